"""The stream of crops: which images and crops come, in which order, and that it goes on anywhere."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.score.config import ImageFilter
from pipelines.tables.chance import is_held_out
from pipelines.tables.identity import Identity
from pipelines.tables.schema import IMAGE_SCORES
from pipelines.tables.table import Table
from pipelines.train.stream.prefetch import PrefetchedStream
from pipelines.train_autoencoder.config import CropConfig, ImageSource, PictureConfig
from pipelines.train_autoencoder.crops import CropJob, crop_box, cut_crop
from pipelines.train_autoencoder.pictures import read_pictures
from pipelines.train_autoencoder.run import train_autoencoder_identity
from pipelines.train_autoencoder.stream import CropBatch, CropStream, find_sources
from tests.support.autoencoder_world import make_image_row, make_images, tiny_training, to_row, write_images
from tests.support.training_world import write_table

CONFIG = CropConfig(sizes=(16, 32), decode_processes=0, shuffle_shards=2)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return make_images(tmp_path_factory.mktemp("data"), [9, 7, 8, 6])


def make_stream(table: Table, config: CropConfig = CONFIG, *, rank: int = 0, world_size: int = 1, accum: int = 1) -> CropStream:
    sizes = {"micro_batch_size": 4, "grad_accum_steps": accum, "seed": 3, "rank": rank, "world_size": world_size}
    return CropStream(find_sources(table.dataset_uri, config), config, **sizes)


def take(stream: CropStream, count: int) -> list[CropBatch]:
    return list(islice(stream, count))


def assert_same(batches: list[CropBatch], others: list[CropBatch]) -> None:
    for batch, other in zip(batches, others, strict=True):
        assert (batch.ids, batch.epochs) == (other.ids, other.epochs) and torch.equal(batch.images, other.images)


def draws(batches: Iterator[CropBatch] | list[CropBatch]) -> Counter[tuple[int, str]]:
    return Counter((epoch, row_id) for batch in batches for epoch, row_id in zip(batch.epochs, batch.ids, strict=True))


def test_each_image_comes_once_an_epoch_and_sizes_take_turns_by_chance(table: Table) -> None:
    batches = take(make_stream(table), 45)
    assert set(draws(batches).values()) == {1} and len(draws(batches)) == 180
    assert {batch.images.shape[-1] for batch in batches} == {16, 32}
    assert max(epoch for batch in batches for epoch in batch.epochs) == 5


def test_processes_that_decode_ahead_change_nothing(table: Table) -> None:
    """Nor does reading ahead in a thread; the state is that of the batch last taken."""
    plain = take(make_stream(table), 9)
    ahead = PrefetchedStream(make_stream(table, replace(CONFIG, decode_processes=1, prefetch=2)), depth=2)
    assert_same([next(ahead) for _ in range(5)], plain[:5])
    resumed = make_stream(table)
    resumed.load_all_states([ahead.state_dict()])
    ahead.close()
    assert_same(take(resumed, 4), plain[5:])


def test_another_number_of_ranks_goes_on_and_loses_nothing(table: Table) -> None:
    """Three ranks for four steps of two micro-batches, then two: all draws of the epochs come once, sizes are the step's."""
    streams = [make_stream(table, rank=rank, world_size=3, accum=2) for rank in range(3)]
    before = [take(stream, 8) for stream in streams]
    states = [stream.state_dict() for stream in streams]
    assert all(state["step"] == 4 for state in states)
    resumed = [make_stream(table, rank=rank, world_size=2, accum=3) for rank in range(2)]
    for stream in resumed:
        stream.load_all_states(states)
    after = [take(stream, 30) for stream in resumed]
    counts = draws([batch for batches in [*before, *after] for batch in batches])
    assert set(counts.values()) == {1}
    ended = min(stream.state_dict()["epoch"] for stream in resumed)
    ids = [row_id for shard in table.list_shards() for row_id in table.read_shard(shard, ["id"])["id"].to_pylist()]
    assert ended > 5 and {(epoch, row_id) for epoch in range(ended) for row_id in ids} <= counts.keys()
    for first, second in zip(*after, strict=True):
        assert first.images.shape == second.images.shape


def test_mixtures_held_out_images_and_small_ones(tmp_path: Path, table: Table) -> None:
    """Another dataset's images come three times an epoch; held-out ones and ones that are too small for the step never do."""
    small = [make_image_row(100 + index, (20, 60)) for index in range(4)]
    write_images(tmp_path, [[*small, *(make_image_row(200 + index) for index in range(4))]])
    sources = (ImageSource(), ImageSource(dataset_uri=str(tmp_path), times=3))
    config = replace(CONFIG, sources=sources, held_out_share=0.3, shuffle_shards=1)
    batches = take(make_stream(table, config), 60)
    assert not any(is_held_out(row_id, 0.3) for batch in batches for row_id in batch.ids)
    names = {row["id"] for row in small}
    assert all(batch.images.shape[-1] == 16 for batch in batches if names & set(batch.ids))
    assert any(names & set(batch.ids) for batch in batches)
    theirs = Counter(
        epoch // 3 for batch in batches for epoch, uri in zip(batch.epochs, batch.tables, strict=True) if str(tmp_path) in uri
    )
    assert set(draws(batches).values()) == {1} and theirs[0] > 3


def test_scores_choose_what_is_trained_on_and_what_is_measured_on(tmp_path: Path) -> None:
    images = make_images(tmp_path, [30])
    shard = images.list_shards()[0]
    ids = images.read_shard(shard, ["id"])["id"].to_pylist()
    rows = [{"id": row_id, "score": float(index), "detail": None} for index, row_id in enumerate(ids)]
    scores = Table(str(tmp_path), "image_scores/aesthetic", IMAGE_SCORES)
    write_table(scores, Identity("score_images", {}, {}, {}), {shard: rows})
    data = replace(CONFIG, held_out_share=0.4, image_filters={"aesthetic": ImageFilter(min=10.0)})
    training = tiny_training(data=data, validation=PictureConfig(num_images=30, size=16))
    admitted = set(ids[10:])
    held_out = {row_id for row_id in admitted if is_held_out(row_id, 0.4)}
    assert {row_id for batch in take(make_stream(images, data), 20) for row_id in batch.ids} == admitted - held_out
    assert len(read_pictures(str(tmp_path), training)) == len(held_out) > 3
    assert "image_scores/aesthetic" in train_autoencoder_identity(str(tmp_path), training).inputs
    write_table(scores, Identity("score_images", {}, {}, {}), {shard: rows}, complete=False)
    with pytest.raises(ValueError, match="aesthetic is not complete"):
        train_autoencoder_identity(str(tmp_path), training)


def test_crops_lie_within_the_image_and_reach_its_edges() -> None:
    image = np.zeros((30, 50, 3), np.uint8)
    image[:, :, 0] = np.arange(50)  # the column
    row = to_row(b"", 50, 30)
    job = CropJob(row["image_bytes"], 16, 0.5, 1.0, flip=True, key="0")
    boxes = [crop_box(50, 30, replace(job, key=str(index))) for index in range(300)]
    assert all(0 <= left <= 50 - side and 0 <= top <= 30 - side and 15 <= side <= 30 for left, top, side in boxes)
    assert min(side for *_, side in boxes) < 15.2 and max(side for *_, side in boxes) > 29.8
    assert max(left for left, *_ in boxes) > 30 and min(left for left, *_ in boxes) < 1


def test_what_cannot_be_decoded_is_replaced_and_counted(tmp_path: Path) -> None:
    rows = [make_image_row(index) for index in range(7)]
    broken = to_row(rows[0]["image_bytes"][:200], 40, 40)
    table = write_images(tmp_path, [[*rows, broken]])
    batches = take(make_stream(table, replace(CONFIG, sizes=(16,))), 4)
    assert [batch.num_refused for batch in batches].count(1) == 2  # once an epoch of two micro-batches
    assert all(broken["id"] not in batch.ids and len(batch.ids) == 4 for batch in batches)
    assert isinstance(cut_crop(CropJob(broken["image_bytes"], 16, 0.5, 1.0, flip=False, key="")), str)


def test_flipped_crops_are_mirrored() -> None:
    image_bytes = make_image_row(1)["image_bytes"]
    jobs = [CropJob(image_bytes, 16, 1.0, 1.0, flip=flip, key=str(key)) for key in range(8) for flip in (False, True)]
    crops = [cut_crop(job) for job in jobs]
    mirrored = 0
    for plain, other in zip(crops[::2], crops[1::2], strict=True):
        assert isinstance(plain, np.ndarray) and isinstance(other, np.ndarray)
        mirrored += np.array_equal(np.asarray(Image.fromarray(plain).transpose(Image.Transpose.FLIP_LEFT_RIGHT)), other)
    assert 0 < mirrored < 8


def test_images_that_are_too_small_are_told(tmp_path: Path, table: Table) -> None:
    with pytest.raises(ValueError, match=r"large enough for crops of 64 pixels: the largest has a shorter side of 40"):
        make_stream(table, replace(CONFIG, sizes=(64,)))
    assert take(make_stream(table, replace(CONFIG, sizes=(64,), max_upscale=1.6)), 1)[0].images.shape[-1] == 64
    with pytest.raises(ValueError, match="is empty: there is nothing to train on"):
        make_stream(write_images(tmp_path, []))
    with pytest.raises(ValueError, match="num_workers=5 need a shard each"):
        make_stream(table, world_size=5)
