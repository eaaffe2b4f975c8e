"""The training loop of a worker: steps, and between them reports, pictures, validation and checkpoints."""

import math
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import ray.train
import ray.train.torch
import torch
from torch import Tensor

from pipelines.tables.errors import TrainingError, TrainingInputError
from pipelines.train.bad_steps import BadStepGuard
from pipelines.train.desk import StopWatch, watch_for_sigterm
from pipelines.train.engine.checkpoint_places import CHECKPOINTS_DIR
from pipelines.train.engine.checkpoint_store import TO_JUDGE, CheckpointStore
from pipelines.train.engine.checkpoints import BadCheckpointError, CheckpointReader, take_snapshot
from pipelines.train.engine.collective import any_rank, first_problem, gather_objects
from pipelines.train.engine.deepspeed import Engine
from pipelines.train.engine.ema import EMA
from pipelines.train.engine.optim import learning_rate
from pipelines.train.meter import LossHistory, TrainingMeter, step_flops
from pipelines.train.models import TrainModels
from pipelines.train.outputs import TrainOutputs
from pipelines.train.stream.captions import encode_captions, pad_embeds
from pipelines.train.stream.mixture import check_channels
from pipelines.train.stream.noise import draw_noise, fixed_noise
from pipelines.train.stream.prefetch import PrefetchedStream
from pipelines.train.stream.samples import MicroBatch
from pipelines.train.stream.stream import TrainingStream
from pipelines.train.stream.validation import ValidationSet
from pipelines.train.task import TrainTask
from pipelines.train.trained_pipeline import TrainedPipeline
from sana_model.flow import flow_loss
from sana_model.guidance import Caption
from sana_model.nn.transformer import SanaTransformer


def train_worker(task: TrainTask) -> dict[str, Any]:
    """Train as one of Ray Train's workers; Ray Train calls this function in each of them.

    Returns, on rank 0, the figures of `TrainWorker.finish`, and {} on other ranks; or, on all ranks, {"stopped": step} if the
    driver asked the training to end early, or {"error": message, "wrong_input": whether it could not even start} if it failed
    in a way that would only repeat itself.
    """
    watch_for_sigterm()
    try:
        worker = TrainWorker(task, device=ray.train.torch.get_device(), preempted=ray.train.get_preemption_info)
        with closing(worker.outputs):
            worker.restore()
            worker.train()
            return worker.finish()
    except TrainingError as error:
        return {"error": str(error), "wrong_input": isinstance(error, TrainingInputError)}


class TrainWorker:
    """One rank of a training. The process group must exist. Call `restore`, `train` and `finish`, on all ranks alike.

    Args:
        task: what to train.
        device: device to compute on.
        preempted: returns None unless a node of the training is about to be taken back; all ranks call it together.

    Raises TrainingError if models, tables and configuration do not fit together.
    """

    def __init__(self, task: TrainTask, *, device: torch.device, preempted: Callable[[], object | None] = lambda: None):
        self.task = task
        self.config = task.config
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        resources = self.config.resources
        torch.set_num_threads(resources.num_threads or max(math.ceil(resources.num_cpus), 1))
        self.device = device
        self.engine = Engine(
            self._load(),
            self.config.engine,
            self.config.optim,
            micro_batch_size=self.config.micro_batch_size,
            grad_accum_steps=self.config.grad_accum_steps,
            device=self.device,
        )
        self.ema = EMA(self.engine.master_weights(), self.config.ema)
        self.pipeline = TrainedPipeline(self.engine, self.ema, self.models, self.config.lora)
        self.step = 0  # steps done
        self.stopped = False
        self.history = LossHistory()
        self.meter = TrainingMeter(self.device)
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

    def _load(self) -> SanaTransformer:
        """Load the other models and open the tables. Returns the transformer to train."""
        config, dataset_uri = self.config, self.task.dataset_uri
        sizes = {"rank": self.rank, "world_size": self.world_size}
        try:
            transformer, self.models = TrainModels.load(config, device=self.device, rank=self.rank)
            sources, held_out = config.sources(dataset_uri), config.validation_sources(dataset_uri)
            check_channels([*sources, *held_out], self.models.transformer_config.in_channels)
            self.source = TrainingStream(
                sources, config.data, micro_batch_size=config.micro_batch_size, seed=config.seed, **sizes
            )
            self.validation = None
            if held_out:
                self.validation = ValidationSet.read(
                    held_out, config.validation, config.data, batch_size=config.micro_batch_size, **sizes
                )
        except (ValueError, FileNotFoundError) as error:
            self._raise_together(str(error))
            raise
        self._raise_together(None)
        return transformer

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
            reader = self.store.find(self.engine, fallback=self.config.resume_from)
            waiting = self._take_over(reader) if reader is not None else []
            if reader is not None:
                self.source.load_all_states([state["stream"] for state in reader.checkpoint.states])
        except (BadCheckpointError, ValueError) as error:
            raise TrainingError(str(error)) from error
        self.outputs.begin(self.step, waiting, self.store)
        self.stream = PrefetchedStream(self.source, self.config.data.prefetch)

    def _take_over(self, reader: CheckpointReader) -> list[Any]:
        """Load all of a checkpoint but the stream's position. Returns the metrics that had not reached MLflow."""
        reader.load(self.ema)
        reader.close()
        state = reader.checkpoint.states[0]
        self.step, self.metrics = reader.checkpoint.step, dict(state["metrics"])
        self.history.load_state_dict(state["history"])
        self.guard.load_state_dict(state["guard"])
        return state["waiting"]

    def train(self) -> None:
        """Train until the last step, or until the driver asks to stop. Raises TrainingError if bad steps or writes end it."""
        self.meter.start()
        while self.step < self.config.num_steps and not self.stopped:
            if self.train_step():
                self.step += 1
                self.after_step()
        self.stream.close()

    def train_step(self) -> bool:
        """Make one step. Returns False if it was bad and does not count."""
        config = self.config
        lr = learning_rate(self.step, config.num_steps, config.optim)
        for index in range(config.grad_accum_steps):
            batch = next(self.stream)
            caption = self.encode(batch)
            sigma, noise = draw_noise(batch, config.flow, self.models.shift, whole=self.models.whole, seed=config.seed)
            loss = self.flow_loss(batch, caption, sigma, noise)
            last = index == config.grad_accum_steps - 1
            self.engine.backward(self.guard.watch(loss.mean(), share=1 / config.grad_accum_steps, last=last))
            self._count(batch, caption, loss, sigma)
        grad_norm = self.engine.step(lr)
        if self.guard.is_bad(grad_norm, self.meter.step_losses, scaled=config.engine.dtype == "fp16"):
            self.handle_bad_step(grad_norm)
            return False
        self.ema.update(self.engine.master_weights())
        self.meter.end_step(lr=lr, grad_norm=grad_norm)
        return True

    def encode(self, batch: MicroBatch) -> Caption:
        """Return caption_embeds (B, L, D) and caption_mask (B, L) of a micro-batch."""
        if batch.embeds is not None:
            return pad_embeds(batch.embeds, batch.dropped, self.models.null)
        assert self.models.text_encoder is not None
        return encode_captions(self.models.text_encoder, batch.captions, batch.dropped, self.models.null)

    def flow_loss(self, batch: MicroBatch, caption: Caption, sigma: Tensor, noise: Tensor) -> Tensor:
        """Return the loss of each sample, (B,), for encoded captions, noise levels (B,) and noise (B, C, h, w)."""
        latents = batch.latents.to(self.device, torch.float32)
        return flow_loss(self.engine, latents, *caption, sigma=sigma.to(self.device), noise=noise.to(self.device))

    def _count(self, batch: MicroBatch, caption: Caption, loss: Tensor, sigma: Tensor) -> None:
        """Add a micro-batch to the measurements and to the record of samples."""
        batch_size, _, height, width = batch.latents.shape
        model = self.models.transformer_config
        image_tokens = height * width // model.patch_size**2
        sizes = {"batch_size": batch_size, "image_tokens": image_tokens, "caption_tokens": caption[0].shape[1]}
        flops = step_flops(model, **sizes, adapters=self.config.lora is not None)
        self.meter.add(loss, sigma.to(self.device), num_tokens=batch_size * image_tokens, flops=flops)
        self.outputs.add_batch(self.step + 1, batch)

    def handle_bad_step(self, grad_norm: float) -> None:
        """Do what `bad_steps.policy` says. Raises TrainingError if the training should end."""
        policy, losses = self.config.bad_steps.policy, torch.cat(self.meter.step_losses)
        self.meter.drop_step()
        problem = f"the step after step {self.step} was bad: loss {losses.mean():.4g}, norm of the gradients {grad_norm:.3g}"
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
            reader = self.store.find(self.engine)
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
        if self.validation is not None and (last or self.step % config.validation.every == 0):
            self.validate(self.validation)
        if config.grid.prompts and (last or self.step % config.grid.every == 0):
            self.draw_grid()
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

    @torch.no_grad()
    def validate(self, validation: ValidationSet) -> None:
        """Measure the loss on the held-out samples, by noise level and over all, and send it to MLflow."""
        config = self.config.validation
        sums = torch.zeros(len(config.sigmas) + 1, dtype=torch.float64, device=self.device)
        with self.meter.paused(), self.engine.evaluating():
            for batch, weight in ((item.batch, item.weight) for item in validation.batches):
                caption = self.encode(batch)
                for index, level in enumerate(config.sigmas):
                    sigma = torch.full((len(batch.ids),), level)
                    loss = self.flow_loss(batch, caption, sigma, fixed_noise(batch, level, seed=config.seed))
                    sums[index] += weight * loss.sum()
                sums[-1] += weight * len(batch.ids)
            torch.distributed.all_reduce(sums)
        means = (sums[:-1] / sums[-1]).tolist()
        self.metrics["validation_loss"] = sum(means) / len(means)
        by_sigma = {f"validation_loss_sigma.{level:g}": mean for level, mean in zip(config.sigmas, means, strict=True)}
        self.outputs.log_metrics(self.step, {"validation_loss": self.metrics["validation_loss"], **by_sigma})

    def draw_grid(self) -> None:
        """Draw the grid's prompts with the average weights; write the pictures as a PNG file and send them to MLflow."""
        with self.meter.paused():
            picture = self.pipeline.draw(self.config.grid, say=self.outputs.say)
            if picture is not None:
                self.outputs.show_picture(self.step, picture)

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
            }
            self.outputs.flush_batches(self.step)
            if problem := first_problem(self.store.given_up()):
                raise TrainingError(f"checkpoints cannot be written: {problem}; once they can, run it again to resume")
            self.outputs.log_checkpoint(self.store.last_written)
            snapshot = take_snapshot(self.engine, self.ema, state, step=self.step)
            self.store.write(snapshot, then=self.outputs.judging(snapshot, time.monotonic() - start) if to_judge else None)

    def finish(self) -> dict[str, Any]:
        """Wait for the last checkpoint and write the final pipeline.

        Returns, on rank 0, checkpoint (URI), loss_start, loss_end, losses, samples_per_second and started_at (`time.time()` of
        the first step), and {} on other ranks; {"stopped": step} on all ranks, and no pipeline, if the training was stopped.

        Raises TrainingError if the last checkpoint could not be written.
        """
        if problem := first_problem(self.store.wait()):
            raise TrainingError(
                f"the last checkpoint could not be written: {problem}; run it again to resume from the one before"
            )
        self.outputs.log_checkpoint(self.store.last_written)
        if self.stopped:
            return {"stopped": self.step}
        self.pipeline.write(self.task.output_uri)
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
        }
