"""A model's batch that may not fit into memory: it is halved until it does, and what does not fit alone costs itself only."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from pipelines.tables.rejects import RowRefused

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_halving(model: Callable[[list[Item]], Sequence[Result]], batch: list[Item]) -> list[Result | RowRefused]:
    """What `model` makes of each item of a batch, in order; a RowRefused for one that is too much even alone.

    Raises what the model raises, unless it is out of memory (of a GPU or of the host).
    """
    try:
        return list(model(batch))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        detail = str(error).partition("\n")[0] or type(error).__name__
    # Out of the handler, whose traceback holds the tensors of the call that failed.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(batch) == 1:
        return [RowRefused("out_of_memory", detail)]
    middle = len(batch) // 2
    return run_halving(model, batch[:middle]) + run_halving(model, batch[middle:])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory or the host's was not enough: torch's allocator on the CPU raises a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)
