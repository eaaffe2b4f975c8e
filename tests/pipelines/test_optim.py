"""The learning rate over the steps."""

from itertools import pairwise

import pytest

from pipelines.optim import OptimConfig, learning_rate


def rates(config: OptimConfig, num_steps: int = 100) -> list[float]:
    return [learning_rate(step, num_steps, config) for step in range(num_steps)]


def test_constant_after_a_linear_warmup() -> None:
    values = rates(OptimConfig(lr=1e-3, warmup_steps=9))
    assert values[:10] == pytest.approx([1e-4 * count for count in range(1, 11)])
    assert set(values[9:]) == {1e-3}
    assert set(rates(OptimConfig(lr=1e-3))) == {1e-3}


def test_cosine_ends_where_it_is_told() -> None:
    values = rates(OptimConfig(lr=1e-3, schedule="cosine", warmup_steps=20, final_lr_share=0.1))
    assert max(values) == values[20] == 1e-3
    assert values[-1] == pytest.approx(1e-4)
    assert values[59:61] == pytest.approx([5.5e-4, 5.5e-4], rel=0.02)  # half way down
    assert all(before > after for before, after in pairwise(values[20:]))


def test_a_training_may_end_within_its_warmup() -> None:
    assert rates(OptimConfig(lr=1.0, schedule="cosine", warmup_steps=9), 5) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
