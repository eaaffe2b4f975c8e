"""The training against a plain PyTorch loop: same samples, same noise, same losses, however the work is shared out."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.train.config import TrainConfig
from pipelines.train.engine.config import EngineConfig, OptimConfig
from pipelines.train.engine.optim import learning_rate
from pipelines.train.stream.noise import draw_noise
from pipelines.train.stream.stream import TrainingStream
from sana_model.flow import flow_loss
from sana_model.pipeline import TextToImage
from tests.support.training_ranks import BUCKETS, tiny_config, train_on_ranks
from tests.support.training_world import make_pipeline, make_shards, make_table


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    config = tiny_config(make_pipeline(tmp_path_factory.mktemp("init")))
    optim = OptimConfig(lr=1e-3, warmup_steps=5, schedule="cosine", weight_decay=0.01)
    return replace(config, num_steps=20, global_batch_size=8, optim=optim)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    make_table(folder, make_shards([30, 20, 26], BUCKETS))
    return folder


def plain_loop(config: TrainConfig, dataset: Path) -> Iterator[float]:
    """The losses of a training in one process, in PyTorch alone."""
    pipeline = TextToImage.from_pretrained(str(config.init))
    model, encoder = pipeline.transformer.float().train(), pipeline.text_encoder
    weights = list(model.parameters())
    optim = config.optim
    optimizer = torch.optim.AdamW(weights, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay)
    sizes = {"micro_batch_size": config.micro_batch_size, "seed": config.seed, "world_size": config.num_workers}
    sources = config.sources(str(dataset))
    streams = [TrainingStream(sources, config.data, rank=rank, **sizes) for rank in range(config.num_workers)]
    num_parts = config.num_workers * config.grad_accum_steps
    for step in range(config.num_steps):
        total = 0.0
        for stream in streams:
            for _ in range(config.grad_accum_steps):
                batch = next(stream)
                sigma, noise = draw_noise(batch, config.flow, pipeline.flow_shift, whole=False, seed=config.seed)
                drawn = zip(batch.captions, batch.dropped, strict=True)
                captions = [encoder.null() if dropped else encoder.encode([text]) for text, dropped in drawn]
                losses = [
                    flow_loss(model, latents[None].float(), *caption, sigma=sigma[i : i + 1], noise=noise[i : i + 1])
                    for i, (latents, caption) in enumerate(zip(batch.latents, captions, strict=True))
                ]
                loss = torch.cat(losses).mean() / num_parts
                loss.backward()
                total += loss.item()
        torch.nn.utils.clip_grad_norm_(weights, optim.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.num_steps, optim)
        optimizer.step()
        optimizer.zero_grad()
        yield total


@pytest.mark.parametrize("num_workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_losses_are_those_of_a_plain_loop(tmp_path: Path, dataset: Path, config: TrainConfig, num_workers: int) -> None:
    config = replace(config, num_workers=num_workers)
    expected = list(plain_loop(config, dataset))
    stages = {f"zero-{stage}": replace(config, engine=EngineConfig(zero_stage=stage, dtype="fp32")) for stage in (0, 1, 2, 3)}
    half = {f"bf16-{stage}": replace(config, engine=EngineConfig(zero_stage=stage, dtype="bf16")) for stage in (0, 2)}
    trained = train_on_ranks(tmp_path, dataset, [*stages.items(), *half.items()])
    for name, result in trained.items():
        losses = list(result.losses.values())
        worst = max(abs(loss / plain - 1) for loss, plain in zip(losses, expected, strict=True))
        print(f"{num_workers} workers, {name}: the losses of {len(losses)} steps differ by {worst:.1e} at most")
        assert len(losses) == 20 and worst < (1e-5 if name in stages else 0.02), name


def test_accumulated_steps_are_whole_steps(tmp_path: Path, config: TrainConfig) -> None:
    make_table(tmp_path / "dataset", make_shards([30, 20, 26]))
    whole = replace(config, micro_batch_size=4, global_batch_size=4)
    parts = replace(config, micro_batch_size=1, global_batch_size=4)
    trained = train_on_ranks(tmp_path, tmp_path / "dataset", [("whole", whole), ("parts", parts)])
    assert list(trained["parts"].losses.values()) == pytest.approx(list(trained["whole"].losses.values()), rel=1e-5)
