"""Embedded captions: what the text encoder gives for the real tokens, cut as it cuts, and everything that matters recorded."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from pipelines.extract.config import EmbedConfig
from pipelines.extract.embed_captions import CaptionEmbedder, embed_identity
from pipelines.reports.caption_embeds import caption_embeds_report
from pipelines.tables.errors import MissingTableError
from pipelines.tables.identity import Identity
from pipelines.tables.schema import CAPTION_EMBEDS, SCORES
from pipelines.tables.table import Table
from pipelines.train.stream.captions import read_caption_embeds
from sana_model.nn.config import TextEncoderConfig
from sana_model.nn.text_encoder import TextEncoder
from tests.support.html_page import check_page

PROMPTS = TextEncoderConfig(instruction="Say what the picture shows.\nUser Prompt: ", max_tokens=12, lowercase=True)
CONFIG = EmbedConfig(
    name="gemma",
    text_encoder="zoo://pipeline/text_encoder",
    scorer="clip",
    prompts=PROMPTS,
    compute_dtype="float32",
    dtype="float16",
    batch_size=3,
)
MODELS = {"gemma": "the version of its weights"}
LONG = "a red circle left of a blue square on a gray background " * 3
CAPTIONS = {
    "x": [("original", "a red circle"), ("a", "A large blue square"), ("b", LONG)],
    "y": [("a", "a star"), ("b", "a small green triangle at the top")],
}


def scores_table() -> pa.Table:
    rows = [
        {"id": row_id, "captions": [{"captioner": who, "caption": text, "clip_score": 1.0} for who, text in captions]}
        for row_id, captions in CAPTIONS.items()
    ]
    return pa.Table.from_pylist(rows, SCORES)


@pytest.fixture(scope="module")
def embedder() -> CaptionEmbedder:
    return CaptionEmbedder(CONFIG)


def test_what_is_read_is_what_the_text_encoder_gives(embedder: CaptionEmbedder, tmp_path: Path) -> None:
    rows, rejects, figures = embedder.process(scores_table())
    assert rejects == [] and figures == {"captions": 5, "cut_captions": 1}
    scores = Table(str(tmp_path), "scores/clip", SCORES)
    scores.claim(Identity("score", {}, {}, {}))
    table = Table(str(tmp_path), "caption_embeds/gemma", CAPTION_EMBEDS)
    with pytest.raises(MissingTableError, match="caption_embeds/gemma"):
        read_caption_embeds(table, "00000")
    table.claim(embed_identity(str(tmp_path), CONFIG, MODELS))
    table.write_shard("00000", pa.Table.from_pylist(list(rows), CAPTION_EMBEDS))
    found = read_caption_embeds(table, "00000")
    assert list(found) == [(row_id, who) for row_id, captions in CAPTIONS.items() for who, _ in captions]
    encoder = TextEncoder.from_pretrained(CONFIG.text_encoder, config=PROMPTS, dtype=torch.float32)
    for row_id, captions in CAPTIONS.items():
        for who, text in captions:
            embeds, mask = encoder.encode([text])
            assert found[row_id, who].dtype == torch.float16 and mask.all()
            torch.testing.assert_close(found[row_id, who].float(), embeds[0], atol=2e-2, rtol=2e-3)
    assert len(found["x", "b"]) == PROMPTS.max_tokens > len(found["x", "original"])
    chosen = read_caption_embeds(table, "00000", {("x", "a"), ("y", "b")})
    assert list(chosen) == [("x", "a"), ("y", "b")] and torch.equal(chosen["x", "a"], found["x", "a"])


def test_the_report_counts_captions_and_cuts(embedder: CaptionEmbedder, tmp_path: Path) -> None:
    Table(str(tmp_path), "scores/clip", SCORES).claim(Identity("score", {}, {}, {}))
    table = Table(str(tmp_path), "caption_embeds/gemma", CAPTION_EMBEDS)
    manifest = table.claim(embed_identity(str(tmp_path), CONFIG, MODELS))
    assert "The table is empty" in check_page(caption_embeds_report(str(tmp_path), table.path)).text
    rows, _, figures = embedder.process(scores_table())
    table.write_shard("00000", pa.Table.from_pylist(list(rows), CAPTION_EMBEDS))
    means = {f"{name}.mean": value for name, value in figures.items()}
    table.write_manifest(replace(manifest, complete=True, num_shards=1, num_rows=5, figures=means))
    page = check_page(caption_embeds_report(str(tmp_path), table.path), table)
    assert "About 1 captions were longer than 12 tokens" in page.text
    assert "a 2 40.0%" in page.text and "original 1 20.0%" in page.text


def test_all_that_changes_a_value_is_in_the_identity(tmp_path: Path) -> None:
    Table(str(tmp_path), "scores/clip", SCORES).claim(Identity("score", {}, {}, {}))
    first = embed_identity(str(tmp_path), CONFIG, MODELS)
    changes = [
        replace(CONFIG, prompts=replace(PROMPTS, instruction="Say what it shows.")),
        replace(CONFIG, prompts=replace(PROMPTS, max_tokens=300)),
        replace(CONFIG, prompts=replace(PROMPTS, lowercase=False)),
        replace(CONFIG, attn_implementation="eager"),
        replace(CONFIG, compute_dtype="bfloat16"),
        replace(CONFIG, dtype="bfloat16"),
    ]
    fingerprints = {embed_identity(str(tmp_path), changed, MODELS).fingerprint for changed in changes}
    assert len(fingerprints | {first.fingerprint}) == 7
    assert embed_identity(str(tmp_path), replace(CONFIG, batch_size=1), MODELS) == first
    assert PROMPTS.instruction not in str(first)


def test_captions_that_overflow_cost_their_rows_only(embedder: CaptionEmbedder, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = embedder.encoder.encode

    def overflowing(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        embeds, mask = encode(captions)
        for index, caption in enumerate(captions):
            if caption == "a star":
                embeds[index, 1] = 1e6  # finite here, infinite in half precision
        return embeds, mask

    monkeypatch.setattr(embedder.encoder, "encode", overflowing)
    rows, rejects, _ = embedder.process(scores_table())
    assert len(rows) == 4
    assert [(row["id"], row["reject_reason"], row["detail"]) for row in rejects] == [
        ("y", "bad_embeds", "a: values that are not finite")
    ]
