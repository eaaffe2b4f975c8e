"""Tables that do not fit together end a training before its first step, in a sentence that names the table."""

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.storage.files import read_file, remove_files
from pipelines.tables.identity import MANIFEST
from pipelines.tables.schema import CAPTIONS, SCORES, Row
from pipelines.tables.table import Table
from pipelines.train.stream.config import StreamConfig
from pipelines.train.stream.mixture import check_complete, find_sources
from pipelines.train.stream.stream import TrainingStream
from tests.support.training_world import PATH, STREAM, make_shards, make_table

Spoil = Callable[[str], StreamConfig | None]
"""Changes the dataset at a URI; returns the configuration of the training if it is another one."""


def scores(uri: str, captioner: str = "a") -> Table:
    return Table(uri, f"scores/clip/{captioner}", SCORES)


def rewrite(table: Table, change: Callable[[list[Row]], list[Row]]) -> None:
    for shard in table.list_shards():
        table.write_shard(shard, pa.Table.from_pylist(change(table.read_shard(shard).to_pylist()), table.schema))


def copy_over(source: Table, target: Table) -> None:
    for name in (MANIFEST, "00000.parquet", "00001.parquet"):
        target.write_file(name, read_file(f"{source.uri}/{name}"))


SPOILED: dict[str, tuple[Spoil, str]] = {
    "a captioner that is not there": (
        lambda uri: replace(STREAM, captioners=("a", "c")),
        r"no table 'captions/c' in .*, which has captions/a, captions/b: run .* \(jobs\.caption or jobs\.import_captions\)",
    ),
    "a captioner without scores": (
        lambda uri: remove_files([f"{scores(uri).uri}/{name}" for name in scores(uri).list_files()]),
        r"no table 'scores/clip/a' in .*, which has scores/clip/b: run .* first \(jobs\.score\)",
    ),
    "a CLIP that is not there": (lambda uri: replace(STREAM, clip="siglip"), "no table 'scores/siglip/a'"),
    "another CLIP's scores": (
        lambda uri: (
            [copy_over(scores(uri, name), Table(uri, f"scores/siglip/{name}", SCORES)) for name in "ab"]
            and replace(STREAM, clip="siglip")
        ),
        "scores/siglip/a/_manifest.json .* it is a copy of that of scores/clip/a",
    ),
    "scores that came with imported captions": (
        lambda uri: scores(uri).write_manifest(replace(scores(uri).require(), stage="import_captions", schema_version=1)),
        "scores/clip/a by jobs.import_captions and .*scores/clip/b by jobs.score cannot be compared",
    ),
    "another captioner's scores": (
        lambda uri: copy_over(scores(uri, "b"), scores(uri)),
        "scores/clip/a/_manifest.json .* it is a copy of that of scores/clip/b",
    ),
    "scores of a later form": (
        lambda uri: scores(uri).write_manifest(replace(scores(uri).require(), schema_version=9)),
        "a later version wrote it: it is of form 9, this one knows 2.*: use that version",
    ),
    "scores without a shard": (
        lambda uri: remove_files([scores(uri).shard_uri("00001")]),
        "scores/clip/a has no shard 00001, which .*latents/tiny-64 has: run its stage again",
    ),
    "scores that are no number": (
        lambda uri: rewrite(scores(uri), lambda rows: [rows[0] | {"clip_score": float("nan")}, *rows[1:]]),
        r"scores/clip/a/0000\d\.parquet has 1 scores that are not finite: let python -m jobs\.repair",
    ),
}


@pytest.fixture(params=["file", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "file" else f"{request.getfixturevalue('bucket_uri')}/{tmp_path.name}"


def draw(uri: str, config: StreamConfig) -> list[tuple[str, str]]:
    """Ids and captions of the first samples."""
    sources = find_sources(uri, PATH, config)
    for source in sources:
        check_complete(source)
    batches = islice(TrainingStream(sources, config, micro_batch_size=4, seed=3), 4)
    return [pair for batch in batches for pair in zip(batch.ids, batch.captions, strict=True)]


@pytest.mark.parametrize("what", SPOILED)
def test_what_does_not_fit_is_refused(place: str, what: str) -> None:
    make_table(place, make_shards([4, 4]))
    spoil, told = SPOILED[what]
    with pytest.raises(ValueError, match=f"(?s){told}"):
        draw(place, spoil(place) or STREAM)


def test_rows_in_another_order_and_fewer_of_them_move_no_caption(place: str) -> None:
    make_table(place, make_shards([4, 4]))
    first = draw(place, STREAM)
    for table in (scores(place), Table(place, "captions/a", CAPTIONS)):
        rewrite(table, lambda rows: rows[::-1])
    assert draw(place, STREAM) == first
    rewrite(Table(place, "captions/b", CAPTIONS), lambda rows: rows[:1])
    assert [(row_id, caption) for row_id, caption in draw(place, STREAM)] == [
        (row_id, caption if len(caption.split()) > 1 or int(row_id, 16) % 4 == 0 else f"a {caption} square")
        for row_id, caption in first
    ]
