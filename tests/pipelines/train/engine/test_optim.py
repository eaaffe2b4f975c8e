"""The optimizers under DeepSpeed, and the learning rate over the steps."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipelines.train.config import TrainConfig
from pipelines.train.engine.config import CameConfig, EngineConfig, OptimConfig
from pipelines.train.engine.deepspeed import Engine
from pipelines.train.engine.optim import learning_rate, make_optimizer
from sana_model.flow import flow_loss
from sana_model.nn.transformer import SanaTransformer
from tests.support.one_worker import one_worker
from tests.support.training_world import STREAM


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    with one_worker():
        yield


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


def test_wsd_is_constant_and_then_falls_in_a_straight_line() -> None:
    values = rates(OptimConfig(lr=1e-3, schedule="wsd", warmup_steps=10, decay_steps=20, final_lr_share=0.1))
    assert values[9] < 1e-3 and set(values[10:80]) == {1e-3}
    assert values[-1] == pytest.approx(1e-4)
    falls = [before - after for before, after in pairwise(values[79:])]
    assert falls == pytest.approx([9e-4 / 20] * 20)
    for wrong in ({"schedule": "wsd"}, {"schedule": "cosine", "decay_steps": 5}):
        with pytest.raises(ValueError, match="only wsd reads them, and needs them"):
            OptimConfig(**wrong)


def test_a_training_may_end_within_its_warmup() -> None:
    assert rates(OptimConfig(lr=1.0, schedule="cosine", warmup_steps=9), 5) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def make_engine(optim: OptimConfig, config: EngineConfig) -> Engine:
    torch.manual_seed(0)
    model = SanaTransformer.from_preset("tiny")
    return Engine(model, config, optim, micro_batch_size=4, grad_accum_steps=1, device=torch.device("cpu"))


def loss_of(engine: Engine, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn(2, 4, 8, 4, 4, generator=generator)
    captions = torch.randn(4, 5, 64, generator=generator)
    sigma = torch.rand(4, generator=generator)
    return flow_loss(engine, latents, captions, torch.ones(4, 5), sigma=sigma, noise=noise).mean()


def optimizer_of(engine: Engine) -> torch.optim.Optimizer:
    return engine._deepspeed.basic_optimizer


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
@pytest.mark.parametrize("zero_stage", [0, 2])
def test_the_rate_that_the_optimizer_has_is_the_configured_one(schedule: Any, zero_stage: Any) -> None:
    """Read back from the optimizer that DeepSpeed drives, and seen in how far AdamW moves a weight."""
    optim = OptimConfig(lr=1e-2, schedule=schedule, warmup_steps=2, decay_steps=3 if schedule == "wsd" else 0, betas=(0.0, 0.0))
    engine = make_engine(optim, EngineConfig(zero_stage=zero_stage, dtype="fp32"))
    expected = rates(optim, 8)
    assert len(set(expected)) > 2
    for step, lr in enumerate(expected):
        before = torch.cat([weight.detach().flatten().clone() for weight in engine.master_weights()])
        engine.backward(loss_of(engine))
        engine.step(lr)
        assert {group["lr"] for group in optimizer_of(engine).param_groups} == {lr}
        after = torch.cat([weight.detach().flatten() for weight in engine.master_weights()])
        moved = (after - before).abs().max().item()  # without momentum, AdamW moves by lr * sign(gradient)
        assert moved == pytest.approx(lr, rel=0.01, abs=1e-7), step


@pytest.mark.parametrize(
    ("optimizer", "zero_stage", "dtype"),
    [
        ("adamw", 1, "fp32"),
        ("adamw_8bit", 0, "fp32"),
        ("adamw_8bit", 0, "bf16"),
        ("adamw_8bit", 2, "bf16"),
        ("adamw_8bit", 3, "fp32"),
        ("came", 0, "fp32"),
        ("came", 0, "bf16"),
        ("came_8bit", 0, "fp32"),
        ("came_8bit", 0, "bf16"),
    ],
)
def test_every_optimizer_learns(optimizer: Any, zero_stage: Any, dtype: Any) -> None:
    engine = make_engine(OptimConfig(optimizer=optimizer, lr=2e-3), EngineConfig(zero_stage=zero_stage, dtype=dtype))
    losses = []
    for _ in range(20):
        loss = loss_of(engine)
        losses.append(loss.item())
        engine.backward(loss)
        engine.step(2e-3)
    assert losses[-1] < 0.75 * losses[0], losses
    states = optimizer_of(engine).state.values()
    if optimizer == "adamw_8bit":
        assert any(state["state1"].dtype == torch.uint8 for state in states)
    if optimizer == "came_8bit":
        assert {state["exp_avg_8bit"].dtype for state in states if "exp_avg_8bit" in state} == {torch.uint8}
    if optimizer.startswith("came"):  # every matrix is still one
        shapes = {tuple(state["exp_avg_sq_col"].shape) for state in states if "exp_avg_sq_col" in state}
        assert {(64,), (160,)} < shapes


def test_came_is_refused_where_shapes_are_lost() -> None:
    sizes = {"latents": "l", "init": "i", "num_steps": 1, "micro_batch_size": 1, "global_batch_size": 1, "data": STREAM}
    came = OptimConfig(optimizer="came")
    assert TrainConfig(**sizes, optim=came, engine=EngineConfig(zero_stage=0)).optim is came
    for optim in (came, replace(came, optimizer="came_8bit")):
        with pytest.raises(ValueError, match=rf"optimizer={optim.optimizer} with zero_stage=2: .* Set engine.zero_stage=0"):
            TrainConfig(**sizes, optim=optim, engine=EngineConfig(zero_stage=2))


def came_by_the_book(weight: Tensor, gradients: list[Tensor], config: OptimConfig) -> Tensor:
    """CAME as Algorithm 2 of arXiv 2307.02047 writes it, with its approximations as whole matrices, in float64."""
    (beta1, beta2, beta3), (eps1, eps2) = config.came.betas, config.came.eps
    weight = weight.double()
    momentum = torch.zeros_like(weight)
    rows, columns, rows_s, columns_s = (torch.zeros(size, dtype=torch.float64) for size in (*weight.shape, *weight.shape))
    for gradient in gradients:
        gradient = gradient.double()
        square = gradient.square() + eps1
        rows, columns = beta2 * rows + (1 - beta2) * square.mean(1), beta2 * columns + (1 - beta2) * square.mean(0)
        update = gradient / torch.sqrt(torch.outer(rows, columns) / rows.mean())
        update = update / max(1.0, update.square().mean().sqrt().item())
        momentum = beta1 * momentum + (1 - beta1) * update
        instability = (update - momentum).square() + eps2
        rows_s = beta3 * rows_s + (1 - beta3) * instability.mean(1)
        columns_s = beta3 * columns_s + (1 - beta3) * instability.mean(0)
        weight = weight - config.lr * config.weight_decay * weight
        weight = weight - config.lr * momentum / torch.sqrt(torch.outer(rows_s, columns_s) / rows_s.mean())
    return weight


def test_came_does_not_factor_the_kernels_of_depthwise_convolutions() -> None:
    """As in NVlabs' code: their updates begin at (1 - beta1) and keep all square gradients."""
    kernel = nn.Parameter(torch.zeros(256, 1, 3, 3))
    optimizer = make_optimizer([kernel], OptimConfig(optimizer="came", lr=1.0))
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        kernel.grad = torch.randn(kernel.shape, generator=generator)
        before = kernel.detach().clone()
        optimizer.step()
    assert set(optimizer.state[kernel]) == {"step", "exp_avg", "exp_avg_sq", "RMS"}
    assert (kernel.detach() - before).square().mean().sqrt() < 0.5  # factored: about 8


@pytest.mark.parametrize("name", ["came", "came_8bit"])
def test_came_takes_1x1_convolutions_for_the_matrices_that_they_are(name: Any) -> None:
    """As NVlabs' code does, where the configuration says so: bit for bit what the matrix gets."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(96, 80, generator=generator)
    gradients = [torch.randn(96, 80, generator=generator) for _ in range(4)]
    ends = {}
    for factor in (True, False):
        settings = OptimConfig(optimizer=name, lr=1e-2, came=CameConfig(factor_1x1=factor))
        for shape in ((96, 80), (96, 80, 1, 1)):
            weight = nn.Parameter(start.clone().view(shape))
            optimizer = make_optimizer([weight], settings)
            for gradient in gradients:
                weight.grad = gradient.clone().view(shape)
                optimizer.step()
            assert weight.shape == weight.grad.shape == shape  # type: ignore[union-attr]
            ends[factor, len(shape)] = weight.detach().view(96, 80)
    assert torch.equal(ends[True, 4], ends[True, 2]) and torch.equal(ends[False, 2], ends[True, 2])
    assert not torch.equal(ends[False, 4], ends[True, 4])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_came_is_the_published_one(weight_decay: float) -> None:
    config = OptimConfig(optimizer="came", lr=1e-2, weight_decay=weight_decay)
    torch.manual_seed(0)
    start, gradients = torch.randn(6, 5), [torch.randn(6, 5) for _ in range(5)]
    for settings in (config, replace(config, came=replace(config.came, betas=(0.8, 0.9, 0.95), eps=(1e-3, 1e-2)))):
        weight = nn.Parameter(start.clone())
        optimizer = make_optimizer([weight], settings)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        torch.testing.assert_close(weight.detach().double(), came_by_the_book(start, gradients, settings), rtol=1e-5, atol=1e-5)


def test_came_in_8_bits_goes_nearly_the_same_way() -> None:
    """Two matrices, of which only the larger one's momentum is rounded, and a vector."""
    starts, expected, _ = walk("came")
    _, (large, *small), optimizer = walk("came_8bit")
    assert all(torch.equal(one, other) for one, other in zip(small, expected[1:], strict=True))
    way = (expected[0] - starts[0]).norm()
    print(f"8 bits end {(large - expected[0]).norm() / way:.2%} of the way beside float32")
    assert 0 < (large - expected[0]).norm() < 0.02 * way
    (group,) = optimizer.param_groups
    assert len(group["params"]) == 3
    kept = optimizer.state[group["params"][0]]
    assert "exp_avg" not in kept and kept["exp_avg_8bit"].shape == (96, 80) and kept["exp_avg_scales"].numel() == 30
    _, again, _ = walk("came_8bit", restart=True)
    assert all(torch.equal(one, other) for one, other in zip(again, (large, *small), strict=True))


def walk(name: str, *, restart: bool = False) -> tuple[list[Tensor], list[Tensor], torch.optim.Optimizer]:
    """Weights before and after 60 steps towards a goal, with noise; `restart`: half way by a new optimizer with the states."""
    generator = torch.Generator().manual_seed(0)
    starts, goals = ([torch.randn(shape, generator=generator) for shape in ((96, 80), (30, 20), (40,))] for _ in range(2))
    weights = [nn.Parameter(start.clone()) for start in starts]
    config = OptimConfig(optimizer=name, lr=2e-2)  # type: ignore[arg-type]
    optimizer = make_optimizer(weights, config)
    for step in range(60):
        for weight, goal in zip(weights, goals, strict=True):
            weight.grad = weight.detach() - goal + 0.5 * torch.randn(goal.shape, generator=generator)
        if restart and step == 30:
            states = [copy.deepcopy(optimizer.state[weight]) for weight in weights]
            optimizer = make_optimizer(weights, config)
            for weight, state in zip(weights, states, strict=True):
                optimizer.state[weight] = state
        optimizer.step()
    return starts, [weight.detach() for weight in weights], optimizer
