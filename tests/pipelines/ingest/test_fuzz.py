"""Random and damaged files through the readers and the image decoder: no crash, no hang, bounded memory, and nothing lost.

A few examples run with the other tests. By hand, for as many seconds as you like, each on its own:

    FUZZ_SECONDS=600 python -m pytest tests/pipelines/ingest/test_fuzz.py -k tars -s

What is being tried lies in `fuzz.bin` of the test's temporary folder (`--basetemp`), should the process die.
"""

import csv
import io
import json
import os
import resource
import signal
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, seed, settings

from pipelines.ingest.readers import count_samples, read_parts
from pipelines.ingest.sources import find_parts, find_source
from pipelines.ingest.text_tables import LIST_ERROR, read_table
from pipelines.tables.rejects import RowRefused
from pipelines.tables.schema import Row
from pipelines.workers.images import ImageLimits, decode
from tests.support.hostile_images import all_hostile, encode, gradient

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
EXAMPLES = 200 if SECONDS else 25
MAX_SECONDS = 10  # of one example
MAX_GROWTH = 2**30  # bytes, of the process, over all examples
LIMITS = ImageLimits(max_pixels=4_000_000)


def fuzz(strategy: st.SearchStrategy[Any], try_one: Callable[[Any], object]) -> None:
    """Try examples of a strategy, each within MAX_SECONDS; with FUZZ_SECONDS for so long, else a few, always the same."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    number, end = 0, time.monotonic() + SECONDS
    while number == 0 or time.monotonic() < end:

        @seed(number)
        @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(strategy)
        def run(example: Any) -> None:
            with within(MAX_SECONDS):
                try_one(example)

        run()
        number += 1
    growth = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert growth < MAX_GROWTH, f"{growth / 2**20:.0f} MiB"
    if SECONDS:
        print(f"{number * EXAMPLES} examples, {growth / 2**20:.0f} MiB more at most")


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raise TimeoutError if the body takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"over {seconds} s")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


@st.composite
def damaged(draw: st.DrawFn, contents: st.SearchStrategy[bytes]) -> bytes:
    """A content with some bytes changed, a piece cut out or repeated, or its end cut off; now and then it is left whole."""
    content = bytearray(draw(contents))
    for _ in range(draw(st.integers(0, 6))):
        if not content:
            break
        place = draw(st.integers(0, len(content) - 1) | st.integers(0, min(len(content) - 1, 1023)))
        match draw(st.sampled_from(["byte", "byte", "bit", "piece", "cut", "repeat", "end"])):
            case "byte":
                content[place] = draw(st.sampled_from([0, 1, 127, 128, 255]) | st.integers(0, 255))
            case "bit":
                content[place] ^= 1 << draw(st.integers(0, 7))
            case "piece":
                piece = draw(st.binary(max_size=16))
                content[place : place + len(piece)] = piece
            case "cut":
                del content[place : place + draw(st.sampled_from([1, 8, 511, 512, 1024]))]
            case "repeat":
                content[place:place] = content[place : place + draw(st.sampled_from([1, 8, 512, 1024]))]
            case "end":
                del content[place:]
    return bytes(content)


def rows_of(folder: Path, kind: Any, name: str, content: bytes) -> list[Row]:
    """The rows that the readers make of a file. Raises ValueError where a user is told to put a file right."""
    (folder / "fuzz.bin").write_bytes(content)
    (folder / name).write_bytes(content)
    source = find_source(str(folder / name), kind, copies_uri=str(folder / "copies"))
    parts, _ = find_parts(source)
    counts = [count_samples(source, part) for part in parts]
    assert all(count is None or 0 <= count <= 8 * len(content) for count in counts)
    table = read_parts(source, [part for part, count in zip(parts, counts, strict=True) if count != 0])
    rows = table.to_pylist()
    for row in rows:
        assert row["error"] or row["image_bytes"] is not None
        assert row["metadata"] is None or isinstance(json.loads(row["metadata"]), dict)
    return rows


NAMES = st.sampled_from(["a", "b", "./a", "d/a", "a.b", "@eaDir/a", ".a", "é" * 60, "x" * 120, "\udce9"])
ENDINGS = st.sampled_from([".jpg", ".png", ".txt", ".json", ".JPG", ".caption", ".cls", "", ".jpg.json"])
TYPES = st.sampled_from([tarfile.REGTYPE] * 8 + [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, b"Z"])
HEADERS = st.dictionaries(
    st.sampled_from(["size", "path", "comment", "GNU.sparse.map", "GNU.sparse.size", "GNU.sparse.realsize", "hdrcharset"])
    | st.sampled_from(["GNU.sparse.major", "GNU.sparse.minor", "GNU.sparse.numblocks", "GNU.sparse.name"]),
    st.sampled_from(["0", "1", "-1", "512", "1e9", "10000000000", "9" * 30, "x", "0,512,4096,1", "a.jpg", "BINARY"]),
    max_size=3,
)
CONTENTS = st.binary(max_size=700) | st.sampled_from(
    [b'{"caption": "a"}', b"caption", b"\xff\xd8\xff\xe0" * 200, b"0\n" + bytes(510)]
)


@st.composite
def tar_files(draw: st.DrawFn) -> bytes:
    buffer = io.BytesIO()
    format = draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]))
    mode: Any = draw(st.sampled_from(["w", "w", "w:gz", "w:bz2", "w:xz"]))
    with tarfile.open(fileobj=buffer, mode=mode, format=format) as archive:
        for _ in range(draw(st.integers(0, 6))):
            info = tarfile.TarInfo(draw(NAMES) + draw(ENDINGS))
            info.type, info.linkname = draw(TYPES), draw(NAMES) + draw(ENDINGS)
            content = draw(CONTENTS)
            info.size = len(content)
            info.pax_headers = draw(HEADERS)
            with suppress(ValueError, UnicodeError):  # what the format cannot write
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue() * draw(st.sampled_from([1, 1, 1, 2]))


def test_tars(tmp_path: Path) -> None:
    fuzz(damaged(tar_files()) | st.binary(max_size=2000), lambda content: rows_of(tmp_path, "webdataset", "x.tar", content))


TEXTS = st.text(max_size=20) | st.sampled_from(["a.jpg", "data:,x", "", "x" * 300])
COLUMNS = {
    "text": (TEXTS, pa.string()),
    "binary": (st.binary(max_size=50), pa.binary()),
    "list": (st.lists(TEXTS, max_size=3), pa.list_(pa.string())),
    "struct": (st.fixed_dictionaries({"bytes": st.none() | st.binary(max_size=9), "path": st.none() | TEXTS}), None),
    "int": (st.integers(-(2**63), 2**63 - 1), pa.int64()),
    "float": (st.floats(), pa.float64()),
    "time": (st.integers(-(2**62), 2**62), pa.timestamp("us")),
}


@st.composite
def parquet_files(draw: st.DrawFn) -> bytes:
    num_rows = draw(st.integers(0, 12))
    names = draw(st.lists(st.sampled_from(["image", "url", "text", "caption", "x", "a.b"]), min_size=1, max_size=5))
    arrays = []
    for _ in names:
        values, kind = COLUMNS[draw(st.sampled_from(sorted(COLUMNS)))]
        drawn = draw(st.lists(st.none() | values, min_size=num_rows, max_size=num_rows))
        array = pa.array(drawn, kind or pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        arrays.append(array.dictionary_encode() if kind in (pa.string(), pa.binary()) and draw(st.booleans()) else array)
    buffer = io.BytesIO()
    compression = draw(st.sampled_from(["none", "zstd", "snappy", "gzip"]))
    version: Any = draw(st.sampled_from(["1.0", "2.6"]))
    pages: Any = draw(st.sampled_from(["1.0", "2.0"]))
    table = pa.Table.from_arrays(arrays, names=names)
    pq.write_table(table, buffer, row_group_size=4, compression=compression, version=version, data_page_version=pages)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["parquet", "list"])
def test_parquet(kind: str, tmp_path: Path) -> None:
    def try_one(content: bytes) -> None:
        try:
            rows_of(tmp_path, kind, "x.parquet", content)
        except ValueError as error:
            assert "x.parquet" in str(error), "a user must be told which file it is"

    fuzz(damaged(parquet_files()), try_one)


@st.composite
def text_files(draw: st.DrawFn, ending: str) -> bytes:
    """A list with strange texts in it, which may be badly quoted, in some encoding."""
    rows = draw(st.lists(st.lists(TEXTS, min_size=1, max_size=4), max_size=6))
    if ending == ".jsonl":
        lines = [json.dumps(dict(zip(["url", "text", "x", "y"], row, strict=False))) for row in rows]
    else:
        delimiter = "\t" if ending == ".tsv" else ","
        quoted = draw(st.sampled_from(['"', "", '\\"']))
        lines = [delimiter.join(["url", "text", "x"])]
        lines += [delimiter.join(quoted + text + draw(st.sampled_from([quoted, ""])) for text in row) for row in rows]
    text = draw(st.sampled_from(["\n", "\r\n", "\r"])).join(lines)
    return text.encode(draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1"])), "replace")


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl"])
def test_lists_of_text(ending: str, tmp_path: Path) -> None:
    def try_one(content: bytes) -> None:
        try:
            rows_of(tmp_path, "list", f"x{ending}", content)
        except ValueError as error:
            assert f"x{ending} has no column of URLs" in str(error)

    fuzz(damaged(text_files(ending)) | st.binary(max_size=300), try_one)


def test_json_side_files(tmp_path: Path) -> None:
    values = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | TEXTS, lambda inner: st.lists(inner))
    objects = st.dictionaries(st.sampled_from(["caption", "text", "a"]), values).map(json.dumps).map(str.encode)
    deep = st.builds(lambda opened, depth: b'{"a":' + opened * depth, st.sampled_from([b"[", b'{"a":']), st.integers(0, 9000))

    def try_one(content: bytes) -> None:
        (tmp_path / "a.json").write_bytes(content)
        [row] = rows_of(tmp_path, "folder", "a.jpg", b"image")
        assert row["image_bytes"] == b"image"

    fuzz(damaged(objects) | deep | st.binary(max_size=300), try_one)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore:Corrupt EXIF", "ignore::UserWarning")
def test_images(tmp_path: Path) -> None:
    formats = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"]
    whole = [encode(gradient(), name) for name in formats]
    hostile = [case.content for case in all_hostile() if len(case.content) < 50_000]

    def try_one(content: bytes) -> None:
        (tmp_path / "fuzz.bin").write_bytes(content)
        with suppress(RowRefused):
            assert decode(content, LIMITS).mode == "RGB"

    fuzz(damaged(st.sampled_from(whole + hostile)), try_one)


def test_what_csv_writes_is_read_back() -> None:
    """Against Python's own writer, for every text, delimiter and quoting."""
    cells = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
    rows = st.lists(st.lists(cells, min_size=2, max_size=2), max_size=5)

    def try_one(given: tuple[list[list[str]], int]) -> None:
        written, quoting = given
        buffer = io.StringIO(newline="")
        writer = csv.writer(buffer, quoting=quoting)
        writer.writerow(["a", "b"])
        writer.writerows(written)
        found = list(read_table(io.BytesIO(buffer.getvalue().encode()), "x.csv"))
        assert [[row["a"], row["b"]] for row in found if LIST_ERROR not in row] == written

    fuzz(st.tuples(rows, st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])), try_one)
