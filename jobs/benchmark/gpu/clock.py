"""A line's share of the minutes, and its end when that is over."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SHORTEST_S = 1.0
"""With less time than this left, a line is not begun."""


class OutOfTime(BaseException):
    """A line's time is over. Not an `Exception`, which a compiler or an engine might take for its own failure."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the main thread after so many seconds, as soon as Python is at work again."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Budget:
    """Divides the time left among the lines left, by their weights: what one line does not use, the later ones get.

    Args:
        seconds: for all lines.
        weights: one for each line, in their order.
    """

    def __init__(self, seconds: float, weights: list[float]):
        self.end = time.monotonic() + seconds
        self.weights = list(weights)

    def next_share(self) -> float:
        """Seconds that the next line may take; below SHORTEST_S it is not to be begun."""
        weight, left = self.weights.pop(0), self.end - time.monotonic()
        return left * weight / (weight + sum(self.weights)) if weight else 0.0
