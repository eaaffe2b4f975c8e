"""Captions as the transformer takes them: encoded during the step, or read from the table of the embed_captions stage.

`encode_captions` runs the text encoder on a micro-batch's captions, and `pad_embeds` pads embeddings that were stored before;
both return the same form. Trainings on stored embeddings use `HostTextEncoder` for the null caption and the grid's prompts.
Before they start, `check_caption_embeds` makes sure that the table holds what the training's own text encoder would compute;
`list_caption_embeds` and `read_caption_embeds` read a shard of it.
"""

from collections.abc import Sequence, Set
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from pipelines.extract.embed_captions import prompt_settings
from pipelines.tables.captions import captions_table
from pipelines.tables.identity import Identity, describe_differences
from pipelines.train.stream.mixture import Source
from pipelines.workers.models import model_version
from sana_model.nn.config import TextEncoderConfig
from sana_model.nn.text_encoder import TextEncoder
from sana_model.pipeline import Caption

ROWS_AT_ONCE = 64
"""Embeddings decoded at a time while a shard is read; bounds memory."""


def encode_captions(text_encoder: TextEncoder, captions: list[str | None], null: Caption) -> Caption:
    """Encode a micro-batch's captions. Returns caption_embeds (B, L, D) and caption_mask (B, L).

    Args:
        captions: B captions; None stands for the null caption.
        null: the encoded null caption, as `text_encoder.null()` returns it.
    """
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


def pad_embeds(embeds: Sequence[Tensor | None], null: Caption) -> Caption:
    """Pad stored embeddings to the form that `encode_captions` returns, on the device and in the dtype of `null`.

    Args:
        embeds: B embeddings (num_tokens, D); None stands for the null caption.
        null: the encoded null caption.
    """
    null_embeds, null_mask = null
    told = [null_embeds[0, null_mask[0]] if one is None else one.to(null_embeds) for one in embeds]
    lengths = torch.tensor([len(one) for one in told], device=null_mask.device)
    caption_embeds = torch.nn.utils.rnn.pad_sequence(told, batch_first=True)
    return caption_embeds, torch.arange(caption_embeds.shape[1], device=null_mask.device) < lengths[:, None]


class HostTextEncoder(TextEncoder):
    """A text encoder that computes on the CPU and moves its result to `target`, a device that has no room for its weights."""

    def __init__(self, encoder: TextEncoder, target: torch.device):
        super().__init__(encoder.model, encoder.tokenizer, encoder.config)
        self.target = target

    def encode(self, captions: list[str], *, use_instruction: bool = True) -> tuple[Tensor, Tensor]:
        """Return what `TextEncoder.encode` returns, on `target`."""
        embeds, mask = super().encode(captions, use_instruction=use_instruction)
        return embeds.to(self.target), mask.to(self.target)


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
