"""Halve a model's batch that fails until it succeeds: what fails even alone costs itself only."""

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from pipelines.tables.rejects import RowRefused

OUT_OF_MEMORY = "out_of_memory"
"""The reject reason of an item that is too large even alone."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def refuse_out_of_memory(error: Exception, size: int) -> RowRefused | None:
    """The refusal of an item for which the memory of a GPU or of the host is not enough; None for any other error."""
    if not is_out_of_memory(error):
        return None
    return RowRefused(OUT_OF_MEMORY, str(error).partition("\n")[0] or type(error).__name__)


def run_halving(
    model: Callable[[list[Item]], Sequence[Result]],
    batch: list[Item],
    *,
    refuse: Callable[[Exception, int], RowRefused | None] = refuse_out_of_memory,
) -> list[Result | RowRefused]:
    """What `model` makes of each item of a batch, in order; a RowRefused for an item that fails even alone.

    The model is not called for an empty batch.

    Args:
        refuse: is told what the model raised and how many items it was given. Returns the refusal of an item that fails so
            alone; None if the items are not at fault: then the error is raised.
    """
    if not batch:
        return []
    try:
        return list(model(batch))
    except Exception as error:
        refused = refuse(error, len(batch))
        if refused is None:
            raise
    # Outside the handler, whose traceback holds the tensors of the call that failed.
    if refused.reason == OUT_OF_MEMORY and (torch := sys.modules.get("torch")) is not None:
        torch.cuda.empty_cache()  # does nothing where no GPU is used
    if len(batch) == 1:
        return [refused]
    middle = len(batch) // 2
    first = run_halving(model, batch[:middle], refuse=refuse)
    return first + run_halving(model, batch[middle:], refuse=refuse)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory or the host's was not enough; torch's allocator on the CPU raises a plain RuntimeError."""
    torch = sys.modules.get("torch")  # where it is not loaded, none of its errors comes
    kinds = (MemoryError, torch.OutOfMemoryError) if torch is not None else (MemoryError,)
    return isinstance(error, kinds) or "DefaultCPUAllocator" in str(error)
