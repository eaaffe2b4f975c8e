"""The training of an autoencoder in a worker: its models, its step, fixed pictures, and the trained autoencoder."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.tables.chance import uniform
from pipelines.train.engine.deepspeed import Engine
from pipelines.train.engine.ema import EMA
from pipelines.train.loop.task import TrainTask
from pipelines.train.loop.worker import TrainingLoop
from pipelines.train_autoencoder.adversary import Adversary, BalanceWatch
from pipelines.train_autoencoder.config import TrainAutoencoderConfig
from pipelines.train_autoencoder.losses import latent_losses, latent_noise, picture_losses, to_image, weighted_sum
from pipelines.train_autoencoder.meter import AutoencoderMeter
from pipelines.train_autoencoder.models import load_start
from pipelines.train_autoencoder.parts import TrainableAutoencoder, describe_parts, keep_first
from pipelines.train_autoencoder.perceptual import load_perceptual
from pipelines.train_autoencoder.pictures import psnrs, read_pictures, show, to_crops, to_pixels
from pipelines.train_autoencoder.stream import CropBatch, CropStream, find_sources
from pipelines.train_autoencoder.trained import write_autoencoder
from sana_model.nn.autoencoder import DCAutoencoder

DISCRIMINATOR = "discriminator"
"""Name of the discriminator's part of a checkpoint."""


class AutoencoderWorker(TrainingLoop[TrainAutoencoderConfig]):
    """One rank of an autoencoder's training."""

    source: CropStream
    meter: AutoencoderMeter

    def __init__(
        self,
        task: TrainTask[TrainAutoencoderConfig],
        *,
        device: torch.device,
        preempted: Callable[[], object | None] = lambda: None,
    ):
        super().__init__(task, device=device, preempted=preempted)
        config = self.config
        model = self.load_together(self._load)
        self.autoencoder = model.config
        # Frozen weights are taken from it at the end: a 16-bit engine rounds its own.
        self.start = {name: value.clone() for name, value in model.state_dict().items()} if self.rank == 0 else {}
        adversarial = config.losses.adversarial
        adaptive = adversarial is not None and adversarial.adaptive
        trained = TrainableAutoencoder(model, config.parts, keeps_features=adaptive).train()
        self.parts = describe_parts(trained, config.parts)
        sizes: Any = {
            "micro_batch_size": config.micro_batch_size,
            "grad_accum_steps": config.grad_accum_steps,
            "device": self.device,
        }
        self.engine = Engine(trained, config.engine, config.optim, **sizes)
        self.ema = EMA(self.engine.master_weights(), config.ema)
        self.adversary: Adversary | None = None
        if adversarial is not None:
            self.adversary = Adversary(
                adversarial, num_steps=config.num_steps, dtype=config.engine.dtype, seed=config.seed, **sizes
            )
            self.companions[DISCRIMINATOR] = self.adversary.engine
        self.balance = BalanceWatch()
        self.psnr: float | None = None
        """On the fixed pictures, at the last validation."""
        self.num_refused = 0  # images of this rank that could not be decoded
        self.meter = AutoencoderMeter(self.device)

    def _load(self) -> DCAutoencoder:
        """Load the models, open the tables, and read the fixed pictures. Returns the autoencoder to train."""
        config, dataset_uri = self.config, self.task.dataset_uri
        model = load_start(config)
        self.perceptual: nn.Module | None = None
        if config.losses.perceptual is not None:
            dtype = torch.bfloat16 if config.engine.dtype == "bf16" else torch.float32
            self.perceptual = load_perceptual(config.losses.perceptual).to(self.device, dtype)
        self.source = CropStream(
            find_sources(dataset_uri, config.data),
            config.data,
            micro_batch_size=config.micro_batch_size,
            grad_accum_steps=config.grad_accum_steps,
            seed=config.seed,
            rank=self.rank,
            world_size=self.world_size,
        )
        self.pictures = read_pictures(dataset_uri, config)
        return model

    def restore(self) -> None:
        super().restore()
        self.outputs.say(self.parts)

    def losses_of(self, batch: CropBatch) -> Tensor:
        """Encode and decode a micro-batch, and compute its loss, (B,), see `TrainingLoop.losses_of`."""
        config = self.config
        image = to_image(batch.images, self.device)
        side = image.shape[-1] // self.autoencoder.compression
        shape = (self.autoencoder.latent_channels, side, side)
        noise = latent_noise(batch, shape, config.losses, seed=config.seed).to(self.device)
        decoded, latents = self.engine(image, self.keep(self.num_channels), noise)
        decoded = decoded.float().view_as(decoded)  # of another tensor than the engine's output: see `last_gradient`
        parts = picture_losses(config.losses, self.perceptual, decoded, image) | latent_losses(config.losses, latents)
        loss = weighted_sum(config.losses, parts)
        if self.adversary is not None and self.adversary.teaches(self.step):
            adversarial = self.adversary.generator_loss(decoded)
            weight = self.adversary.weight(loss.mean(), adversarial.mean(), decoded, self.engine.module)
            loss = loss + weight * adversarial
            parts |= {"adversarial": adversarial, "adversarial_weight": weight}
        self._count(batch, loss, {f"loss.{name}": part for name, part in parts.items()})
        if self.adversary is not None and self.adversary.learns(self.step):
            self.meter.add_parts(self.adversary.backward(image, decoded))
        return loss

    def broken_companion(self) -> str | None:
        adversary = self.adversary
        broken = adversary is not None and adversary.learns(self.step) and not adversary.engine.gradients_are_finite()
        return DISCRIMINATOR if broken else None

    def step_companions(self, *, bad: bool) -> None:
        if self.adversary is None or not self.adversary.learns(self.step):
            return
        if bad:
            self.adversary.engine.drop_step()
        else:
            self.meter.add_parts({"discriminator.grad_norm": torch.tensor(self.adversary.step(self.step))})

    @property
    def num_channels(self) -> int:
        """How many channels of the latents the current step keeps; the same on all ranks."""
        choices = self.config.latent_channels or (self.autoencoder.latent_channels,)
        return choices[int(uniform(self.config.seed, self.step, "channels") * len(choices))]

    def keep(self, count: int) -> Tensor:
        """The `keep` of `TrainableAutoencoder.forward` for the first `count` channels."""
        return keep_first(count, self.autoencoder.latent_channels, self.device)

    def _count(self, batch: CropBatch, loss: Tensor, parts: Mapping[str, Tensor]) -> None:
        """Add a micro-batch to the measurements and to the record of samples."""
        self.meter.add(loss, parts)
        self.outputs.add_batch(self.step + 1, batch)
        if batch.num_refused:
            self.num_refused += batch.num_refused
            self.outputs.tell_driver(
                f"{batch.num_refused} images of a micro-batch cannot be decoded, others stand in for them "
                f"({self.num_refused} so far on worker {self.rank})"
            )

    def look_at(self, metrics: Mapping[str, float]) -> None:
        if (problem := self.balance.look(self.step, metrics)) is not None:
            self.outputs.say(problem)

    def more_state(self) -> dict[str, Any]:
        return {"balance": self.balance.state_dict(), "psnr": self.psnr}

    def load_more_state(self, state: Mapping[str, Any]) -> None:
        self.balance.load_state_dict(state["balance"])
        self.psnr = state["psnr"]

    def between_steps(self, *, last: bool) -> None:
        if not (last or self.step % self.config.validation.every == 0):
            return
        with self.meter.paused(), self.averaged():
            if self.config.holds_out:
                self.validate()
            if self.config.validation.grid:
                self.show_grid()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the autoencoder has the average weights and is in evaluation mode, without gradients. Collective."""
        with torch.no_grad(), self.engine.evaluating():
            with self.ema.in_place_of(self.engine.master_weights()):
                self.engine.apply_master_weights()
                yield
            self.engine.apply_master_weights()

    def encode(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) to unscaled latents, in the engine's dtype."""
        return self.engine.module.encoder(image.to(self.config.engine.torch_dtype))

    def decode(self, latents: Tensor, num_channels: int) -> Tensor:
        """Unscaled latents, of which the first channels are kept, to the image (B, 3, H, W), float32."""
        return self.engine.module.decoder(latents * self.keep(num_channels).to(latents.dtype)).float()

    def validate(self) -> None:
        """Measure PSNR and loss on the fixed pictures, shared out among the ranks, and send them to MLflow."""
        config = self.config
        everything = self.autoencoder.latent_channels
        counts = sorted({everything, *config.latent_channels})
        sums = torch.zeros(len(counts) + 2, dtype=torch.float64, device=self.device)
        for start in range(self.rank * config.micro_batch_size, len(self.pictures), self.world_size * config.micro_batch_size):
            image = to_image(to_crops(self.pictures[start : start + config.micro_batch_size]), self.device)
            latents = self.encode(image)
            for index, count in enumerate(counts):
                decoded = self.decode(latents, count)
                sums[index] += psnrs(decoded, image).sum()
            parts = picture_losses(config.losses, self.perceptual, decoded, image) | latent_losses(config.losses, latents)
            sums[-2] += weighted_sum(config.losses, parts).sum()
            sums[-1] += len(image)
        torch.distributed.all_reduce(sums)
        *found, loss = (sums[:-1] / sums[-1]).tolist()
        by_count = {f"psnr.channels_{count}": value for count, value in zip(counts, found, strict=True) if count != everything}
        self.metrics["validation_loss"] = loss
        self.psnr = found[-1]
        self.outputs.log_metrics(self.step, {"validation_loss": loss, "psnr": found[-1], **by_count})

    def show_grid(self) -> None:
        """Write the grid of fixed pictures and their reconstructions as a PNG file, and send it to MLflow."""
        if self.rank == 0:
            chosen = self.pictures[: self.config.validation.grid]
            images = [to_image(to_crops([one]), self.device) for one in chosen]
            rows = [to_pixels(self.decode(self.encode(image), self.autoencoder.latent_channels))[0] for image in images]
            self.outputs.show_picture(self.step, show(np.stack(chosen), np.stack(rows)))

    def write_result(self) -> dict[str, Any]:
        with self.ema.in_place_of(self.engine.master_weights()):
            weights = self.engine.gather_weights()
        if weights is None:
            return {}
        figures = write_autoencoder(
            self.task.output_uri, self.config, self.autoencoder, self.start, weights, self.pictures, device=self.device
        )
        return figures | ({} if self.psnr is None else {"psnr": self.psnr})
