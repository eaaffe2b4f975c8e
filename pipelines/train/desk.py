"""Between the driver of a training and its workers: how far it is, what there is to say, and the wish to stop.

It is a small actor beside the driver, so that it works on any cluster and outlives workers whose node is lost.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import ray

from pipelines.stages.placement import on_this_node

POLL_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class TrainProgress:
    """How far a training is: `step` of `num_steps` are done. The figures are those since the last report.

    data_wait_share: of the time, in which the training waited for samples. checkpoint_time: time.time() of the last checkpoint,
    or of the start.
    """

    step: int
    num_steps: int
    loss: float
    samples_per_second: float
    data_wait_share: float
    seconds_left: float
    checkpoint_time: float


OnTrainProgress = Callable[[TrainProgress], None]
OnNotice = Callable[[str], None]


class Desk:
    """The actor. Its methods are called from driver and workers."""

    def __init__(self) -> None:
        self._progress: TrainProgress | None = None
        self._notices: list[str] = []
        self._stop: str | None = None

    def show(self, progress: TrainProgress) -> None:
        self._progress = progress

    def say(self, notice: str) -> None:
        self._notices.append(notice)

    def look(self, num_heard: int) -> tuple[TrainProgress | None, list[str]]:
        """The last progress, and the notices after the first `num_heard`."""
        return self._progress, self._notices[num_heard:]

    def ask_to_stop(self, reason: str) -> None:
        self._stop = reason

    def stop_reason(self) -> str | None:
        return self._stop


@contextmanager
def open_desk(on_progress: OnTrainProgress, on_notice: OnNotice, *, on_stop: Callable[[], None]) -> Iterator[Any]:
    """The actor's handle. Within, a thread calls back with what is new, and SIGTERM asks the workers to save and end.

    `on_stop`: called by the same thread soon after SIGTERM: `ray job stop` may kill this process before the workers have ended.
    """
    desk: Any = ray.remote(Desk).options(num_cpus=0, scheduling_strategy=on_this_node()).remote()
    ended, stopping = threading.Event(), threading.Event()

    def watch() -> None:
        shown, num_heard, last_look, told_of_stop = None, 0, False, False
        while not last_look:
            last_look = ended.wait(POLL_SECONDS)
            if stopping.is_set() and not told_of_stop:
                told_of_stop = True
                on_stop()
            progress, notices = ray.get(desk.look.remote(num_heard))
            num_heard += len(notices)
            for notice in notices:
                on_notice(notice)
            if progress is not None and progress != shown:
                shown = progress
                on_progress(progress)

    def ask_to_stop(signum: int, frame: FrameType | None) -> None:
        stopping.set()
        desk.ask_to_stop.remote("SIGTERM came")

    thread = threading.Thread(target=watch, name="training-progress", daemon=True)
    thread.start()
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, ask_to_stop) if in_main_thread else None
    try:
        yield desk
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, previous)
        ended.set()
        thread.join()
        ray.kill(desk)


_terminated = threading.Event()


def watch_for_sigterm() -> None:
    """Let SIGTERM to this worker, such as of a node that is taken back, be a notice in place of its end.

    Ray runs the training in a thread, and Python hears signals in the main thread alone: the actor itself has to set it.
    """
    actor = ray.get_runtime_context().current_actor
    ray.get(actor.execute.remote(_hear_sigterm))


def _hear_sigterm() -> None:
    signal.signal(signal.SIGTERM, lambda signum, frame: _terminated.set())


class StopWatch:
    """What a worker knows of a coming end, without waiting for anybody.

    Args:
        desk: asked on one worker; None on the others.
        preempted: asks Ray, on all workers together, whether a node is about to be taken back: None if not.
    """

    def __init__(self, desk: Any | None, preempted: Callable[[], object | None]):
        self._preempted = preempted
        self._desk = desk
        self._answer = desk.stop_reason.remote() if desk is not None else None
        self._saved_on_notice = False

    def asked_to_stop(self) -> bool:
        """Whether the driver wants the training to save and end."""
        if self._desk is None or self._answer is None:
            return False
        answered, _ = ray.wait([self._answer], timeout=0)
        if not answered:
            return False
        reason = ray.get(self._answer)
        self._answer = self._desk.stop_reason.remote()
        return reason is not None

    def noticed(self, *, ask_ray: bool) -> bool:
        """Whether this worker has been told, and this is the first time it says so, that it will be killed soon."""
        if ask_ray and self._preempted() is not None:
            _terminated.set()
        if self._saved_on_notice or not _terminated.is_set():
            return False
        self._saved_on_notice = True
        return True
