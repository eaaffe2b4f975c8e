"""What a training tells while it goes on: to the driver, to MLflow, and in its output folder."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from pipelines.drawn import DRAWN_DIR, DrawnLog, forget_after
from pipelines.patient_run import Entry, PatientRun
from pipelines.sample import to_png
from pipelines.samples import MicroBatch
from pipelines.storage import StorageError, write_file
from pipelines.train_config import TrainTask
from pipelines.train_meter import MeterReport
from pipelines.train_progress import TrainProgress

GRIDS_DIR = "samples"


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
