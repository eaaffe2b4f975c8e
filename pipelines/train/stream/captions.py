"""Captions as the transformer takes them: encoded during the step, or read from the table of the embed_captions stage.

`encode_captions` runs the text encoder on a micro-batch's captions, and `pad_embeds` pads embeddings that were stored before;
both return the same form. Trainings on stored embeddings use `HostTextEncoder` for the null caption and the grid's prompts.
Before they start, `check_caption_embeds` makes sure that the table holds what the training's own text encoder would compute;
`list_caption_embeds` and `read_caption_embeds` read a shard of it.
"""

from collections.abc import Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipelines.extract.embed_captions import prompt_settings
from pipelines.tables.captions import captions_table
from pipelines.tables.identity import Identity, describe_differences
from pipelines.train.stream.mixture import Source
from pipelines.workers.models import model_version
from sana_model.guidance import Caption
from sana_model.nn.config import NullCaption, TextEncoderConfig

if TYPE_CHECKING:
    from sana_model.nn.text_encoder import TextEncoder

ROWS_AT_ONCE = 64
"""Embeddings decoded at a time while a shard is read; bounds memory."""


@dataclass(frozen=True)
class DroppedCaption:
    """The embeddings that a sample trains on when its caption is dropped: as many of `rows` (L, D) as `kind` says."""

    rows: Tensor
    kind: NullCaption

    @classmethod
    def encode(cls, text_encoder: "TextEncoder", kind: NullCaption) -> "DroppedCaption":
        """Encode the published null caption for weights of this kind."""
        if kind == "caption_mask":
            return cls(text_encoder.encode_padded("", text_encoder.config.max_tokens), kind)
        return cls(text_encoder.null()[0][0], kind)

    def in_place_of(self, num_tokens: int) -> Tensor:
        """The embeddings, (l, D), in place of a caption of `num_tokens` tokens."""
        return self.rows[:num_tokens] if self.kind == "caption_mask" else self.rows


def encode_captions(
    text_encoder: "TextEncoder", captions: Sequence[str], dropped: Sequence[bool], null: DroppedCaption
) -> Caption:
    """Encode a micro-batch's B captions. Returns caption_embeds (B, L, D) and caption_mask (B, L).

    Those that are `dropped` are not encoded: they become `null`.
    """
    kept = [index for index, drop in enumerate(dropped) if not drop]
    lengths = [0] * len(captions)
    if null.kind == "caption_mask" and len(kept) < len(captions):
        limit = text_encoder.config.max_tokens
        lengths = [min(count, limit) for count in text_encoder.count_tokens(list(captions))]
    embeds = [null.in_place_of(length) for length in lengths]
    if kept:
        encoded, mask = text_encoder.encode([captions[index] for index in kept])
        for index, states, length in zip(kept, encoded, mask.sum(dim=1).tolist(), strict=True):
            embeds[index] = states[:length]
    return _pad(embeds)


def pad_embeds(embeds: Sequence[Tensor], dropped: Sequence[bool], null: DroppedCaption) -> Caption:
    """Pad stored embeddings to the form that `encode_captions` returns, on the device and in the dtype of `null`.

    `embeds`: B embeddings (num_tokens, D); those that are `dropped` become `null`.
    """
    pairs = zip(embeds, dropped, strict=True)
    return _pad([null.in_place_of(len(one)) if drop else one.to(null.rows) for one, drop in pairs])


def _pad(embeds: list[Tensor]) -> Caption:
    """Pad embeddings (l, D) to caption_embeds (B, L, D), zeros at the padding, and caption_mask (B, L)."""
    device = embeds[0].device
    lengths = torch.tensor([len(one) for one in embeds], device=device)
    caption_embeds = torch.nn.utils.rnn.pad_sequence(embeds, batch_first=True)
    return caption_embeds, torch.arange(caption_embeds.shape[1], device=device) < lengths[:, None]


def check_caption_embeds(source: Source, *, text_encoder: str, prompts: TextEncoderConfig) -> None:
    """Check that the stored embeddings of `source` are what the training's own text encoder would compute.

    Args:
        source: a latents table with the stored embeddings of its captions.
        text_encoder: path of the training's text encoder.
        prompts: how that text encoder turns captions into tokens.

    Raises MissingTableError if a table of embeddings does not exist; ValueError if it was made by another text encoder or from
    other captions, naming the fields that differ.
    """
    ours = prompt_settings(prompts) | {"attn_implementation": "sdpa"}
    version = model_version(text_encoder)
    for captioner in source.captioners:
        table = source.embeds_table(captioner)
        manifest = table.require()
        captions = captions_table(table.dataset_uri, captioner)
        made = Identity(
            "embed_captions",
            {name: manifest.config[name] for name in ours},
            {"text_encoder": next(iter(manifest.models.values()))},
            manifest.inputs,
        )
        wanted = Identity("embed_captions", ours, {"text_encoder": version}, {captions.path: captions.require().fingerprint})
        if made != wanted:
            differences = "\n".join(f"  {line}" for line in describe_differences(made, wanted))
            raise ValueError(
                f"{table.uri} is not what this training's text encoder gives for the captions of {captioner}:\n"
                f"{differences}\nEmbed the captions again; or let the training encode as they were, with its train.prompts and "
                f"train.text_encoder={manifest.config['text_encoder']}; or leave train.caption_embeds out."
            )


def list_caption_embeds(source: Source, shard: str) -> frozenset[tuple[str, str]] | None:
    """Return (id, captioner) of every embedded caption of a shard; None if `source` has no stored embeddings.

    Raises like `Table.read_shard`.
    """
    if source.embeds is None:
        return None
    with ThreadPoolExecutor(len(source.captioners)) as pool:  # on an object store reading is waiting
        tables = [source.embeds_table(captioner) for captioner in source.captioners]
        shards = pool.map(lambda table: table.read_shard(shard, ["id"])["id"].to_pylist(), tables)
        return frozenset(
            (row_id, captioner) for captioner, ids in zip(source.captioners, shards, strict=True) for row_id in ids
        )


def read_caption_embeds(source: Source, shard: str, wanted: Set[tuple[str, str]]) -> dict[tuple[str, str], torch.Tensor]:
    """Read stored embeddings of a shard's captions: (id, captioner) -> (num_tokens, width), in the table's dtype.

    Args:
        source: a latents table with the stored embeddings of its captions.
        shard: name of the shard.
        wanted: (id, captioner) of the captions to keep, for example those that the selection policy chose. The others are
            dropped a few rows at a time, so they cost little memory.

    Raises MissingTableError if there is no such table, FileNotFoundError if it has no such shard.
    """
    found = {}
    for captioner in sorted({captioner for _, captioner in wanted}):
        table = source.embeds_table(captioner)
        dtype = getattr(torch, table.require().config["dtype"])
        for batch in table.iter_shard(shard, ROWS_AT_ONCE):
            for row, row_id in enumerate(batch["id"].to_pylist()):
                if (row_id, captioner) in wanted:
                    values = bytearray(batch["embeds"][row].as_buffer())
                    embeds = torch.frombuffer(values, dtype=dtype).view(batch["num_tokens"][row].as_py(), -1)
                    found[row_id, captioner] = embeds
    return found
