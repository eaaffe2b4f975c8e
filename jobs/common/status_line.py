"""One line that shows how far a stage is, and one that says what it did."""

import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from jobs.common.background import repeating
from pipelines.stages.contract import Progress, StageResult

CLEAR_LINE = "\r\x1b[2K"
PRINT_EVERY = 10.0  # seconds between progress lines in a log file
BEAT = 1.0  # seconds between two lines on a terminal while nothing new comes
BEAT_IN_LOG = 60.0  # the same in a log file


class StatusLine:
    """A line of progress: rewritten in place on a terminal, printed every 10 seconds into a log file."""

    def __init__(self) -> None:
        self.printed = 0.0
        self.is_terminal = sys.stderr.isatty()
        self.text = ""
        self.lock = threading.RLock()  # of the text and the terminal, which `running` writes from a thread of its own

    def show(self, text: str) -> None:
        with self.lock:
            self.text = text
            now = time.monotonic()
            if self.is_terminal or now - self.printed >= PRINT_EVERY:
                self._print(text, now)

    def _print(self, text: str, now: float) -> None:
        self.printed = now
        if self.is_terminal:
            text = text[: shutil.get_terminal_size().columns - 1]  # a line that wraps could not be erased
        start, end = (CLEAR_LINE, "") if self.is_terminal else ("", "\n")
        print(f"{start}{text}", end=end, file=sys.stderr, flush=True)

    @contextmanager
    def running(self, text: str) -> Iterator[None]:
        """Within, show the last text again with the seconds since the beginning whenever nothing new has come for a while.

        Args:
            text: what is shown until the first `show`.
        """
        begun, pause = time.monotonic(), BEAT if self.is_terminal else BEAT_IN_LOG
        self.text = text

        def beat() -> None:
            with self.lock:
                now = time.monotonic()
                if now - max(begun, self.printed) >= pause:
                    self._print(f"{self.text}  {now - begun:.0f} s", now)

        with repeating(beat, BEAT, "status-line"):
            yield

    def say(self, text: str) -> None:
        """Print a line that stays."""
        with self.lock:
            self.clear()
            print(text, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Erase the line, on a terminal."""
        with self.lock:
            if self.is_terminal:
                print(CLEAR_LINE, end="", file=sys.stderr, flush=True)


def describe_progress(name: str, progress: Progress) -> str:
    """The text of the line while a stage runs."""
    return (
        f"{name:<22} {progress.done_shards}/{progress.num_shards} shards  {progress.num_rows} rows  "
        f"{_rate(progress.rows_per_second)} rows/s  {progress.num_rejects} rejects"
    )


def describe_result(name: str, result: StageResult, *, is_due: bool = False) -> str:
    """The line when a stage has ended; `is_due` as in `track_stage`."""
    counts = f"{result.num_rows} rows, {result.num_rejects} rejects in {result.num_shards} shards"
    if result.num_shards == 0:
        return f"{name:<22} nothing to do: no shard of its inputs is ready"
    if result.was_done:
        return f"{name:<22} {counts}: {'made along with another' if is_due else 'all there already, nothing to do'}"
    found = f" ({result.found_shards} were there already)" if result.found_shards else ""
    return f"{name:<22} {counts}{found}, {result.seconds:.0f} s, {_rate(result.rows_per_second)} rows/s"


def _rate(rows_per_second: float) -> str:
    """One digit behind the point; two digits that count, where that would be 0.0."""
    return f"{rows_per_second:.2g}" if 0 < rows_per_second < 0.1 else f"{rows_per_second:.1f}"
