"""One line that shows how far a stage is, and one that says what it did."""

import sys
import time

from pipelines.stages.contract import Progress, StageResult

CLEAR_LINE = "\r\x1b[2K"
PRINT_EVERY = 10.0  # seconds between progress lines in a log file


class StatusLine:
    """A line of progress: rewritten in place on a terminal, printed every 10 seconds into a log file."""

    def __init__(self) -> None:
        self.printed = 0.0
        self.is_terminal = sys.stderr.isatty()

    def show(self, text: str) -> None:
        now = time.monotonic()
        if not self.is_terminal and now - self.printed < PRINT_EVERY:
            return
        self.printed = now
        start, end = (CLEAR_LINE, "") if self.is_terminal else ("", "\n")
        print(f"{start}{text}", end=end, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.clear()
        print(text, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Erase the line, on a terminal."""
        if self.is_terminal:
            print(CLEAR_LINE, end="", file=sys.stderr, flush=True)


def describe_progress(name: str, progress: Progress) -> str:
    """The text of the line while a stage runs."""
    return (
        f"{name:<22} {progress.done_shards}/{progress.num_shards} shards  {progress.num_rows} rows  "
        f"{progress.rows_per_second:.1f} rows/s  {progress.num_rejects} rejects"
    )


def describe_result(name: str, result: StageResult, *, is_due: bool = False) -> str:
    """The line when a stage has ended; `is_due` as in `track_stage`."""
    counts = f"{result.num_rows} rows, {result.num_rejects} rejects in {result.num_shards} shards"
    if result.num_shards == 0:
        return f"{name:<22} nothing to do: no shard of its inputs is ready"
    if result.was_done:
        return f"{name:<22} {counts}: {'made along with another' if is_due else 'all there already, nothing to do'}"
    found = f" ({result.found_shards} were there already)" if result.found_shards else ""
    return f"{name:<22} {counts}{found}, {result.seconds:.0f} s, {result.rows_per_second:.1f} rows/s"
