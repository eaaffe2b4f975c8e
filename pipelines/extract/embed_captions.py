"""The embed_captions stage (optional): compute the text encoder's output of every caption once.

Only real tokens are kept. With Gemma-2-2B that is still 0.7 MB for a caption of 150 tokens: ingest into shards of a few
hundred images for it, since a shard is held in memory whole.
"""

import hashlib
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipelines.extract.config import EmbedConfig
from pipelines.stages.contract import OnProgress, ShardOutput, StageResult
from pipelines.stages.run import run_shards
from pipelines.storage.lease import Leases
from pipelines.tables.captions import captions_table, read_captions
from pipelines.tables.identity import Identity, value_settings
from pipelines.tables.rejects import RowRefused, reject
from pipelines.tables.schema import CAPTION_EMBEDS, Row, caption_embeds_path
from pipelines.tables.table import Table
from pipelines.workers.halving import run_halving
from pipelines.workers.models import FoundModel, find_model, pick_device, pretrained
from sana_model.nn.config import TextEncoderConfig

if TYPE_CHECKING:
    import torch


def embed_identity(dataset_uri: str, config: EmbedConfig, captioner: str, models: dict[str, str]) -> Identity:
    """Everything that the embeddings of a captioner's captions depend on; `models`: the version of the text encoder."""
    settings = value_settings(config)
    del settings["prompts"]  # a long text: its hash stands for it
    settings |= prompt_settings(config.prompts)
    captions = captions_table(dataset_uri, captioner)
    inputs = {captions.path: captions.require().fingerprint}
    return Identity("embed_captions", settings, models, inputs, rows_of=captions.path)


def prompt_settings(prompts: TextEncoderConfig) -> dict[str, Any]:
    """How captions become tokens, for an identity; the instruction, which is long, by its hash."""
    return {
        "instruction": f"sha256:{hashlib.sha256(prompts.instruction.encode()).hexdigest()[:32]}",
        "max_tokens": prompts.max_tokens,
        "lowercase": prompts.lowercase,
    }


def run_embed_captions(
    dataset_uri: str,
    config: EmbedConfig,
    captioner: str,
    encoder: FoundModel | None = None,
    *,
    on_progress: OnProgress = lambda _: None,
    leases: Leases | None = None,
) -> StageResult:
    """Embed every caption of a captioner into `caption_embeds/<name>/<captioner>`.

    Args:
        encoder: the text encoder of `config` if it was found before; None: it is sought here.

    Raises as `run_shards`, and MissingTableError if the captions are not there.
    """
    captions = captions_table(dataset_uri, captioner)
    captions.require()  # before any weights are fetched or hashed
    encoder = encoder or find_model(config.text_encoder)
    identity = embed_identity(dataset_uri, config, captioner, {config.name: encoder.version})
    return run_shards(
        Table(dataset_uri, caption_embeds_path(config.name, captioner), CAPTION_EMBEDS),
        identity,
        captions.list_shards(),
        read_shard=partial(_read_texts, dataset_uri, captioner),
        make_worker=partial(CaptionEmbedder, replace(config, text_encoder=encoder.address)),
        resources=config.resources,
        max_reject_share=config.max_reject_share,
        on_progress=on_progress,
        leases=leases,
    )


def _read_texts(dataset_uri: str, captioner: str, shard: str) -> pa.Table:
    """id and caption of a shard's captions."""
    captions = read_captions(dataset_uri, captioner, shard)
    return pa.table({"id": pa.array(captions, pa.string()), "caption": pa.array(captions.values(), pa.string())})


class CaptionEmbedder:
    """Ray Data actor: captions -> the text encoder's output for their real tokens."""

    def __init__(self, config: EmbedConfig):
        import torch

        from sana_model.nn.text_encoder import TextEncoder

        self.config = config
        path, options = pretrained(config.text_encoder)
        self.encoder = TextEncoder.from_pretrained(
            path,
            **options,
            config=config.prompts,
            dtype=getattr(torch, config.compute_dtype),
            attn_implementation=config.attn_implementation,
        ).to(pick_device(config.device))

    def process(self, table: pa.Table) -> ShardOutput:
        """A row for each caption, or a reject; figures: captions, and how many of them were cut."""
        captions = table.to_pylist()
        rows: list[Row] = []
        rejects: list[Row] = []
        num_cut = 0
        for start in range(0, len(captions), self.config.batch_size):
            batch = captions[start : start + self.config.batch_size]
            texts = [entry["caption"] for entry in batch]
            num_cut += sum(count > self.config.prompts.max_tokens for count in self.encoder.count_tokens(texts))
            for entry, embeds in zip(batch, run_halving(self._embed, texts), strict=True):
                if not isinstance(embeds, RowRefused) and not embeds.isfinite().all():
                    embeds = self._not_finite()
                if isinstance(embeds, RowRefused):
                    rejects.append(reject(entry, embeds))
                else:
                    rows.append(_embeds_row(entry, embeds))
        return ShardOutput(rows, rejects, {"captions": len(captions), "cut_captions": num_cut})

    def _not_finite(self) -> RowRefused:
        config = self.config
        made = f"compute_dtype={config.compute_dtype}, dtype={config.dtype}"
        advice = "take bfloat16 for both" if "float16" in (config.dtype, config.compute_dtype) else "take another copy of it"
        return RowRefused("bad_embeds", f"the text encoder gives values that are not finite, with {made}: {advice}")

    def _embed(self, texts: list[str]) -> list["torch.Tensor"]:
        """(num_tokens, width) of each, on the CPU and of the table's dtype."""
        import torch

        embeds, mask = self.encoder.encode(texts)
        stored = embeds.to(getattr(torch, self.config.dtype))
        return [one[real].cpu() for one, real in zip(stored, mask, strict=True)]


def _embeds_row(entry: Row, embeds: "torch.Tensor") -> Row:
    import torch

    content = embeds.contiguous().view(torch.uint8).numpy().tobytes()
    return {"id": entry["id"], "embeds": content, "num_tokens": len(embeds)}
