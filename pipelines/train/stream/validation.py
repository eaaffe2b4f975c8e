"""The samples of the validation loss: held out of the training, and the same in every validation, so that losses compare."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice, zip_longest

import torch

from pipelines.tables.chance import is_held_out
from pipelines.train.stream.config import StreamConfig, ValidationConfig
from pipelines.train.stream.mixture import Source
from pipelines.train.stream.samples import MicroBatch, Sample, ShardRows, collate


@dataclass(frozen=True)
class ValidationBatch:
    """A micro-batch and the weight of its samples in the mean loss: 1, or 0 if it only fills up a rank's share."""

    batch: MicroBatch
    weight: float


@dataclass(frozen=True, kw_only=True)
class ValidationSet:
    """The batches that one rank computes; all have the same number, since with ZeRO 3 a forward pass is a collective call."""

    batches: Sequence[ValidationBatch] = field(default_factory=list)

    @classmethod
    def read(
        cls,
        sources: Sequence[Source],
        config: ValidationConfig,
        stream: StreamConfig,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
    ) -> "ValidationSet":
        """Read the samples from `sources` and share out their batches among the ranks.

        Raises ValueError if no table has a sample to validate with.
        """
        by_turns = chain.from_iterable(zip_longest(*(_read_samples(source, config, stream) for source in sources)))
        by_bucket: dict[str, list[Sample]] = {}
        for sample in islice((sample for sample in by_turns if sample is not None), config.num_samples):
            by_bucket.setdefault(sample.bucket, []).append(sample)
        with_embeds = any(source.embeds is not None for source in sources)
        batches = [
            collate(samples[start : start + batch_size], with_embeds=with_embeds)
            for _, samples in sorted(by_bucket.items())
            for start in range(0, len(samples), batch_size)
        ]
        if not batches:
            names = ", ".join(source.table.uri for source in sources)
            raise ValueError(f"{names} has no sample to validate with: raise data.held_out_share, or give validation.latents")
        mine = [ValidationBatch(batch, 1.0) for batch in batches[rank::world_size]]
        missing = -(-len(batches) // world_size) - len(mine)
        return cls(batches=[*mine, *[ValidationBatch(batches[0], 0.0)] * missing])


def _read_samples(source: Source, config: ValidationConfig, stream: StreamConfig) -> Iterator[Sample]:
    never_dropped = replace(stream, caption_dropout=0.0)
    for shard in source.table.list_shards():
        rows = ShardRows(source, shard, dtype=torch.float32)
        held_out = [
            row
            for row, sample_id in enumerate(rows.ids)
            if config.latents is not None or is_held_out(sample_id, stream.held_out_share)
        ]
        chosen = [(row, choice) for row in held_out if (choice := rows.choose(row, 0, never_dropped, seed=config.seed))]
        rows.load_embeds(chosen[: config.num_samples])
        for row, choice in chosen[: config.num_samples]:
            yield rows.sample(row, 0, choice)
