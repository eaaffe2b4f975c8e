"""No change of a table's JSON files passes, a single flipped bit is mended, and files of earlier versions are read."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.caption.imports.config import ImportConfig
from pipelines.caption.imports.run import COUNTS, CaptionImport
from pipelines.ingest.plan import PLAN, Plan, read_plan, write_plan
from pipelines.ingest.sources import Part
from pipelines.score.duplicates import _plan_generations
from pipelines.score.verdicts import GENERATIONS
from pipelines.tables.errors import DamagedFileError
from pipelines.tables.hashed_json import from_hashed_json, mend, to_hashed_json
from pipelines.tables.identity import MANIFEST
from pipelines.tables.table import Table
from tests.support.whole_dataset import make_dataset

Read = Callable[[], object]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, tuple[Path, Read]]:
    """A file of each kind, and what reads it."""
    tables = make_dataset(str(tmp_path))
    images, captions = tables["images"], tables["captions/a"]
    write_plan(images, Plan("folder", "ab12", {"00000": [Part("é/a.png", 3)], "00001": [Part("b.png", 4, ("b.txt",))]}), None)
    generations = Table(str(tmp_path), "image_scores/near_duplicates", images.schema)
    _plan_generations(images, generations, None)
    (tmp_path / "caps.jsonl").write_text('{"id": "x", "caption": "y"}\n')
    imported = CaptionImport(str(tmp_path), ImportConfig(name="a", source=str(tmp_path / "caps.jsonl")))
    captions.write_json(COUNTS, {"captions": 3, "not_taken": {"unmatched": 1}})
    reads: dict[str, tuple[Table, Read]] = {
        MANIFEST: (captions, captions.require),
        PLAN: (images, lambda: read_plan(images)),
        GENERATIONS: (generations, lambda: _plan_generations(images, generations, None)),
        COUNTS: (captions, imported.read_counts),
    }
    return {name: (Path(table.uri, name), read) for name, (table, read) in reads.items()}


def test_of_a_thousand_single_flipped_bits_none_passes_and_each_can_be_mended(files: dict[str, tuple[Path, Read]]) -> None:
    random = np.random.default_rng(0)
    for name, (path, read) in files.items():
        content = path.read_bytes()
        bits = random.choice(8 * len(content), min(1000, 8 * len(content)), replace=False).tolist()
        for number, bit in enumerate(bits):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            with pytest.raises(DamagedFileError, match=f"{name} is not what this version wrote"):
                read()
            if number % 5 == 0:
                assert mend(bytes(flipped)) == content, f"{name}: byte {bit // 8}"
        path.write_bytes(content)
        assert read() is not None and mend(content) is None


def test_edited_cut_and_empty_files_and_those_of_later_versions_are_refused_and_not_mended(
    files: dict[str, tuple[Path, Read]],
) -> None:
    for name, (path, read) in files.items():
        text = path.read_text()
        fields = from_hashed_json(text.encode())
        first = next(iter(fields))
        half_a_checksum = re.sub(r'(?s)32": ".*"sha2', "", text)
        moved_brace = text.replace("},", ",", 1) + "}"
        cuts = (text[:-20], text[20:], text + text, f"{text} ", half_a_checksum, moved_brace)
        for changed in (text.replace(first, "other"), "", "3", "<html>", *cuts):
            path.write_text(changed)
            with pytest.raises(DamagedFileError, match=name):
                read()
            assert mend(changed.encode()) is None
        if name == MANIFEST:
            path.write_bytes(to_hashed_json(fields | {"later": 1}))
            with pytest.raises(DamagedFileError, match="later"):
                read()


def test_files_of_earlier_versions_are_read(files: dict[str, tuple[Path, Read]]) -> None:
    for name, (path, read) in files.items():
        now, fields = read(), from_hashed_json(path.read_bytes())
        path.write_text(json.dumps(fields["generations"] if name == GENERATIONS else fields))
        assert read() == now


def test_a_bit_of_a_large_file_is_found_in_one_pass() -> None:
    content = to_hashed_json({"shards": {f"{number:05}": [{"path": f"{number}.png"}] for number in range(3000)}})
    flipped = bytearray(content)
    flipped[1000] ^= 4
    assert mend(bytes(flipped)) == content
    flipped[50_000] ^= 1
    assert mend(bytes(flipped)) is None
