"""Choose the caption that a sample trains on, by a policy over CLIP scores, when the sample is drawn."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from pipelines.score.config import POLICIES, Policy, SelectionConfig
from pipelines.tables.chance import uniform

Caption = dict[str, Any]
"""captioner, caption, clip_score (None where the policy does not look at scores)."""


def caption_probabilities(captions: Sequence[Caption], config: SelectionConfig) -> list[float]:
    """The probability of each caption; they sum to 1, or are all 0 if none may be chosen."""
    if not captions or is_below(captions, config.min_best_score):
        return [0.0] * len(captions)
    weights = _weights(captions, config)
    total = sum(weights)
    return [weight / total if total else 0.0 for weight in weights]


def is_below(captions: Sequence[Caption], min_best_score: float | None) -> bool:
    """Whether an image is dropped because its best caption scores too low. It must have a caption."""
    return min_best_score is not None and max(caption["clip_score"] for caption in captions) < min_best_score


def _weights(captions: Sequence[Caption], config: SelectionConfig) -> list[float]:
    if config.policy == "random":
        return [1.0] * len(captions)
    if config.policy == "proportions":
        return [config.proportions.get(caption["captioner"], 0.0) for caption in captions]
    scores = [caption["clip_score"] for caption in captions]
    best = max(scores)
    if config.policy == "paper":
        return [math.exp((score - best) / config.tau) for score in scores]
    if config.policy == "published" and best >= config.threshold and best > 0:
        return [(score / best) ** (1 / config.tau) if score >= config.threshold and score > 0 else 0.0 for score in scores]
    return [float(index == scores.index(best)) for index in range(len(scores))]


def choose_caption(
    captions: Sequence[Caption], config: SelectionConfig, *, seed: int, epoch: int, sample_id: str
) -> Caption | None:
    """The caption of a sample in an epoch, the same on every machine. None if the policy admits none."""
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
