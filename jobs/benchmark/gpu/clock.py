"""A line's share of the minutes, and its end when that is over."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SHORTEST_S = 1.0
"""With less time than this left, a line is not begun."""
LEAST_SHARE_S = 3.0
"""A short line's share, at the cost of later ones: as planned it might not get SHORTEST_S."""
AGAIN_S = 2.0
"""Between further calls to end, in case something took the first one for its own failure."""


class OutOfTime(BaseException):
    """A line's time is over. Not an `Exception`, which a compiler or an engine might take for its own failure."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the main thread after so many seconds, as soon as Python is at work again."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Budget:
    """Divides the time left among the lines left, by their weights: what one line does not use, the later ones get.

    Args:
        seconds: for all lines.
        weights: one for each line, in their order; 0 for a line that cannot run, which gets nothing.
    """

    def __init__(self, seconds: float, weights: list[float]):
        self.end = time.monotonic() + seconds
        self.weights = list(weights)

    def next_share(self) -> float:
        """Seconds that the next line may take; below SHORTEST_S it is not to be begun."""
        weight, left = self.weights.pop(0), self.end - time.monotonic()
        if not weight:
            return 0.0
        return min(left, max(left * weight / (weight + sum(self.weights)), LEAST_SHARE_S))
