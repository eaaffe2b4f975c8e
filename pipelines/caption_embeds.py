"""Reading what the embed_captions stage made, and whether it is what a training's own text encoder would give."""

from collections.abc import Set

import torch

from pipelines.embed_captions import prompt_settings
from pipelines.mixture import Source
from pipelines.models import model_version
from pipelines.tables import Identity, Table, describe_differences
from sana_model.text_encoder import TextEncoderConfig

ROWS_AT_ONCE = 64


def list_caption_embeds(table: Table, shard: str) -> frozenset[tuple[str, str]]:
    """(id, captioner) of the captions of a shard that were embedded. Raises as `Table.read_shard`."""
    rows = table.read_shard(shard, ["id", "captioner"])
    return frozenset(zip(rows["id"].to_pylist(), rows["captioner"].to_pylist(), strict=True))


def read_caption_embeds(
    table: Table, shard: str, wanted: Set[tuple[str, str]] | None = None
) -> dict[tuple[str, str], torch.Tensor]:
    """The embeddings of a shard's captions: (id, captioner) -> (num_tokens, width), in the table's dtype.

    Args:
        shard: the same as that of `latents`: shards are aligned.
        wanted: the captions to read, such as those that a selection policy chose; None: all. Of the others only a few are in
            memory at a time.

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


def check_caption_embeds(source: Source, *, text_encoder: str, prompts: TextEncoderConfig) -> None:
    """Whether a training on `source` may take its stored embeddings for what its text encoder gives.

    Args:
        text_encoder: path of the training's.
        prompts: how it makes tokens of captions.

    Raises MissingTableError if there are none; ValueError if they are not complete, or not what this text encoder gives for the
    captions of `source`, with the fields that differ.
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
