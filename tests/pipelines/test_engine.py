"""DeepSpeed against a plain PyTorch loop, in every ZeRO stage."""

import copy
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipelines.ema import EMA, EmaConfig
from pipelines.engine import Engine, EngineConfig
from pipelines.optim import OptimConfig, make_optimizer
from sana_model.flow import flow_loss
from sana_model.transformer import SanaTransformer

OPTIM = OptimConfig(lr=1e-3, max_grad_norm=1.0, weight_decay=0.01)
NUM_STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    """A world of one, over gloo."""
    with socket.socket() as free, pytest.MonkeyPatch.context() as patch:
        free.bind(("127.0.0.1", 0))
        place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
        for name, value in place.items():
            patch.setenv(name, str(value))
        patch.delenv("DS_ACCELERATOR", raising=False)
        free.close()
        torch.distributed.init_process_group("gloo")
        yield
        torch.distributed.destroy_process_group()


def make_engine(config: EngineConfig, *, micro_batch_size: int = 4, grad_accum_steps: int = 2) -> Engine:
    torch.manual_seed(0)
    model = SanaTransformer.from_preset("tiny")
    sizes = {"micro_batch_size": micro_batch_size, "grad_accum_steps": grad_accum_steps}
    return Engine(model, config, OPTIM, device=torch.device("cpu"), **sizes)


def losses(model: Engine | SanaTransformer, step: int, parts: int) -> Iterator[Tensor]:
    """The loss of each part of the step's 8 samples."""
    generator = torch.Generator().manual_seed(step)
    latents, noise = torch.randn(2, 8, 8, 8, 8, generator=generator)
    sigma, captions = torch.rand(8, generator=generator), torch.randn(8, 5, 64, generator=generator)
    for part in torch.arange(8).chunk(parts):
        mask = torch.ones(len(part), 5)
        yield flow_loss(model, latents[part], captions[part], mask, sigma=sigma[part], noise=noise[part]).mean()


def train(engine: Engine, ema: EMA, steps: range, parts: int = 2) -> list[float]:
    """The norms of the gradients."""
    norms = []
    for step in steps:
        for loss in losses(engine, step, parts):
            engine.backward(loss)
        norms.append(engine.step(OPTIM.lr))
        ema.update(engine.master_weights())
    return norms


def plain_loop() -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """Weights, average and norms of the gradients after the steps, without DeepSpeed."""
    torch.manual_seed(0)
    model = SanaTransformer.from_preset("tiny")
    average = copy.deepcopy(model)
    optimizer = make_optimizer(model.parameters(), OPTIM)
    norms = []
    for step in range(NUM_STEPS):
        next(losses(model, step, 1)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.max_grad_norm).item())
        optimizer.step()
        optimizer.zero_grad()
        decay = (2 + step) / (11 + step)
        for averaged, weight in zip(average.parameters(), model.parameters(), strict=True):
            averaged.data = decay * averaged.data + (1 - decay) * weight.data
    return dict(model.named_parameters()), dict(average.named_parameters()), norms


def assert_close(weights: dict[str, Tensor] | None, expected: dict[str, Tensor], tolerance: float) -> None:
    assert weights is not None and weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight, expected[name].detach(), rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


# A weight whose gradient is nothing but rounding moves by up to lr in each step, either way.
@pytest.mark.parametrize(("dtype", "tolerance", "norm_tolerance"), [("fp32", 2e-5, 1e-4), ("bf16", 2 * NUM_STEPS * 1e-3, 0.02)])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_equals_a_plain_loop(zero_stage: int, dtype: str, tolerance: float, norm_tolerance: float) -> None:
    weights, average, norms = plain_loop()
    engine = make_engine(EngineConfig(zero_stage=zero_stage, dtype=dtype))
    ema = EMA(engine.master_weights(), EmaConfig(decay=0.999))
    assert train(engine, ema, range(NUM_STEPS)) == pytest.approx(norms, rel=norm_tolerance)
    assert_close(engine.gather_weights(), weights, tolerance)
    with ema.in_place_of(engine.master_weights()):
        assert_close(engine.gather_weights(), average, tolerance)


@pytest.mark.parametrize("grad_accum_steps", [1, 4])
def test_accumulated_gradients_are_those_of_the_whole(grad_accum_steps: int) -> None:
    weights, _, norms = plain_loop()
    engine = make_engine(
        EngineConfig(zero_stage=2, dtype="fp32"),
        micro_batch_size=8 // grad_accum_steps,
        grad_accum_steps=grad_accum_steps,
    )
    ema = EMA(engine.master_weights(), EmaConfig())
    assert train(engine, ema, range(NUM_STEPS), parts=grad_accum_steps) == pytest.approx(norms, rel=1e-4)
    assert_close(engine.gather_weights(), weights, 2e-5)


@pytest.mark.parametrize(("zero_stage", "dtype"), [(0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "fp32"), (3, "fp32")])
def test_goes_on_from_a_checkpoint_exactly(tmp_path: Path, zero_stage: int, dtype: str) -> None:
    config = EngineConfig(zero_stage=zero_stage, dtype=dtype)
    straight = make_engine(config)
    ema = EMA(straight.master_weights(), EmaConfig())
    train(straight, ema, range(3))
    straight.save(tmp_path)
    norms = train(straight, ema, range(3, NUM_STEPS))
    resumed = make_engine(config)
    resumed.load(tmp_path)
    assert train(resumed, EMA(resumed.master_weights(), EmaConfig()), range(3, NUM_STEPS)) == norms
    assert_close(resumed.gather_weights(), straight.gather_weights() or {}, 0.0)


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        make_engine(EngineConfig(zero_stage=0, dtype="fp32")).load(tmp_path)
