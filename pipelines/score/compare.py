"""Compare what each selection policy would choose from the captioners' scores, before anything is extracted or trained.

No caption is drawn: the figures are the expected ones of the policies' probabilities. Memory does not grow with the table.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pipelines.score.candidates import Candidates
from pipelines.score.config import Policy, SelectionConfig
from pipelines.score.selection import Caption, all_policies, caption_probabilities
from pipelines.tables.sampling import spread
from pipelines.tables.schema import ORIGINAL_CAPTIONER


@dataclass(frozen=True, kw_only=True)
class PolicyFigures:
    """Figures of one policy; means are over the images that it keeps, and None if it keeps none.

    Args:
        shares: of those images, how many train on a captioner's caption.
        expected_score: of the caption that is drawn.
        entropy: of the choice, in nats: 0 where it is always the same, log(n) where n captions are all alike.
        num_dropped: images of which no caption is drawn.
    """

    config: SelectionConfig
    shares: dict[str, float]
    expected_score: float | None
    entropy: float | None
    num_dropped: int


@dataclass(frozen=True, kw_only=True)
class CaptionerFigures:
    """Figures of all captions of a captioner."""

    num_captions: int
    mean_score: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Figures of the images that were read: by captioner, the original captions first, and by policy."""

    num_images: int
    captioners: dict[str, CaptionerFigures]
    policies: dict[Policy, PolicyFigures]


@dataclass
class _Sums:
    weights: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    score: float = 0.0
    entropy: float = 0.0
    num_kept: int = 0


def compare_policies(rows: Iterable[Sequence[Caption]], policies: Mapping[Policy, SelectionConfig]) -> Comparison:
    """The figures of every policy over the captions (captioner, clip_score) of each image."""
    sums: dict[Policy, _Sums] = {name: _Sums() for name in policies}
    counts: Counter[str] = Counter()
    scores: dict[str, float] = defaultdict(float)
    num_images = 0
    for captions in rows:
        num_images += 1
        for caption in captions:
            counts[caption["captioner"]] += 1
            scores[caption["captioner"]] += caption["clip_score"]
        for name, config in policies.items():
            _add(sums[name], captions, caption_probabilities(captions, config))
    return Comparison(
        num_images=num_images,
        captioners={
            name: CaptionerFigures(num_captions=counts[name], mean_score=scores[name] / counts[name])
            for name in sorted(counts, key=lambda name: (name != ORIGINAL_CAPTIONER, name))
        },
        policies={name: _figures(total, policies[name], num_images) for name, total in sums.items()},
    )


def _add(sums: _Sums, captions: Sequence[Caption], probabilities: list[float]) -> None:
    if not any(probabilities):
        return
    sums.num_kept += 1
    for caption, probability in zip(captions, probabilities, strict=True):
        if probability:
            sums.weights[caption["captioner"]] += probability
            sums.score += probability * caption["clip_score"]
            sums.entropy -= probability * math.log(probability)


def _figures(sums: _Sums, config: SelectionConfig, num_images: int) -> PolicyFigures:
    kept = sums.num_kept
    return PolicyFigures(
        config=config,
        shares={name: weight / kept for name, weight in sorted(sums.weights.items())},
        expected_score=sums.score / kept if kept else None,
        entropy=sums.entropy / kept if kept else None,
        num_dropped=num_images - kept,
    )


@dataclass(frozen=True, kw_only=True)
class Scope:
    """The shards that are read: all that every captioner's scores have, or `max_shards` of them, spread evenly.

    Args:
        total_shards: how many shards any captioner's scores have.
        lacking: a sentence on captioners whose scores lack some of these; empty if there are none.
    """

    shards: list[str]
    total_shards: int
    lacking: str = ""


def compare_table(
    dataset_uri: str,
    clip: str,
    captioners: Sequence[str],
    selection: SelectionConfig,
    *,
    max_shards: int | None = None,
    on_shard: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Comparison, Scope]:
    """Compare all policies over `scores/<clip>/<captioner>` of some captioners, shard by shard.

    Args:
        selection: the policies' settings; its own policy is one of those that are compared.
        on_shard: is told how many of how many shards are read.

    Raises:
        MissingTableError: a captioner has no such table.
    """
    candidates = Candidates(dataset_uri, tuple(captioners), clip)
    found = candidates.find_scored()
    shards = found.common
    chosen = [shards[index] for index in spread(len(shards), len(shards) if max_shards is None else max_shards)]

    def rows() -> Iterator[list[Caption]]:
        for index, shard in enumerate(chosen):
            yield from candidates.read_scored(shard).values()
            on_shard(index + 1, len(chosen))

    comparison = compare_policies(rows(), all_policies(selection, captioners))
    return comparison, Scope(shards=chosen, total_shards=found.total, lacking=found.explain())
