"""Sources as people have them, and as attackers make them: each costs what it must and no more, and nothing vanishes untold.

A case makes a source, and says which rows are read from it and what is counted as not taken.
"""

import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.ingest import tars as tars_module
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.not_taken import describe_not_taken
from pipelines.ingest.readers import count_samples, read_parts
from pipelines.ingest.run import run_ingest
from pipelines.ingest.sources import find_parts, find_source, list_parts
from pipelines.reports.images import images_report
from pipelines.tables.schema import Row
from tests.support.html_page import check_page

IMAGE = b"\xff\xd8\xff\xe0 the readers do not decode"


@dataclass(frozen=True)
class Case:
    """How a source is made below a folder, (error, caption) of each row that it gives, and what is counted, by kind."""

    make: Callable[[Path], None]
    rows: list[tuple[str | None, str | None]]
    not_taken: Mapping[str, int] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[list[Row]], object] = lambda rows: True


def read(folder: Path, **options: Any) -> tuple[list[Row], dict[str, int]]:
    """The rows of a source, as the stage reads them: planned, then in one shard; and what was not taken, by kind."""
    source = find_source(str(folder), options.pop("kind", "auto"), copies_uri=f"{folder}-copies", **options)
    parts = [(part, count_samples(source, part)) for part in list_parts(source)]
    rows = read_parts(source, [part for part, count in parts if count != 0]).to_pylist()
    counted: dict[str, int] = dict(find_parts(source)[1])
    for row in rows:
        for kind, count in row["not_taken"] or ():
            counted[kind] = counted.get(kind, 0) + count
    return rows, counted


def bad_text(*values: bytes | None) -> pa.Array:
    """A string column that holds these bytes, whatever they are."""
    plain = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(values), plain.buffers())


def parquet(**columns: Any) -> Callable[[Path], None]:
    return lambda folder: pq.write_table(pa.table(columns), folder / "x.parquet")


def two_of_a_name(folder: Path) -> None:
    arrays = [pa.array(["a", "b"]), pa.array([b"1", b"2"]), pa.array([1, 2]), pa.array(["c", "d"])]
    pq.write_table(pa.Table.from_arrays(arrays, names=["text", "image", "text", "text"]), folder / "x.parquet")


def damaged_column(folder: Path) -> None:
    """Only the pages of the column "score" are damaged."""
    path = folder / "x.parquet"
    table = pa.table({"image": [b"1", b"2"], "text": ["a", "b"], "score": [0.123456, 0.654321]})
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    chunk = pq.read_metadata(path).row_group(0).column(2)
    content[chunk.data_page_offset : chunk.data_page_offset + 10] = b"\xff" * 10
    path.write_bytes(content)


def files(**named: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name, content in named.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    return write


def beside(content: bytes, ending: str = "json") -> Callable[[Path], None]:
    return files(**{"a.jpg": IMAGE, f"a.{ending}": content})


Entry = tuple[str, bytes | str | Mapping[str, Any]]
"""Name and content of a member of a tar; a text is what a symbolic link leads to, a mapping holds attributes of a header."""


def tar(*entries: Entry, mode: str = "w", format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=format) as archive:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            attributes = dict(content) if isinstance(content, Mapping) else {}
            data = attributes.pop("data", b"") if isinstance(content, Mapping) else content
            if isinstance(data, str):
                info.type, info.linkname, data = tarfile.SYMTYPE, data, b""
            for attribute, value in attributes.items():
                setattr(info, attribute, value)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def tars(**named: bytes) -> Callable[[Path], None]:
    return files(**{name.replace("__", "."): content for name, content in named.items()})


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :]


GOOD_TAR = tar(("b.jpg", IMAGE), ("b.txt", b"good"))
DEEP = b'{"caption": "deep", "x": ' + b"[" * 900 + b"]" * 900 + b"}"
BAD_VALUES = {
    "bytes that are no UTF-8 among captions": Case(
        parquet(image=[b"1", b"2"], text=bad_text(b"caf\x81\xff\xfe", b"fine")),
        [(None, None), (None, "fine")],
        {"captions in an unknown encoding": 1},
    ),
    "bytes that are no UTF-8 in a column that is only metadata": Case(
        parquet(image=[b"1", b"2"], text=["one", "two"], note=bad_text(b"\x81\xff\xfe", b"fine")),
        [(None, "one"), (None, "two")],
        {"values that cannot be read": 1},
        check=lambda rows: json.loads(rows[1]["metadata"]) == {"note": "fine"},
    ),
    "a timestamp outside Python's range": Case(
        parquet(image=[b"1", b"2"], text=["one", "two"], time=pa.array([2**62, 0], pa.timestamp("us"))),
        [(None, "one"), (None, "two")],
        check=lambda rows: json.loads(rows[0]["metadata"]) == {"time": f"{2**62} (timestamp[us])"},
    ),
    "three columns of one name": Case(
        two_of_a_name,
        [(None, "a"), (None, "b")],
        check=lambda rows: json.loads(rows[0]["metadata"]) == {"text (2)": 1, "text (3)": "c"},
    ),
    "a damaged column beside the images": Case(damaged_column, [(None, "a"), (None, "b")], {"values that cannot be read": 2}),
    "a date beyond all calendars": Case(
        parquet(image=[b"1"], text=["one"], day=pa.array([2**30], pa.int32()).cast(pa.date32())), [(None, "one")]
    ),
    "a time zone that is none": Case(
        parquet(image=[b"1"], text=["one"], time=pa.array([1], pa.timestamp("s", "Nowhere/Land"))), [(None, "one")]
    ),
    "bytes that are no UTF-8 inside of lists and structs": Case(
        parquet(
            image=[b"1"],
            captions=pa.ListArray.from_arrays([0, 2], bad_text(b"\x81\xff\xfe", b"second")),
            more=pa.StructArray.from_arrays([bad_text(b"\x81\xff\xfe"), pa.array([7])], ["name", "size"]),
        ),
        [(None, "second")],
        {"captions in an unknown encoding": 1, "values that cannot be read": 1},
        check=lambda rows: json.loads(rows[0]["metadata"])["more"] == {"name": None, "size": 7},
    ),
    "JSON nested to the recursion limit": Case(
        beside(DEEP),
        [(None, "deep")],
        check=lambda rows: json.loads(rows[0]["metadata"])["x"] == "<nested deeper than 100>",
    ),
    "JSON nested beyond it": Case(beside(b"[" * 100_000), [(None, None)], {"side files that cannot be read": 1}),
    "JSON with an integer of 5000 digits": Case(beside(b'{"text": "one", "x": ' + b"7" * 5000 + b"}"), [(None, "one")]),
    "JSON with one key twice": Case(
        beside(b'{"text": "one", "text": "two"}'),
        [(None, "one")],
        check=lambda rows: json.loads(rows[0]["metadata"]) == {"text (2)": "two"},
    ),
    "a tar with size=10^30": Case(
        tars(
            a__tar=tar(("a.jpg", IMAGE), ("c.jpg", {"pax_headers": {"size": "1" + "0" * 30}}), ("d.jpg", IMAGE)),
            b__tar=GOOD_TAR,
        ),
        [(None, None), ("too_many_bytes", None), (None, None), ("unreadable", None), (None, "good")],
    ),
    "a tar with a negative size": Case(
        tars(a__tar=tar(("a.jpg", IMAGE), ("c.jpg", {"pax_headers": {"size": "-512"}}), ("d.jpg", IMAGE)), b__tar=GOOD_TAR),
        [(None, None), (None, None), (None, None), ("unreadable", None), (None, "good")],
    ),
    "a tar with a sparse field that is no number": Case(
        tars(
            a__tar=tar(("a.jpg", IMAGE), ("c.jpg", {"pax_headers": {"GNU.sparse.size": "many"}}), ("d.jpg", IMAGE)),
            b__tar=GOOD_TAR,
        ),
        [(None, None), (None, None), (None, None), ("unreadable", None), (None, "good")],
    ),
    "an xz tar with a flipped byte beside a good one": Case(
        tars(a__tar__xz=flipped(tar(("a.jpg", IMAGE * 99), mode="w:xz"), 60), b__tar=GOOD_TAR),
        [("unreadable", None), (None, "good")],
    ),
    "a gz tar and a bz2 tar with a flipped byte": Case(
        tars(
            a__tar__gz=flipped(tar(("a.jpg", IMAGE * 99), mode="w:gz"), 60),
            a__tar__bz2=flipped(tar(("a.jpg", IMAGE * 99), mode="w:bz2"), 60),
            b__tar=GOOD_TAR,
        ),
        [("unreadable", None), ("unreadable", None), (None, "good")],
    ),
    "a flipped bit in a header in the middle": Case(
        tars(a__tar=flipped(tar(("a.jpg", IMAGE), ("b.jpg", IMAGE), ("c.jpg", IMAGE)), 1024)),
        [(None, None), (None, None), ("unreadable", None)],
    ),
}


def linked(folder: Path) -> None:
    """A linked folder, a link to a folder that is read already, and one that leads nowhere."""
    files(**{"real/a.jpg": IMAGE, "real/a.txt": b"real"})(folder)
    files(**{"b.jpg": IMAGE + b"b", "b.txt": b"linked"})(folder.parent / "elsewhere")
    (folder / "linked").symlink_to(folder.parent / "elsewhere")
    (folder / "again").symlink_to("real")
    (folder / "real/loop").symlink_to("..")
    (folder / "gone.jpg").symlink_to("nowhere.jpg")


def text_list(ending: str, content: str) -> Callable[[Path], None]:
    """A list beside three images, "1.jpg" to "3.jpg", which it names."""
    return lambda folder: files(**{f"{n}.jpg": IMAGE for n in "123"}, **{f"list.{ending}": content.encode()})(folder)


def key_list(**columns: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        text_list("csv", "")(folder)
        (folder / "list.csv").unlink()
        pq.write_table(pa.table(columns), folder / "list.parquet")

    return write


LIST = {"kind": "list"}
UNLISTED = {".jpg files": 3}
OTHER = IMAGE + b"other"
NOTHING_VANISHES = {
    "hard and symbolic links in a tar": Case(
        tars(
            a__tar=tar(
                ("data/a.jpg", IMAGE),
                ("data/a.txt", b"linked"),
                ("data/b.jpg", {"type": tarfile.LNKTYPE, "linkname": "data/a.jpg"}),
                ("data/b.txt", {"type": tarfile.LNKTYPE, "linkname": "data/a.txt"}),
                ("more/c.jpg", "../data/b.jpg"),
                ("more/c.txt", "../data/a.txt"),
                ("d.jpg", "/etc/passwd"),
                ("e.jpg", "e.jpg"),
                ("f.txt", "gone.txt"),
            )
        ),
        [(None, "linked")] * 3 + [("dead_link", None)] * 2,
        {"links that lead nowhere": 1},
    ),
    "the same key twice in a tar, side by side": Case(
        tars(a__tar=tar(("a.jpg", IMAGE), ("a.txt", b"first"), ("a.jpg", OTHER), ("a.txt", b"second"))),
        [(None, "first"), (None, "second")],
    ),
    "the same key twice in a tar, apart, and one without a caption": Case(
        tars(a__tar=tar(("a.jpg", IMAGE), ("a.txt", b"first"), ("b.jpg", IMAGE), ("a.jpg", OTHER))),
        [(None, "first"), (None, None), (None, None)],
    ),
    "the same key twice in a tar, and nobody can say whose caption it is": Case(
        tars(a__tar=tar(("a.jpg", IMAGE), ("a.jpg", OTHER), ("a.txt", b"whose?"), ("b.jpg", IMAGE), ("b.txt", b"own"))),
        [(None, None), (None, None), (None, "own")],
        {"captions that may belong to several images": 1},
    ),
    "the same key twice in a tar that is sorted by kind": Case(
        tars(
            a__tar=tar(
                ("a.jpg", IMAGE), ("b.jpg", IMAGE), ("a.jpg", OTHER), ("a.txt", b"?"), ("b.txt", b"own"), ("a.txt", b"?")
            )
        ),
        [(None, None), (None, "own"), (None, None)],
        {"captions that may belong to several images": 2},
    ),
    "tars that were put together": Case(
        tars(a__tar=tar(("a.jpg", IMAGE), ("a.txt", b"one")) + tar(("b.jpg", IMAGE), ("b.txt", b"two")) + GOOD_TAR),
        [(None, "one"), (None, "two"), (None, "good")],
    ),
    "compressed tars that were put together": Case(
        tars(a__tar__gz=tar(("a.jpg", IMAGE), mode="w:gz") + tar(("b.jpg", IMAGE), mode="w:gz")), [(None, None)] * 2
    ),
    "a tar with something behind it": Case(
        tars(a__tar=GOOD_TAR + b"signature" * 99), [(None, "good")], {"tars with other bytes behind them": 1}
    ),
    "members of a tar that are no images": Case(
        tars(
            a__tar=tar(
                ("a.jpg", IMAGE),
                ("a.cls", b"7"),
                ("b.cls", b"7"),
                ("lone.txt", b"x"),
                ("._a.jpg", b"of a Mac"),
                ("__MACOSX/a.jpg", b"of a Mac"),
                ("pipe", {"type": tarfile.FIFOTYPE}),
                ("c", IMAGE),
            )
        ),
        [(None, None), (None, None)],
        {
            ".cls files": 2,
            "side files without an image": 1,
            "hidden files and folders": 1,
            "files and folders of operating systems": 1,
            "pipes, sockets and devices": 1,
        },
    ),
    "a tar without any image": Case(tars(a__tar=tar(("a.cls", b"7")), b__tar=GOOD_TAR), [(None, "good")]),
    "endings in capitals": Case(
        files(**{"a.JPG": IMAGE, "a.TXT": b"capital", "b.jpg": IMAGE, "b.Json": b'{"text": "mixed"}'}),
        [(None, "capital"), (None, "mixed")],
    ),
    "endings in capitals, in a tar": Case(tars(a__TAR=tar(("a.JPG", IMAGE), ("a.TXT", b"capital"))), [(None, "capital")]),
    "kohya's folder": Case(
        files(
            **{
                "10_dog/a.png": IMAGE,
                "10_dog/a.caption": b"a dog",
                "10_dog/a.npz": b"latents",
                "10_dog/b.png": IMAGE,
                "10_dog/b.txt": b"dog, brown",
                "10_dog/b.caption": b"a brown dog",
                "meta_cap.json": b"{}",
            }
        ),
        [(None, "a dog"), (None, "dog, brown")],
        {".npz files": 1, "side files without an image": 1},
        check=lambda rows: json.loads(rows[1]["metadata"]) == {".caption": "a brown dog"},
    ),
    "side files named after the whole name of the image": Case(
        files(**{"a.jpg": IMAGE, "a.jpg.json": b'{"text": "of the jpg"}', "a.png": OTHER, "a.txt": b"of both"}),
        [(None, "of both"), (None, "of both")],
        check=lambda rows: json.loads(rows[0]["metadata"]) == {"text": "of the jpg"} and rows[1]["metadata"] is None,
    ),
    "two side files of one kind": Case(
        files(**{"a.jpg": IMAGE, "a.txt": b"small", "a.TXT": b"capital"}),
        [(None, "capital")],
        {"second side files of the same kind": 1},
    ),
    "what Synology, Windows and macOS leave": Case(
        files(
            **{
                "a.jpg": IMAGE,
                "@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg": IMAGE,
                "$RECYCLE.BIN/b.jpg": IMAGE,
                "#recycle/b.jpg": IMAGE,
                "__MACOSX/._a.jpg": b"x",
                "._a.jpg": b"x",
                ".DS_Store": b"x",
                "Thumbs.db": b"x",
            }
        ),
        [(None, None)],
        {"files and folders of operating systems": 5, "hidden files and folders": 2},
    ),
    "linked folders": Case(
        linked,
        [("missing_source", None), (None, "linked"), (None, "real")],
        {"links to folders that are read already": 2},
    ),
    "names without an ending, or with a query": Case(
        files(
            **{
                "0a1b2c": IMAGE,
                "photo.jpg?width=200": IMAGE,
                "photo.txt": b"a photo",
                "README": b"no image",
                "1.2": b"neither",
            }
        ),
        [(None, None), (None, "a photo")],
        {"files without an ending": 1, "files with other endings": 1},
    ),
    "a caption that is empty, and another that is not": Case(
        beside(b'{"caption": " \\u200b", "text": [""], "prompt": "real"}'),
        [(None, "real")],
        check=lambda rows: json.loads(rows[0]["metadata"]) == {"caption": " \u200b", "text": [""]},
    ),
    "captions in several columns of Parquet": Case(
        parquet(image=[b"1", b"2", b"3"], caption=[None, "two", ""], text=["one", "zwei", None], prompt=[b"", b"", b"three"]),
        [(None, "one"), (None, "two"), (None, "three")],
    ),
    "captions under several keys of JSON lines": Case(
        text_list(
            "jsonl", '{"url": "1.jpg", "caption": "one"}\n{"url": "2.jpg", "text": "two"}\n{"url": "3.jpg", "text": ""}\n'
        ),
        [(None, "one"), (None, "two"), (None, None)],
        UNLISTED,
        LIST,
    ),
    "a thousand broken lines before the first good one": Case(
        text_list("csv", "url,text\n" + '1.jpg,"x"y\n' * 1001 + "2.jpg,two\n"),
        [("no_url", None)] * 1001 + [(None, "two")],
        UNLISTED,
        LIST,
    ),
    "the line in which Excel names its delimiter": Case(
        text_list("csv", "\ufeffsep=;\nurl;text\n1.jpg;one, two\n"), [(None, "one, two")], UNLISTED, LIST
    ),
    "old Macintosh line ends, and others within a caption": Case(
        text_list("csv", "url,text\r1.jpg,o\u2028n\x0be\r2.jpg,two\r"),
        [(None, "o\u2028n\x0be"), (None, "two")],
        UNLISTED,
        LIST,
    ),
    "JSON lines that are one array": Case(
        text_list("jsonl", '[\n{"url": "1.jpg", "text": "one"},\n{"url": "2.jpg", "text": "two"}\n]\n'),
        [("no_url", None), ("no_url", None), (None, "two"), ("no_url", None)],
        UNLISTED,
        LIST,
    ),
    "URLs of JSON lines that are no texts": Case(
        text_list(
            "jsonl", "".join(f'{{"url": {url}}}\n' for url in ('"1.jpg"', "5", "{}", "true", '""', "null", '"\\u0000"', "[[]]"))
        ),
        [(None, None)] + [("no_url", None)] * 7,
        UNLISTED,
        LIST,
    ),
    "folders that are named like images and side files": Case(
        lambda folder: files(**{"a.jpg": IMAGE, "a.txt/b.jpg": OTHER, "c.jpg/d.jpg": IMAGE + b"d", "e.json/f.txt": b"lone"})(
            folder
        ),
        [(None, None)] * 3,
        {"side files without an image": 1},
    ),
    "names with line breaks, blanks and dashes": Case(
        files(**{"a\nb.jpg": IMAGE, "a\nb.txt": b"cap", " .jpg": OTHER, " .txt": b"blank", "-rf.jpg": IMAGE + b"r"}),
        [(None, "blank"), (None, None), (None, "cap")],
    ),
    "hard links in a tar in a circle, and to what comes later": Case(
        tars(
            a__tar=tar(
                ("a.jpg", {"type": tarfile.LNKTYPE, "linkname": "b.jpg"}),
                ("b.jpg", {"type": tarfile.LNKTYPE, "linkname": "a.jpg"}),
                ("c.jpg", {"type": tarfile.LNKTYPE, "linkname": "d.jpg"}),
                ("d.jpg", IMAGE),
            )
        ),
        [("dead_link", None)] * 2 + [(None, None)] * 2,
    ),
    "files that are no tar": Case(
        tars(a__tar=b"", b__tar=b"PK\3\4" + bytes(2000), c__tar=b"<html>" * 300, d__tar=GOOD_TAR),
        [("unreadable", None)] * 3 + [(None, "good")],
    ),
    "files that are no Parquet": Case(
        lambda folder: (files(**{"a.parquet": b"", "b.parquet": b"url,text\n"})(folder), parquet(image=[b"1"])(folder)),
        [("unreadable", None)] * 2 + [(None, None)],
    ),
    "a caption of JSON that is no text": Case(
        beside(b'{"caption": {"en": "one"}, "captions": [{"raw": "two"}]}'),
        [(None, None)],
        {"captions that are neither a text nor texts": 1},
    ),
    "archives beside images": Case(
        files(**{"a.jpg": IMAGE, "more.zip": b"PK", "b.rar": b"Rar!", "c.7z": b"7z"}),
        [(None, None)],
        {".zip files": 1, ".rar files": 1, ".7z files": 1},
    ),
    "tars of every compression": Case(
        tars(
            a__tar__bz2=tar(("a.jpg", IMAGE), mode="w:bz2"),
            b__tar__xz=tar(("b.jpg", IMAGE), mode="w:xz"),
            c__tgz=tar(("c.jpg", IMAGE), mode="w:gz"),
            d__tar__zst=b"(\xb5/\xfd",
        ),
        [(None, None)] * 3,
        {".zst files": 1},
    ),
    "dictionary, list and bytes as captions": Case(
        parquet(
            image=[b"1", b"2"],
            prompt=pa.array(["one", "two"]).dictionary_encode(),
        ),
        [(None, "one"), (None, "two")],
    ),
    "bytes as captions": Case(
        parquet(image=[b"1", b"2"], text=pa.array(["één".encode(), b"\x81\xff\xfe"], pa.binary())),
        [(None, "één"), (None, None)],
        {"captions in an unknown encoding": 1},
    ),
    "lists of every type as captions": Case(
        parquet(image=[b"1"], captions=pa.array([["one", "two"]], pa.list_(pa.string(), 2))), [(None, "one")]
    ),
    "a dictionary of bytes as images": Case(
        parquet(image=pa.array([b"1", b"2", b"1"]).dictionary_encode(), text=["a", "b", "c"]),
        [(None, "a"), (None, "b"), (None, "c")],
        check=lambda rows: [row["image_bytes"] for row in rows] == [b"1", b"2", b"1"],
    ),
    "lists as images": Case(
        parquet(image=pa.array([[b"1"], [b"2", b"3"], []], pa.list_(pa.binary())), text=["a", "b", "c"]),
        [(None, "a"), ("several_images", "b"), ("unreadable", "c")],
    ),
    "columns of bytes beside the images": Case(
        parquet(image=[b"1"], thumbnail=[b"2"], mask=[b"3"]), [(None, None)], {"columns of bytes beside the images": 2}
    ),
    "dictionary, bytes and lists as URLs": Case(
        key_list(url=pa.array([b"1.jpg", b"2.jpg", b"\x81\xff\xfe"], pa.binary()), text=["a", "b", "c"]),
        [(None, "a"), (None, "b"), ("no_url", "c")],
        UNLISTED,
        LIST,
    ),
    "lists as URLs": Case(
        key_list(url=pa.array([["1.jpg"], ["2.jpg", "3.jpg"], []]), text=pa.array([["a"], ["b"], ["c"]])),
        [(None, "a"), ("no_url", "b"), ("no_url", "c")],
        UNLISTED,
        LIST,
    ),
    "a caption of JSON lines that is a list": Case(
        text_list("jsonl", '{"url": "1.jpg", "caption": ["one", "two"]}\n{"url": "2.jpg", "caption": "three"}\n'),
        [(None, "one"), (None, "three")],
        UNLISTED,
        LIST,
    ),
    "a quote that is never closed": Case(
        text_list("csv", 'url,text\n1.jpg,"never closed\n2.jpg,two\n3.jpg,"three, with comma"\n'),
        [("no_url", None), (None, "two"), (None, "three, with comma")],
        UNLISTED,
        LIST,
        check=lambda rows: "a quote is opened" in rows[0]["detail"],
    ),
    "a quote that is never closed, to the end of the file": Case(
        text_list("csv", 'url,text\n1.jpg,one\n2.jpg,"never closed\n3.jpg,three\n'),
        [(None, "one"), ("no_url", None), (None, "three")],
        UNLISTED,
        LIST,
    ),
    "a quote that a later line's inch mark would close": Case(
        text_list("csv", 'url,text\nfile://x/1.jpg,"never closed\nfile://x/2.jpg,a screen of 5"\n'),
        [("no_url", None), ("outside_folder", 'a screen of 5"')],
        UNLISTED,
        LIST,
    ),
    "quotes escaped by a backslash": Case(
        text_list("csv", 'url,text,n\n1.jpg,"he said \\"hi, you\\"",1\n2.jpg,"a ""b"" c",2\n3.jpg,"ends with \\",3\n'),
        [(None, 'he said "hi, you"'), (None, 'a "b" c'), (None, "ends with \\")],
        UNLISTED,
        LIST,
    ),
    "a TSV without quoting": Case(
        text_list("tsv", 'url\ttext\n1.jpg\t"Hello" she said\n2.jpg\t12" wide\n3.jpg\t"opened\n'),
        [(None, '"Hello" she said'), (None, '12" wide'), (None, '"opened')],
        UNLISTED,
        LIST,
    ),
    "more fields than the first line names, or fewer": Case(
        text_list("csv", "url,text,size\n1.jpg,a cat, sleeping,7\n2.jpg,two\n3.jpg,three,3,,\n"),
        [("no_url", None), (None, "two"), (None, "three")],
        UNLISTED | {"values that cannot be read": 1},
        LIST,
    ),
    "line breaks in a field": Case(
        text_list("csv", 'url,text\r\n1.jpg,"two\r\nlines, and ""quotes"""\r\n2.jpg,two\r\n'),
        [(None, 'two\r\nlines, and "quotes"'), (None, "two")],
        UNLISTED,
        LIST,
    ),
    "semicolons, and spaces around names": Case(
        text_list("csv", "url ; text\n1.jpg;one, two\n"), [(None, "one, two")], UNLISTED, LIST
    ),
    "two columns of one name": Case(
        text_list("csv", "url,text,text\n1.jpg,one,two\n"),
        [(None, "one")],
        UNLISTED,
        LIST,
        check=lambda rows: json.loads(rows[0]["metadata"]) == {"text (2)": "two"},
    ),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_one_bad_value_costs_that_value_or_row(name: str, tmp_path: Path) -> None:
    check(BAD_VALUES[name], make(BAD_VALUES[name], tmp_path))


CHINESE, JAPANESE = "一只白色的猫坐在红色的沙发上，看着窗外的鸟。", "赤いソファの上に白い猫が座って、窓の外の鳥を見ている。"
KOREAN = "하얀 고양이가 빨간 소파에 앉아 창밖의 새를 바라보고 있는 모습을 찍은 따뜻한 오후의 사진"
RUSSIAN, FRENCH, GERMAN = "Белая кошка сидит на красном диване", "Une fenêtre près de la mère", "Ein schönes, grünes Mädchen"
UNKNOWN = {"captions in an unknown encoding": 1}
TEXTS: dict[str, tuple[bytes, str | None, str | None]] = {
    "UTF-8 with a mark": (("\ufeff" + FRENCH).encode(), FRENCH, None),
    "UTF-16 with a mark": (RUSSIAN.encode("utf-16"), RUSSIAN, None),
    "UTF-16, the other end first": (b"\xfe\xff" + RUSSIAN.encode("utf-16-be"), RUSSIAN, None),
    "UTF-32 with a mark": (FRENCH.encode("utf-32"), FRENCH, None),
    "UTF-16 without a mark": ("a plain caption".encode("utf-16-le"), "a plain caption", None),
    "UTF-16 cut off": (RUSSIAN.encode("utf-16")[:-1], None, None),
    "zero bytes": (b"\0\x01caption\0", None, None),
    "GBK": (CHINESE.encode("gbk"), CHINESE, None),
    "Big5": ("一隻白色的貓坐在紅色的沙發上看著窗外的鳥".encode("big5"), "一隻白色的貓坐在紅色的沙發上看著窗外的鳥", None),
    "Shift-JIS": (JAPANESE.encode("shift_jis"), JAPANESE, None),
    "EUC-KR": (KOREAN.encode("euc_kr"), KOREAN, None),
    "ISO-2022-JP": (JAPANESE.encode("iso2022_jp"), JAPANESE, None),
    "GBK, too short to be sure": ("白猫".encode("gbk"), None, None),
    "Latin-1 that reads alike in all Latin encodings": (GERMAN.encode("latin-1"), GERMAN, None),
    "Latin-1 that does not": (FRENCH.encode("latin-1"), None, None),
    "Latin-1, as the configuration says": (FRENCH.encode("latin-1"), FRENCH, "cp1252"),
    "KOI8-R": (RUSSIAN.encode("koi8-r"), None, None),
    "Windows-1251": (RUSSIAN.encode("cp1251"), None, None),
    "lost before": ("caf\ufffd".encode(), None, None),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_in_other_encodings_are_right_or_none(name: str, tmp_path: Path) -> None:
    content, caption, encoding = TEXTS[name]
    told = {} if caption else UNKNOWN
    options = {"text_encoding": encoding}
    for ending in ("txt", "caption"):
        case = Case(beside(content, ending), [(None, caption)], told, options)
        check(case, make(case, tmp_path / ending))
    case = Case(parquet(image=[b"1"], text=pa.array([content], pa.binary())), [(None, caption)], told, options)
    check(case, make(case, tmp_path / "parquet"))


def test_lists_in_other_encodings(tmp_path: Path) -> None:
    lines = f"url,text\n1.jpg,{CHINESE}\n2.jpg,plain\n"
    for encoding in ("utf-8-sig", "utf-16", "gbk"):
        case = Case(
            lambda folder, encoding=encoding: write_list(folder, lines.encode(encoding)),
            [(None, CHINESE), (None, "plain")],
            UNLISTED,
            LIST,
        )
        check(case, make(case, tmp_path / encoding))


def write_list(folder: Path, content: bytes) -> None:
    text_list("csv", "")(folder)
    (folder / "list.csv").write_bytes(content)


@pytest.mark.parametrize(
    "text", ["\u200b\ufeff", "\u2060\u00ad", "\u3164", "\u2800 \u2800", "\ufe0f", "\u0301", "\x07\x1b", "\u202e"]
)
def test_a_caption_of_invisible_characters_is_none(text: str, tmp_path: Path) -> None:
    case = Case(beside(text.encode(), "txt"), [(None, None)])
    check(case, make(case, tmp_path))


def test_captions_that_are_no_texts_stay_in_the_metadata(tmp_path: Path) -> None:
    content = '{"url": "1.jpg", "text": "one"}\n{"url": "2.jpg", "text": {"en": "two"}}\n'
    told = UNLISTED | {"captions that are neither a text nor texts": 1}
    kept = {"text": {"en": "two"}}
    case = Case(
        text_list("jsonl", content),
        [(None, "one"), (None, None)],
        told,
        LIST,
        lambda rows: json.loads(rows[1]["metadata"]) == kept,
    )
    check(case, make(case, tmp_path))


@pytest.mark.parametrize("name", NOTHING_VANISHES)
def test_nothing_vanishes(name: str, tmp_path: Path) -> None:
    check(NOTHING_VANISHES[name], make(NOTHING_VANISHES[name], tmp_path))


def special_files(folder: Path) -> None:
    """A pipe, a device and a socket, named like an image, its caption, and another image."""
    files(**{"a.jpg": IMAGE, "pipes/b.jpg": IMAGE})(folder)
    os.mkfifo(folder / "a.txt")
    os.mkfifo(folder / "c.jpg")
    (folder / "d.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(folder / "e.jpg"))


def claims(number: int) -> Callable[[Path], None]:
    """A Parquet file of 77 rows whose footer claims another number, everywhere."""

    def varint(value: int) -> bytes:
        digits = [(2 * value >> 7 * place) & 127 for place in range(10) if 2 * value >> 7 * place]
        return bytes([digit | 128 for digit in digits[:-1]] + digits[-1:])

    def write(folder: Path) -> None:
        buffer = io.BytesIO()
        pq.write_table(pa.table({"image": [b"1"] * 77}), buffer)
        content = buffer.getvalue()
        size = int.from_bytes(content[-8:-4], "little")
        footer = content[-8 - size : -8].replace(b"\x16" + varint(77), b"\x16" + varint(number))
        (folder / "a.parquet").write_bytes(content[: -8 - size] + footer + len(footer).to_bytes(4, "little") + b"PAR1")
        parquet(image=[b"2"])(folder)

    return write


def sparse(name: str, size: int) -> tuple[Entry, Entry]:
    """An image, and a member of a tar that holds nothing and claims a size."""
    headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": name, "GNU.sparse.realsize": str(size)}
    return ("a.jpg", IMAGE), (name, {"pax_headers": headers, "data": b"0\n".ljust(512, b"\0")})


def forty(value: pa.Scalar) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array([0] * 40), pa.array([value]))


def forty_times(name: str, **columns: Any) -> Callable[[Path], None]:
    """A Parquet file with one value forty times, which it holds once."""
    value = np.random.default_rng(0).bytes(15 * 2**20)
    large = pa.scalar(value) if name == "image" else pa.scalar(value.hex())

    def write(folder: Path) -> None:
        table = pa.table({name: forty(large), **columns})
        pq.write_table(table, folder / "x.parquet", store_schema=False)  # so that it is no column of categories

    return write


def zeros(**columns: str | bytes) -> Callable[[Path], None]:
    """A Parquet file of one row whose values hardly take any place in it."""
    values = {name: pa.array([value]) for name, value in ({"image": b"1"} | columns).items()}
    return lambda folder: pq.write_table(pa.table(values), folder / "x.parquet", compression="zstd", use_dictionary=False)


def hollow(folder: Path) -> None:
    files(**{"a.jpg": IMAGE})(folder)
    for name in ("a.txt", "b.jpg"):
        with (folder / name).open("wb") as file:
            file.truncate(10 * 2**30)


CLAIMS = {
    "pipes, devices and sockets in a folder": Case(
        special_files, [(None, None), (None, None)], {"pipes, sockets and devices": 4}
    ),
    "a side file that is too large": Case(
        files(**{"a.jpg": IMAGE, "a.txt": b"x" * 2**19, "a.json": b'{"text": "small"}'}),
        [(None, "small")],
        {"side files that are too large": 1},
    ),
    "a text in a tar that claims 3 GB": Case(
        tars(a__tar=tar(*sparse("a.txt", 3 * 2**30))), [(None, None)], {"side files that are too large": 1}
    ),
    "an image in a tar that claims 3 GB": Case(
        tars(a__tar=tar(*sparse("b.jpg", 3 * 2**30))), [(None, None), ("too_many_bytes", None)]
    ),
    "a header in a tar that is too large": Case(
        tars(a__tar=tar(("a.jpg", IMAGE), ("b.jpg", {"pax_headers": {"comment": "x" * 2**21}}))),
        [(None, None), (None, None), ("unreadable", None)],
    ),
    "a tar that unpacks to much more than its size": Case(
        tars(a__tar__gz=tar(("a.jpg", IMAGE), ("zeros.bin", bytes(2**22)), ("b.jpg", IMAGE), mode="w:gz"), b__tar=GOOD_TAR),
        [(None, None), ("truncated", None), (None, "good")],
        {".bin files": 1},
    ),
    "a Parquet footer that claims 10^12 rows": Case(claims(10**12), [("unreadable", None), (None, None)]),
    "a Parquet footer that claims some rows more": Case(claims(80), [(None, None)] * 77 + [("unreadable", None), (None, None)]),
    "one image of 15 MB forty times": Case(
        forty_times("image"), [(None, None)] + [("duplicate", None)] * 39, options={"max_shard_bytes": 2**27}
    ),
    "one caption of 30 MB forty times": Case(
        forty_times("text", url=["1.jpg"] * 40, note=["x" * 2**20] * 40),
        [("missing_source", None)] * 40,
        {"texts that are too large": 40},
        LIST,
        check=lambda rows: json.loads(rows[0]["metadata"]) == {"note": "<1048582 bytes, left out>"},
    ),
    "a text of 100 MB in a Parquet file of some KB": Case(
        zeros(note="x" * 100 * 2**20), [(None, None)], check=lambda rows: "bytes, left out" in rows[0]["metadata"]
    ),
    "an image of 300 MB in a Parquet file of some KB": Case(zeros(image=bytes(300 * 2**20)), [("unreadable", None)]),
    "files of 10 GB that hold nothing": Case(
        hollow, [(None, None), ("too_many_bytes", None)], {"side files that are too large": 1}
    ),
    "a line of 5 MB": Case(
        text_list("jsonl", '{"url": "1.jpg", "x": "' + "y" * 5 * 2**20 + '"}\n{"url": "2.jpg"}\n'),
        [("no_url", None), (None, None)],
        UNLISTED,
        LIST,
    ),
    "a shard that is fuller than it may be": Case(
        files(**{f"{n}.jpg": IMAGE + n.encode() for n in "123"}),
        [(None, None), (None, None), ("shard_full", None)],
        options={"max_shard_bytes": 2 * len(IMAGE) + 2},
    ),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_nothing_hangs_or_eats_the_machine(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars_module, "UNPACKED_BYTES", 2**20)
    source = make(CLAIMS[name], tmp_path)
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        check(CLAIMS[name], source)
    finally:
        done.set()
        watcher.join()
    assert peak - before < 400 * 2**20, f"{(peak - before) / 2**20:.0f} MiB"


def test_what_is_not_taken_is_told_at_the_end_and_in_the_report(tmp_path: Path, local_ray: None) -> None:
    """And a reject that names no readable file neither ends the job nor the page."""
    (tmp_path / "notazip").write_bytes(b"no zip")
    os.mkfifo(tmp_path / "pipe.png")
    listed = ["pipe.png", f"zip://x.jpg::{tmp_path}/notazip", "s3://", "good.png", "good.png#none", "short.png"]
    files(**{"good.png": png(1), "short.png": png(2), "more.zip": b"PK", ".hidden": b""})(tmp_path)
    lines = "".join(f"{url},caption,7\n" for url in listed[:-1]) + f"{listed[-1]},caption\n"
    (tmp_path / "list.csv").write_text(f"url,text,size\n{lines}")
    dataset = str(tmp_path / "dataset")
    for _ in range(2):
        result = run_ingest(dataset, IngestConfig(source=str(tmp_path), source_kind="list", max_reject_share=0.9))
        assert (result.num_rows, result.num_rejects) == (2, 4)
        told = {"1 values that cannot be read", "2 .png files", "1 .zip files", "1 hidden files and folders"}
        told |= {"1 files without an ending", "1 pipes, sockets and devices"}
        said = describe_not_taken(result.figures)
        assert all(one in said for one in told) and len(said) == len(", ".join(told))
        page = check_page(images_report(dataset)).text
        assert "Besides the images that were refused" in page and all(kind in page for kind in told)


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def make(case: Case, folder: Path) -> Path:
    source = folder / "source"
    source.mkdir(parents=True)
    case.make(source)
    return source


def check(case: Case, source: Path) -> None:
    rows, not_taken = read(source, **case.options)
    assert [(row["error"], row["caption"]) for row in rows] == case.rows, [row["detail"] for row in rows]
    assert not_taken == case.not_taken, not_taken
    assert all(row["detail"] and row["source_uri"].partition("#")[0] for row in rows if row["error"])
    assert case.check(rows), rows


FLIPS = """
import sys
import pyarrow as pa
from pipelines.ingest import parquet_rows
from pipelines.ingest.parquet_rows import TableFile
from io import BytesIO

parquet_rows.BATCH_BYTES = 1  # as if its values were large
whole = sys.stdin.buffer.read()
start = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
for position in range(start, len(whole) - 8):
    for bit in range(8):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << bit
        try:
            list(TableFile(BytesIO(damaged)).iter_rows(["url", "tags"], 0, None, batch=4))
        except (pa.ArrowException, OSError, ValueError):
            pass
print("alive")
"""


def test_no_flipped_bit_of_a_parquet_footer_ends_the_process() -> None:
    """pyarrow ends it where sizes of a column contradict themselves, unless reading found it out before."""
    content = io.BytesIO()
    pq.write_table(pa.table({"url": ["http://a/1.jpg", None] * 2, "tags": [["x"], None] * 2}), content)
    run = subprocess.run([sys.executable, "-c", FLIPS], input=content.getvalue(), capture_output=True)
    assert run.stdout == b"alive\n", run.stderr.decode()[-500:]


def test_a_list_of_too_many_columns_or_bytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each short row would tell a million values that it lacks; and the copy of a list is held in memory by pieces."""
    wide = make(Case(text_list("csv", "url," + "a," * 20_000 + "\n" + "1.jpg\n" * 9), []), tmp_path / "wide")
    with pytest.raises(ValueError, match="A line could not be read: 20002 columns, over 10000"):
        read(wide, **LIST)
    monkeypatch.setattr("pipelines.ingest.lists.MAX_PIECE_BYTES", 2000)
    large = make(Case(text_list("jsonl", ('{"url": "data:image/png,' + "x" * 1000 + '"}\n') * 3), []), tmp_path / "large")
    with pytest.raises(ValueError, match="hold over 2000 bytes: a list names images; put those of data: URLs into files"):
        read(large, **LIST)
