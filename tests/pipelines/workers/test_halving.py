"""Batches that do not fit into memory: halved, in order; an item that does not fit alone costs itself."""

import pytest
import torch

from pipelines.tables.rejects import RowRefused
from pipelines.workers.halving import run_halving

LIMIT = 10


class Model:
    """Doubles numbers; has memory for a batch whose sum is at most LIMIT."""

    def __init__(self, error: type[Exception], message: str):
        self.error, self.message = error, message
        self.calls: list[list[int]] = []

    def __call__(self, batch: list[int]) -> list[int]:
        self.calls.append(batch)
        if sum(batch) > LIMIT:
            raise self.error(self.message)
        return [2 * number for number in batch]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB"),
        (RuntimeError, "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
        (MemoryError, ""),
    ],
)
def test_a_batch_is_halved_until_it_fits(error: type[Exception], message: str) -> None:
    model = Model(error, message)
    found = run_halving(model, [1, 2, 3, 99, 4, 5, 6])
    assert [value for value in found if not isinstance(value, RowRefused)] == [2, 4, 6, 8, 10, 12]
    refused = found[3]
    assert isinstance(refused, RowRefused) and refused.reason == "out_of_memory"
    assert refused.detail == (message or "MemoryError")
    assert [1, 2, 3] in model.calls  # what fits is not halved further


def test_a_real_allocation_that_cannot_be_had() -> None:
    def allocate(batch: list[int]) -> list[int]:
        return [torch.empty(size, dtype=torch.uint8).numel() for size in batch]

    found = run_halving(allocate, [10, 2**60, 20])
    assert found[0] == 10 and found[2] == 20
    assert isinstance(found[1], RowRefused) and found[1].reason == "out_of_memory"


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run_halving(Model(RuntimeError, "CUDA error: an illegal memory access was encountered"), [11])


def test_a_caller_may_say_which_other_errors_are_an_items_own() -> None:
    sizes = []

    def refuse(error: Exception, size: int) -> RowRefused | None:
        sizes.append(size)
        return RowRefused("odd", str(error)) if isinstance(error, LookupError) else None

    found = run_halving(Model(KeyError, "no such image"), [1, 2, 99, 4], refuse=refuse)
    assert [getattr(value, "reason", value) for value in found] == [2, 4, "odd", 8] and sizes == [4, 2, 1]
    with pytest.raises(TypeError, match="a bug"):
        run_halving(Model(TypeError, "a bug"), [99], refuse=refuse)


def test_an_empty_batch_asks_nothing() -> None:
    model = Model(MemoryError, "none")
    assert run_halving(model, []) == [] and model.calls == []
