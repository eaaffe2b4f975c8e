"""Judging the checkpoints of a training by their pictures, in Ray tasks beside it: the driver starts them and keeps the best.

A checkpoint is judged when all its parts are written: the steps are held for the copy of the weights that every checkpoint
takes, and for nothing else. One task runs at a time. What it is to do is given by the caller: this room draws no pictures.
"""

import math
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError

from pipelines.storage.errors import StorageError
from pipelines.tracking.patient_run import PatientRun
from pipelines.tracking.runs import RunRequest
from pipelines.tracking.unsent import Entry
from pipelines.train.config import TrainConfig
from pipelines.train.engine.checkpoint_places import CHECKPOINTS_DIR, checkpoint_uri, list_checkpoints
from pipelines.train.engine.judgements import (
    SKIPPED,
    BestConfig,
    Judgement,
    choose_best,
    read_best,
    read_judgements,
    write_best,
    write_judgements,
)
from pipelines.train.loop.config import WorkerResources
from pipelines.train.loop.desk import OnNotice, ToJudge
from pipelines.train.loop.record import BEST_DIR

POLL_SECONDS = 0.2
"""Pause between two looks at a task at the end of the training."""


@dataclass(frozen=True, kw_only=True)
class Judging:
    """How the checkpoints of a training are judged.

    Args:
        judge: called in a Ray task with the training's configuration, and the step and the URI of a checkpoint; returns a
            judgement that lacks `where`.
        every: steps between two checkpoints that are judged; the last step's is judged too.
        resources: what Ray reserves for the task, beside the training's workers.
        best: which checkpoint is kept as the best; None: none.
        wait_seconds: at the end of the training, the longest wait for judgements.
    """

    judge: Callable[[TrainConfig, int, str], Judgement]
    every: int
    resources: WorkerResources
    best: BestConfig | None
    wait_seconds: float


@dataclass
class CheckpointJudge:
    """The driver's part: call `poll` again and again during the training, `finish` after it, or `abandon` if it failed.

    What MLflow gets goes to the training's run by `PatientRun`, which waits for no server. What earlier starts judged is sent
    again; MLflow keeps each step once.

    Args:
        judging: how checkpoints are judged; None: no more of them are.
        config: the training.
        output_uri: its output folder.
        say: called with messages for a person.

    Raises ValueError if the file of judgements is damaged; StorageError.
    """

    judging: Judging | None
    config: TrainConfig
    output_uri: str
    say: OnNotice
    _queue: list[ToJudge] = field(default_factory=list)
    _running: tuple[ToJudge, Any] | None = None
    _run: PatientRun | None = None

    def __post_init__(self) -> None:
        self.root_uri = f"{self.output_uri}/{CHECKPOINTS_DIR}"
        self.judgements = read_judgements(self.root_uri)
        self.best = read_best(self.root_uri)

    def begin(self, run_request: RunRequest | None) -> None:
        """Log to this MLflow run from now on, first what earlier starts judged. None: no MLflow."""
        if run_request is not None and (self.judging is not None or self.judgements):
            entries = [Entry("metrics", _metrics(one), step) for step, one in sorted(self.judgements.items())]
            self._run = PatientRun(run_request, say=self.say, waiting=entries, monitors=False)

    def poll(self, asked: Sequence[ToJudge]) -> None:
        """Take note of a judgement that has ended, and start the next one, without waiting for anything.

        While a task runs, further checkpoints are skipped, and told; only the last one of the training waits for its turn.

        Args:
            asked: checkpoints to judge that are new, or known.
        """
        for one in asked:
            waiting = [*self._queue, *([self._running[0]] if self._running is not None else [])]
            if one.step not in {*self.judgements, *(other.step for other in waiting)}:
                self._queue.append(one)
        if self._running is not None and ray.wait([self._running[1]], timeout=0)[0]:
            self._end(*self._running)
        while self._queue and (self._running is None or self._queue[0].step < self.config.num_steps):
            one = self._queue.pop(0)
            if self._running is None:
                self._running = (one, self._start(one.step))
            else:
                why = f"the judgement of step {self._running[0].step} has not ended (it reserves {self._reserved})"
                self._add(Judgement(step=one.step, problems={SKIPPED: why}, held_seconds=one.held_seconds))

    def _start(self, step: int) -> Any:
        assert self.judging is not None, "no worker asks for a judgement"
        resources = self.judging.resources
        options = {"num_cpus": resources.num_cpus, "num_gpus": resources.num_gpus, "resources": resources.custom or None}
        task = ray.remote(_judge).options(name=f"judge step {step}", max_retries=1, **options)
        return task.remote(partial(self.judging.judge, self.config, step, checkpoint_uri(self.root_uri, step)))

    def _end(self, one: ToJudge, task: Any) -> None:
        self._running = None
        try:
            judged: Judgement = ray.get(task)
        except RayError as error:
            judged = Judgement(step=one.step, problems={"task": _last_line(error)})
        self._add(replace(judged, held_seconds=one.held_seconds))

    def _add(self, judgement: Judgement) -> None:
        """Choose the best checkpoint anew, write a judgement down, and tell it."""
        self.judgements[judgement.step] = judgement
        told = describe_judgement(judgement)
        try:
            told += self._choose_best()  # first: what is judged and not the best may be removed
            write_judgements(self.root_uri, self.judgements.values())
        except StorageError as error:
            told += f"; it cannot be written down: {error}"
        self.say(told)
        if self._run is not None:
            self._run.log_metrics(_metrics(judgement), judgement.step)
            self._run.set_tags({f"judgement.{judgement.step:06d}": told})

    def _choose_best(self) -> str:
        """Let the pointer name the best of the judged checkpoints that are there. Returns what to say. Raises StorageError."""
        config = self.judging.best if self.judging is not None else None
        there = set(list_checkpoints(self.root_uri)) if config is not None else set()
        judged = [one for step, one in self.judgements.items() if checkpoint_uri(self.root_uri, step) in there]
        best = choose_best(judged, config) if config is not None else None
        if best is None:
            known = {name for one in judged for name in one.figures}
            return f"; validation.best.figure is none of {', '.join(sorted(known))}" if known else ""
        if best == self.best:
            return ""
        write_best(self.root_uri, best)
        self.best = best
        return "; it is the best so far"

    def finish(self) -> list[Entry]:
        """Wait for the judgements that are to come, for `wait_seconds` at most, and write the best checkpoint's pipeline.

        Returns entries that MLflow has not got.
        """
        wait_seconds = self.judging.wait_seconds if self.judging is not None else 0.0
        deadline = time.monotonic() + wait_seconds
        self.poll([])
        if self._running is not None:
            steps = ", ".join(str(one.step) for one in (self._running[0], *self._queue))
            self.say(f"the training has ended; judgements are awaited for {wait_seconds:g} s at most: step {steps}")
        while self._running is not None and time.monotonic() < deadline:
            ray.wait([self._running[1]], timeout=POLL_SECONDS)
            self.poll([])
        late = [*([self._running[0]] if self._running else []), *self._queue]
        self._cancel()
        for one in late:
            why = f"it has not ended {wait_seconds:g} s after the training (it reserves {self._reserved})"
            self._add(Judgement(step=one.step, problems={SKIPPED: why}, held_seconds=one.held_seconds))
        unsent = self._run.close() if self._run is not None else []
        self.write_best_pipeline()
        return unsent

    def write_best_pipeline(self) -> None:
        """Write the pipeline of the best checkpoint, if there is one, into BEST_DIR of the output folder, by a Ray task."""
        if self.best is None:
            return
        target = f"{self.output_uri}/{BEST_DIR}"
        task = ray.remote(_write_pipeline).options(name="write the best pipeline", num_cpus=1, max_retries=1)
        try:
            ray.get(task.remote(self.config, checkpoint_uri(self.root_uri, self.best.step), target))
        except RayError as error:
            self.say(f"the best checkpoint's pipeline, step {self.best.step}, is not written to {target}: {_last_line(error)}")

    def abandon(self) -> None:
        """End a judgement that runs. The next start judges the checkpoint, and sends again what MLflow has not got."""
        self._cancel()
        if self._run is not None:
            self._run.close()

    def _cancel(self) -> None:
        if self._running is not None:
            ray.cancel(self._running[1], force=True)
        self._running, self._queue = None, []

    @property
    def _reserved(self) -> str:
        assert self.judging is not None
        resources = self.judging.resources
        amounts = {"CPU": resources.num_cpus, "GPU": resources.num_gpus, **resources.custom}
        return ", ".join(f"{amount:g} {name}" for name, amount in amounts.items() if amount) or "nothing"


def _judge(judge: Callable[[], Judgement]) -> Judgement:
    """The Ray task."""
    start = time.monotonic()
    judgement = judge()
    devices = ", ".join(f"GPU {number}" for number in ray.get_gpu_ids()) or "CPU"
    infinite = {name: f"it is {value}" for name, value in judgement.figures.items() if not math.isfinite(value)}
    return replace(
        judgement,
        figures={name: value for name, value in judgement.figures.items() if name not in infinite},
        problems={**judgement.problems, **infinite},
        seconds={**judgement.seconds, "total": time.monotonic() - start},
        where=f"{socket.gethostname()} ({ray.util.get_node_ip_address()}), {devices}",
    )


def _last_line(error: RayError) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _write_pipeline(config: TrainConfig, uri: str, target_uri: str) -> None:
    from pipelines.train.checkpoint_pipeline import write_checkpoint_pipeline  # loads what a driver does without

    write_checkpoint_pipeline(config, uri, target_uri)


def _metrics(judgement: Judgement) -> Mapping[str, float]:
    """What MLflow is told of a judgement, at its step."""
    costs = {"judgement_seconds": judgement.seconds["total"]} if "total" in judgement.seconds else {}
    return {**judgement.figures, **costs, "judgement_held_seconds": judgement.held_seconds}


def describe_judgement(judgement: Judgement) -> str:
    """A line for people: the figures, what they cost and where, and what could not be judged."""
    figures = ", ".join(f"{name} {value:.4g}" for name, value in judgement.figures.items())
    costs = f"{judgement.seconds['total']:.1f} s on {judgement.where}; " if "total" in judgement.seconds else ""
    problems = "; ".join(f"not judged by {name}: {problem}" for name, problem in judgement.problems.items())
    if SKIPPED in judgement.problems:
        problems = f"not judged: {judgement.problems[SKIPPED]}"
    told = "; ".join(part for part in (figures, problems) if part)
    return f"step {judgement.step}: {told} ({costs}the steps were held {judgement.held_seconds:.2f} s)"
