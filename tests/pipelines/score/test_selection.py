"""Selection policies against their formulas, and draws that depend on (seed, epoch, id) alone."""

import math
from collections import Counter

import pytest

from pipelines.score.config import POLICIES, Policy, SelectionConfig
from pipelines.score.selection import all_policies, caption_probabilities, choose_caption

CAPTIONS = [
    {"captioner": "a", "caption": "one", "clip_score": 30.0},
    {"captioner": "b", "caption": "two", "clip_score": 27.0},
    {"captioner": "c", "caption": "three", "clip_score": 24.0},
]


def probabilities(**settings: object) -> list[float]:
    return caption_probabilities(CAPTIONS, SelectionConfig(**settings))  # type: ignore[arg-type]


def test_each_policy_is_its_formula() -> None:
    weights = [math.exp(score / 2.0) for score in (30, 27, 24)]
    assert probabilities(policy="paper", tau=2.0) == pytest.approx([weight / sum(weights) for weight in weights])
    share = 30**10 / (30**10 + 27**10)
    assert probabilities(policy="published") == pytest.approx([share, 1 - share, 0])
    assert probabilities(policy="published", threshold=31.0) == [1, 0, 0]
    assert probabilities(policy="best") == [1, 0, 0]
    assert probabilities(policy="random") == pytest.approx([1 / 3] * 3)
    assert probabilities(policy="proportions", proportions={"b": 3, "c": 1}) == pytest.approx([0, 0.75, 0.25])


def test_scores_that_would_overflow_or_are_negative() -> None:
    hot = [{**CAPTIONS[0], "clip_score": 1e6}, {**CAPTIONS[1], "clip_score": -5.0}]
    assert caption_probabilities(hot, SelectionConfig(policy="paper")) == [1, 0]
    assert caption_probabilities(hot, SelectionConfig(policy="published")) == [1, 0]
    below = [{**CAPTIONS[0], "clip_score": -3.0}, {**CAPTIONS[1], "clip_score": -5.0}]
    assert caption_probabilities(below, SelectionConfig(policy="published", threshold=-10.0)) == [1, 0]


def test_an_image_may_be_dropped() -> None:
    config = SelectionConfig(policy="best", min_best_score=31.0)
    assert choose_caption(CAPTIONS, config, seed=0, epoch=0, sample_id="x") is None
    assert choose_caption([], SelectionConfig(), seed=0, epoch=0, sample_id="x") is None
    other = SelectionConfig(policy="proportions", proportions={"nobody": 1.0})
    assert choose_caption(CAPTIONS, other, seed=0, epoch=0, sample_id="x") is None


def test_draws_follow_the_probabilities_and_nothing_but_seed_epoch_and_id() -> None:
    config = SelectionConfig(policy="proportions", proportions={"a": 1, "b": 3})

    def draw(seed: int, epoch: int, number: int) -> str:
        chosen = choose_caption(CAPTIONS, config, seed=seed, epoch=epoch, sample_id=f"id{number}")
        assert chosen is not None
        return chosen["captioner"]

    drawn = [draw(0, 0, number) for number in range(4000)]
    assert Counter(drawn)["b"] / 4000 == pytest.approx(0.75, abs=0.03)
    assert drawn == [draw(0, 0, number) for number in range(4000)]
    assert drawn != [draw(0, 1, number) for number in range(4000)]
    assert drawn != [draw(1, 0, number) for number in range(4000)]


# Scores close enough that every policy leaves several captions a chance; one below the published threshold.
CLOSE = [
    {"captioner": name, "caption": name, "clip_score": score}
    for name, score in (("original", 27.9), ("a", 28.1), ("b", 28.0), ("c", 24.9), ("d", 25.0))
]
NUM_DRAWS = 100_000


def expected_shares(policy: str) -> dict[str, float]:
    """The formulas once more, by hand: tau is 0.1."""
    scores = {caption["captioner"]: caption["clip_score"] for caption in CLOSE}
    weights = {
        "paper": {name: math.exp(score / 0.1 - 281) for name, score in scores.items()},
        "published": {name: (score / 28.1) ** 10 if score >= 25 else 0.0 for name, score in scores.items()},
        "best": {"a": 1.0},
        "random": dict.fromkeys(scores, 1.0),
        "proportions": {"original": 1.0, "a": 2.0, "d": 5.0},  # "absent" has no caption here: its share goes to the others
    }[policy]
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_hundred_thousand_draws_follow_the_formula(policy: Policy) -> None:
    config = SelectionConfig(policy=policy, proportions={"original": 1, "a": 2, "d": 5, "absent": 9})
    drawn: Counter[str] = Counter()
    for number in range(NUM_DRAWS):
        chosen = choose_caption(CLOSE, config, seed=3, epoch=1, sample_id=f"{number}")
        assert chosen is not None
        drawn[chosen["captioner"]] += 1
    expected = expected_shares(policy)
    for caption in CLOSE:
        share = expected.get(caption["captioner"], 0.0)
        sigma = math.sqrt(NUM_DRAWS * share * (1 - share))
        assert abs(drawn[caption["captioner"]] - NUM_DRAWS * share) <= 4 * sigma


def test_all_policies_share_their_settings() -> None:
    policies = all_policies(SelectionConfig(tau=0.5, min_best_score=22.0), ["a", "b"])
    assert list(policies) == list(POLICIES)
    assert all(config.policy == name and config.tau == 0.5 for name, config in policies.items())
    assert policies["proportions"].proportions == {"a": 1.0, "b": 1.0}
    assert "proportions" not in all_policies(SelectionConfig(), [])


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match=r"tau=0\.0 must be positive"):
        SelectionConfig(tau=0.0)
    with pytest.raises(ValueError, match=r"proportions=\{'a': -1\} must not be negative"):
        SelectionConfig(policy="proportions", proportions={"a": -1, "b": 2})
    with pytest.raises(ValueError, match="proportions"):
        SelectionConfig(policy="proportions")
