"""Which steps are bad, on one rank; what a training then does is in test_ranks.py."""

from collections.abc import Iterator

import pytest
import torch

from pipelines.train.loop.bad_steps import NUM_RECENT, BadStepGuard
from pipelines.train.loop.config import BadStepConfig
from tests.support.one_worker import one_worker

CPU = torch.device("cpu")
NAN = float("nan")


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    with one_worker():
        yield


def watch(guard: BadStepGuard, *losses: float) -> float:
    """The loss that the last micro-batch of a step goes backward from."""
    watched = torch.tensor(NAN)
    for number, loss in enumerate(losses, start=1):
        watched = guard.watch(torch.tensor(loss), share=1 / len(losses), last=number == len(losses))
    return float(watched)


def test_a_leap_over_the_usual_loss_becomes_nan_once_there_are_steps_to_compare_with() -> None:
    guard = BadStepGuard(BadStepConfig(policy="skip", spike_factor=5.0), CPU)
    assert watch(guard, 100.0) == 100.0  # the first steps are compared with nothing
    for _ in range(NUM_RECENT):
        assert watch(guard, 0.5, 1.5) == 1.5
    assert watch(guard, 4.0, 5.9) == pytest.approx(5.9)  # the step's mean loss counts, 4.95
    assert watch(guard, 0.0, 10.2) != watch(guard, 0.0, 10.2)  # NaN, and again: a leap is not among the usual losses
    assert watch(guard, 1.0) == 1.0


def test_without_a_factor_the_loss_is_left_alone() -> None:
    guard = BadStepGuard(BadStepConfig(), CPU)
    for loss in [1.0] * NUM_RECENT + [1e9]:
        assert watch(guard, loss) == loss
    assert guard.state_dict() == {"num_bad": 0, "recent": []}


def test_a_gradient_that_is_not_finite_is_bad_and_counted() -> None:
    guard = BadStepGuard(BadStepConfig(), CPU)
    losses = [torch.tensor([1.0])]
    judged = [guard.is_bad(norm, losses, scaled=False) for norm in (1.0, NAN, float("inf"), 2.0, NAN)]
    assert judged == [False, True, True, False, True]
    assert (guard.num_bad, guard.num_in_a_row) == (3, 1)


def test_gradients_of_a_scaled_loss_may_overflow_but_the_loss_may_not() -> None:
    guard = BadStepGuard(BadStepConfig(), CPU)
    assert not guard.is_bad(float("inf"), [torch.tensor([1.0, 2.0])], scaled=True)
    assert guard.is_bad(float("inf"), [torch.tensor([1.0]), torch.tensor([NAN])], scaled=True)


def test_its_state_is_part_of_a_checkpoint() -> None:
    config = BadStepConfig(policy="skip", spike_factor=5.0)
    guard, resumed = BadStepGuard(config, CPU), BadStepGuard(config, CPU)
    for _ in range(NUM_RECENT):
        watch(guard, 1.0)
    guard.is_bad(NAN, [torch.tensor([1.0])], scaled=False)
    resumed.load_state_dict(guard.state_dict())
    assert resumed.state_dict() == guard.state_dict() and resumed.num_bad == 1
    assert watch(resumed, 6.0) != 6.0
