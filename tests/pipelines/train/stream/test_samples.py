"""The rows of a shard: latents, captions, scores and filters joined by id, and the captions that are drawn for each image."""

import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from pipelines.score.config import ImageFilter, SelectionConfig
from pipelines.tables.identity import Identity
from pipelines.tables.schema import IMAGE_SCORES, IMAGES
from pipelines.tables.table import Table
from pipelines.train.run import train_identity
from pipelines.train.stream.config import StreamConfig, WeightedTable
from pipelines.train.stream.mixture import Source, find_sources
from pipelines.train.stream.samples import ShardRows
from pipelines.train.stream.stream import TrainingStream
from tests.support.training_ranks import tiny_config
from tests.support.training_world import (
    PATH,
    STREAM,
    add_captioner,
    add_scores,
    make_shards,
    make_source,
    make_table,
    write_table,
)

SHARD = "00000"
RANDOM = StreamConfig(captioners=("a", "b"), selection=SelectionConfig(policy="random"), caption_dropout=0.0)


def row_id(index: int) -> str:
    return f"{index:064x}"


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """Four images: a red, a green, a blue and a yellow square."""
    return make_table(tmp_path, make_shards([4]))


def drawn(source: Source, config: StreamConfig = STREAM) -> dict[int, set[str]]:
    """The captions that are drawn for each image in twenty epochs, without the images that are never drawn."""
    rows, found = ShardRows(source, SHARD), dict[int, set[str]]()
    for row, sample_id in enumerate(rows.ids):
        for epoch in range(20):
            if (choice := rows.choose(row, epoch, config, seed=0)) is not None:
                found.setdefault(int(sample_id, 16), set()).add(choice.caption)
    return found


def test_captions_and_scores_find_their_image_by_id(tmp_path: Path, table: Table) -> None:
    """Rows in another order, an image without a caption, a caption without a score, a caption of an unknown image."""
    entries = {3: ("yellow!", 30.0), 7: ("unknown!", 30.0), 2: ("blue!", None), 0: ("red!", 30.0)}
    add_captioner(tmp_path, "c", {SHARD: {row_id(index): entry for index, entry in entries.items()}})
    alone = make_source(table, captioners=("c",))
    assert drawn(alone) == {0: {"red!"}, 3: {"yellow!"}}
    assert drawn(make_source(table, captioners=("c",), clip=None), RANDOM) == {0: {"red!"}, 2: {"blue!"}, 3: {"yellow!"}}
    of_both = drawn(make_source(table, captioners=("a", "c")), replace(STREAM, selection=SelectionConfig(policy="random")))
    assert of_both == {
        0: {"a red square", "red!"},
        1: {"a green square"},
        2: {"a blue square"},
        3: {"a yellow square", "yellow!"},
    }
    stream = TrainingStream([alone], STREAM, micro_batch_size=2, seed=0)
    assert {sample_id for batch in islice(stream, 20) for sample_id in batch.ids} == {row_id(0), row_id(3)}


def test_original_captions_are_those_of_the_images(tmp_path: Path, table: Table) -> None:
    told = {2: "blue, as it came", 0: "red, as it came", 1: None, 3: "yellow, as it came"}
    fixed = {
        "image_bytes": b"",
        "format": "PNG",
        "width": 64,
        "height": 64,
        "phash": "0" * 16,
        "source_uri": "",
        "metadata": None,
    }
    rows = [{"id": row_id(index), "caption": caption, **fixed} for index, caption in told.items()]
    images = write_table(Table(str(tmp_path), "images", IMAGES), Identity("ingest", {}, {}, {}), {SHARD: rows})
    add_scores(tmp_path, "original", {SHARD: {row_id(2): ("", 28.0), row_id(0): ("", 27.0)}})
    scored = make_source(table, captioners=("original",))
    assert drawn(scored) == {0: {"red, as it came"}, 2: {"blue, as it came"}}
    unscored = make_source(table, captioners=("original",), clip=None)
    assert drawn(unscored, RANDOM) == {index: {caption} for index, caption in told.items() if caption is not None}
    assert images.path in {one.path for one in unscored.tables()}


def test_filters_keep_images_out_and_make_no_table_anew(tmp_path: Path, table: Table) -> None:
    scores = {2: 5.0, 0: 6.5, 1: 4.9}  # image 3 has none: its scorer refused it
    rows = [{"id": row_id(index), "score": score, "detail": None} for index, score in scores.items()]
    aesthetic = Table(str(tmp_path), "image_scores/aesthetic", IMAGE_SCORES)
    write_table(aesthetic, Identity("score_images", {}, {}, {}), {SHARD: rows})

    def with_filter(**limits: float) -> StreamConfig:
        return replace(STREAM, image_filters={"aesthetic": ImageFilter(**limits)})

    def source(config: StreamConfig) -> Source:
        return find_sources(str(tmp_path), PATH, config)[0]

    assert drawn(source(STREAM)).keys() == {0, 1, 2, 3}
    assert drawn(source(with_filter(min=5.0))).keys() == {0, 2}
    assert drawn(source(with_filter(min=4.0, max=6.0))).keys() == {1, 2}
    training = tiny_config("zoo://pipeline")
    one, other = (train_identity(str(tmp_path), replace(training, data=with_filter(min=limit))) for limit in (5.0, 6.0))
    assert one.inputs == other.inputs and "image_scores/aesthetic" in one.inputs and one.fingerprint != other.fingerprint
    none = with_filter(min=9.0)
    with pytest.raises(ValueError, match=r"can be drawn: .* image_filters=\{'aesthetic': ImageFilter\(min=9\.0, .*loosen"):
        next(TrainingStream([source(none)], none, micro_batch_size=2, seed=0))


@pytest.mark.parametrize(
    "selection", [SelectionConfig(policy="random"), SelectionConfig(policy="proportions", proportions={"a": 3, "b": 1})]
)
def test_policies_that_compare_no_scores_need_none(tmp_path: Path, table: Table, selection: SelectionConfig) -> None:
    shutil.rmtree(tmp_path / "scores")
    config = replace(RANDOM, selection=selection)
    training = replace(tiny_config("zoo://pipeline"), data=config)
    assert train_identity(str(tmp_path), training).inputs.keys() == {PATH, "captions/a", "captions/b"}
    (source,) = training.sources(str(tmp_path))
    assert drawn(source, config)[0] == {"a red square", "red"}


def test_a_policy_that_compares_scores_needs_a_clip() -> None:
    with pytest.raises(ValueError, match=r"clip=None: selection\.policy='published' .* compares scores; name the CLIP"):
        StreamConfig(captioners=("a",))
    with pytest.raises(ValueError, match=r"clip=None: .* with min_best_score=22\.0 compares .* and min_best_score null"):
        replace(RANDOM, selection=SelectionConfig(policy="random", min_best_score=22.0))


def test_captioners_are_named_each_once() -> None:
    with pytest.raises(ValueError, match=r"captioners=\[\] names nobody: give tables under captions/, or 'original'"):
        replace(STREAM, captioners=())
    with pytest.raises(ValueError, match=r"captioners=\['a', 'a'\] must differ"):
        WeightedTable(latents=PATH, captioners=("a", "a"))


def test_a_table_of_a_mixture_may_have_captioners_of_its_own(tmp_path: Path) -> None:
    make_table(tmp_path / "own", make_shards([8]))
    make_table(tmp_path / "far", make_shards([8], first=100))
    far = WeightedTable(latents=PATH, dataset_uri=str(tmp_path / "far"), captioners=("b",))
    config = replace(STREAM, selection=SelectionConfig(policy="random"), caption_dropout=0.0)
    sources = find_sources(str(tmp_path / "own"), [WeightedTable(latents=PATH), far], config)
    captions: dict[str, set[str | None]] = {}
    for batch in islice(TrainingStream(sources, config, micro_batch_size=4, seed=0), 40):
        for uri, caption in zip(batch.tables, batch.captions, strict=True):
            captions.setdefault(uri, set()).add(caption)
    assert captions[sources[1].table.uri] == {"red", "green", "blue", "yellow"}
    assert captions[sources[0].table.uri] == captions[sources[1].table.uri] | {
        f"a {color} square" for color in ("red", "green", "blue", "yellow")
    }


def test_a_captioner_that_is_added_joins_at_the_next_sample(tmp_path: Path) -> None:
    """The checkpoint's order goes on; from then on the new captions compete too."""
    shards = make_shards([9, 14, 7], ("64x64", "32x128"))
    table = make_table(tmp_path, shards)
    config = replace(STREAM, selection=SelectionConfig(policy="random"), shuffle_shards=2)
    stream = TrainingStream([make_source(table)], config, micro_batch_size=4, seed=3)
    list(islice(stream, 5))
    state = stream.state_dict()
    assert any(state["buffers"].values())
    add_captioner(tmp_path, "c", {name: {row["id"]: ("new", 31.0) for row in rows} for name, rows in shards.items()})
    more = replace(config, captioners=("a", "b", "c"))
    resumed = TrainingStream(find_sources(str(tmp_path), PATH, more), more, micro_batch_size=4, seed=3)
    resumed.load_state_dict(state)
    captions: list[str] = []
    for expected, batch in zip(islice(stream, 40), resumed, strict=False):
        assert (batch.ids, batch.epochs, batch.bucket) == (expected.ids, expected.epochs, expected.bucket)
        captions += batch.captions
    assert 0.2 < captions.count("new") / len(captions) < 0.45  # a third
