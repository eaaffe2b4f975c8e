"""The loop of a training in a worker: steps, and between them reports, pictures, validation and checkpoints."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any, Generic, TypeVar

import ray.train
import ray.train.torch
import torch
from torch import Tensor

from pipelines.tables.errors import TrainingError, TrainingInputError
from pipelines.train.engine.checkpoint_places import CHECKPOINTS_DIR
from pipelines.train.engine.checkpoint_reader import CheckpointReader
from pipelines.train.engine.checkpoint_store import TO_JUDGE, CheckpointStore
from pipelines.train.engine.checkpoints import BadCheckpointError, take_snapshot
from pipelines.train.engine.collective import any_rank, first_problem, gather_objects
from pipelines.train.engine.deepspeed import Engine
from pipelines.train.engine.ema import EMA
from pipelines.train.engine.optim import learning_rate
from pipelines.train.loop.bad_steps import BadStepGuard
from pipelines.train.loop.config import LoopConfig
from pipelines.train.loop.desk import StopWatch, watch_for_sigterm
from pipelines.train.loop.meter import LossHistory, StepMeter
from pipelines.train.loop.outputs import TrainOutputs
from pipelines.train.loop.task import TrainTask
from pipelines.train.stream.prefetch import PrefetchedStream, SampleStream

Config = TypeVar("Config", bound=LoopConfig)
Loaded = TypeVar("Loaded")


class TrainingLoop(ABC, Generic[Config]):
    """One rank of a training. The process group must exist. Call `restore`, `train` and `finish`, on all ranks alike.

    A subclass sets `source`, `engine`, `ema` and `meter` when it is made, and says what the loss is.

    Args:
        task: what to train.
        device: device to compute on.
        preempted: returns None unless a node of the training is about to be taken back; all ranks call it together.

    Raises TrainingError if models, tables and configuration do not fit together.
    """

    source: SampleStream[Any]
    engine: Engine
    ema: EMA
    meter: StepMeter
    stream: PrefetchedStream[Any]

    def __init__(self, task: TrainTask[Config], *, device: torch.device, preempted: Callable[[], object | None] = lambda: None):
        self.task = task
        self.config = task.config
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        resources = self.config.resources
        torch.set_num_threads(resources.num_threads or max(math.ceil(resources.num_cpus), 1))
        self.device = device
        self.companions: dict[str, Engine] = {}
        """The engines of further models that are trained, by name."""
        self.step = 0  # steps done
        self.stopped = False
        self.history = LossHistory()
        self.guard = BadStepGuard(self.config.bad_steps, self.device)
        self.metrics: dict[str, float] = {}  # the last "loss" and "validation_loss", for `keep_best`
        self.outputs = TrainOutputs(task, self.rank)
        self.stop_watch = StopWatch(task.desk if self.rank == 0 else None, preempted)
        self.store = CheckpointStore(
            f"{task.output_uri}/{CHECKPOINTS_DIR}",
            keep_last=self.config.keep_checkpoints,
            keep_every=self.config.keep_every,
            keep_best=self.config.keep_best,
            judged=task.judge_every is not None,
            say=self.outputs.tell_driver,
        )

    @abstractmethod
    def losses_of(self, batch: Any) -> Tensor:
        """Return the loss of each sample of a micro-batch, (B,), and count what it measures.

        Companions that learn in this step get their gradients of the micro-batch here.
        """

    def broken_companion(self) -> str | None:
        """Return the name of a companion whose gradients of this step are not finite. The same on all ranks."""
        return None

    def step_companions(self, *, bad: bool) -> None:
        """Update the companions that learn in this step, or leave them as they are if it was bad."""

    @abstractmethod
    def between_steps(self, *, last: bool) -> None:
        """Validate and draw, if either is due after this step. `last`: it is the last step of the training."""

    @abstractmethod
    def write_result(self) -> dict[str, Any]:
        """Write what was trained into the output folder. Returns further figures on rank 0. Raises StorageError."""

    def look_at(self, metrics: Mapping[str, float]) -> None:
        """Look at the metrics of a report, which all ranks have alike."""

    def more_state(self) -> dict[str, Any]:
        """Return further state for the checkpoint, which JSON can hold."""
        return {}

    def load_more_state(self, state: Mapping[str, Any]) -> None:
        """Take the state of a checkpoint, which holds what `more_state` returned."""

    def load_together(self, load: Callable[[], Loaded]) -> Loaded:
        """Call `load` on all ranks; if it finds models, tables or settings wrong on any, all ranks raise. Collective call."""
        try:
            loaded = load()
        except (ValueError, FileNotFoundError) as error:
            self._raise_together(str(error))
            raise
        self._raise_together(None)
        return loaded

    def _raise_together(self, problem: str | None) -> None:
        """Raise on all ranks if any rank has a problem. Collective call.

        If all ranks have one, another try would fail too: TrainingInputError. If only some have one, such as a node that did
        not reach the hub: RuntimeError, after which Ray starts all workers again.
        """
        problems = [one for one in gather_objects(problem) if one is not None]
        if problems:
            kind = TrainingInputError if len(problems) == self.world_size else RuntimeError
            raise kind(problem or problems[0])

    def restore(self) -> None:
        """Resume from the last good checkpoint, if there is one, and start to read samples.

        Raises TrainingError if there are checkpoints, but none can be read.
        """
        try:
            reader = self.store.find(self.engine, companions=self.companions, fallback=self.config.resume_from)
            waiting = self._take_over(reader) if reader is not None else []
            if reader is not None:
                self.source.load_all_states([state["stream"] for state in reader.checkpoint.states])
        except (BadCheckpointError, ValueError) as error:
            raise TrainingError(str(error)) from error
        self.outputs.begin(self.step, waiting, self.store)
        self.stream = PrefetchedStream(self.source, self.source.prefetch)

    def _take_over(self, reader: CheckpointReader) -> list[Any]:
        """Load all of a checkpoint but the stream's position. Returns the metrics that had not reached MLflow."""
        reader.load(self.ema)
        reader.close()
        state = reader.checkpoint.states[0]
        self.step, self.metrics = reader.checkpoint.step, dict(state["metrics"])
        self.history.load_state_dict(state["history"])
        self.guard.load_state_dict(state["guard"])
        self.load_more_state(state)
        return state["waiting"]

    def train(self) -> None:
        """Train until the last step, or until the driver asks to stop. Raises TrainingError if bad steps or writes end it."""
        self.meter.start()
        with closing(self.stream):
            while self.step < self.config.num_steps and not self.stopped:
                if self.train_step():
                    self.step += 1
                    self.after_step()

    def train_step(self) -> bool:
        """Make one step. Returns False if it was bad: then nothing was updated, and it does not count."""
        config, lr = self.config, self.lr
        broken = None
        for index in range(config.grad_accum_steps):
            loss = self.losses_of(next(self.stream)).mean()
            last = index == config.grad_accum_steps - 1
            loss = self.guard.watch(loss, share=1 / config.grad_accum_steps, last=last)
            if last and (broken := self.broken_companion()) is not None:
                loss = loss * float("nan")  # one verdict for all models: nor are the engine's gradients applied
            self.engine.backward(loss)
        grad_norm = self.engine.step(lr)
        scaled = config.engine.dtype == "fp16" and broken is None
        bad = self.guard.is_bad(grad_norm, self.meter.step_losses, scaled=scaled)
        self.step_companions(bad=bad)
        if bad:
            self.handle_bad_step(grad_norm, whose="gradients" if broken is None else f"{broken}'s gradients")
            return False
        self.ema.update(self.engine.master_weights())
        self.meter.end_step(lr=lr, grad_norm=grad_norm)
        return True

    @property
    def lr(self) -> float:
        """Learning rate of the current step."""
        return learning_rate(self.step, self.config.num_steps, self.config.optim)

    def handle_bad_step(self, grad_norm: float, *, whose: str) -> None:
        """Do what `bad_steps.policy` says. Raises TrainingError if the training should end. `whose`: the norm's name."""
        policy, losses = self.config.bad_steps.policy, torch.cat(self.meter.step_losses)
        self.meter.drop_step()
        problem = f"the step after step {self.step} was bad: loss {losses.mean():.4g}, norm of the {whose} {grad_norm:.3g}"
        if policy == "stop" or self.guard.num_in_a_row >= self.config.bad_steps.max_in_a_row:
            self.outputs.say(problem)
            raise TrainingError(
                f"{problem}: lower optim.lr={self.config.optim.lr:g}, raise optim.warmup_steps, or look for samples that are "
                "not finite; bad_steps.policy=skip or roll_back goes on without them"
            )
        if policy == "roll_back":
            self.roll_back(problem)
        else:
            self.outputs.say(f"{problem}; it is passed over")

    def roll_back(self, problem: str) -> None:
        """Return to weights, optimizer and average of the last checkpoint, but continue with the next samples.

        `problem`: the message that says why. Raises TrainingError if there is no checkpoint to return to.
        """
        num_bad, num_in_a_row = self.guard.num_bad, self.guard.num_in_a_row
        first_problem(self.store.wait())  # waits for the writes of all ranks, whether or not they succeed
        try:
            reader = self.store.find(self.engine, companions=self.companions)
        except BadCheckpointError as error:
            raise TrainingError(f"{problem}; it cannot be rolled back: {error}") from error
        if reader is None:
            raise TrainingError(
                f"{problem}; it cannot be rolled back: there is no checkpoint yet. Lower optim.lr={self.config.optim.lr:g}, "
                f"raise optim.warmup_steps, or lower checkpoint_every={self.config.checkpoint_every}"
            )
        self.outputs.forget_after(reader.checkpoint.step)
        self._take_over(reader)
        self.guard.num_bad, self.guard.num_in_a_row = num_bad, num_in_a_row
        self.meter.restart(self.stream.wait_seconds)
        self.outputs.say(f"{problem}; back at step {self.step}, with the next samples")

    def after_step(self) -> None:
        """Report, validate, draw and save, each if it is due after this step."""
        config = self.config
        last = self.step == config.num_steps
        reports = last or self.step % config.log_every == 0
        if reports:
            self.log()
        self.between_steps(last=last)
        watch = self.stop_watch
        self.stopped, noticed = any_rank(watch.asked_to_stop(), watch.noticed(ask_ray=reports), device=self.device)
        to_judge = self.task.judge_every is not None and (last or self.step % self.task.judge_every == 0)
        if last or self.stopped or noticed or to_judge or self.step % config.checkpoint_every == 0:
            self.save(to_judge=to_judge)

    def log(self) -> None:
        """Report losses and speed since the last report, over all ranks, to MLflow and to the driver."""
        report = self.meter.collect(self.stream.wait_seconds, self.config.global_batch_size)
        self.outputs.flush_batches(self.step)
        if report is None:
            return
        self.history.add(self.step, report.losses)
        self.metrics["loss"] = report.mean_loss
        more = {"epoch": self.stream.state_dict()["epoch"], "ema_decay": self.ema.decay, "bad_steps": self.guard.num_bad}
        self.outputs.report(self.step, report, more, checkpoint_time=self.store.written_at)
        self.look_at(report.metrics)

    def save(self, *, to_judge: bool = False) -> None:
        """Start to write a checkpoint in the background. Raises TrainingError if several in a row could not be written."""
        with self.meter.paused():
            start = time.monotonic()
            state = {
                "stream": self.stream.state_dict(),
                "history": self.history.state_dict(),
                "guard": self.guard.state_dict(),
                "metrics": self.metrics,
                "waiting": self.outputs.waiting(),
                TO_JUDGE: to_judge,
                **self.more_state(),
            }
            self.outputs.flush_batches(self.step)
            if problem := first_problem(self.store.given_up()):
                raise TrainingError(f"checkpoints cannot be written: {problem}; once they can, run it again to resume")
            self.outputs.log_checkpoint(self.store.last_written)
            companions = {name: take_snapshot(engine, None, {}, step=self.step) for name, engine in self.companions.items()}
            snapshot = take_snapshot(self.engine, self.ema, state, step=self.step, companions=companions)
            self.store.write(snapshot, then=self.outputs.judging(snapshot, time.monotonic() - start) if to_judge else None)

    def finish(self) -> dict[str, Any]:
        """Wait for the last checkpoint and write the result.

        Returns, on rank 0, checkpoint (URI), loss_start, loss_end, losses, samples_per_second, started_at (`time.time()` of
        the first step) and the figures of `write_result`, and {} on other ranks; {"stopped": step} on all ranks, and no
        result, if the training was stopped.

        Raises TrainingError if the last checkpoint could not be written.
        """
        if problem := first_problem(self.store.wait()):
            raise TrainingError(
                f"the last checkpoint could not be written: {problem}; run it again to resume from the one before"
            )
        if self.rank == 0:
            self.store.prune()
        self.outputs.log_checkpoint(self.store.last_written)
        if self.stopped:
            return {"stopped": self.step}
        figures = self.write_result()
        if self.rank:
            return {}
        loss_start, loss_end = self.history.ends()
        return {
            "checkpoint": self.store.uri(self.step),
            "loss_start": loss_start,
            "loss_end": loss_end,
            "losses": self.history.points,
            "samples_per_second": self.meter.num_samples / self.meter.seconds if self.meter.seconds else 0.0,
            "started_at": self.meter.started_at,
            **figures,
        }


def train_as_worker(loop_class: type[TrainingLoop[Config]], task: TrainTask[Config]) -> dict[str, Any]:
    """Train as one of Ray Train's workers.

    Returns, on rank 0, the figures of `TrainingLoop.finish`, and {} on other ranks; or, on all ranks, {"stopped": step} if the
    driver asked the training to end early, or {"error": message, "wrong_input": whether it could not even start} if it failed
    in a way that would only repeat itself.
    """
    watch_for_sigterm()
    try:
        loop = loop_class(task, device=ray.train.torch.get_device(), preempted=ray.train.get_preemption_info)
        with closing(loop.outputs):
            loop.restore()
            loop.train()
            return loop.finish()
    except TrainingError as error:
        return {"error": str(error), "wrong_input": isinstance(error, TrainingInputError)}
