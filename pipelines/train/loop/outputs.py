"""Outputs of a training while it runs: progress and notices to the driver, metrics and pictures to MLflow, and files.

The files in the output folder are grids of pictures and, with `record_samples`, the record of which samples each step used.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from PIL import Image

from pipelines.storage.errors import StorageError
from pipelines.storage.files import list_folder, read_file, remove_file, write_file
from pipelines.tracking.patient_run import PatientRun
from pipelines.tracking.unsent import Entry, read_unsent, write_unsent
from pipelines.train.engine.checkpoint_store import CheckpointStore
from pipelines.train.engine.checkpoints import Snapshot
from pipelines.train.loop.config import LoopConfig
from pipelines.train.loop.desk import TrainProgress
from pipelines.train.loop.meter import MeterReport
from pipelines.train.loop.record import GRIDS_DIR
from pipelines.train.loop.task import TrainTask
from pipelines.workers.images import to_png

DRAWN_DIR = "drawn"
"""Folder of the record of samples, in the output folder."""


class DrawnBatch(Protocol):
    """A micro-batch whose samples have a table, a number of the draw, and an id each."""

    @property
    def tables(self) -> list[str]: ...
    @property
    def epochs(self) -> list[int]: ...
    @property
    def ids(self) -> list[str]: ...


class TrainOutputs:
    """The outputs of one rank. Metrics, pictures and most notices come from rank 0 alone; the other ranks' calls do nothing."""

    def __init__(self, task: TrainTask[LoopConfig], rank: int):
        self.task = task
        self.rank = rank
        self.run: PatientRun | None = None
        self._num_notices = 0
        self._drawn = DrawnLog(f"{task.output_uri}/{DRAWN_DIR}", rank) if task.config.record_samples else None

    def begin(self, step: int, waiting: Sequence[tuple[int, Mapping[str, float]]], store: CheckpointStore) -> None:
        """Prepare the outputs for the steps after `step`; ask the driver to judge what an earlier start left. Collective call.

        Args:
            step: step of the checkpoint that the training resumes from, or 0.
            waiting: steps and metrics from the checkpoint that had not reached MLflow.
            store: of the checkpoints.
        """
        if self.rank == 0:
            if self._drawn is not None:
                self._drawn.forget_after(step)
            if self.task.run_request is not None:
                entries = [*self._kept(step), *(Entry("metrics", dict(metrics), at_step) for at_step, metrics in waiting)]
                self.run = PatientRun(self.task.run_request, say=self.tell_driver, waiting=entries)
                self.run.log_inputs(self.task.dataset_uri, self.task.inputs, "training")
            self._try(lambda: self._ask_again(store))
        torch.distributed.barrier()
        if step:
            self.say(f"goes on from the checkpoint of step {step}")

    def _kept(self, step: int) -> list[Entry]:
        """Read what an earlier start could not send, without what will be repeated after `step`, and without its end.

        Metrics up to the checkpoint are in the checkpoint too.
        """
        entries: list[Entry] = []
        self._try(lambda: entries.extend(read_unsent(self.task.output_uri)))
        lasting = [entry for entry in entries if entry.kind not in ("metrics", "end")]
        return [entry for entry in lasting if entry.step is None or entry.step <= step]

    def forget_after(self, step: int) -> None:
        """Drop the record of samples after `step`; those steps will be repeated. Collective call."""
        if self._drawn is not None:
            self.flush_batches(step)
            torch.distributed.barrier()
            if self.rank == 0:
                self._drawn.forget_after(step)
            torch.distributed.barrier()

    def say(self, notice: str) -> None:
        """Tell a person something that all ranks know: rank 0 passes it to the driver and to MLflow."""
        if self.rank == 0:
            self.tell_driver(notice)
            if self.run is not None:
                self._num_notices += 1
                self.run.set_tags({f"notice.{self._num_notices:03d}": notice})

    def tell_driver(self, notice: str) -> None:
        """Tell a person something that this rank alone may know; it goes to the driver, not to MLflow."""
        if self.task.desk is not None:
            self.task.desk.say.remote(notice)

    def add_batch(self, step: int, batch: DrawnBatch) -> None:
        """Note which samples `step` uses, if they are recorded."""
        if self._drawn is not None:
            self._drawn.add(step, batch)

    def flush_batches(self, step: int) -> None:
        """Write the noted samples of the steps up to `step`."""
        if (drawn := self._drawn) is not None:
            self._try(lambda: drawn.flush(step))

    def _try(self, write: Callable[[], None]) -> None:
        """Call `write`; pass a StorageError on as a notice, since these files are not worth ending a training."""
        try:
            write()
        except StorageError as error:
            self.tell_driver(str(error))

    def report(self, step: int, report: MeterReport, more: dict[str, float], *, checkpoint_time: float) -> None:
        """Send measurements to the driver and, with the metrics `more`, to MLflow.

        `checkpoint_time`: see `TrainProgress`.
        """
        if self.rank != 0:
            return
        metrics = report.metrics
        num_steps = self.task.config.num_steps
        progress = TrainProgress(
            step=step,
            num_steps=num_steps,
            loss=report.mean_loss,
            samples_per_second=metrics["samples_per_second"],
            data_wait_share=metrics["data_wait_share"],
            seconds_left=metrics["seconds_per_step"] * (num_steps - step),
            checkpoint_time=checkpoint_time,
        )
        if self.task.desk is not None:
            self.task.desk.show.remote(progress)
        self.log_metrics(step, {**metrics, **more})

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Send metrics to MLflow, without those that are not finite."""
        if self.run is not None:
            self.run.log_metrics({name: value for name, value in metrics.items() if math.isfinite(value)}, step)

    def log_checkpoint(self, uri: str | None) -> None:
        """Let MLflow's tag `checkpoint` name the last checkpoint."""
        if self.run is not None and uri is not None:
            self.run.set_tags({"checkpoint": uri})

    def show_picture(self, step: int, picture: Image.Image) -> None:
        """Write a grid of pictures as a PNG file, and send it to MLflow. Call it on rank 0 alone."""
        self._try(lambda: write_file(f"{self.task.output_uri}/{GRIDS_DIR}/step-{step:06d}.png", to_png(picture)))
        if self.run is not None:
            self.run.log_image(picture, "samples", step)

    def judging(self, snapshot: Snapshot, held_seconds: float) -> Callable[[], None]:
        """Return what to call once this rank's part of a checkpoint is written that is to be judged: it tells the driver.

        `held_seconds`: how long this rank's steps were held to copy the part.
        """
        return lambda: self._ask(snapshot.step, snapshot.world_size, held_seconds)

    def _ask_again(self, store: CheckpointStore) -> None:
        for step in store.unjudged():
            self._ask(step, 1, 0.0)

    def _ask(self, step: int, num_parts: int, held_seconds: float) -> None:
        if self.task.desk is not None:
            self.task.desk.add_part.remote(step, self.rank, num_parts, held_seconds)

    def waiting(self) -> list[Any]:
        """Return the metrics that have not reached MLflow yet, for the checkpoint."""
        return self.run.waiting() if self.run is not None else []

    def close(self) -> None:
        """Send what waits for MLflow, as far as it can be reached in time; its run stays open for the driver to end.

        What cannot be sent is kept in a file, for the driver or the next start to send.
        """
        if (run := self.run) is not None:
            self.run = None
            self._try(lambda: write_unsent(self.task.output_uri, run.close()))


class DrawnLog:
    """The record of which samples one rank drew, in JSON lines. Each file holds the steps since the file before it."""

    def __init__(self, folder_uri: str, rank: int):
        self.folder_uri = folder_uri
        self.rank = rank
        self._lines: list[str] = []
        self._first_step = 0

    def add(self, step: int, batch: DrawnBatch) -> None:
        """Note the samples of a micro-batch, in memory."""
        if not self._lines:
            self._first_step = step
        self._lines += [
            json.dumps({"step": step, "table": table, "epoch": epoch, "id": sample_id})
            for table, epoch, sample_id in zip(batch.tables, batch.epochs, batch.ids, strict=True)
        ]

    def flush(self, step: int) -> None:
        """Write the noted samples, which end with `step`. If this raises StorageError, they are kept for the next call."""
        if self._lines:
            name = f"steps-{self._first_step:06d}-{step:06d}-rank-{self.rank:05d}.jsonl"
            write_file(f"{self.folder_uri}/{name}", "".join(f"{line}\n" for line in self._lines).encode())
            self._lines = []

    def forget_after(self, step: int) -> None:
        """Remove the steps after `step` from the files of all ranks. Raises StorageError."""
        for name in list_folder(self.folder_uri):
            uri = f"{self.folder_uri}/{name}"
            first, last = (int(number) for number in name.split("-")[1:3])
            if first > step:
                remove_file(uri)
            elif last > step:
                lines = read_file(uri).decode().splitlines(keepends=True)
                kept = "".join(line for line in lines if json.loads(line)["step"] <= step)
                write_file(uri, kept.encode())
