"""A file is written whole or not at all."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sana_model.files.atomic import write_atomically


@pytest.fixture
def strict_umask() -> Iterator[None]:
    before = os.umask(0o077)
    yield
    os.umask(before)


def test_folders_are_made_and_others_may_read_the_file(tmp_path: Path, strict_umask: None) -> None:
    path = tmp_path / "a" / "b.bin"
    for content in (b"old", b"new"):
        write_atomically(path, lambda temporary, content=content: temporary.write_bytes(content))
        assert path.read_bytes() == content and path.stat().st_mode & 0o777 == 0o644
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "b.bin"
    path.write_bytes(b"old")

    def fail(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        assert temporary.parent == tmp_path and temporary.name.startswith(".") and temporary.suffix == ".tmp"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(path, fail)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"old"
