"""Captions as the transformer takes them: encoded during the step, or read from the table of the embed_captions stage.

`encode_captions` runs the text encoder on a micro-batch's captions, and `pad_embeds` pads embeddings that were stored before;
both return the same form. Trainings on stored embeddings use `HostTextEncoder` for the null caption and the grid's prompts.
Before they start, `check_caption_embeds` makes sure that the table holds what the training's own text encoder would compute;
`list_caption_embeds` and `read_caption_embeds` read a shard of it.
"""

from collections.abc import Sequence, Set

import torch
from torch import Tensor

from pipelines.extract.embed_captions import prompt_settings
from pipelines.tables.identity import Identity, describe_differences
from pipelines.tables.table import Table
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
        source: a latents table with its table of embeddings.
        text_encoder: path of the training's text encoder.
        prompts: how that text encoder turns captions into tokens.

    Raises MissingTableError if the table of embeddings does not exist; ValueError if it is incomplete, or was made by another
    text encoder or from other captions, naming the fields that differ.
    """
    assert source.embeds is not None
    table, manifest = source.embeds, source.embeds.require()
    if not manifest.complete:
        raise ValueError(f"{table.uri} is not complete: let its stage finish first")
    if missing := set(source.table.list_shards()).difference(table.list_shards()):
        raise ValueError(f"{table.uri} has no shard {min(missing)}, which {source.table.uri} has: let its stage make it first")
    ours = prompt_settings(prompts) | {"attn_implementation": "sdpa"}
    scores = {path: value for path, value in source.manifest.inputs.items() if path.startswith("scores/")}
    made = Identity(
        "embed_captions",
        {name: manifest.config[name] for name in ours},
        {"text_encoder": next(iter(manifest.models.values()))},
        manifest.inputs,
    )
    wanted = Identity("embed_captions", ours, {"text_encoder": model_version(text_encoder)}, scores)
    if made != wanted:
        differences = "\n".join(f"  {line}" for line in describe_differences(made, wanted))
        raise ValueError(
            f"{table.uri} is not what this training's text encoder gives for the captions of {source.table.uri}:\n"
            f"{differences}\nEmbed the captions again; or let the training encode as they were encoded, with "
            f"train.text_encoder={manifest.config['text_encoder']} and its train.prompts; or leave train.caption_embeds out."
        )


def list_caption_embeds(table: Table, shard: str) -> frozenset[tuple[str, str]]:
    """Return (id, captioner) of every embedded caption of a shard. Raises like `Table.read_shard`."""
    rows = table.read_shard(shard, ["id", "captioner"])
    return frozenset(zip(rows["id"].to_pylist(), rows["captioner"].to_pylist(), strict=True))


def read_caption_embeds(
    table: Table, shard: str, wanted: Set[tuple[str, str]] | None = None
) -> dict[tuple[str, str], torch.Tensor]:
    """Read the embeddings of a shard's captions: (id, captioner) -> (num_tokens, width), in the table's dtype.

    Args:
        table: a table under caption_embeds/.
        shard: name of the shard; it is the name of the latents' shard too, since shards are aligned.
        wanted: (id, captioner) of the captions to keep, for example those that the selection policy chose; None keeps all.
            The others are dropped a few rows at a time, so they cost little memory.

    Raises MissingTableError if there is no such table, FileNotFoundError if it has no such shard.
    """
    dtype = getattr(torch, table.require().config["dtype"])
    found = {}
    for batch in table.iter_shard(shard, ROWS_AT_ONCE):
        keys = list(zip(batch["id"].to_pylist(), batch["captioner"].to_pylist(), strict=True))
        for row, key in enumerate(keys):
            if wanted is None or key in wanted:
                values = bytearray(batch["embeds"][row].as_buffer())
                found[key] = torch.frombuffer(values, dtype=dtype).view(batch["num_tokens"][row].as_py(), -1)
    return found
