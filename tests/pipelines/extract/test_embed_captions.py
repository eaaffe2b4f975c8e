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
from pipelines.tables.schema import CAPTION_EMBEDS, LATENTS
from pipelines.tables.table import Table
from pipelines.train.stream.captions import list_caption_embeds, read_caption_embeds
from sana_model.nn.config import TextEncoderConfig
from sana_model.nn.text_encoder import TextEncoder
from tests.support.html_page import check_page
from tests.support.training_world import add_captioner, make_source

PROMPTS = TextEncoderConfig(instruction="Say what the picture shows.\nUser Prompt: ", max_tokens=12, lowercase=True)
CONFIG = EmbedConfig(
    name="gemma",
    text_encoder="zoo://pipeline/text_encoder",
    captioners=("a", "b"),
    prompts=PROMPTS,
    compute_dtype="float32",
    dtype="float16",
    batch_size=3,
)
MODELS = {"gemma": "the version of its weights"}
LONG = "a red circle left of a blue square on a gray background " * 3
CAPTIONS = {"a": {"x": "A large blue square", "y": "a star"}, "b": {"y": "a small green triangle at the top", "x": LONG}}


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    """Two images, with the captions of two captioners."""
    for captioner, texts in CAPTIONS.items():
        add_captioner(tmp_path, captioner, {"00000": {row_id: (text, 20.0) for row_id, text in texts.items()}})
    return str(tmp_path)


def captions_of(captioner: str) -> pa.Table:
    """The captions as the stage hands them to its workers."""
    return pa.table({"id": list(CAPTIONS[captioner]), "caption": list(CAPTIONS[captioner].values())})


def embeds_table(dataset: str, captioner: str) -> Table:
    return Table(dataset, f"caption_embeds/gemma/{captioner}", CAPTION_EMBEDS)


@pytest.fixture(scope="module")
def embedder() -> CaptionEmbedder:
    return CaptionEmbedder(CONFIG)


def test_what_is_read_is_what_the_text_encoder_gives(embedder: CaptionEmbedder, dataset: str) -> None:
    source = replace(make_source(Table(dataset, "latents/tiny-64", LATENTS)), embeds="gemma")
    every = {(row_id, captioner) for captioner, texts in CAPTIONS.items() for row_id in texts}
    with pytest.raises(MissingTableError, match="caption_embeds/gemma/a"):
        read_caption_embeds(source, "00000", every)
    for captioner, num_cut in (("a", 0), ("b", 1)):
        rows, rejects, figures = embedder.process(captions_of(captioner))
        assert rejects == [] and figures == {"captions": 2, "cut_captions": num_cut}
        table = embeds_table(dataset, captioner)
        table.claim(embed_identity(dataset, CONFIG, captioner, MODELS))
        table.write_shard("00000", pa.Table.from_pylist(list(rows), CAPTION_EMBEDS))
    found = read_caption_embeds(source, "00000", every)
    assert found.keys() == every == list_caption_embeds(source, "00000")
    encoder = TextEncoder.from_pretrained(CONFIG.text_encoder, config=PROMPTS, dtype=torch.float32)
    for row_id, captioner in every:
        embeds, mask = encoder.encode([CAPTIONS[captioner][row_id]])
        assert found[row_id, captioner].dtype == torch.float16 and mask.all()
        torch.testing.assert_close(found[row_id, captioner].float(), embeds[0], atol=2e-2, rtol=2e-3)
    assert len(found["x", "b"]) == PROMPTS.max_tokens > len(found["y", "a"])
    chosen = read_caption_embeds(source, "00000", {("x", "a"), ("y", "b")})
    assert chosen.keys() == {("x", "a"), ("y", "b")} and torch.equal(chosen["x", "a"], found["x", "a"])


def test_the_report_counts_captions_and_cuts(embedder: CaptionEmbedder, dataset: str) -> None:
    table = embeds_table(dataset, "b")
    manifest = table.claim(embed_identity(dataset, CONFIG, "b", MODELS))
    assert "The table is empty" in check_page(caption_embeds_report(dataset, table.path)).text
    rows, _, figures = embedder.process(captions_of("b"))
    table.write_shard("00000", pa.Table.from_pylist(list(rows), CAPTION_EMBEDS))
    means = {f"{name}.mean": value for name, value in figures.items()}
    table.write_manifest(replace(manifest, complete=True, num_shards=1, num_rows=2, figures=means))
    page = check_page(caption_embeds_report(dataset, table.path), table)
    assert "About 1 captions were longer than 12 tokens" in page.text


def test_all_that_changes_a_value_is_in_the_identity(dataset: str) -> None:
    first = embed_identity(dataset, CONFIG, "a", MODELS)
    changes = [
        replace(CONFIG, prompts=replace(PROMPTS, instruction="Say what it shows.")),
        replace(CONFIG, prompts=replace(PROMPTS, max_tokens=300)),
        replace(CONFIG, prompts=replace(PROMPTS, lowercase=False)),
        replace(CONFIG, attn_implementation="eager"),
        replace(CONFIG, compute_dtype="bfloat16"),
        replace(CONFIG, dtype="bfloat16"),
    ]
    fingerprints = {embed_identity(dataset, changed, "a", MODELS).fingerprint for changed in changes}
    other = embed_identity(dataset, CONFIG, "b", MODELS)
    assert len(fingerprints | {first.fingerprint, other.fingerprint}) == 8 and other.rows_of == "captions/b"
    same = replace(CONFIG, batch_size=1, captioners=("a", "b", "c"))  # one captioner more makes no other table anew
    assert embed_identity(dataset, same, "a", MODELS) == first
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
    rows, rejects, _ = embedder.process(captions_of("a"))
    assert [row["id"] for row in rows] == ["x"]
    assert [(row["id"], row["reject_reason"]) for row in rejects] == [("y", "bad_embeds")]
    assert "not finite, with compute_dtype=float32, dtype=float16: take bfloat16 for both" in rejects[0]["detail"]
