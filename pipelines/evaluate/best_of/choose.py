"""Which of a prompt's candidates are kept: pure functions of the judge's ranks."""

from collections.abc import Sequence
from typing import Literal

Rank = tuple[float, ...]


def choose(ranks: Sequence[Rank | None], keep: int, choice: Literal["best", "tournament"]) -> list[int]:
    """The indices of the candidates that are kept, in ascending order.

    Args:
        ranks: of a prompt's candidates in the order in which they were drawn, the larger the better; None: not judged, and
            never kept.
        keep: how many; fewer if fewer were judged.
    """
    if choice == "tournament":
        return play(ranks, keep)
    judged = [(rank, -index) for index, rank in enumerate(ranks) if rank is not None]  # of equals the first
    return sorted(-index for _, index in sorted(judged, reverse=True)[:keep])


def play(ranks: Sequence[Rank | None], keep: int) -> list[int]:
    """A tournament between neighbours, round after round, until `keep` are left (`nvila_sana_pick.py` of NVlabs/Sana).

    Of two equals the second wins, as published. One that was not judged loses, and is not kept if it wins against another such.
    A player that has no opponent goes on.
    """
    left = list(range(len(ranks)))
    while len(left) > keep:
        left = [_winner(ranks, left[at : at + 2]) for at in range(0, len(left), 2)]
    return [index for index in left if ranks[index] is not None]


def _winner(ranks: Sequence[Rank | None], pair: Sequence[int]) -> int:
    best = pair[-1]
    first, second = ranks[pair[0]], ranks[best]
    return pair[0] if second is None or (first is not None and first > second) else best
