"""The moving average of weights."""

import pytest
import torch

from pipelines.train.engine.config import EmaConfig
from pipelines.train.engine.ema import EMA


def walk(num_steps: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(num_steps, 12, generator=generator).cumsum(0))


def test_follows_its_formula() -> None:
    path = walk(60)
    ema = EMA([path[0]], EmaConfig(decay=0.8))
    expected = path[0].double()
    for count, weights in enumerate(path[1:], start=1):
        ema.update([weights])
        decay = min(0.8, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * weights.double()
    torch.testing.assert_close(ema.averages[0].double(), expected, rtol=1e-5, atol=1e-5)


def test_parts_of_the_weights_make_the_whole() -> None:
    path = walk(30)
    whole, parts = EMA([path[0]], EmaConfig()), EMA([path[0][:5], path[0][5:]], EmaConfig())
    for weights in path[1:]:
        whole.update([weights])
        parts.update([weights[:5], weights[5:]])
    assert torch.equal(torch.cat(parts.averages), whole.averages[0])


def test_without_decay_it_is_the_weights() -> None:
    path = walk(5)
    ema = EMA([path[0]], EmaConfig(decay=0.0))
    for weights in path[1:]:
        ema.update([weights])
        assert torch.equal(ema.averages[0], weights)


def test_takes_the_place_of_the_weights_for_a_while() -> None:
    path = walk(20)
    ema, live = EMA([path[0]], EmaConfig()), torch.nn.Parameter(path[0].clone())
    for weights in path[1:]:
        live.data.copy_(weights)
        ema.update([live])
    average = ema.averages[0].clone()
    with pytest.raises(KeyError), ema.in_place_of([live]):
        assert torch.equal(live, average) and not torch.equal(live, path[-1])
        raise KeyError  # whatever happens within
    assert torch.equal(live, path[-1])
    assert torch.equal(ema.averages[0], average)


def test_decay_must_leave_room_for_the_weights() -> None:
    with pytest.raises(ValueError, match=r"decay=1\.0"):
        EmaConfig(decay=1.0)
