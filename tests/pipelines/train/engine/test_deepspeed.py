"""DeepSpeed against a plain PyTorch loop, in every ZeRO stage."""

import copy
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from pipelines.train.engine.checkpoint_reader import CheckpointReader
from pipelines.train.engine.checkpoints import (
    BadCheckpointError,
    Checkpoint,
    read_weights,
    take_snapshot,
    write_part,
)
from pipelines.train.engine.config import EmaConfig, EngineConfig, OptimConfig
from pipelines.train.engine.deepspeed import Engine
from pipelines.train.engine.ema import EMA
from pipelines.train.engine.optim import make_optimizer
from sana_model.flow import flow_loss
from sana_model.nn.transformer import SanaTransformer
from tests.support.one_worker import one_worker

OPTIM = OptimConfig(lr=1e-3, max_grad_norm=1.0, weight_decay=0.01)
NUM_STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    with one_worker():
        yield


def make_engine(
    config: EngineConfig, *, micro_batch_size: int = 4, grad_accum_steps: int = 2, optim: OptimConfig = OPTIM
) -> Engine:
    torch.manual_seed(0)
    model = SanaTransformer.from_preset("tiny")
    sizes = {"micro_batch_size": micro_batch_size, "grad_accum_steps": grad_accum_steps}
    device = torch.device("cuda" if config.dtype == "fp16" else "cpu")
    return Engine(model, config, optim, device=device, **sizes)


def losses(model: Engine | SanaTransformer, step: int, parts: int) -> Iterator[Tensor]:
    """The loss of each part of the step's 8 samples."""
    generator = torch.Generator().manual_seed(step)
    latents, noise = torch.randn(2, 8, 8, 8, 8, generator=generator)
    sigma, captions = torch.rand(8, generator=generator), torch.randn(8, 5, 64, generator=generator)
    if isinstance(model, Engine):
        latents, noise, sigma, captions = (tensor.to(model.device) for tensor in (latents, noise, sigma, captions))
    for part in torch.arange(8).chunk(parts):
        mask = torch.ones(len(part), 5, device=latents.device)
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


def snapshot_of(engine: Engine, ema: EMA, folder: Path) -> Checkpoint:
    write_part(str(folder), take_snapshot(engine, ema, {}, step=3))
    return Checkpoint.open(str(folder))


def restore(engine: Engine, checkpoint: Checkpoint) -> EMA:
    ema = EMA(engine.master_weights(), EmaConfig())
    reader = CheckpointReader(checkpoint, engine)
    reader.load(ema)
    reader.close()
    return ema


@pytest.mark.parametrize(
    ("zero_stage", "dtype"), [(0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "fp32"), (3, "fp32"), (3, "bf16")]
)
def test_goes_on_from_a_checkpoint_exactly(tmp_path: Path, zero_stage: int, dtype: str) -> None:
    config = EngineConfig(zero_stage=zero_stage, dtype=dtype)
    straight = make_engine(config)
    ema = EMA(straight.master_weights(), EmaConfig())
    train(straight, ema, range(3))
    state = {"points": [3]}
    snapshot = take_snapshot(straight, ema, state, step=3)
    norms = train(straight, ema, range(3, NUM_STEPS))
    state["points"].append(4)
    write_part(str(tmp_path), snapshot)  # in the background it may come as late as this
    checkpoint = Checkpoint.open(str(tmp_path))
    assert checkpoint.states[0]["points"] == [3]
    resumed = make_engine(config)
    resumed_ema = restore(resumed, checkpoint)
    assert train(resumed, resumed_ema, range(3, NUM_STEPS)) == norms
    assert_close(resumed.gather_weights(), straight.gather_weights() or {}, 0.0)
    for average, other in zip(resumed_ema.averages, ema.averages, strict=True):
        assert torch.equal(average, other)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "came"])
def test_a_snapshot_stays_while_the_training_goes_on(optimizer: Literal["adamw", "adamw_8bit", "came"]) -> None:
    """It is written in the background, and nothing of it may change meanwhile."""
    engine = make_engine(EngineConfig(zero_stage=0, dtype="fp32"), optim=replace(OPTIM, optimizer=optimizer))
    ema = EMA(engine.master_weights(), EmaConfig())
    train(engine, ema, range(2))
    snapshot = take_snapshot(engine, ema, {}, step=2)
    before = copy.deepcopy((snapshot.tensors, snapshot.others))
    train(engine, ema, range(2, 4))
    torch.testing.assert_close((snapshot.tensors, snapshot.others), before, rtol=0, atol=0)
    now = engine.other_states()["states"]
    assert any(not torch.equal(*pair) for pair in zip(tensors_of(now), tensors_of(before[1]["states"]), strict=True))


def tensors_of(states: list[dict[str, Any]]) -> list[Tensor]:
    return [torch.as_tensor(value) for state in states for value in state.values()]


@pytest.mark.parametrize(("written", "read"), [(0, 2), (2, 3), (3, 0), (1, 2)])
def test_another_zero_stage_goes_on_from_it(tmp_path: Path, written: int, read: int) -> None:
    straight = make_engine(EngineConfig(zero_stage=written, dtype="fp32"))
    ema = EMA(straight.master_weights(), EmaConfig())
    train(straight, ema, range(3))
    checkpoint = snapshot_of(straight, ema, tmp_path)
    assert_close(read_weights(str(tmp_path), average=False), straight.gather_weights() or {}, 0.0)
    with ema.in_place_of(straight.master_weights()):
        assert_close(read_weights(str(tmp_path)), straight.gather_weights() or {}, 0.0)
    norms = train(straight, ema, range(3, NUM_STEPS))
    resumed = make_engine(EngineConfig(zero_stage=read, dtype="fp32"))
    resumed_ema = restore(resumed, checkpoint)
    assert train(resumed, resumed_ema, range(3, NUM_STEPS)) == pytest.approx(norms, rel=1e-5)
    assert_close(resumed.gather_weights(), straight.gather_weights() or {}, 1e-5)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gradients_that_are_not_finite_change_nothing(zero_stage: int, dtype: str) -> None:
    engine = make_engine(EngineConfig(zero_stage=zero_stage, dtype=dtype))
    ema = EMA(engine.master_weights(), EmaConfig())
    train(engine, ema, range(2))
    before = engine.gather_weights() or {}
    moments = {name: [tensor.clone() for tensor in tensors] for name, tensors in engine.moments().items()}
    for index, loss in enumerate(losses(engine, 2, 2)):
        engine.backward(loss * (float("nan") if index == 1 else 1.0))
    assert not math.isfinite(engine.step(OPTIM.lr))
    assert_close(engine.gather_weights(), before, 0.0)
    assert set(moments) == {"exp_avg", "exp_avg_sq"}
    for name, tensors in engine.moments().items():
        for tensor, old in zip(tensors, moments[name], strict=True):
            assert torch.equal(tensor, old)
    assert all(math.isfinite(norm) for norm in train(engine, ema, range(3, 5)))


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(zero_stage=2, dtype="fp32", offload_optimizer=True),
        EngineConfig(zero_stage=3, dtype="fp32", offload_optimizer=True, offload_weights=True),
        EngineConfig(zero_stage=1, dtype="fp32", checkpoint_blocks=1),
        EngineConfig(zero_stage=0, dtype="fp32", checkpoint_blocks=2),
    ],
    ids=["offload_optimizer", "offload_weights", "checkpoint_all", "checkpoint_every_second"],
)
def test_ways_to_save_memory_change_no_weight(config: EngineConfig, tmp_path: Path) -> None:
    weights, _, norms = plain_loop()
    engine = make_engine(config)
    ema = EMA(engine.master_weights(), EmaConfig())
    assert train(engine, ema, range(NUM_STEPS)) == pytest.approx(norms, rel=1e-4)
    assert_close(engine.gather_weights(), weights, 2e-5)
    checkpoint = snapshot_of(engine, ema, tmp_path)
    resumed = make_engine(EngineConfig(zero_stage=0, dtype="fp32"))
    restore(resumed, checkpoint)
    assert_close(resumed.gather_weights(), engine.gather_weights() or {}, 0.0)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blocks_change_no_weight(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's C++ takes a minute to compile; aot_eager is all of torch.compile but that."""
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=backend))
    weights, _, norms = plain_loop()
    engine = make_engine(EngineConfig(zero_stage=2, dtype="fp32", compile_blocks=True))
    assert train(engine, EMA(engine.master_weights(), EmaConfig()), range(NUM_STEPS)) == pytest.approx(norms, rel=1e-3)
    assert_close(engine.gather_weights(), weights, 1e-3)


@pytest.mark.gpu
def test_loss_scaling_in_half_precision(tmp_path: Path) -> None:
    """DeepSpeed refuses float16 on a CPU."""
    _, _, norms = plain_loop()
    engine = make_engine(EngineConfig(zero_stage=1, dtype="fp16"))
    ema = EMA(engine.master_weights(), EmaConfig())
    assert engine.other_states()["loss_scale"]["cur_scale"] > 1
    assert train(engine, ema, range(NUM_STEPS)) == pytest.approx(norms, rel=0.02)
    checkpoint = snapshot_of(engine, ema, tmp_path)
    resumed = make_engine(EngineConfig(zero_stage=1, dtype="fp16"))
    restore(resumed, checkpoint)
    assert resumed.other_states()["loss_scale"] == engine.other_states()["loss_scale"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "rank-00000.json").unlink(), "rank-00000.json is missing"),
        (lambda folder: os.truncate(folder / "rank-00000-average.safetensors", 100), "has 100 bytes in place of"),
        (lambda folder: flip_last_byte(folder / "rank-00000-moments.safetensors"), "the content of .*moments.* has changed"),
    ],
)
def test_damaged_checkpoints_are_known(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    engine = make_engine(EngineConfig(zero_stage=1, dtype="fp32"))
    ema = EMA(engine.master_weights(), EmaConfig())
    train(engine, ema, range(1))
    snapshot_of(engine, ema, tmp_path)
    damage(tmp_path)
    with pytest.raises(BadCheckpointError, match=message):
        CheckpointReader(Checkpoint.open(str(tmp_path)), engine)


def flip_last_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
