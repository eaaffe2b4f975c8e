"""Noise and noise levels come from a sample's id, epoch and seed, and from nothing else."""

from dataclasses import replace

import pytest
import torch

from pipelines.train.stream.config import FlowConfig
from pipelines.train.stream.noise import draw_noise, fixed_noise
from pipelines.train.stream.samples import MicroBatch

FLOW = FlowConfig()


def batch_of(ids: list[str], epochs: list[int]) -> MicroBatch:
    size = len(ids)
    return MicroBatch("64x64", torch.zeros(size, 8, 8, 8), ["x"] * size, [False] * size, ids, epochs, ["table"] * size)


def test_a_sample_has_the_same_noise_in_any_batch() -> None:
    sigma, noise = draw_noise(batch_of(["a", "b", "c"], [0, 0, 4]), FLOW, 2.0, whole=False, seed=1)
    other_sigma, other_noise = draw_noise(batch_of(["c", "d", "a"], [4, 0, 0]), FLOW, 2.0, whole=False, seed=1)
    assert torch.equal(sigma[[0, 2]], other_sigma[[2, 0]]) and torch.equal(noise[[0, 2]], other_noise[[2, 0]])
    assert len(set(sigma.tolist())) == 3 and ((sigma > 0) & (sigma < 1)).all()


@pytest.mark.parametrize(("epoch", "seed"), [(1, 1), (0, 2)])
def test_another_epoch_or_seed_is_other_noise(epoch: int, seed: int) -> None:
    sigma, noise = draw_noise(batch_of(["a"], [0]), FLOW, 2.0, whole=False, seed=1)
    other_sigma, other_noise = draw_noise(batch_of(["a"], [epoch]), FLOW, 2.0, whole=False, seed=seed)
    assert sigma != other_sigma and not torch.equal(noise, other_noise)


def test_the_shift_raises_the_level_and_leaves_the_noise() -> None:
    batch = batch_of([str(number) for number in range(200)], [0] * 200)
    (low, noise), (high, same) = (draw_noise(batch, FLOW, shift, whole=False, seed=0) for shift in (1.0, 3.0))
    torch.testing.assert_close(high, 3 * low / (1 + 2 * low))
    assert torch.equal(noise, same)
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01


def test_the_noise_of_validation_depends_on_id_level_and_seed_but_not_on_the_epoch() -> None:
    batch = batch_of(["a", "b"], [0, 0])
    noise = fixed_noise(batch, 0.5, seed=0)
    assert torch.equal(noise, fixed_noise(replace(batch, epochs=[7, 8]), 0.5, seed=0))
    assert torch.equal(noise[[1]], fixed_noise(batch_of(["b"], [0]), 0.5, seed=0))
    for other in (fixed_noise(batch, 0.3, seed=0), fixed_noise(batch, 0.5, seed=1), noise.flip(0)):
        assert not torch.equal(noise, other)
