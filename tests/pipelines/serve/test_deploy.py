"""Replicas that are lost, by a handle in this process; tests/jobs/test_serve.py kills real ones, at no exact moment."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayError

from pipelines.serve.orders import Accepted, Event, Finished, Order, Settings

pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")  # of Ray Serve, when it is imported

ORDER = Order(
    prompt="a circle",
    seeds=[0, 1],
    settings=Settings(height=64, width=64, num_steps=1, guidance_scale=4.5, negative_prompt=""),
)


class LosesReplicas:
    """A handle whose replicas draw some of the pictures and are lost: how many each draws, and how it ends."""

    def __init__(self, fates: list[tuple[int, RayError | None]]):
        self.fates = fates
        self.stream = self

    def options(self, *, stream: bool) -> "LosesReplicas":
        return self

    async def remote(self, order: Order) -> AsyncIterator[Event]:
        drawn, error = self.fates.pop(0)
        yield Accepted()
        for index in range(drawn):
            yield Finished(index, b"picture")
        if error is not None:
            raise error


def test_a_stream_goes_on_with_another_replica_and_ends_after_its_last_picture() -> None:
    from pipelines.serve.deploy import ServedPainter

    async def events(handle: Any) -> list[Event]:
        return [event async for event in ServedPainter(handle, "tiny").stream(ORDER)]

    expected = [Accepted(), Finished(0, b"picture"), Finished(1, b"picture")]
    lost = LosesReplicas([(1, OutOfMemoryError("killed by Ray")), (2, None)])
    assert asyncio.run(events(lost)) == expected and not lost.fates
    late = LosesReplicas([(2, ActorDiedError()), (2, None)])
    assert asyncio.run(events(late)) == expected and len(late.fates) == 1
