"""The model of a replica: draws one batch of pictures at a time."""

import time
from dataclasses import replace
from functools import partial

import pyarrow as pa
from torch import Tensor

from pipelines.draw.config import DrawConfig, SampleConfig
from pipelines.draw.sampler import Sampler, find_drawing
from pipelines.draw.start import StartFiles
from pipelines.serve.batches import Ticket
from pipelines.serve.captions import KeptCaptions
from pipelines.serve.checks import PictureCheck, PromptCheck
from pipelines.serve.config import ServeConfig
from pipelines.serve.metrics import PainterMetrics
from pipelines.serve.orders import Abandoned, ModelFacts, Order, Preview, Refused, Settings
from pipelines.serve.previews import PreviewMaker
from sana_model.arguments import nearest_multiple
from sana_model.pictures import default_strength
from sana_model.solver import steps_taken

POLICY = "content_policy_violation"


class BatchDrawer:
    """Loads what a configuration names. Raises what `find_drawing`, `Sampler` and the checks raise."""

    def __init__(self, config: ServeConfig, metrics: PainterMetrics):
        self._config, self._metrics = config, metrics
        draw = DrawConfig(
            dtype=config.dtype,
            memory=config.memory,
            precision=config.precision,
            device=config.device,
            batch_size=config.batch_size,
        )
        sample = SampleConfig(name="served", pipeline=config.model, prompts="of the orders", lora=config.lora, draw=draw)
        drawing = find_drawing(sample, with_versions=False)
        self._sampler = Sampler(drawing.config, drawing.pipeline, loras=drawing.loras)
        self._captions = KeptCaptions(self._sampler.pipeline.text_encoder, config.cached_prompts)
        self._prompt_check = config.prompt_check and PromptCheck(config.prompt_check, config.device)
        self._picture_check = config.picture_check and PictureCheck(config.picture_check, config.device)

    def describe(self) -> ModelFacts:
        """The size and number of steps that are taken where an order names none."""
        height, width = self._sampler.pipeline.image_size(None, None)
        num_steps = self._sampler.config.num_steps or 0
        return ModelFacts(height=height, width=width, unit=self._unit, num_steps=num_steps, guided=not self._is_sprint)

    @property
    def _unit(self) -> int:
        pipeline = self._sampler.pipeline
        return pipeline.autoencoder.compression * pipeline.transformer.config.patch_size

    @property
    def _is_sprint(self) -> bool:
        return self._sampler.pipeline.transformer.config.guidance_embeds

    @property
    def _parts_take_turns(self) -> bool:
        """Whether the autoencoder is away while the transformer draws: decoding a preview would exchange them in every step."""
        offload = self._sampler.pipeline.offload
        return offload is not None and offload.plan.kept == "one part at a time"

    def settle(self, order: Order) -> Settings:
        """An order's settings with the size, steps and strength that will be. Raises ValueError for what cannot be drawn."""
        settings, start = order.settings, order.start()
        draw = settings.to_draw().for_model(self._config.served_name, is_sprint=self._is_sprint)
        height, width, strength = settings.height, settings.width, settings.strength
        if start is not None:
            own_width, own_height = start.images[0].size
            if start.masks and start.masks[0].size != start.images[0].size:
                mask_width, mask_height = start.masks[0].size
                sizes = f"the mask is {mask_width}x{mask_height} and its picture {own_width}x{own_height}"
                raise ValueError(f"{sizes}: they must have the same size")
            height, width = height or nearest_multiple(own_height, self._unit), width or nearest_multiple(own_width, self._unit)
            strength = default_strength(with_mask=bool(start.masks)) if strength is None else strength
        height, width = self._sampler.pipeline.image_size(height, width)
        if height * width > self._config.limits.max_pixels:
            raise ValueError(f"size={width}x{height} has more than {self._config.limits.max_pixels} pixels: ask for less")
        return replace(settings, height=height, width=width, num_steps=draw.num_steps, strength=strength)

    def draw(self, batch: list[Ticket]) -> list[bytes | Refused]:
        """Draw pictures of equal settings, as PNGs. Raises Abandoned after the step in which the last one was given up."""
        started, hits, misses = time.perf_counter(), self._captions.hits, self._captions.misses
        outcomes: dict[Ticket, bytes | Refused] = {}
        if self._prompt_check:
            for ticket in batch:
                if self._prompt_check.refuses(ticket.order.prompt):
                    outcomes[ticket] = Refused(400, "this server's check refuses the prompt", POLICY, "prompt")
        allowed = [ticket for ticket in batch if ticket not in outcomes]
        if allowed:
            outcomes |= dict(zip(allowed, map(self._check, self._draw_allowed(allowed)), strict=True))
        self._metrics.time_batch(time.perf_counter() - started, len(batch))
        self._metrics.count_prompts(self._captions.hits - hits, self._captions.misses - misses)
        return [outcomes[ticket] for ticket in batch]

    def _check(self, drawn: bytes | Refused) -> bytes | Refused:
        if self._picture_check and isinstance(drawn, bytes) and self._picture_check.refuses(drawn):
            return Refused(400, "this server's check refuses the picture that was drawn", POLICY)
        return drawn

    def _draw_allowed(self, batch: list[Ticket]) -> list[bytes | Refused]:
        sampler = self._sampler_of(batch)
        counts = [ticket.order.num_previews for ticket in batch]
        num_steps = steps_taken(sampler.config.num_steps or 0, batch[0].order.settings.strength)
        if any(counts) and not self._parts_take_turns:
            on_preview = partial(_tell_preview, batch, num_steps)
            sampler.on_estimate = PreviewMaker(sampler.pipeline.autoencoder, num_steps, counts, on_preview)

        def on_step(index: int, latents: Tensor) -> None:
            if all(ticket.abandoned for ticket in batch):
                raise Abandoned

        sampler.on_step = on_step
        numbers = list(range(len(batch)))
        ids = list(map(str, numbers))
        prompts, seeds = [ticket.order.prompt for ticket in batch], [ticket.seed for ticket in batch]
        output = sampler.process(pa.table({"id": ids, "prompt": prompts, "seed": seeds, "number": numbers}))
        assert isinstance(output.rows, list)
        drawn = {row["id"]: row["image_bytes"] for row in output.rows}
        refused = {row["id"]: Refused(500, row["detail"], row["reject_reason"]) for row in output.rejects}
        return [(drawn | refused)[row_id] for row_id in ids]

    def _sampler_of(self, batch: list[Ticket]) -> Sampler:
        """The sampler with the settings and the pictures of a batch."""
        settings = batch[0].order.settings
        draw = settings.to_draw().for_model(self._config.served_name, is_sprint=self._is_sprint)
        starts = [start for ticket in batch if (start := ticket.order.start()) is not None]
        images = [image for start in starts for image in start.images]
        masks = [mask for start in starts for mask in start.masks]
        start = StartFiles(settings.strength, images, masks) if images else None
        return self._sampler.with_settings(replace(draw, batch_size=len(batch)), start)


def _tell_preview(batch: list[Ticket], num_steps: int, place: int, step: int, content: bytes) -> None:
    ticket = batch[place]
    if ticket.on_event is not None:
        ticket.on_event(Preview(ticket.index, step, num_steps, content))
