"""What every training worker does: steps, and between them reports, pictures and checkpoints."""

import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from torch import Tensor

from pipelines.checkpoints import load_checkpoint, save_checkpoint
from pipelines.data import MicroBatch, PrefetchedStream, TrainingStream
from pipelines.ema import EMA
from pipelines.engine import Engine
from pipelines.optim import learning_rate
from pipelines.sample import image_grid
from pipelines.select import uniform
from pipelines.tables import Table
from pipelines.tracking import TrackedRun
from pipelines.train_config import FlowConfig, TrainConfig, TrainingError
from pipelines.train_meter import LossHistory, TrainingMeter
from pipelines.train_progress import TrainProgress
from sana_model.autoencoder import DCAutoencoder
from sana_model.flow import flow_loss, sample_sigmas
from sana_model.generate import DEFAULT_FLOW_SHIFT, Caption, TextToImage
from sana_model.pipeline_files import load_pipeline
from sana_model.text_encoder import TextEncoder
from sana_model.transformer import SanaTransformer

PIPELINE_DIR = "pipeline"
GRIDS_DIR = "samples"


@dataclass(frozen=True, kw_only=True)
class TrainTask:
    """What the driver hands to the workers."""

    config: TrainConfig
    table: Table
    output_dir: Path
    run: TrackedRun | None


def train_worker(task: TrainTask) -> dict[str, Any]:
    """Run by Ray Train in each worker. Returns the figures of the whole training on rank 0, or {"error": message} on all."""
    try:
        worker = TrainWorker(task)
        worker.restore()
        worker.train()
        return worker.finish()
    except TrainingError as error:
        return {"error": str(error)}


def load_start(config: TrainConfig) -> TextToImage:
    """The pipeline that training starts from: the transformer in float32, the others as they are stored.

    Raises FileNotFoundError or ValueError, naming what does not fit.
    """
    if config.init is not None:
        pipeline = load_pipeline(
            config.init,
            autoencoder=config.autoencoder,
            text_encoder=config.text_encoder,
            flow_shift=config.flow.shift,
        )
        pipeline.transformer.float()
        return pipeline
    assert config.preset is not None and config.autoencoder is not None and config.text_encoder is not None
    autoencoder = DCAutoencoder.from_pretrained(config.autoencoder)
    text_encoder = TextEncoder.from_pretrained(config.text_encoder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        transformer = SanaTransformer.from_preset(
            config.preset, in_channels=autoencoder.config.latent_channels, caption_dim=text_encoder.embed_dim
        )
    shift = DEFAULT_FLOW_SHIFT if config.flow.shift is None else config.flow.shift
    return TextToImage(transformer, autoencoder, text_encoder, flow_shift=shift)


def encode_captions(text_encoder: TextEncoder, captions: list[str | None], null: Caption) -> Caption:
    """caption_embeds (B, L, D) and caption_mask (B, L); None becomes `null`, which is text_encoder.null()."""
    null_embeds, null_mask = null
    embeds, mask = null_embeds[:0], null_mask[:0]
    told = [index for index, caption in enumerate(captions) if caption is not None]
    if told:
        embeds, mask = text_encoder.encode([caption for caption in captions if caption is not None])
    length, null_length = max(mask.shape[1], null_mask.shape[1]), null_mask.shape[1]
    caption_embeds = null_embeds.new_zeros(len(captions), length, null_embeds.shape[-1])
    caption_mask = null_mask.new_zeros(len(captions), length)
    caption_embeds[:, :null_length], caption_mask[:, :null_length] = null_embeds, null_mask
    if told:
        caption_embeds[told], caption_mask[told] = 0, False
        caption_embeds[told, : mask.shape[1]], caption_mask[told, : mask.shape[1]] = embeds, mask
    return caption_embeds, caption_mask


def draw_noise(batch: MicroBatch, config: FlowConfig, shift: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """Noise levels (B,) and noise (B, C, h, w), float32 on the CPU.

    Each sample's come from (seed, epoch, id) alone: they are the same in any batch, on any worker, after any restart.
    """
    generator = torch.Generator()
    sigma, noise = torch.empty(len(batch.ids)), torch.empty(batch.latents.shape)
    for index, key in enumerate(zip(batch.epochs, batch.ids, strict=True)):
        generator.manual_seed(int(uniform(seed, *key, "noise") * 2**53))
        sigma[index] = sample_sigmas(
            1, distribution=config.distribution, mean=config.mean, std=config.std, shift=shift, generator=generator
        )[0]
        noise[index] = torch.randn(noise.shape[1:], generator=generator)
    return sigma, noise


class TrainWorker:
    """One rank of a training.

    Raises TrainingError if models, table and configuration do not fit together.
    """

    def __init__(self, task: TrainTask):
        self.task = task
        self.config = task.config
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        resources = self.config.resources
        torch.set_num_threads(resources.num_threads or max(math.ceil(resources.num_cpus), 1))
        self.device = ray.train.torch.get_device()
        self._load_models()
        self.engine = Engine(
            self.pipeline.transformer,
            self.config.engine,
            self.config.optim,
            micro_batch_size=self.config.micro_batch_size,
            grad_accum_steps=self.config.grad_accum_steps,
            device=self.device,
        )
        self.ema = EMA(self.engine.master_weights(), self.config.ema)
        self.step = 0  # done
        self.checkpoint_time = time.time()
        self.preemption_notice: ray.train.PreemptionInfo | None = None
        self.history = LossHistory()
        self.meter = TrainingMeter(self.device)

    def _load_models(self) -> None:
        config = self.config
        try:
            self.pipeline = load_start(config)
            self.source = TrainingStream(
                self.task.table,
                config.data,
                micro_batch_size=config.micro_batch_size,
                seed=config.seed,
                rank=self.rank,
                world_size=self.world_size,
            )
        except (ValueError, FileNotFoundError) as error:
            raise TrainingError(str(error)) from error
        self.shift = self.pipeline.flow_shift
        self.transformer_config = self.pipeline.transformer.config
        self.pipeline.transformer.train()
        dtype = config.engine.torch_dtype
        self.text_encoder = self.pipeline.text_encoder.to(self.device, dtype)
        self.autoencoder = self.pipeline.autoencoder.to(self.device, dtype) if self.rank == 0 else None
        self.null = self.text_encoder.null()

    def restore(self) -> None:
        """Go on from the last checkpoint, if there is one."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                state = load_checkpoint(Path(folder), self.engine, self.ema, rank=self.rank)
            self.step = state["step"]
            self.history.load_state_dict(state["history"])
            self.source.load_state_dict(state["stream"])
        self.stream = PrefetchedStream(self.source, self.config.data.prefetch)

    def train(self) -> None:
        config = self.config
        self.meter.start()
        while self.step < config.num_steps:
            self.train_step()
            self.step += 1
            last = self.step == config.num_steps
            if last or self.step % config.log_every == 0:
                self.log()
            if config.grid.prompts and (last or self.step % config.grid.every == 0):
                self.draw_grid()
            leaving = self.step % config.log_every == 0 and self.a_node_leaves()
            if last or leaving or self.step % config.checkpoint_every == 0:
                self.save()
        self.stream.close()

    def a_node_leaves(self) -> bool:
        """True once for every notice that a node of this training will be taken away. All ranks must call it, and agree."""
        notice = ray.train.get_preemption_info()
        news = notice is not None and notice != self.preemption_notice
        self.preemption_notice = notice
        return news

    def train_step(self) -> None:
        config = self.config
        lr = learning_rate(self.step, config.num_steps, config.optim)
        for _ in range(config.grad_accum_steps):
            batch = next(self.stream)
            caption_embeds, caption_mask = encode_captions(self.text_encoder, batch.captions, self.null)
            sigma, noise = draw_noise(batch, config.flow, self.shift, seed=config.seed)
            sigma, noise = sigma.to(self.device), noise.to(self.device)
            latents = self._to_latents(batch)
            loss = flow_loss(self.engine, latents, caption_embeds, caption_mask, sigma=sigma, noise=noise)
            self.engine.backward(loss.mean())
            self.meter.add(loss, sigma)
        grad_norm = self.engine.step(lr)
        self.ema.update(self.engine.master_weights())
        self.meter.end_step(lr=lr, grad_norm=grad_norm)

    def _to_latents(self, batch: MicroBatch) -> Tensor:
        channels = self.transformer_config.in_channels
        if batch.latents.shape[1] != channels:
            raise TrainingError(
                f"{self.task.table.uri} holds latents of {batch.latents.shape[1]} channels, the transformer takes {channels}: "
                "they are not of this pipeline's autoencoder"
            )
        return batch.latents.to(self.device, torch.float32)

    def log(self) -> None:
        """Losses and speed since the last time, over all ranks, to MLflow and to the driver. Raises TrainingError on NaN."""
        report = self.meter.collect(self.stream.wait_seconds, self.config.global_batch_size)
        self.history.add(self.step, report.losses)
        loss, metrics = report.mean_loss, report.metrics
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss became {loss} within the {len(report.losses)} steps before step {self.step} (norm of the gradients "
                f"{metrics['grad_norm']:.3g}): lower optim.lr={self.config.optim.lr:g} or raise optim.warmup_steps"
            )
        if self.rank != 0:
            return
        progress = TrainProgress(
            step=self.step,
            num_steps=self.config.num_steps,
            loss=loss,
            samples_per_second=metrics["samples_per_second"],
            data_wait_share=metrics["data_wait_share"],
            seconds_left=metrics["seconds_per_step"] * (self.config.num_steps - self.step),
            checkpoint_time=self.checkpoint_time,
        )
        progress.write(self.task.output_dir)
        if self.task.run is not None:
            self.task.run.log_metrics({**metrics, "epoch": self.stream.state_dict()["epoch"]}, self.step)

    def draw_grid(self) -> None:
        """Pictures of the configured prompts with the average weights, as a PNG file and in MLflow."""
        pipeline = self.gather_pipeline(self.config.engine.torch_dtype)
        if pipeline is None:
            return
        with self.meter.paused():
            grid = self.config.grid
            seeds = range(grid.seed, grid.seed + len(grid.prompts))
            images = pipeline(grid.prompts, num_steps=grid.num_steps, guidance_scale=grid.guidance_scale, seed=seeds)
            picture = image_grid(images, grid.columns)
            folder = self.task.output_dir / GRIDS_DIR
            folder.mkdir(exist_ok=True)
            picture.save(folder / f"step-{self.step:06d}.png")
            if self.task.run is not None:
                self.task.run.log_image(picture, "samples", self.step)

    def gather_pipeline(self, dtype: torch.dtype) -> TextToImage | None:
        """The pipeline with the average weights, on rank 0. All ranks must call it."""
        with self.ema.in_place_of(self.engine.master_weights()):
            weights = self.engine.gather_weights()
        if weights is None:
            return None
        assert self.autoencoder is not None
        with torch.device("meta"):
            transformer = SanaTransformer(self.transformer_config)
        transformer.load_state_dict(weights, assign=True)
        transformer.to(self.device, dtype)
        return TextToImage(transformer, self.autoencoder, self.text_encoder, flow_shift=self.shift)

    def save(self) -> None:
        """A checkpoint of all ranks; Ray Train counts it only when every rank's part has arrived."""
        state = {"step": self.step, "history": self.history.state_dict(), "stream": self.stream.state_dict()}
        with self.meter.paused(), tempfile.TemporaryDirectory() as folder:
            save_checkpoint(Path(folder), self.engine, self.ema, state, rank=self.rank)
            ray.train.report(
                {"step": self.step},
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                checkpoint_dir_name=f"step-{self.step:06d}",
            )
        self.checkpoint_time = time.time()

    def finish(self) -> dict[str, Any]:
        """Write the final pipeline; the training's figures, on rank 0."""
        pipeline = self.gather_pipeline(torch.float32)
        if pipeline is None:
            return {}
        pipeline.save_pretrained(self.task.output_dir / PIPELINE_DIR)
        loss_start, loss_end = self.history.ends()
        return {
            "loss_start": loss_start,
            "loss_end": loss_end,
            "losses": self.history.points,
            "samples_per_second": self.meter.num_samples / self.meter.seconds if self.meter.seconds else 0.0,
            "started_at": self.meter.started_at,
        }
