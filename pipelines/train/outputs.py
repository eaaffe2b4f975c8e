"""What a training tells while it goes on: to the driver, to MLflow, and in its output folder."""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from pipelines.storage.errors import StorageError
from pipelines.storage.files import list_folder, read_file, remove_file, write_file
from pipelines.tracking.patient_run import Entry, PatientRun
from pipelines.train.desk import TrainProgress
from pipelines.train.meter import MeterReport
from pipelines.train.stream.samples import MicroBatch
from pipelines.train.task import TrainTask
from pipelines.workers.images import to_png

GRIDS_DIR = "samples"
DRAWN_DIR = "drawn"


class TrainOutputs:
    """Of one rank; only the first speaks to the driver and to MLflow."""

    def __init__(self, task: TrainTask, rank: int):
        self.task = task
        self.rank = rank
        self.run: PatientRun | None = None
        self._num_notices = 0
        self._drawn = DrawnLog(f"{task.output_uri}/{DRAWN_DIR}", rank) if task.config.record_samples else None

    def begin(self, step: int, waiting: Sequence[Entry]) -> None:
        """At a step that was restored, or at 0; `waiting` is what MLflow has not had by then. All ranks must."""
        if self.rank == 0:
            if self._drawn is not None:
                forget_after(self._drawn.folder_uri, step)
            if self.task.plan is not None:
                self.run = PatientRun(self.task.plan, say=self.tell_driver, waiting=waiting)
                self.run.log_inputs(self.task.dataset_uri, self.task.inputs, "training")
        torch.distributed.barrier()
        if step:
            self.say(f"goes on from the checkpoint of step {step}")

    def forget_after(self, step: int) -> None:
        """Steps after this one come again. All ranks must."""
        if self._drawn is not None:
            self.flush_batches(step)
            torch.distributed.barrier()
            if self.rank == 0:
                forget_after(self._drawn.folder_uri, step)
            torch.distributed.barrier()

    def say(self, notice: str) -> None:
        """Something that a person should know; said once, by the first rank."""
        if self.rank == 0:
            self.tell_driver(notice)
            if self.run is not None:
                self._num_notices += 1
                self.run.set_tags({f"notice.{self._num_notices:03d}": notice})

    def tell_driver(self, notice: str) -> None:
        """The same from any rank, for what is not of the training's course."""
        if self.task.desk is not None:
            self.task.desk.say.remote(notice)

    def add_batch(self, step: int, batch: MicroBatch) -> None:
        if self._drawn is not None:
            self._drawn.add(step, batch)

    def flush_batches(self, step: int) -> None:
        if (drawn := self._drawn) is not None:
            self._try(lambda: drawn.flush(step))

    def _try(self, write: Callable[[], None]) -> None:
        """What is only told is not worth a training: a failure is said."""
        try:
            write()
        except StorageError as error:
            self.tell_driver(str(error))

    def report(self, step: int, report: MeterReport, more: dict[str, float], *, checkpoint_time: float) -> None:
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
        if self.run is not None:
            self.run.log_metrics({name: value for name, value in metrics.items() if math.isfinite(value)}, step)

    def log_checkpoint(self, uri: str | None) -> None:
        if self.run is not None and uri is not None:
            self.run.set_tags({"checkpoint": uri})

    def show_picture(self, step: int, picture: Image.Image) -> None:
        """As a PNG file and in MLflow."""
        self._try(lambda: write_file(f"{self.task.output_uri}/{GRIDS_DIR}/step-{step:06d}.png", to_png(picture)))
        if self.run is not None:
            self.run.log_image(picture, "samples", step)

    def waiting(self) -> list[Any]:
        return self.run.waiting() if self.run is not None else []

    def close(self) -> None:
        if self.run is not None:
            self.run.close()
            self.run = None


class DrawnLog:
    """Of one rank. A file holds the steps since the one before."""

    def __init__(self, folder_uri: str, rank: int):
        self.folder_uri = folder_uri
        self.rank = rank
        self._lines: list[str] = []
        self._first_step = 0

    def add(self, step: int, batch: MicroBatch) -> None:
        if not self._lines:
            self._first_step = step
        self._lines += [
            json.dumps({"step": step, "table": table, "epoch": epoch, "id": sample})
            for table, epoch, sample in zip(batch.tables, batch.epochs, batch.ids, strict=True)
        ]

    def flush(self, step: int) -> None:
        """Write down the samples up to this step. Raises StorageError, and keeps them for the next time."""
        if self._lines:
            name = f"steps-{self._first_step:06d}-{step:06d}-rank-{self.rank:05d}.jsonl"
            write_file(f"{self.folder_uri}/{name}", "".join(f"{line}\n" for line in self._lines).encode())
            self._lines = []


def forget_after(folder_uri: str, step: int) -> None:
    """Take the steps after this one, which come again, out of the record."""
    for name in list_folder(folder_uri):
        first, last = (int(number) for number in name.split("-")[1:3])
        if first > step:
            remove_file(f"{folder_uri}/{name}")
        elif last > step:
            lines = read_file(f"{folder_uri}/{name}").decode().splitlines(keepends=True)
            kept = "".join(line for line in lines if json.loads(line)["step"] <= step)
            write_file(f"{folder_uri}/{name}", kept.encode())


def read_drawn(folder_uri: str) -> dict[int, list[tuple[int, str]]]:
    """(epoch, id) of the samples of each step, over all ranks and tables, sorted."""
    drawn: dict[int, list[tuple[int, str]]] = {}
    for name in list_folder(folder_uri):
        for line in read_file(f"{folder_uri}/{name}").decode().splitlines():
            row = json.loads(line)
            drawn.setdefault(row["step"], []).append((row["epoch"], row["id"]))
    return {step: sorted(samples) for step, samples in sorted(drawn.items())}
