"""A weighted mixture of tables: how often each sample is drawn, in which epochs, and after a resume."""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from pipelines.tables.errors import MissingTableError, StaleTableError
from pipelines.tables.table import Table
from pipelines.train.loop.record import TrainingRecord
from pipelines.train.run import train_identity
from pipelines.train.stream.config import WeightedTable
from pipelines.train.stream.mixture import Source, check_channels, check_complete, find_sources
from pipelines.train.stream.stream import TrainingStream
from tests.support.training_ranks import tiny_config
from tests.support.training_world import PATH, STREAM, make_row, make_shards, make_source, make_table

WEIGHTS = (1.0, 2.5, 0.4)
SIZES = ((9, 0, 7), (6, 5), (11, 10, 9, 5))
BUCKETS = ("64x64", "64x64", "32x128", "64x64", "128x32")
Key = tuple[str, int, str]
"""URI of the table, how often the sample was drawn before, its id."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    """16, 11 and 35 samples, whose ids are all different."""
    tables = [
        make_table(tmp_path_factory.mktemp("data"), make_shards(sizes, BUCKETS, first=100 * index))
        for index, sizes in enumerate(SIZES)
    ]
    return [make_source(table, weight) for table, weight in zip(tables, WEIGHTS, strict=True)]


def make_stream(sources: Sequence[Source], rank: int = 0, world_size: int = 1, **changes: object) -> TrainingStream:
    config = replace(STREAM, shuffle_shards=2)
    options = {"micro_batch_size": 4, "seed": 3, **changes}
    return TrainingStream(sources, config, rank=rank, world_size=world_size, **options)  # type: ignore[arg-type]


def all_ids(sources: Sequence[Source]) -> list[tuple[Source, str]]:
    return [
        (source, str(make_row(100 * index + number)["id"]))
        for index, source in enumerate(sources)
        for number in range(sum(SIZES[index]))
    ]


def due(sources: Sequence[Source], num_epochs: int) -> set[Key]:
    """All that the first epochs draw."""
    return {
        (source.table.uri, number, sample_id)
        for source, sample_id in all_ids(sources)
        for epoch in range(num_epochs)
        for number in source.draws(sample_id, epoch=epoch, seed=3)
    }


def drawn_of(batch: object) -> list[Key]:
    return list(zip(batch.tables, batch.epochs, batch.ids, strict=True))  # type: ignore[attr-defined]


def waiting_in(stream: TrainingStream) -> list[Key]:
    return [(s.table, s.epoch, s.id) for samples in stream._buffers.values() for s in samples]


@pytest.mark.parametrize("weight", [0.1, 1.0, 2.5, 1 / 3])
def test_a_weight_is_draws_of_each_sample_in_an_epoch(weight: float) -> None:
    source = make_source(Table("", "latents/x", None), weight)
    totals = []
    for index in range(400):
        epochs = [source.draws(f"{index:064x}", epoch=epoch, seed=0) for epoch in range(30)]
        assert all(len(numbers) in (int(weight), source.num_passes) for numbers in epochs)
        numbers = [number for epoch in epochs for number in epoch]
        assert numbers == list(range(len(numbers))) and len(numbers) in {int(30 * weight), -int(-30 * weight // 1)}
        totals.append([len(numbers) for numbers in epochs])
    for epoch in range(30):  # each takes its part of the samples, and another one than the last
        assert sum(total[epoch] for total in totals) / 400 == pytest.approx(weight, abs=0.08)
    assert (len({tuple(total) for total in totals}) > 1) == (weight != 1.0)


@pytest.mark.parametrize("world_size", [1, 3])
def test_epochs_draw_what_is_due(sources: list[Source], world_size: int) -> None:
    drawn: Counter[Key] = Counter()
    for rank in range(world_size):
        stream = make_stream(sources, rank, world_size)
        while stream.epoch < 10:
            drawn.update(drawn_of(next(stream)))
        drawn.update(waiting_in(stream))
    expected = due(sources, 10)
    assert set(drawn.values()) == {1} and expected <= drawn.keys()
    assert drawn.keys() <= due(sources, 12)  # the epoch that has begun, and no more
    shares = Counter(uri for uri, _, _ in expected)
    counts = [shares[source.table.uri] for source in sources]
    assert counts == [160, 275, 140]  # 16 * 1, 11 * 2.5 and 35 * 0.4 in each of ten epochs


def test_what_comes_again_comes_with_other_captions(sources: list[Source]) -> None:
    """Each draw has a number, from which its caption and its noise are drawn, also within one epoch."""
    stream = make_stream([sources[1]])
    captions: dict[str, set[str | None]] = {}
    while stream.epoch < 4:
        batch = next(stream)
        for sample_id, caption in zip(batch.ids, batch.captions, strict=True):
            captions.setdefault(sample_id, set()).add(caption)
    assert len(captions) == 11 and all(len(found) >= 2 for found in captions.values())


@pytest.mark.parametrize(("rank", "world_size", "num_taken"), [(0, 1, 11), (1, 2, 23)])
def test_resume_gives_the_very_same_batches(sources: list[Source], rank: int, world_size: int, num_taken: int) -> None:
    stream = make_stream(sources, rank, world_size)
    list(islice(stream, num_taken))
    resumed = make_stream(sources, rank, world_size)
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    for expected, batch in zip(islice(stream, 20), resumed, strict=False):
        assert (drawn_of(batch), batch.captions) == (drawn_of(expected), expected.captions)
        assert torch.equal(batch.latents, expected.latents)


@pytest.mark.parametrize("world_sizes", [(2, 1, 2), (1, 3, 2)])
def test_another_world_size_loses_nothing_and_draws_nothing_twice(sources: list[Source], world_sizes: tuple[int, ...]) -> None:
    trained: Counter[Key] = Counter()
    states: list[dict[str, object]] = []
    for turn, world_size in enumerate(world_sizes):
        streams = [make_stream(sources, rank, world_size) for rank in range(world_size)]
        for rank, stream in enumerate(streams):
            if states:
                stream.load_all_states(states)
            last_turn = turn == len(world_sizes) - 1
            for number, batch in enumerate(stream, start=1):
                trained.update(drawn_of(batch))
                if number >= 3 + rank % 2 and not (last_turn and (stream.epoch < 4 or stream.state_dict()["leftover"])):
                    break
        states = json.loads(json.dumps([stream.state_dict() for stream in streams]))
    waiting = {key for stream in streams for key in waiting_in(stream)}
    ended = min(stream.epoch for stream in streams)
    assert ended >= 3 and set(trained.values()) == {1} and not waiting & trained.keys()
    assert due(sources, ended) <= trained.keys() | waiting


def test_a_table_that_grew_is_drawn_as_it_was(tmp_path: Path) -> None:
    shards = make_shards([8, 8, 8])
    (table,) = [make_table(tmp_path, dict(list(shards.items())[:2]))]
    stream = make_stream([make_source(table)])
    list(islice(stream, 3))
    make_table(tmp_path, shards)
    assert {i for batch in islice(make_stream([make_source(table)]), 40) for i in batch.ids} > {i for i in all_of(shards, 2)}
    resumed = make_stream([make_source(table)])
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    for expected, batch in zip(islice(stream, 20), resumed, strict=False):
        assert batch.ids == expected.ids
    (tmp_path / PATH / "00001.parquet").unlink()
    (tmp_path / PATH / "00002.parquet").unlink()
    with pytest.raises(ValueError, match="has 1 shards, and had 2 when the training began"):
        make_stream([make_source(table)]).load_state_dict(stream.state_dict())


def all_of(shards: dict[str, list[dict[str, object]]], count: int) -> list[str]:
    return [str(row["id"]) for rows in list(shards.values())[:count] for row in rows]


def test_states_of_other_mixtures_are_refused(sources: list[Source]) -> None:
    state = make_stream(sources).state_dict()
    others = [make_source(sources[0].table, 2.0), *sources[1:]]
    with pytest.raises(ValueError, match=r"come in another order \(tables: .* put it back, or begin a new training"):
        make_stream(others).load_state_dict(state)
    with pytest.raises(ValueError, match=r"come in another order \(seed: 3 -> 4\)"):
        make_stream(sources, seed=4).load_state_dict(state)


def test_what_is_wrong_is_said_of_its_table(tmp_path: Path, sources: list[Source]) -> None:
    with pytest.raises(MissingTableError, match="no table 'latents/none'"):
        make_stream([sources[0], make_source(Table(str(tmp_path), "latents/none", sources[0].table.schema))])
    empty = make_table(tmp_path / "empty", {})
    with pytest.raises(ValueError, match=f"{empty.uri} is empty"):
        make_stream([sources[0], make_source(empty)])
    narrow = make_shards([0, 3])
    for row in narrow["00001"]:
        row["channels"] = 4
    other = make_table(tmp_path / "narrow", narrow)
    check_channels(sources, 8)
    with pytest.raises(ValueError, match=f"{other.uri} holds latents of 4 channels, the transformer takes 8"):
        check_channels([*sources, make_source(other)], 8)
    with pytest.raises(ValueError, match="num_workers=20 need a shard each"):  # 3, three times 2, and 4 shards
        make_stream(sources, world_size=20)
    with pytest.raises(ValueError, match=r"weight=-1.0 of latents/a must be a positive number"):
        WeightedTable(latents="latents/a", weight=-1.0)


def test_tables_are_found_by_their_dataset() -> None:
    one, other = find_sources(
        "s3://own",
        [
            WeightedTable(latents="latents/a"),
            WeightedTable(latents="latents/b", weight=3, dataset_uri="s3://far/", captioners=("original",)),
        ],
        STREAM,
    )
    assert (one.table.uri, other.table.uri, other.weight) == ("s3://own/latents/a", "s3://far/latents/b", 3)
    with pytest.raises(ValueError, match=r"latents names s3://own/latents/a more than once"):
        find_sources(
            "s3://own", [WeightedTable(latents="latents/a"), WeightedTable(latents="latents/a", dataset_uri="s3://own")], STREAM
        )
    with pytest.raises(ValueError, match="names no table"):
        find_sources("s3://own", [], STREAM)
    names = [[table.name_in("s3://own") for table in source.tables()] for source in (one, other)]
    assert names[0] == ["latents/a", "captions/a", "captions/b", "scores/clip/a", "scores/clip/b"]
    assert names[1] == ["s3://far/latents/b", "s3://far/images", "s3://far/scores/clip/original"]


def test_a_table_that_was_made_anew_is_named(tmp_path: Path) -> None:
    make_table(tmp_path / "own", make_shards([8]))
    far = make_table(tmp_path / "far", make_shards([8]))
    mixture = [WeightedTable(latents=PATH), WeightedTable(latents=PATH, weight=2.0, dataset_uri=str(tmp_path / "far"))]
    config = replace(tiny_config("zoo://pipeline"), latents=mixture)
    output, own = str(tmp_path / "run"), str(tmp_path / "own")
    TrainingRecord.claim(output, train_identity(own, config))
    (tmp_path / "run/checkpoints/step-000001").mkdir(parents=True)
    (tmp_path / "run/checkpoints/step-000001/rank-00000.json").touch()
    TrainingRecord.claim(output, train_identity(own, config))
    (tmp_path / "far" / PATH / "_manifest.json").unlink()
    (tmp_path / "far" / PATH / "00000.parquet").unlink()
    with pytest.raises(MissingTableError, match=f"no table '{PATH}' in {tmp_path}/far"):
        train_identity(own, config)
    make_table(tmp_path / "far", make_shards([8]), inputs={"images": "f00d"})
    with pytest.raises(StaleTableError, match=f"inputs.{far.uri}: '"):
        TrainingRecord.claim(output, train_identity(own, config))
    make_table(tmp_path / "far", make_shards([8]), inputs={"images": "f00d"}, complete=False)
    with pytest.raises(ValueError, match=f"{far.uri} is not complete"):
        train_identity(own, config)


def test_tables_that_do_not_fit_together_are_refused_by_name(tmp_path: Path) -> None:
    table = make_table(tmp_path, make_shards([5, 6]), inputs={"images": "first"})
    (source,) = find_sources(str(tmp_path), PATH, STREAM)
    check_complete(source)
    captions, scores = (Table(str(tmp_path), path, None) for path in ("captions/b", "scores/clip/a"))
    manifest = captions.require()
    captions.write_manifest(replace(manifest, complete=False))
    with pytest.raises(ValueError, match=f"{captions.uri} is not complete: let its stage finish first"):
        check_complete(source)
    captions.write_manifest(replace(manifest, inputs={"images": "second"}))
    with pytest.raises(ValueError, match=f"{captions.uri} was made from another images than {table.uri}"):
        check_complete(source)
    captions.write_manifest(manifest)
    made = scores.require()
    scores.write_manifest(replace(made, inputs={"captions/a": "older"}))
    with pytest.raises(ValueError, match=f"{scores.uri} was made from another captions/a than the one that is there now"):
        check_complete(source)
    scores.write_manifest(made)
    Path(scores.shard_uri("00001")).unlink()
    with pytest.raises(ValueError, match=f"{scores.uri} has no shard 00001, which {table.uri} has: run its stage again"):
        check_complete(source)
    with pytest.raises(MissingTableError, match=r"no table 'captions/c' in .*, which has captions/a, captions/b"):
        check_complete(find_sources(str(tmp_path), PATH, replace(STREAM, captioners=("a", "c")))[0])


def test_tables_of_the_old_form_are_refused_in_a_sentence(tmp_path: Path) -> None:
    """Latents that held captions, and scores of all captioners in one table."""
    table = make_table(tmp_path, make_shards([5]))
    config, manifest = tiny_config("zoo://pipeline"), table.require()
    table.write_manifest(replace(manifest, schema_version=1))
    old = r"is of form 1, and this program knows form 2 of what jobs\.{0} makes: let jobs\.{0} make it anew with --on_stale .*$"
    with pytest.raises(StaleTableError, match=f"^{table.uri} {old.format('extract')}"):
        train_identity(str(tmp_path), config)
    table.write_manifest(manifest)
    one_for_all = Table(str(tmp_path), "scores/clip", None)
    one_for_all.write_manifest(replace(Table(str(tmp_path), "scores/clip/a", None).require(), schema_version=1))
    shutil.rmtree(tmp_path / "scores/clip/a")
    with pytest.raises(StaleTableError, match=f"^{one_for_all.uri} {old.format('score')}"):
        train_identity(str(tmp_path), config)
