"""LoRA: it begins as nothing, trains under DeepSpeed, and what it saves is what diffusers draws with."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SanaPipeline, SanaTransformer2DModel
from torch import Tensor

from pipelines.train.config import TrainConfig
from pipelines.train.engine.config import EmaConfig, EngineConfig, LoraConfig, OptimConfig
from pipelines.train.engine.deepspeed import Engine
from pipelines.train.engine.ema import EMA
from pipelines.train.engine.lora import add_lora, merge_lora, save_lora
from pipelines.train.loop.record import PIPELINE_DIR
from pipelines.train.models import TrainModels
from pipelines.train.trained_pipeline import LORA_DIR, TrainedPipeline
from sana_model.flow import flow_loss
from sana_model.nn.transformer import SanaTransformer
from sana_model.pipeline import TextToImage
from tests.support.one_worker import one_worker
from tests.support.training_world import STREAM

LORA = LoraConfig(rank=4, alpha=8.0)


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    with one_worker():
        yield


def make_model() -> SanaTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SanaTransformer.from_preset("tiny")


def plain(weights: dict[str, Tensor]) -> SanaTransformer:
    model = SanaTransformer.from_preset("tiny").eval()
    model.load_state_dict(merge_lora(weights, LORA))
    return model


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, 8, 4, 4, generator=generator)
    return latents, torch.tensor([100.0, 800.0]), torch.randn(2, 5, 64, generator=generator)


def train(zero_stage: Any, dtype: Any = "fp32") -> tuple[dict[str, Tensor], list[float], Engine]:
    """The weights, adapters and all, that six steps end in; and the losses."""
    model = make_model()
    add_lora(model, LORA, seed=0)
    config = EngineConfig(zero_stage=zero_stage, dtype=dtype)
    engine = Engine(model, config, OptimConfig(lr=1e-2), micro_batch_size=2, grad_accum_steps=1, device=torch.device("cpu"))
    ema = EMA(engine.master_weights(), EmaConfig(decay=0.9))
    noise = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(1))
    latents, _, captions = inputs()
    losses = []
    for _ in range(6):
        loss = flow_loss(engine, latents, captions, torch.ones(2, 5), sigma=torch.tensor([0.2, 0.7]), noise=noise).mean()
        losses.append(loss.item())
        engine.backward(loss)
        engine.step(1e-2)
        ema.update(engine.master_weights())
    weights = engine.gather_weights()
    assert weights is not None
    return weights, losses, engine


def test_begins_as_the_model_that_it_was_given_to() -> None:
    model = make_model().eval()
    expected = model(*inputs())
    add_lora(model, LORA, seed=0)
    assert torch.equal(model(*inputs()), expected)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 2 * 7 and all(".lora_" in name for name in trained)
    assert all(
        torch.equal(weight, make_model().state_dict()[name]) for name, weight in plain(model.state_dict()).state_dict().items()
    )


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_trains_the_adapters_alone_and_merges_to_the_same_model(zero_stage: int) -> None:
    weights, losses, engine = train(zero_stage)
    assert losses[-1] < 0.9 * losses[0]
    start = make_model().state_dict()
    frozen = [name for name in weights if ".lora_" not in name]
    assert all(torch.equal(weights[name], start[name.replace(".base_layer.", ".")]) for name in frozen)
    assert sum(weight.numel() for weight in engine.master_weights()) < 0.2 * sum(weight.numel() for weight in start.values())
    with torch.no_grad():
        torch.testing.assert_close(plain(weights)(*inputs()), engine._deepspeed.module.eval()(*inputs()), rtol=0, atol=1e-4)


def test_bf16_keeps_its_adapters_in_float32() -> None:
    weights, losses, _ = train(0, "bf16")
    assert losses[-1] < 0.9 * losses[0]
    adapters = torch.cat([weight.flatten() for name, weight in weights.items() if ".lora_" in name])
    assert not torch.equal(adapters, adapters.bfloat16().float())


def test_adapters_are_merged_into_the_weights_that_the_training_began_with(tmp_path: Path) -> None:
    start = TextToImage.from_pretrained("zoo://pipeline", dtype=torch.float32)
    with torch.no_grad():
        for weight in start.transformer.parameters():
            weight.mul_(1 + 2**-12)  # which bfloat16, as the engine has them, rounds away
    start.save_pretrained(tmp_path / "start")
    engine_config = EngineConfig(zero_stage=0, dtype="bf16")
    sizes = {"num_steps": 1, "micro_batch_size": 1, "global_batch_size": 1}
    config = TrainConfig(latents="l", init=str(tmp_path / "start"), data=STREAM, lora=LORA, engine=engine_config, **sizes)
    model, models = TrainModels.load(config, device=torch.device("cpu"), rank=0)
    engine = Engine(model, config.engine, OptimConfig(), micro_batch_size=1, grad_accum_steps=1, device=torch.device("cpu"))
    with torch.no_grad():
        for weight in engine.master_weights():
            weight.normal_(std=0.1)
    TrainedPipeline(engine, EMA(engine.master_weights(), config.ema), models, config).write(str(tmp_path / "run"))
    written = SanaTransformer.from_pretrained(tmp_path / "run" / PIPELINE_DIR).state_dict()
    start.load_lora(tmp_path / "run" / LORA_DIR, merge=True)
    for name, expected in start.transformer.state_dict().items():
        torch.testing.assert_close(written[name], expected, rtol=1e-6, atol=1e-6)


def test_diffusers_draws_with_the_adapter_what_we_draw(tmp_path: Path) -> None:
    weights, *_ = train(0)
    save_lora(tmp_path / "lora", weights, LORA)
    make_model().save_pretrained(tmp_path / "base", layout="diffusers")
    theirs = SanaTransformer2DModel.from_pretrained(tmp_path / "base").eval()
    pipeline = SanaPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=theirs, scheduler=None)
    latents, timestep, captions = inputs()

    def draw() -> Tensor:
        with torch.no_grad():
            return theirs(latents, encoder_hidden_states=captions, timestep=timestep, return_dict=False)[0]

    before = draw()
    pipeline.load_lora_weights(tmp_path / "lora")
    with torch.no_grad():
        ours = plain(weights)(*inputs())
    assert (ours - before).abs().max() > 0.05
    torch.testing.assert_close(draw(), ours, rtol=0, atol=1e-4)


def test_what_does_not_fit_is_said_at_once() -> None:
    sizes = {"latents": "l", "init": "i", "num_steps": 1, "micro_batch_size": 1, "global_batch_size": 1, "data": STREAM}
    with pytest.raises(ValueError, match="lora with zero_stage=3"):
        TrainConfig(**sizes, lora=LORA, engine=EngineConfig(zero_stage=3))
    with pytest.raises(ValueError, match="both must be positive"):
        LoraConfig(rank=0)
