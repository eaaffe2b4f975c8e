"""The desk: a small Ray actor through which the driver of a training and its workers tell each other things.

Workers leave progress, notices and checkpoints to judge there for the driver; the driver leaves its wish to stop for them. The
actor runs on the driver's node, so it survives when the node of a worker is lost.
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
"""Pause between two looks of the driver at the desk."""
STOPPING = (signal.SIGTERM, signal.SIGINT)
"""Signals that end a training of this process with a checkpoint: of `ray job stop`, and Ctrl-C."""


@dataclass(frozen=True, kw_only=True)
class TrainProgress:
    """Progress of a training: `step` of `num_steps` steps are done.

    loss, samples_per_second: means since the last report.
    data_wait_share: share of the time since the last report in which the training waited for samples.
    seconds_left: estimate, from the speed since the last report.
    checkpoint_time: `time.time()` of the last checkpoint, or of the start if there is none.
    """

    step: int
    num_steps: int
    loss: float
    samples_per_second: float
    data_wait_share: float
    seconds_left: float
    checkpoint_time: float


@dataclass(frozen=True)
class ToJudge:
    """A whole checkpoint that the workers ask the driver to judge. `held_seconds`: how long it held the slowest of them."""

    step: int
    held_seconds: float


OnTrainProgress = Callable[[TrainProgress], None]
OnNotice = Callable[[str], None]
OnLook = Callable[[list[ToJudge]], None]
"""Called every POLL_SECONDS, with the checkpoints that the workers ask to be judged since the last call."""


class Desk:
    """The actor's class. Workers call `show`, `say`, `add_part` and `stop_reason`; the driver `look` and `ask_to_stop`."""

    def __init__(self) -> None:
        self._progress: TrainProgress | None = None
        self._notices: list[str] = []
        self._parts: dict[int, dict[int, float]] = {}
        self._to_judge: list[ToJudge] = []
        self._stop: str | None = None

    def show(self, progress: TrainProgress) -> None:
        """Replace the progress that the driver sees."""
        self._progress = progress

    def say(self, notice: str) -> None:
        """Add a notice, a message for a person."""
        self._notices.append(notice)

    def add_part(self, step: int, rank: int, num_parts: int, held_seconds: float) -> None:
        """Note that a rank's part of a checkpoint that is to be judged is written; with all parts, it is asked for."""
        parts = self._parts.setdefault(step, {})
        parts[rank] = held_seconds
        if len(parts) == num_parts:
            self._to_judge.append(ToJudge(step, max(self._parts.pop(step).values())))

    def look(self, num_heard: int) -> tuple[TrainProgress | None, list[str], list[ToJudge]]:
        """Return the last progress, the notices after the first `num_heard`, and what is to be judged since the last look."""
        to_judge, self._to_judge = self._to_judge, []
        return self._progress, self._notices[num_heard:], to_judge

    def ask_to_stop(self, reason: str) -> None:
        """Ask the workers to save a checkpoint and end."""
        self._stop = reason

    def stop_reason(self) -> str | None:
        """Return why the workers should end; None if they should not."""
        return self._stop


@contextmanager
def open_desk(
    on_progress: OnTrainProgress, on_notice: OnNotice, *, on_stop: Callable[[], None], on_look: OnLook = lambda to_judge: None
) -> Iterator[Any]:
    """Start the desk and yield the actor's handle. Within, SIGTERM and Ctrl-C make the workers save a checkpoint and end.

    A second Ctrl-C does not wait for them: it raises KeyboardInterrupt.

    Args:
        on_progress: called with each new progress.
        on_notice: called with each new notice.
        on_stop: called soon after such a signal, since `ray job stop` may kill this process before the workers have ended.
        on_look: called with each look at the desk.

    All four are called from one other thread.
    """
    desk: Any = ray.remote(Desk).options(num_cpus=0, scheduling_strategy=on_this_node()).remote()
    ended, stopping = threading.Event(), threading.Event()

    def watch() -> None:
        shown, num_heard, last_look, told_of_stop = None, 0, False, False
        while not last_look:
            last_look = ended.wait(POLL_SECONDS)
            if stopping.is_set() and not told_of_stop:
                told_of_stop = True
                on_notice("stops: the workers save a checkpoint first")
                on_stop()
            progress, notices, to_judge = ray.get(desk.look.remote(num_heard))
            num_heard += len(notices)
            for notice in notices:
                on_notice(notice)
            if progress is not None and progress != shown:
                shown = progress
                on_progress(progress)
            on_look(to_judge)

    def ask_to_stop(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and stopping.is_set():
            raise KeyboardInterrupt
        stopping.set()
        desk.ask_to_stop.remote(f"{signal.Signals(signum).name} came")

    thread = threading.Thread(target=watch, name="training-progress", daemon=True)
    thread.start()
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = {one: signal.signal(one, ask_to_stop) for one in STOPPING} if in_main_thread else {}
    try:
        yield desk
    finally:
        for one, handler in previous.items():
            signal.signal(one, handler)
        ended.set()
        thread.join()
        ray.kill(desk)


_terminated = threading.Event()


def watch_for_sigterm() -> None:
    """Let this worker take SIGTERM as a warning instead of ending. A node that is taken back gets one, for example.

    Ray runs the training in a thread of the worker's actor, but only the main thread can set a signal handler, so a method call
    of the actor does it.
    """
    actor = ray.get_runtime_context().current_actor
    ray.get(actor.execute.remote(_hear_sigterm))


def _hear_sigterm() -> None:
    signal.signal(signal.SIGTERM, lambda signum, frame: _terminated.set())


class StopWatch:
    """Tells a worker whether it should stop, or will be killed soon, without waiting for an answer of the desk.

    Args:
        desk: handle of the desk on the one worker that asks it; None on the others.
        preempted: asks Ray whether a node is about to be taken back; returns None if not. All workers call it together.
    """

    def __init__(self, desk: Any | None, preempted: Callable[[], object | None]):
        self._preempted = preempted
        self._desk = desk
        self._answer = desk.stop_reason.remote() if desk is not None else None
        self._saved_on_notice = False

    def asked_to_stop(self) -> bool:
        """Return whether the driver has asked the training to save and end, as far as the desk has answered."""
        if self._desk is None or self._answer is None:
            return False
        answered, _ = ray.wait([self._answer], timeout=0)
        if not answered:
            return False
        reason = ray.get(self._answer)
        self._answer = self._desk.stop_reason.remote()
        return reason is not None

    def noticed(self, *, ask_ray: bool) -> bool:
        """Return True once, after this worker was warned that it will be killed soon.

        Args:
            ask_ray: ask Ray too whether a node is about to be taken back; all workers must do so together.
        """
        if ask_ray and self._preempted() is not None:
            _terminated.set()
        if self._saved_on_notice or not _terminated.is_set():
            return False
        self._saved_on_notice = True
        return True
