"""Output that goes into a pipe whose reader has left, as `head` does: the command goes on, and nobody sees the rest."""

import io
import os
import stat
import sys
from typing import TextIO


class _PatientFile(io.FileIO):
    """Writes into a pipe, and into nothing once its reader is gone."""

    def write(self, content: "io.ReadableBuffer", /) -> int:  # type: ignore[name-defined]
        try:
            return super().write(content)
        except BrokenPipeError:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self.fileno())
            os.close(nothing)
            return super().write(content)


def outlive_readers() -> None:
    """Let this process's output and errors outlive the reader of a pipe that they go into."""
    sys.stdout, sys.stderr = _outliving(sys.stdout), _outliving(sys.stderr)


def _outliving(stream: TextIO) -> TextIO:
    try:
        descriptor = stream.fileno()
        is_pipe = stat.S_ISFIFO(os.fstat(descriptor).st_mode)
    except (OSError, ValueError, AttributeError):  # closed, or no file at all
        return stream
    if not is_pipe or isinstance(getattr(getattr(stream, "buffer", None), "raw", None), _PatientFile):
        return stream
    stream.flush()
    raw = _PatientFile(descriptor, "wb", closefd=False)
    by_line = bool(getattr(stream, "line_buffering", False))
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=stream.encoding, errors=stream.errors, line_buffering=by_line)
