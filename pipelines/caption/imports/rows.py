"""Reads the captions of files, each with the forms of its key, its text and its CLIP score; what cannot be read is told."""

import gzip
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from posixpath import basename
from typing import Any, BinaryIO, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.caption.imports.config import ImportConfig
from pipelines.caption.imports.files import CaptionFile, Found
from pipelines.caption.imports.keys import PATH_NAMES, URL_NAMES, Form, key_forms, place_forms
from pipelines.ingest.columns import holds_captions, is_binary
from pipelines.ingest.text_tables import LIST_ERROR, read_table
from pipelines.storage.errors import StorageError
from pipelines.storage.files import NUM_THREADS, open_file, read_file
from pipelines.tables.schema import Row
from pipelines.tables.text import first_caption
from sana_model.files.retry import is_transient

ID_NAMES = ("id", "image_id", "sha256")
SCORE_NAMES = ("clip_score", "clipscore", "similarity")
PARQUET_BATCH = 1000
TOO_LARGE = 1e30  # for a score: the table's float32 holds less, whatever its scale
FILES_AHEAD = 256
"""JSON files that are read at a time: they may be as many as images, and as small as a caption."""
READ_ERRORS = (OSError, EOFError, ValueError, RecursionError, zlib.error, pa.ArrowException)


@dataclass(frozen=True, slots=True)
class Entry:
    """A caption as a file has it.

    Args:
        place: of its row in the file, from 0.
        key: as it was found.
        forms: of the key, the most telling first.
        caption: None if it is empty.
        others: more captions of the same row, which are not taken.
        caption_key: where the caption stood.
        score: of CLIP, as it was found.
    """

    place: int
    key: str
    forms: list[Form]
    caption: str | None
    others: int = 0
    caption_key: str = ""
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """Something in a file that cannot be taken: the file itself, a row, or a score."""

    place: int
    key: str
    reason: str
    detail: str


class _Columns(NamedTuple):
    keys: list[tuple[str, str]]
    """(kind, column) of the columns that name the image."""
    captions: list[str]
    score: str | None


class EntryReader:
    """Reads captions from the files that were found."""

    def __init__(self, config: ImportConfig, found: Found):
        self.config, self.found = config, found
        self.columns = lru_cache(maxsize=64)(self._find_columns)

    def read(self) -> Iterator[tuple[CaptionFile, Entry | Fault]]:
        """Every caption and every fault of all files, in order. Raises StorageError if the storage does not answer."""
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            for start in range(0, len(self.found.files), FILES_AHEAD):
                files = self.found.files[start : start + FILES_AHEAD]
                for file, content in zip(files, pool.map(_read_json, files), strict=True):
                    for entry in self._read_file(file, content):
                        yield file, entry

    def _read_file(self, file: CaptionFile, content: Any) -> Iterator[Entry | Fault]:
        yield from _tell_repeated(content[0] if file.stem is not None and isinstance(content, tuple) else content)
        if isinstance(content, Exception):
            yield _unreadable(0, content)
        elif file.stem is not None:
            yield from self._read_nvlabs(file, *content)
        elif content is not None:
            yield from self._read_object(file, content)
        else:
            place = -1
            try:
                for place, row in enumerate(self._iter_rows(file)):
                    yield from self._read_row(place, row)
            except READ_ERRORS as error:
                yield _unreadable(place + 1, error)

    def _read_nvlabs(self, file: CaptionFile, captions: Any, scores: Any) -> Iterator[Entry | Fault]:
        """A file of NVlabs' layout: {key: {vlm: caption}}, and {key: {vlm: score}} beside it."""
        if not isinstance(captions, dict):
            yield Fault(0, "", "unreadable", f"a {type(captions).__name__}, not an object of captions by key")
            return
        if isinstance(scores, Exception):
            yield Fault(0, "", "bad_score", f"{file.score_path}: {scores}")
        scores = scores if isinstance(scores, dict) else {}
        for place, (key, value) in enumerate(captions.items()):
            entry = self._entry_of(place, key, self._beside(file, key, len(captions)), value)
            score, fault = _score_of(entry, scores.get(key), self.found.vlm)
            yield _with_score(entry, score)
            if fault:
                yield fault
        for key in scores.keys() - captions.keys():
            yield Fault(0, key, "bad_score", f"{file.score_path} has a score and {file.path} no caption")

    def _beside(self, file: CaptionFile, key: str, num_keys: int) -> list[Form]:
        """The forms of a key of NVlabs' layout: a member of the tar beside the file, or the only image beside it."""
        match, stem = self.config.match, cast(str, file.stem)
        if match in ("id", "url"):
            return key_forms(key, match)
        forms = place_forms(f"{file.root}/{stem}.tar#{key}", f"{stem}.tar#{key}", match, min_parts=2)
        if num_keys == 1 and key == basename(stem):
            forms += place_forms(f"{file.root}/{stem}", stem, match, min_parts=1)
        return forms

    def _read_object(self, file: CaptionFile, content: Any) -> Iterator[Entry | Fault]:
        """A JSON file: a list of rows, one row, which may be about the image beside the file, or captions by key."""
        if isinstance(content, list):
            for place, row in enumerate(content):
                yield from self._read_row(place, row)
        elif not isinstance(content, dict):
            yield Fault(0, "", "unreadable", f"a {type(content).__name__}, neither an object nor a list")
        elif any(not isinstance(content[name], dict) for name in self.columns(tuple(content)).captions):
            stem = file.path.removesuffix(".gz").removesuffix(".json")
            beside = place_forms(f"{file.root}/{stem}", stem, self.config.match, min_parts=1)
            yield from self._read_row(0, content, (stem, beside))
        else:
            for place, (key, value) in enumerate(content.items()):
                yield self._entry_of(place, key, key_forms(key, self.config.match), value)

    def _read_row(self, place: int, row: Any, beside: tuple[str, list[Form]] | None = None) -> Iterator[Entry | Fault]:
        """A row of a table. Without a key it is about the image `beside`, if there is one: (key, its forms)."""
        if not isinstance(row, dict) or LIST_ERROR in row:
            problem = row[LIST_ERROR] if isinstance(row, dict) else f"a {type(row).__name__}, not an object"
            yield Fault(place, "", "unreadable", problem)
            return
        columns = self.columns(tuple(row))
        keys = [(kind, str(row[name]).strip()) for kind, name in columns.keys if row[name] not in (None, "")]
        forms = [form for kind, key in keys for form in self._forms_of(kind, key)]
        if not forms and beside:
            keys, forms = [("", beside[0])], beside[1]
        if not forms:
            yield Fault(place, "", "no_key", _explain_no_key(row, columns)[:1000])
            return
        if not columns.captions:
            named = f"none of caption_keys ({', '.join(self.config.caption_keys)})"
            yield Fault(place, keys[0][1], "no_caption_key", f"{named} is among {', '.join(map(str, row))}"[:1000])
            return
        found = [(name, caption) for name in columns.captions if (caption := first_caption(row[name]))]
        caption_key, caption = found[0] if found else ("", None)
        others = sum(len(row[name]) - 1 for name, _ in found[:1] if isinstance(row[name], list))
        entry = Entry(place, keys[0][1], forms, caption, others, caption_key)
        score, fault = _parse_score(entry, row[columns.score]) if columns.score else (None, None)
        yield _with_score(entry, score)
        if fault:
            yield fault

    def _forms_of(self, kind: str, key: str) -> list[Form]:
        """The forms of a key from a column of some kind; a column "id" may hold the ids of another data set."""
        return [form for form in key_forms(key, self.config.match) if kind != "id" or form.kind == "id"]

    def _entry_of(self, place: int, key: str, forms: list[Form], value: Any) -> Entry:
        """A caption by key: a text, a list of texts, or an object that holds one under the VLM's name, or a usual one."""
        if not isinstance(value, Mapping):
            others = len(value) - 1 if isinstance(value, list) else 0
            return Entry(place, key, forms, first_caption(value), max(others, 0), "(by key)")
        vlm = self.found.vlm
        names = [*([vlm] if vlm is not None and vlm in value else []), *self.columns(tuple(value)).captions]
        texts = [name for name in value if isinstance(value[name], str)]
        only = texts[0] if len(texts) == 1 else ""
        name: str = next((name for name in names if first_caption(value[name])), only)
        return Entry(place, key, forms, first_caption(value.get(name)), 0, name)

    def _find_columns(self, names: tuple[str, ...]) -> _Columns:
        """Which of the columns, or keys of an object, name the image, hold captions, and hold the score."""
        config = self.config
        there = {name.lower(): name for name in reversed(names) if isinstance(name, str)}
        captions = [there[name.lower()] for name in config.caption_keys if name.lower() in there]
        score = next((there[name] for name in SCORE_NAMES if name in there), None)
        if config.score_column:
            score = there.get(config.score_column.lower())
        if config.key_column:
            column = there.get(config.key_column.lower())
            return _Columns([("file_name", column)] if column else [], captions, score)
        ids = [("id", there[name]) for name in ID_NAMES if name in there and config.match in ("auto", "id")]
        names_of: list[tuple[str, Sequence[str]]] = [("url", URL_NAMES), ("file_name", PATH_NAMES)]
        others = [
            (kind, next(there[name] for name in usual if name in there))
            for kind, usual in names_of
            if config.match in ("auto", kind) and not there.keys().isdisjoint(usual)
        ]
        return _Columns(ids + others, captions, score)

    def _iter_rows(self, file: CaptionFile) -> Iterator[Row]:
        """The rows of a table: Parquet, JSON lines, CSV or TSV."""
        path = file.path.lower()
        with open_file(file.uri) as raw:
            if path.endswith(".parquet"):
                yield from self._iter_parquet(raw)
                return
            opened = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if path.endswith(".gz") else raw
            yield from read_table(opened, path.removesuffix(".gz"))

    def _iter_parquet(self, raw: BinaryIO) -> Iterator[Row]:
        parquet = pq.ParquetFile(raw)
        fields = [field for field in parquet.schema_arrow if not is_binary(field.type) and not pa.types.is_struct(field.type)]
        texts = {field.name for field in fields if holds_captions(field.type)}
        columns = self.columns(tuple(field.name for field in fields))
        wanted = [name for _, name in columns.keys] + [name for name in columns.captions if name in texts]
        wanted += [columns.score] if columns.score else []
        if not columns.keys or texts.isdisjoint(columns.captions):  # what is told of these rows names all columns
            wanted = [field.name for field in fields]
        for batch in parquet.iter_batches(PARQUET_BATCH, columns=wanted):
            yield from batch.to_pylist()


class _Object(dict[str, Any]):
    """A JSON object in which keys come twice: the first of each, and the others beside it."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__()
        self.others: list[tuple[str, Any]] = []
        for key, value in pairs:
            if key in self:
                self.others.append((key, value))
            else:
                self[key] = value


def _to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else _Object(pairs)


def _tell_repeated(content: Any) -> Iterator[Fault]:
    """A fault for each key of a JSON file's object that came before."""
    for key, value in content.others if isinstance(content, _Object) else ():
        yield Fault(0, key, "repeated_key", f"the key comes again, with {value!r}"[:1000])


def _read_json(file: CaptionFile) -> Any:
    """The content of a JSON file, or the error of reading it; of NVlabs' layout, captions and scores. None: a file of rows."""
    path = file.path.lower()
    if not path.removesuffix(".gz").endswith(".json"):
        return None
    try:
        content = read_file(file.uri)
        text = gzip.decompress(content) if path.endswith(".gz") else content
        captions = json.loads(text, object_pairs_hook=_to_object)
    except READ_ERRORS as error:
        return _told(error)
    if file.stem is None:
        return captions if captions is not None else ValueError("the file holds null")
    if file.score_path is None:
        return captions, None
    try:
        return captions, json.loads(read_file(f"{file.root}/{file.score_path}"))
    except READ_ERRORS as error:
        return captions, _told(error)


def _told(error: Exception) -> Exception:
    """An error that means a bad file. Raises one that means a storage that does not answer."""
    if isinstance(error, StorageError) and is_transient(error):
        raise error
    return error


def _unreadable(place: int, error: Exception) -> Fault:
    return Fault(place, "", "unreadable", f"{type(_told(error)).__name__}: {error}")


def _explain_no_key(row: Row, columns: _Columns) -> str:
    """Why a row names no image: nothing in it could, or its ids are those of another data set."""
    named = [f"{name}={row[name]!r}" for kind, name in columns.keys if kind == "id" and row[name] not in (None, "")]
    if named:
        return (
            f"{', '.join(named)}: an id is the hash of an image's bytes, 64 hexadecimal digits; if it names the file, give "
            "key_column"
        )
    return f"no key among {', '.join(map(str, row))}"


def _score_of(entry: Entry, value: Any, vlm: str | None) -> tuple[float | None, Fault | None]:
    """The score of a caption in NVlabs' layout: by the caption's own key, the VLM's name, or the only one there is."""
    if not isinstance(value, Mapping):
        return _parse_score(entry, value)
    names = [name for name in (entry.caption_key, vlm) if name in value] or (list(value) if len(value) == 1 else [])
    if not names and value:
        return None, Fault(entry.place, entry.key, "bad_score", f"none of the scores {', '.join(value)} is this caption's")
    return _parse_score(entry, value[names[0]] if names else None)


def _parse_score(entry: Entry, value: Any) -> tuple[float | None, Fault | None]:
    """A score that is a number, or the text of one; None if there is none."""
    if value is None or value == "":
        return None, None
    try:
        score = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not abs(score) < TOO_LARGE:
        return None, Fault(entry.place, entry.key, "bad_score", f"{value!r} is no score"[:1000])
    return score, None


def _with_score(entry: Entry, score: float | None) -> Entry:
    return Entry(entry.place, entry.key, entry.forms, entry.caption, entry.others, entry.caption_key, score)
