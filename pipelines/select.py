"""Which of an image's captions a sample trains on: a policy over their CLIP scores, applied when the sample is drawn."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

Policy = Literal["paper", "published", "best", "random", "proportions"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """A policy over scores c (100 times the cosine of image and text).

    Args:
        policy: "paper": P ~ exp(c / tau) (arXiv 2410.10629, section 3.2); "published": P ~ c^(1 / tau) over captions with
            c >= threshold, or else the best one (NVlabs' code); "best"; "random": all alike, scores unseen;
            "proportions": fixed shares by captioner, of those that have a caption of the image.
        tau: temperature of the first two; small is close to "best".
        threshold: lowest score of "published".
        proportions: of captioners, relative to each other; a captioner that is not named is never chosen.
        min_best_score: an image whose best caption scores less is dropped (Sana 1.5: 22); None: none is.
    """

    policy: Policy = "published"
    tau: float = 0.1
    threshold: float = 25.0
    proportions: dict[str, float] = field(default_factory=dict)
    min_best_score: float | None = None

    def __post_init__(self) -> None:
        if self.tau <= 0:
            raise ValueError(f"tau={self.tau} must be positive")
        if negative := {name: share for name, share in self.proportions.items() if not 0 <= share < math.inf}:
            raise ValueError(f"proportions={negative} must not be negative")
        if self.policy == "proportions" and not sum(self.proportions.values()) > 0:
            raise ValueError(
                f"policy 'proportions' needs proportions={self.proportions} with a positive share, such as {{llava: 1}}"
            )


Caption = dict[str, Any]
"""captioner, caption, clip_score."""


def caption_probabilities(captions: Sequence[Caption], config: SelectionConfig) -> list[float]:
    """The chance of each caption; they sum to 1, or are all 0 where none may be chosen."""
    if not captions or is_below(captions, config.min_best_score):
        return [0.0] * len(captions)
    weights = _weights(captions, [caption["clip_score"] for caption in captions], config)
    total = sum(weights)
    return [weight / total if total else 0.0 for weight in weights]


def is_below(captions: Sequence[Caption], min_best_score: float | None) -> bool:
    """Whether an image is to be dropped: the best of its captions, of which there is one at least, scores too low."""
    return min_best_score is not None and best_score(captions) < min_best_score


def best_score(captions: Sequence[Caption]) -> float:
    return max(caption["clip_score"] for caption in captions)


def _weights(captions: Sequence[Caption], scores: list[float], config: SelectionConfig) -> list[float]:
    best = max(scores)
    if config.policy == "paper":
        return [math.exp((score - best) / config.tau) for score in scores]
    if config.policy == "random":
        return [1.0] * len(scores)
    if config.policy == "proportions":
        return [config.proportions.get(caption["captioner"], 0.0) for caption in captions]
    if config.policy == "published" and best >= config.threshold and best > 0:
        return [(score / best) ** (1 / config.tau) if score >= config.threshold and score > 0 else 0.0 for score in scores]
    return [float(index == scores.index(best)) for index in range(len(scores))]


def choose_caption(
    captions: Sequence[Caption], config: SelectionConfig, *, seed: int, epoch: int, sample_id: str
) -> Caption | None:
    """The caption of a sample in an epoch: the same wherever it is drawn. None where the policy lets none pass."""
    probabilities = caption_probabilities(captions, config)
    if not any(probabilities):
        return None
    draw = uniform(seed, epoch, sample_id)
    for caption, probability in zip(captions, probabilities, strict=True):
        draw -= probability
        if draw < 0:
            return caption
    return captions[max(range(len(captions)), key=probabilities.__getitem__)]  # rounding left a rest


def all_policies(config: SelectionConfig, captioners: Iterable[str]) -> dict[Policy, SelectionConfig]:
    """Every policy with the settings of `config`; proportions that it does not give are equal ones of `captioners`.

    Where there are none of these either, "proportions" is left out.
    """
    proportions = config.proportions or dict.fromkeys(captioners, 1.0)
    possible = [policy for policy in POLICIES if policy != "proportions" or proportions]
    return {policy: replace(config, policy=policy, proportions=proportions) for policy in possible}


def uniform(*key: object) -> float:
    """A number in [0, 1) that depends on `key` alone, on every machine."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
