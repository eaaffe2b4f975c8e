"""Values on which all ranks agree. Every function here is a collective call: all ranks must make it."""

from collections.abc import Callable
from typing import Any

import torch


def gather_objects(value: Any) -> list[Any]:
    """Return the values of all ranks, in the order of the ranks."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def first_problem(problem: str | None) -> str | None:
    """Return the first problem that any rank has, so that all ranks raise it or none; None if no rank has one."""
    return next((message for message in gather_objects(problem) if message is not None), None)


def from_rank_zero(make: Callable[[], Any]) -> Any:
    """Call `make` on rank 0 and return its value on all ranks."""
    value = [make() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(value)
    return value[0]


def any_rank(*flags: bool, device: torch.device) -> list[bool]:
    """Return, for each flag, whether it is true on any rank. `device`: where the ranks communicate."""
    values = torch.tensor(flags, dtype=torch.float32, device=device)
    torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
    return [bool(value) for value in values.tolist()]
