"""From a checkpoint of every ZeRO stage to pictures that diffusers draws."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SanaPipeline
from PIL import Image

from jobs.export import main
from pipelines.tables.table import Table
from pipelines.train.config import TrainConfig
from pipelines.train.engine.config import EngineConfig, LoraConfig, OptimConfig
from pipelines.train.engine.lora import merge_lora
from pipelines.train.loop.record import write_config
from pipelines.train.loop.task import TrainTask
from pipelines.train.worker import TrainWorker
from sana_model.nn.transformer import SanaTransformer
from sana_model.pipeline import TextToImage
from tests.support.one_worker import one_worker
from tests.support.training_world import PATH, STREAM, make_pipeline, make_shards, make_table

PROMPTS = ["a red square", "blue"]
LOGVAR = torch.arange(64.0)[None]
"""The weights of a layer that only the training of Sana-Sprint uses, and that other trainings keep."""


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    with one_worker():
        yield


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return make_table(tmp_path_factory.mktemp("data"), make_shards([16]))


def train(folder: Path, table: Table, engine: EngineConfig, **settings: Any) -> TrainWorker:
    """Five steps on one worker: long enough for the average to be far from the weights."""
    init = make_pipeline(folder / "init")
    transformer = SanaTransformer.from_pretrained(init)
    transformer.logvar_weight, transformer.logvar_bias = LOGVAR, torch.ones(1)
    transformer.save_pretrained(f"{init}/transformer")
    config = TrainConfig(
        latents=PATH,
        init=init,
        num_steps=5,
        micro_batch_size=4,
        global_batch_size=4,
        data=STREAM,
        engine=engine,
        optim=OptimConfig(lr=1e-2),
        **settings,
    )
    write_config(str(folder / "run"), config)
    task = TrainTask(config=config, dataset_uri=table.dataset_uri, inputs={}, output_uri=str(folder / "run"))
    worker = TrainWorker(task, device=torch.device("cpu"))
    worker.restore()
    worker.train()
    worker.store.wait()
    return worker


def ours(worker: TrainWorker, folder: Path, *, ema: bool) -> TextToImage:
    """A pipeline with the weights that the worker holds."""
    weights = worker.pipeline.gather_average() if ema else worker.engine.gather_weights()
    assert weights is not None
    pipeline = TextToImage.from_pretrained(folder / "init")
    if worker.config.lora is not None:
        weights = merge_lora(weights, worker.config.lora)
    pipeline.transformer = SanaTransformer(pipeline.transformer.config)
    pipeline.transformer.load_state_dict(weights)
    pipeline.transformer.eval()
    return pipeline


def largest_difference(left: list[Image.Image], right: list[Image.Image]) -> int:
    pairs = zip(left, right, strict=True)
    return max(int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max()) for a, b in pairs)


def draw(pipeline: TextToImage) -> list[Image.Image]:
    return pipeline(PROMPTS, 64, 64, num_steps=4, generator=torch.Generator().manual_seed(7))


def draw_theirs(folder: Path, instruction: str) -> list[Image.Image]:
    pipeline = SanaPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPTS,
        height=64,
        width=64,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(7),
        use_resolution_binning=False,
        complex_human_instruction=[instruction],
        max_sequence_length=32,
    ).images


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_diffusers_draws_what_we_draw(tmp_path: Path, table: Table, zero_stage: Any) -> None:
    worker = train(tmp_path, table, EngineConfig(zero_stage=zero_stage, dtype="fp32"))
    pictures = {}
    for ema in (True, False):
        out = tmp_path / f"diffusers-{ema}"
        assert main(["--source", str(tmp_path / "run"), "--output", str(out), "--ema", str(ema).lower()]) == 0
        pipeline = ours(worker, tmp_path, ema=ema)
        pictures[ema] = draw(pipeline)
        assert all(np.asarray(picture).std() > 5 for picture in pictures[ema])
        assert largest_difference(draw_theirs(out, pipeline.text_encoder.config.instruction), pictures[ema]) <= 2
    assert largest_difference(pictures[True], pictures[False]) > 8, "the average must be something else"


def test_other_layouts_adapters_and_one_checkpoint_of_several(tmp_path: Path, table: Table) -> None:
    worker = train(
        tmp_path,
        table,
        EngineConfig(zero_stage=2, dtype="fp32"),
        lora=LoraConfig(rank=4),
        checkpoint_every=2,
        keep_checkpoints=9,
    )
    expected = ours(worker, tmp_path, ema=True).transformer.state_dict()
    source = ["--source", str(tmp_path / "run")]
    assert main([*source, "--output", str(tmp_path / "sana"), "--layout", "sana"]) == 0
    assert main([*source, "--output", str(tmp_path / "model.pth"), "--layout", "nvlabs"]) == 0
    exported = TextToImage.from_pretrained(tmp_path / "sana")
    assert exported.flow_shift == 2.0 and exported.text_encoder.config.instruction == "User Prompt: "
    written = SanaTransformer.from_pretrained(tmp_path / "model.pth", num_cross_heads=4)
    trained = worker.pipeline.gather(torch.float32)
    assert trained is not None
    for kept in (exported.transformer, written, trained.transformer):
        assert torch.equal(kept.logvar["logvar_weight"], LOGVAR) and len(kept.logvar) == 2
    nvlabs = written.state_dict()
    for name, weight in exported.transformer.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)
        assert torch.equal(weight, nvlabs[name]), name
    (tmp_path / "init").rename(tmp_path / "moved")
    first = tmp_path / "run" / "checkpoints" / "step-000002"
    source = ["--source", str(first), "--init", str(tmp_path / "moved")]
    assert main([*source, "--output", str(tmp_path / "first"), "--layout", "sana"]) == 0
    changed = TextToImage.from_pretrained(tmp_path / "first").transformer.state_dict()
    assert any(not torch.equal(weight, changed[name]) for name, weight in expected.items())


def test_what_cannot_be_exported_is_said(tmp_path: Path, table: Table, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(source: str) -> str:
        assert main(["--source", source, "--output", str(tmp_path / "out")]) == 1
        return capsys.readouterr().err

    assert "holds no checkpoint" in refused(str(tmp_path))
    assert "zoo://pipeline is no training: python -m jobs.convert changes the layout" in refused("zoo://pipeline")
    train(tmp_path, table, EngineConfig(zero_stage=0, dtype="fp32"))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000005"
    weights = checkpoint / "rank-00000-average.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "is not whole: rank-00000-average.safetensors has" in refused(str(checkpoint))
    assert f"none of the checkpoints in {tmp_path / 'run'} is whole" in refused(str(tmp_path / "run"))
    assert not (tmp_path / "out").exists()
