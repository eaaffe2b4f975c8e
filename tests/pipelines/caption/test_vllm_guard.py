"""How rows that kill engines are found, with engines that die as vLLM's do. `test_vllm.py` has the real one."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import ray

from pipelines.caption.rows import ENGINE_DIED
from pipelines.caption.vllm_guard import (
    COMPANY,
    MAX_DEATHS,
    MAX_REFUSED_IN_A_ROW,
    CarefulEngine,
    EngineDeaths,
    vLLMEngineStageUDF,
)
from pipelines.tables.errors import StageError
from pipelines.tables.schema import Row

PLACE, ERROR = CarefulEngine.IDX_IN_BATCH_COLUMN, "__inference_error__"


class Engines:
    """Answers batches side by side, each time with a new engine for what the death of the last one left, as Ray does."""

    def __init__(self, is_deadly: Callable[[int], bool], monkeypatch: pytest.MonkeyPatch):
        self.is_deadly = is_deadly
        self.deaths: list[int] = []  # rows that were in flight
        self.in_flight: set[int] = set()
        self.died = asyncio.Event()
        self.errors: dict[int, str] = {}
        monkeypatch.setattr(vLLMEngineStageUDF, "__init__", lambda engine: None)
        monkeypatch.setattr(vLLMEngineStageUDF, "udf", lambda engine, rows: self.generate(rows))

    async def generate(self, rows: list[Row]) -> AsyncIterator[Row]:
        self.in_flight.update(row["place"] for row in rows)
        for row in rows:
            await asyncio.sleep(0.001)  # the others are asked in between
            if any(self.is_deadly(place) for place in self.in_flight):
                if not self.died.is_set():
                    self.deaths.append(len(self.in_flight))
                self.died.set()
                await asyncio.Event().wait()  # for ever: a process that ends raises nothing
            yield {PLACE: row[PLACE], ERROR: ""}
        self.in_flight.difference_update(row["place"] for row in rows)

    async def ask(self, engine: CarefulEngine, batch: list[Row]) -> None:
        answers = [answer async for answer in engine.udf(batch)]
        self.errors.update({batch[answer[PLACE]]["place"]: answer[ERROR] for answer in answers})

    async def run(self, num_rows: int, batch_size: int) -> None:
        ledger: Any = ray.remote(EngineDeaths).options(num_cpus=0).remote()
        rows: list[Row] = [{"shard": "00000", "place": place, PLACE: place % batch_size} for place in range(num_rows)]
        batches = [rows[start : start + batch_size] for start in range(0, num_rows, batch_size)]
        while waiting := [batch for batch in batches if batch[0]["place"] not in self.errors]:
            engine = CarefulEngine(deaths=ledger)
            self.in_flight.clear()
            self.died.clear()
            tasks = [asyncio.create_task(self.ask(engine, batch)) for batch in waiting]
            death = asyncio.create_task(self.died.wait())
            answered = asyncio.gather(*tasks)
            await asyncio.wait([answered, death], return_when=asyncio.FIRST_COMPLETED)
            if answered.done():
                answered.result()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def test_two_deadly_rows_cost_themselves_alone(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = Engines({13, 45}.__contains__, monkeypatch)
    asyncio.run(engines.run(60, 12))
    assert sorted(engines.errors) == list(range(60))
    refused = {place: error for place, error in engines.errors.items() if error}
    assert sorted(refused) == [13, 45] and all(error.startswith(ENGINE_DIED) for error in refused.values())
    assert engines.deaths[0] > max(COMPANY.values()) and engines.deaths[-1] == 1 and len(engines.deaths) <= 2 * MAX_DEATHS


def test_an_engine_that_always_dies_ends_the_stage(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = Engines(lambda place: True, monkeypatch)
    with pytest.raises(StageError, match="what is wrong is not with the images"):
        asyncio.run(engines.run(24, 8))
    assert engines.errors == {} and len(engines.deaths) < MAX_DEATHS + 3 * MAX_REFUSED_IN_A_ROW
