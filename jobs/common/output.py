"""Keeps secrets out of what a command prints."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast

from sana_model.files.redact import redact


@contextmanager
def hiding(secrets: Iterable[str]) -> Iterator[None]:
    """Within, whatever this process prints is without secrets: messages, tracebacks, warnings, notices."""
    known = frozenset(secrets)
    out, err = (cast(TextIO, _Redacted(stream, known)) for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(out), redirect_stderr(err):
        yield


class _Redacted:
    """A stream that hides secrets in each text that is written to it; all else it passes on."""

    def __init__(self, stream: TextIO, secrets: frozenset[str]):
        self._stream, self._secrets = stream, secrets

    def write(self, text: str) -> int:
        self._stream.write(redact(text, self._secrets))
        return len(text)

    def writelines(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
