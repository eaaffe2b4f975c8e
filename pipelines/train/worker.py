"""The training of the transformer in a worker: its models, its step, validation and pictures."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipelines.train.config import TrainConfig
from pipelines.train.engine.deepspeed import Engine
from pipelines.train.engine.ema import EMA
from pipelines.train.loop.task import TrainTask
from pipelines.train.loop.worker import TrainingLoop
from pipelines.train.meter import TrainingMeter, step_flops
from pipelines.train.models import TrainModels
from pipelines.train.stream.captions import encode_captions, pad_embeds
from pipelines.train.stream.mixture import check_channels
from pipelines.train.stream.noise import draw_noise, fixed_noise
from pipelines.train.stream.samples import MicroBatch
from pipelines.train.stream.stream import TrainingStream
from pipelines.train.stream.validation import ValidationSet
from pipelines.train.trained_pipeline import TrainedPipeline
from sana_model.flow import flow_loss
from sana_model.guidance import Caption
from sana_model.nn.transformer import SanaTransformer


class TrainWorker(TrainingLoop[TrainConfig]):
    """One rank of the transformer's training."""

    source: TrainingStream
    meter: TrainingMeter

    def __init__(
        self, task: TrainTask[TrainConfig], *, device: torch.device, preempted: Callable[[], object | None] = lambda: None
    ):
        super().__init__(task, device=device, preempted=preempted)
        self.engine = Engine(
            self.load_together(self._load),
            self.config.engine,
            self.config.optim,
            micro_batch_size=self.config.micro_batch_size,
            grad_accum_steps=self.config.grad_accum_steps,
            device=self.device,
        )
        self.ema = EMA(self.engine.master_weights(), self.config.ema)
        self.pipeline = TrainedPipeline(self.engine, self.ema, self.models, self.config)
        self.meter = TrainingMeter(self.device)

    def _load(self) -> SanaTransformer:
        """Load the other models and open the tables. Returns the transformer to train."""
        config, dataset_uri = self.config, self.task.dataset_uri
        sizes = {"rank": self.rank, "world_size": self.world_size}
        transformer, self.models = TrainModels.load(config, device=self.device, rank=self.rank)
        sources, held_out = config.sources(dataset_uri), config.validation_sources(dataset_uri)
        check_channels([*sources, *held_out], self.models.transformer_config.in_channels)
        self.source = TrainingStream(sources, config.data, micro_batch_size=config.micro_batch_size, seed=config.seed, **sizes)
        self.validation = None
        if held_out:
            self.validation = ValidationSet.read(
                held_out, config.validation, config.data, batch_size=config.micro_batch_size, **sizes
            )
        return transformer

    def losses_of(self, batch: MicroBatch) -> Tensor:
        config = self.config
        caption = self.encode(batch)
        sigma, noise = draw_noise(batch, config.flow, self.models.shift, whole=self.models.whole, seed=config.seed)
        loss = self.flow_loss(batch, caption, sigma, noise)
        self._count(batch, caption, loss, sigma)
        return loss

    def encode(self, batch: MicroBatch) -> Caption:
        """Return caption_embeds (B, L, D) and caption_mask (B, L) of a micro-batch."""
        if batch.embeds is not None:
            return pad_embeds(batch.embeds, batch.dropped, self.models.null)
        assert self.models.text_encoder is not None
        return encode_captions(self.models.text_encoder, batch.captions, batch.dropped, self.models.null)

    def flow_loss(self, batch: MicroBatch, caption: Caption, sigma: Tensor, noise: Tensor) -> Tensor:
        """Return the loss of each sample, (B,), for encoded captions, noise levels (B,) and noise (B, C, h, w)."""
        latents = batch.latents.to(self.device, torch.float32)
        return flow_loss(self.engine, latents, *caption, sigma=sigma.to(self.device), noise=noise.to(self.device))

    def _count(self, batch: MicroBatch, caption: Caption, loss: Tensor, sigma: Tensor) -> None:
        """Add a micro-batch to the measurements and to the record of samples."""
        batch_size, _, height, width = batch.latents.shape
        model = self.models.transformer_config
        image_tokens = height * width // model.patch_size**2
        sizes = {"batch_size": batch_size, "image_tokens": image_tokens, "caption_tokens": caption[0].shape[1]}
        flops = step_flops(model, **sizes, adapters=self.config.lora is not None)
        self.meter.add(loss, sigma.to(self.device), num_tokens=batch_size * image_tokens, flops=flops)
        self.outputs.add_batch(self.step + 1, batch)

    def between_steps(self, *, last: bool) -> None:
        config = self.config
        if self.validation is not None and (last or self.step % config.validation.every == 0):
            self.validate(self.validation)
        if config.grid.prompts and (last or self.step % config.grid.every == 0):
            self.draw_grid()

    @torch.no_grad()
    def validate(self, validation: ValidationSet) -> None:
        """Measure the loss on the held-out samples, by noise level and over all, and send it to MLflow."""
        config = self.config.validation
        sums = torch.zeros(len(config.sigmas) + 1, dtype=torch.float64, device=self.device)
        with self.meter.paused(), self.engine.evaluating():
            for batch, weight in ((item.batch, item.weight) for item in validation.batches):
                caption = self.encode(batch)
                for index, level in enumerate(config.sigmas):
                    sigma = torch.full((len(batch.ids),), level)
                    loss = self.flow_loss(batch, caption, sigma, fixed_noise(batch, level, seed=config.seed))
                    sums[index] += weight * loss.sum()
                sums[-1] += weight * len(batch.ids)
            torch.distributed.all_reduce(sums)
        means = (sums[:-1] / sums[-1]).tolist()
        self.metrics["validation_loss"] = sum(means) / len(means)
        by_sigma = {f"validation_loss_sigma.{level:g}": mean for level, mean in zip(config.sigmas, means, strict=True)}
        self.outputs.log_metrics(self.step, {"validation_loss": self.metrics["validation_loss"], **by_sigma})

    def draw_grid(self) -> None:
        """Draw the grid's prompts with the average weights; write the pictures as a PNG file and send them to MLflow."""
        with self.meter.paused():
            picture = self.pipeline.draw(self.config.grid, say=self.outputs.say)
            if picture is not None:
                self.outputs.show_picture(self.step, picture)

    def write_result(self) -> dict[str, Any]:
        self.pipeline.write(self.task.output_uri)
        return {}
