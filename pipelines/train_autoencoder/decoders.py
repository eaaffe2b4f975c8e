"""Processes that cut crops ahead of the device. They import no torch, and end with the process that started them."""

import multiprocessing
import os
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from types import TracebackType
from typing import Self

import numpy as np

from pipelines.train_autoencoder.crops import CropJob, cut_crop


class Decoders:
    """A pool of processes; with `num_processes` 0, `submit` cuts the crop itself. Use it in a `with` statement."""

    def __init__(self, num_processes: int):
        self._pool: ProcessPoolExecutor | None = None
        if num_processes:
            # Not by fork: threads of the training may hold locks.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(num_processes, mp_context=context, initializer=_end_with_parent)

    def submit(self, job: CropJob) -> "Future[np.ndarray | str]":
        """The crop, or why the image cannot be used, once it is there. Raises BrokenProcessPool if a process died."""
        if self._pool is not None:
            return self._pool.submit(cut_crop, job)
        done: Future[np.ndarray | str] = Future()
        done.set_result(cut_crop(job))
        return done

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """End this process when the one that started it is gone: a kill would leave it waiting for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
