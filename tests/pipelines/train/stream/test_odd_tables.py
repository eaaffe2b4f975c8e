"""Tables that do not fit together end a training before its first step, in a sentence that names the table."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.storage.files import read_file, remove_files
from pipelines.tables.identity import MANIFEST
from pipelines.tables.schema import CAPTIONS, SCORES, Row
from pipelines.tables.table import Table
from pipelines.train.stream.config import StreamConfig
from pipelines.train.stream.mixture import check_complete, find_sources
from tests.support.whole_dataset import SHARDS, make_dataset

STREAM = StreamConfig(captioners=("a", "b"), clip="clip")
Found = dict[str, list[tuple[str, float]]]
"""Captions and scores by image."""


def scores(uri: str, captioner: str = "a") -> Table:
    return Table(uri, f"scores/clip/{captioner}", SCORES)


def rewrite(table: Table, change: Callable[[list[Row]], list[Row]]) -> None:
    for shard in table.list_shards():
        rows = change(table.read_shard(shard).to_pylist())
        table.write_shard(shard, pa.Table.from_pylist(rows, table.schema))


def copy_over(source: Table, target: Table) -> None:
    for name in (MANIFEST, *(f"{shard}.parquet" for shard in SHARDS)):
        target.write_file(name, read_file(f"{source.uri}/{name}"))


SPOILED: dict[str, tuple[Callable[[str], object], StreamConfig, str]] = {
    "a captioner that is not there": (
        lambda uri: None,
        replace(STREAM, captioners=("a", "c")),
        r"no table 'captions/c' in .*, which has captions/a, captions/b: run .* \(jobs\.caption or jobs\.import_captions\)",
    ),
    "a captioner without scores": (
        lambda uri: remove_files([f"{scores(uri).uri}/{name}" for name in scores(uri).list_files()]),
        STREAM,
        r"no table 'scores/clip/a' in .*, which has scores/clip/b: run .* first \(jobs\.score\)",
    ),
    "a CLIP that is not there": (lambda uri: None, replace(STREAM, clip="siglip"), "no table 'scores/siglip/a'"),
    "another CLIP's scores": (
        lambda uri: [copy_over(scores(uri, name), Table(uri, f"scores/siglip/{name}", SCORES)) for name in "ab"],
        replace(STREAM, clip="siglip"),
        r"scores/siglip/a/_manifest\.json .*it is a copy of that of scores/clip/a",
    ),
    "another captioner's scores": (
        lambda uri: copy_over(scores(uri, "b"), scores(uri)),
        STREAM,
        r"scores/clip/a/_manifest\.json .*it is a copy of that of scores/clip/b",
    ),
    "scores that came with imported captions": (
        lambda uri: scores(uri).write_manifest(replace(scores(uri).require(), stage="import_captions", schema_version=1)),
        STREAM,
        "scores/clip/a came with imported captions, and cannot be compared with .*scores/clip/b: delete it",
    ),
    "scores of a later form": (
        lambda uri: scores(uri).write_manifest(replace(scores(uri).require(), schema_version=9)),
        STREAM,
        "a later version wrote it: it is of form 9, this one knows 2.*: use that version",
    ),
    "scores without a shard": (
        lambda uri: remove_files([scores(uri).shard_uri("00001")]),
        STREAM,
        "scores/clip/a has no shard 00001, which .*latents/ae-64 has: run its stage again",
    ),
    "scores that are no number": (
        lambda uri: rewrite(scores(uri), lambda rows: [rows[0] | {"clip_score": float("nan")}, *rows[1:]]),
        STREAM,
        r"scores/clip/a/00000\.parquet has 1 scores that are not finite: let python -m jobs\.repair",
    ),
}


ON_S3 = ("a captioner without scores", "another CLIP's scores", "scores without a shard")


def read(uri: str, config: StreamConfig) -> Found:
    """What competes for each image of the first shard, once the training has looked at its tables."""
    (source,) = find_sources(uri, "latents/ae-64", config)
    check_complete(source)
    found = source.candidates.read("00000")
    return {row_id: [(one["caption"], one["clip_score"]) for one in captions] for row_id, captions in found.items()}


@pytest.mark.parametrize(("place", "what"), [*(("here", what) for what in SPOILED), *(("s3", what) for what in ON_S3)])
def test_what_does_not_fit_is_refused(request: pytest.FixtureRequest, tmp_path: Path, place: str, what: str) -> None:
    uri = str(tmp_path) if place == "here" else f"{request.getfixturevalue('bucket_uri')}/{tmp_path.name}"
    make_dataset(uri)
    spoil, config, told = SPOILED[what]
    spoil(uri)
    with pytest.raises(ValueError, match=told):
        read(uri, config)


def test_rows_in_another_order_and_fewer_of_them_move_no_caption(tmp_path: Path) -> None:
    uri = str(tmp_path)
    make_dataset(uri)
    first = read(uri, STREAM)
    assert len(first) == 20 and all(len(captions) == 2 for captions in first.values())
    for table in (scores(uri), Table(uri, "captions/a", CAPTIONS)):
        rewrite(table, lambda rows: rows[::-1])
    assert read(uri, STREAM) == first
    kept = Table(uri, "captions/b", CAPTIONS).read_shard("00000")["id"][0].as_py()
    rewrite(Table(uri, "captions/b", CAPTIONS), lambda rows: rows[:1])
    assert read(uri, STREAM) == {row_id: captions[: 1 + (row_id == kept)] for row_id, captions in first.items()}
