"""vLLM's engine behind `ray.data.llm`, for rows that kill it.

Where an engine dies, Ray starts a new one and repeats what was in flight, without end. Here rows that were in flight when
engines died are asked about in ever smaller company, at last alone, and then refused: the row that kills engines is found in
`MAX_DEATHS` deaths, and no other row is lost with it.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.data.llm import Processor
from ray.llm._internal.batch.stages.vllm_engine_stage import vLLMEngineStageUDF  # Ray has no public way to the engine's rows

from pipelines.caption.rows import ENGINE_DIED
from pipelines.stages.shards import LIGHT
from pipelines.tables.errors import StageError
from pipelines.tables.schema import Row

STAGE = "vLLMEngineStage"
MAX_DEATHS = 4
"""Deaths after which a row is refused."""
COMPANY = {2: 8, 3: 1}
"""By number of deaths: how many such rows are asked about at a time, with no other row in flight."""
MAX_REFUSED_IN_A_ROW = 5
"""If more rows are refused without an answer between them, the rows are not at fault."""


class EngineDeaths:
    """Ray actor: which rows are in flight, and how often each was when an engine died."""

    def __init__(self) -> None:
        self.in_flight: set[str] = set()
        self.deaths: Counter[str] = Counter()
        self.refused: set[str] = set()

    def count(self, names: Sequence[str]) -> list[int]:
        """The deaths of rows that are about to be asked about. One that is still in flight was there when its engine died."""
        for name in self.in_flight.intersection(names):
            self.in_flight.remove(name)
            self.deaths[name] += 1
        return [self.deaths[name] for name in names]

    def begin(self, names: Sequence[str]) -> None:
        self.in_flight.update(names)

    def end(self, names: Sequence[str]) -> None:
        """They are answered."""
        self.in_flight.difference_update(names)
        for name in names:
            self.deaths.pop(name, None)
        self.refused.clear()

    def refuse(self, name: str) -> int:
        """Returns how many were refused since the last answer."""
        self.refused.add(name)
        return len(self.refused)


class CarefulEngine(vLLMEngineStageUDF):
    """Ray Data actor: a vLLM engine that is asked about rows, which have a "shard" and a "place"."""

    def __init__(self, *args: Any, deaths: ActorHandle, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.deaths = deaths
        self.turn = asyncio.Lock()
        self.quiet = asyncio.Event()
        self.quiet.set()
        self.num_asking = 0

    async def udf(self, batch: list[Row]) -> AsyncIterator[Row]:  # type: ignore[override]  # like Ray's own
        """Yield each row's answer, or a refusal after `MAX_DEATHS` deaths, in any order. StageError if none is answered."""
        counts = await self.deaths.count.remote([_name_of(row) for row in batch])
        for row, deaths in zip(batch, counts, strict=True):
            if deaths >= MAX_DEATHS:
                place, error = row[self.IDX_IN_BATCH_COLUMN], await self._refuse(_name_of(row))
                yield {self.IDX_IN_BATCH_COLUMN: place, "__inference_error__": error}
        for rows, alone in split(batch, counts):
            names = [_name_of(row) for row in rows]
            async with self._alone() if alone else self._together():
                await self.deaths.begin.remote(names)
                answers = [answer async for answer in super().udf(rows)]
                await self.deaths.end.remote(names)
            for answer in answers:
                yield answer

    async def _refuse(self, name: str) -> str:
        refused = await self.deaths.refuse.remote(name)
        if refused > MAX_REFUSED_IN_A_ROW:
            raise StageError(
                f"vLLM's engine died {MAX_DEATHS} times with each of {refused} images, and answered about none between them: "
                "what is wrong is not with the images. Ray's logs of the engine's actor say more"
            )
        return f"{ENGINE_DIED}: {MAX_DEATHS} engines died while they were asked about this image, the last about nothing else"

    @asynccontextmanager
    async def _together(self) -> AsyncIterator[None]:
        async with self.turn:
            self.num_asking += 1
            self.quiet.clear()
        try:
            yield
        finally:
            self.num_asking -= 1
            if not self.num_asking:
                self.quiet.set()

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        async with self.turn:  # whoever comes now waits
            await self.quiet.wait()
            yield


def guard_engine(processor: Processor) -> None:
    """Have a processor of `ray.data.llm` ask a `CarefulEngine`; call it once, before it is used."""
    actor: Any = ray.remote(EngineDeaths)
    engine = processor.get_stage_by_name(STAGE)
    engine.fn_constructor_kwargs["deaths"] = actor.options(num_cpus=LIGHT, max_restarts=-1, max_task_retries=-1).remote()
    processor.stages[STAGE] = engine.model_copy(update={"fn": CarefulEngine})  # to assign it would validate the stage anew


def _name_of(row: Row) -> str:
    return f"{row['shard']}/{row['place']}"


def split(rows: Sequence[Row], deaths: Sequence[int]) -> Iterator[tuple[list[Row], bool]]:
    """The rows that are to be asked about, in groups, and whether a group must be alone with the engine."""
    calm = [row for row, count in zip(rows, deaths, strict=True) if count < min(COMPANY)]
    if calm:
        yield calm, False
    for count, size in COMPANY.items():
        feared = [row for row, times in zip(rows, deaths, strict=True) if times == count]
        for start in range(0, len(feared), size):
            yield feared[start : start + size], True
