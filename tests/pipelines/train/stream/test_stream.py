"""The training stream: what is drawn, in which order, and after a resume."""

import json
from collections import Counter
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.score.config import SelectionConfig
from pipelines.tables.chance import is_held_out
from pipelines.tables.errors import MissingTableError
from pipelines.tables.schema import LATENTS
from pipelines.tables.table import Table
from pipelines.train.stream.config import StreamConfig
from pipelines.train.stream.order import deal
from pipelines.train.stream.samples import MicroBatch
from pipelines.train.stream.stream import TrainingStream
from tests.support.training_world import PATH, STREAM, assert_same, make_row, make_shards, make_source, make_table

BUCKETS = ("64x64", "64x64", "32x128", "64x64", "128x32")
CONFIG = replace(STREAM, shuffle_shards=2)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """7 shards of unlike sizes, 3 buckets, one shard without a row."""
    return make_table(tmp_path_factory.mktemp("data"), make_shards([9, 1, 14, 0, 7, 11, 5], BUCKETS))


def make_stream(table: Table, config: StreamConfig = CONFIG, rank: int = 0, world_size: int = 1) -> TrainingStream:
    return TrainingStream([make_source(table)], config, micro_batch_size=4, seed=3, rank=rank, world_size=world_size)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_every_sample_once_an_epoch(table: Table, world_size: int) -> None:
    drawn: Counter[tuple[int, str]] = Counter()
    for rank in range(world_size):
        stream = make_stream(table, rank=rank, world_size=world_size)
        while stream.epoch < 6:
            batch = next(stream)
            drawn.update(zip(batch.epochs, batch.ids, strict=True))
        waiting = stream.state_dict()["buffers"]
        drawn.update((epoch, sample_id) for entries in waiting.values() for epoch, _, sample_id in entries)
    expected = {(epoch, make_row(index)["id"]) for epoch in range(6) for index in range(47)}
    assert {key for key in drawn if key[0] < 6} == expected
    assert set(drawn.values()) == {1}


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_the_shards_evenly_over_epochs(world_size: int) -> None:
    counts = np.zeros(world_size, int)
    for epoch in range(2 * world_size):
        parts = [deal(7, seed=0, epoch=epoch, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert sorted(chain.from_iterable(parts)) == list(range(7))
        counts += [len(part) for part in parts]
    assert len(set(counts)) == 1


def test_batches_are_of_one_bucket(table: Table) -> None:
    buckets = set()
    for batch in islice(make_stream(table), 30):
        height, width = (int(side) // 8 for side in batch.bucket.split("x"))
        assert batch.latents.shape == (4, 8, height, width) and batch.latents.dtype == torch.float16
        for latents, sample_id in zip(batch.latents, batch.ids, strict=True):
            row = make_row(int(sample_id, 16), batch.bucket)
            assert latents.numpy().tobytes() == row["latents"]
        buckets.add(batch.bucket)
    assert buckets == set(BUCKETS)


def test_epochs_differ_in_order_and_seeds_too(table: Table) -> None:
    def order(stream: TrainingStream, epoch: int) -> list[str]:
        batches = islice(stream, 60)
        return [i for batch in batches for e, i in zip(batch.epochs, batch.ids, strict=True) if e == epoch]

    first, second = order(make_stream(table), 0), order(make_stream(table), 1)
    assert first != second
    other = TrainingStream([make_source(table)], CONFIG, micro_batch_size=4, seed=4)
    assert order(other, 0) != first == order(make_stream(table), 0)


@pytest.mark.parametrize(("rank", "world_size", "num_taken"), [(0, 1, 0), (0, 1, 13), (1, 2, 37), (2, 3, 8)])
def test_resume_gives_the_very_same_batches(table: Table, rank: int, world_size: int, num_taken: int) -> None:
    stream = make_stream(table, rank=rank, world_size=world_size)
    list(islice(stream, num_taken))
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = make_stream(table, rank=rank, world_size=world_size)
    resumed.load_state_dict(state)
    for expected, batch in zip(islice(stream, 20), resumed, strict=False):
        assert_same(batch, expected)


@pytest.mark.parametrize("world_sizes", [(2, 1, 2), (1, 3, 2, 7), (7, 1), (3, 5, 4, 2)])
def test_another_world_size_loses_no_sample_and_draws_none_twice(table: Table, world_sizes: tuple[int, ...]) -> None:
    """Trained at each world size for a while, the ranks at unlike speeds, as leftovers make them."""
    trained: Counter[tuple[int, str]] = Counter()
    states: list[dict[str, object]] = []
    for turn, world_size in enumerate(world_sizes):
        streams = [make_stream(table, rank=rank, world_size=world_size) for rank in range(world_size)]
        for rank, stream in enumerate(streams):
            if states:
                stream.load_all_states(states)
            last_turn = turn == len(world_sizes) - 1
            num_batches = 3 + rank % 2
            for number, batch in enumerate(stream, start=1):
                trained.update(zip(batch.epochs, batch.ids, strict=True))
                if number >= num_batches and not (last_turn and (stream.epoch < 4 or stream.state_dict()["leftover"])):
                    break
        states = json.loads(json.dumps([stream.state_dict() for stream in streams]))
    assert set(trained.values()) == {1}
    waiting = {(e, i) for state in states for entries in state["buffers"].values() for e, _, i in entries}  # type: ignore[attr-defined]
    ended = min(int(state["epoch"]) for state in states)  # type: ignore[call-overload]
    assert ended >= 3
    expected = {(epoch, make_row(index)["id"]) for epoch in range(ended) for index in range(47)}
    assert {key for key in trained.keys() | waiting if key[0] < ended} == expected
    assert not waiting & trained.keys()


def test_resumes_at_the_same_world_size_after_another(table: Table) -> None:
    """A state taken while the epochs of another world size are still being finished."""
    before = [make_stream(table, rank=rank, world_size=2) for rank in range(2)]
    for stream in before:
        list(islice(stream, 2))
    stream = make_stream(table)
    stream.load_all_states([old.state_dict() for old in before])
    list(islice(stream, 3))
    state = json.loads(json.dumps(stream.state_dict()))
    assert state["leftover"]
    resumed = make_stream(table)
    resumed.load_all_states([state])
    for expected, batch in zip(islice(stream, 30), resumed, strict=False):
        assert_same(batch, expected)


def test_held_out_samples_are_never_drawn(table: Table) -> None:
    config = replace(CONFIG, held_out_share=0.3)
    held_out = {make_row(index)["id"] for index in range(47) if is_held_out(str(make_row(index)["id"]), 0.3)}
    drawn = {sample_id for batch in islice(make_stream(table, config), 40) for sample_id in batch.ids}
    assert 5 < len(held_out) < 25
    assert drawn == {make_row(index)["id"] for index in range(47)} - held_out


def test_skewed_buckets_on_two_ranks(tmp_path: Path) -> None:
    """Twenty buckets, the first many times as frequent as the last: every rank goes on, every sample comes once an epoch."""
    sides = [f"{8 * height}x{8 * width}" for height in range(1, 5) for width in range(1, 6)]
    weights = 0.8 ** np.arange(20)
    buckets = np.random.default_rng(0).choice(sides, 600, p=weights / weights.sum())
    shards = {f"{shard:05d}": [make_row(i, buckets[i]) for i in range(100 * shard, 100 * shard + 100)] for shard in range(6)}
    table = make_table(tmp_path, shards)
    drawn: Counter[tuple[int, str]] = Counter()
    for rank in range(2):
        stream = make_stream(table, rank=rank, world_size=2)
        while stream.epoch < 3:
            batch = next(stream)
            drawn.update(zip(batch.epochs, batch.ids, strict=True))
        waiting = stream.state_dict()["buffers"]
        assert sum(map(len, waiting.values())) <= 20 * 3  # leftovers never grow
        drawn.update((epoch, sample_id) for entries in waiting.values() for epoch, _, sample_id in entries)
    assert {key for key in drawn if key[0] < 3} == {
        (epoch, make_row(index)["id"]) for epoch in range(3) for index in range(600)
    }
    assert set(drawn.values()) == {1}
    assert len(set(buckets)) == 20


def told(batch: MicroBatch) -> list[str | None]:
    """The captions, None where they are dropped."""
    return [None if dropped else caption for caption, dropped in zip(batch.captions, batch.dropped, strict=True)]


def test_captions_depend_on_seed_epoch_and_id_alone(table: Table) -> None:
    config = replace(STREAM, selection=SelectionConfig(policy="random"), caption_dropout=0.3)
    captions: dict[tuple[int, str], str | None] = {}
    for batch in islice(make_stream(table, config), 200):
        captions.update(zip(zip(batch.epochs, batch.ids, strict=True), told(batch), strict=True))
    for batch in islice(make_stream(table, replace(config, shuffle_shards=3), rank=1, world_size=2), 50):
        for key, caption in zip(zip(batch.epochs, batch.ids, strict=True), told(batch), strict=True):
            assert captions.get(key, caption) == caption
    dropped = np.mean([caption is None for caption in captions.values()])
    assert 0.24 < dropped < 0.36
    known = {caption["caption"] for index in range(4) for caption in make_row(index)["captions"]}
    assert {caption for caption in captions.values() if caption is not None} == known


def test_tables_that_cannot_be_trained_on(tmp_path: Path, table: Table) -> None:
    with pytest.raises(MissingTableError, match="no table 'latents/tiny-64'"):
        make_stream(Table(str(tmp_path), PATH, LATENTS))
    with pytest.raises(ValueError, match="is empty"):
        make_stream(make_table(tmp_path / "none", {}))
    with pytest.raises(ValueError, match="can be drawn: it has no rows"):
        next(make_stream(make_table(tmp_path / "rowless", {"00000": []})))
    with pytest.raises(ValueError, match=r"num_workers=8 need a shard each, and .* has 7"):
        make_stream(table, world_size=8)
    none_passes = replace(STREAM, selection=SelectionConfig(min_best_score=99.0))
    with pytest.raises(ValueError, match="let none pass"):
        next(make_stream(table, none_passes))


def test_state_of_another_rank_is_refused(table: Table) -> None:
    state = make_stream(table, rank=0, world_size=2).state_dict()
    with pytest.raises(ValueError, match="rank=0, this is rank=1"):
        make_stream(table, rank=1, world_size=2).load_state_dict(state)
