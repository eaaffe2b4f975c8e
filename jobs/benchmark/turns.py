"""Several measurements in turns, so that what disturbs the machine disturbs all of them alike. Imports no torch."""

from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

from tqdm import tqdm

Key = TypeVar("Key", bound=Hashable)
Measured = TypeVar("Measured")


def in_turns(
    measures: Mapping[Key, Callable[[], Measured]], repeats: int, *, label: str, warm_up: bool = False
) -> dict[Key, list[Measured]]:
    """What each measurement returns in `repeats` rounds that call all of them.

    Args:
        label: of the progress bar.
        warm_up: begin with a round that does not count.
    """
    measured: dict[Key, list[Measured]] = {key: [] for key in measures}
    for number in tqdm(range(repeats + warm_up), desc=label, leave=False):
        for key, measure in measures.items():
            result = measure()
            if number >= warm_up:
                measured[key].append(result)
    return measured
