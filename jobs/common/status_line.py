"""One line that shows how far a job is."""

import sys
import time

CLEAR_LINE = "\r\x1b[2K"
PRINT_EVERY = 10.0  # seconds between progress lines in a log file


class StatusLine:
    """Shows how far something is: one line, rewritten on a terminal; in a log a line now and then."""

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
        """A line that stays."""
        self.clear()
        print(text, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take the line away, where it can be."""
        if self.is_terminal:
            print(CLEAR_LINE, end="", file=sys.stderr, flush=True)
