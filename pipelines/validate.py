"""The loss on samples that are never trained on, at fixed noise levels and noise: comparable over steps, restarts and runs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from pipelines.data import MicroBatch, StreamConfig, is_held_out
from pipelines.extract import read_latents
from pipelines.schema import LATENTS
from pipelines.select import choose_caption, uniform
from pipelines.tables import Table


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Which samples the validation loss is of.

    Args:
        latents: path of a table in the dataset; None: the share of the training's own that `data.held_out_share` holds out;
            without one there is no validation.
        every: steps from one validation to the next; the last step has one too.
        num_samples: the first of the table.
        sigmas: noise levels, at each of which every sample is judged.
        seed: of the noise and the captions.
    """

    latents: str | None = None
    every: int = 1000
    num_samples: int = 512
    sigmas: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("every", "num_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.sigmas or not all(0 < sigma < 1 for sigma in self.sigmas):
            raise ValueError(f"sigmas={self.sigmas} must be one or more noise levels between 0 and 1")


@dataclass(frozen=True)
class ValidationBatch:
    """A batch of one bucket, and the loss's weight of each of its samples: 0 for those that only make ranks alike."""

    batch: MicroBatch
    weight: float


@dataclass(frozen=True, kw_only=True)
class ValidationSet:
    """The batches of one rank; all ranks have as many. Raises ValueError if the table has no sample for it."""

    batches: Sequence[ValidationBatch] = field(default_factory=list)

    @classmethod
    def read(
        cls, table: Table, config: ValidationConfig, stream: StreamConfig, *, batch_size: int, rank: int, world_size: int
    ) -> "ValidationSet":
        by_bucket: dict[str, list[tuple[str, Tensor, str]]] = {}
        for bucket, sample in islice(_read_samples(table, config, stream), config.num_samples):
            by_bucket.setdefault(bucket, []).append(sample)
        batches = [
            _collate(bucket, samples[start : start + batch_size])
            for bucket, samples in sorted(by_bucket.items())
            for start in range(0, len(samples), batch_size)
        ]
        if not batches:
            raise ValueError(
                f"{table.uri} has no sample to validate with: raise data.held_out_share, or give validation.latents"
            )
        mine = [ValidationBatch(batch, 1.0) for batch in batches[rank::world_size]]
        missing = -(-len(batches) // world_size) - len(mine)
        return cls(batches=[*mine, *[ValidationBatch(batches[0], 0.0)] * missing])


def _read_samples(
    table: Table, config: ValidationConfig, stream: StreamConfig
) -> Iterator[tuple[str, tuple[str, Tensor, str]]]:
    """Bucket, and id, latents and caption of each."""
    dtype = table.require().config["dtype"]
    for shard in table.list_shards():
        for row in table.read_shard(shard).to_pylist():
            if config.latents is None and not is_held_out(row["id"], stream.held_out_share):
                continue
            chosen = choose_caption(row["captions"], stream.selection, seed=config.seed, epoch=0, sample_id=row["id"])
            if chosen is not None:
                yield row["bucket"], (row["id"], read_latents(row, dtype), chosen["caption"])


def _collate(bucket: str, samples: Sequence[tuple[str, Tensor, str]]) -> MicroBatch:
    ids, latents, captions = zip(*samples, strict=True)
    return MicroBatch(bucket, torch.stack(latents), list(captions), list(ids), [0] * len(ids))


def fixed_noise(batch: MicroBatch, sigma: float, *, seed: int) -> Tensor:
    """(B, C, h, w) float32 on the CPU: each sample's comes from its id, the noise level and the seed alone."""
    noise = torch.empty(batch.latents.shape)
    generator = torch.Generator()
    for index, sample_id in enumerate(batch.ids):
        generator.manual_seed(int(uniform(seed, sample_id, sigma, "validation") * 2**53))
        noise[index] = torch.randn(noise.shape[1:], generator=generator)
    return noise


def validation_table(dataset_uri: str, latents: str, config: ValidationConfig, stream: StreamConfig) -> Table | None:
    """None where there is no validation."""
    if config.latents is None and not stream.held_out_share:
        return None
    return Table(dataset_uri, config.latents or latents, LATENTS)
