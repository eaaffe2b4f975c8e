"""Reports: the pages say what lies in the tables, escape it, and need nothing from elsewhere."""

import hashlib
import json
import re
import tarfile
from dataclasses import replace
from html import unescape
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipelines.reports.captions import captions_report
from pipelines.reports.images import images_report
from pipelines.reports.latents import latents_report
from pipelines.reports.pictures import thumbnail
from pipelines.reports.rejects import read_rejects
from pipelines.reports.runs import Link, Section, demo_report, training_report
from pipelines.reports.scores import scores_report
from pipelines.score.config import SelectionConfig
from pipelines.shapes.drawing import draw_row
from pipelines.shapes.grammar import sample_caption
from pipelines.tables.errors import MissingTableError
from pipelines.tables.identity import Identity
from pipelines.tables.rejects import RowRefused, reject
from pipelines.tables.sampling import ReportScope
from pipelines.tables.schema import CAPTIONS, IMAGES, IMAGES_PATH, LATENTS, REJECTS, SCORES, Row
from pipelines.tables.table import Table
from tests.support.html_page import check_page

LONG = "a very long caption " * 250
HOSTILE = '<script>alert("1")</script> & "quotes"'
CAPTIONERS = ("idefics", "llava")
BEST = SelectionConfig(policy="best")


def encode(image: Image.Image, kind: str) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def image_row(index: int) -> Row:
    scene, pixels = draw_row(index)
    image = Image.fromarray(pixels)
    kind = "PNG"
    if index % 5 == 4:  # some that are larger and not square
        kind, image = "JPEG", image.resize((200 + 60 * index % 400, 300))
    content = encode(image, kind)
    caption = sample_caption(scene, np.random.default_rng(index)) if index % 2 else None
    return {
        "id": hashlib.sha256(content).hexdigest(),
        "image_bytes": content,
        "format": kind,
        "width": image.width,
        "height": image.height,
        "phash": "0" * 16,
        "caption": HOSTILE if index == 1 else caption,
        "source_uri": f"/photos/{index}.{kind.lower()}",
        "metadata": None,
    }


def text_of(captioner: str, index: int) -> str:
    if captioner == "llava" and index < 3:
        return (LONG, HOSTILE, "")[index]
    if captioner == "idefics" and index % 4 == 0:
        return "a photo of a thing"
    return sample_caption(draw_row(index)[0], np.random.default_rng([index, len(captioner)]))


def competing(index: int, row: Row) -> list[Row]:
    rng = np.random.default_rng([index, 7])
    texts = {"original": row["caption"]} if row["caption"] else {}
    texts |= {captioner: text_of(captioner, index) for captioner in CAPTIONERS}
    base = {"original": 24, "llava": 26, "idefics": 20}
    return [
        {"captioner": name, "caption": text, "clip_score": float(np.float32(base[name] + rng.normal(0, 3)))}
        for name, text in texts.items()
    ]


def latents_row(index: int, row: Row) -> Row:
    latents = np.random.default_rng(index).normal(np.arange(4)[:, None, None] / 4, 1, (4, 8, 8)).astype(np.float16)
    shape = {"channels": 4, "height": 8, "width": 8, "bucket": "64x64" if index % 3 else "64x128"}
    return {"id": row["id"], "latents": latents.tobytes(), "captions": competing(index, row), **shape}


def make_table(
    uri: str, path: str, schema: pa.Schema, shards: list[list[Row]], rejects: list[Row] | None = None, **config: object
) -> Table:
    table = Table(uri, path, schema)
    table.claim(Identity("test", {"name": path, **config}, {}, {}))
    for index, rows in enumerate(shards):
        refused = Table.rejects(table)
        refused.write_shard(f"{index:05d}", pa.Table.from_pylist((rejects or []) if index == 0 else [], refused.schema))
        table.write_shard(f"{index:05d}", pa.Table.from_pylist(rows, schema))
    table.write_manifest(
        replace(table.require(), complete=True, num_rows=sum(map(len, shards)), num_rejects=len(rejects or []))
    )
    return table


def make_dataset(folder: Path, num_shards: int = 3, shard_rows: int = 10) -> str:
    """Images, captions, scores and latents of the Shapes world, with one reject each of several kinds."""
    uri = str(folder / "dataset")
    (folder / "notes.jpg").write_text("Dear diary, <b>this is</b> not a picture.\n")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8))
    (folder / "cut.jpg").write_bytes(encode(noise, "JPEG")[:20000])
    (folder / "zeros.png").write_bytes(bytes(100))
    refused = [
        reject({"source_uri": str(folder / "notes.jpg")}, RowRefused("not_an_image", "41 bytes")),
        reject({"source_uri": str(folder / "cut.jpg")}, RowRefused("truncated", "image file is truncated")),
        reject({"source_uri": str(folder / "zeros.png")}, RowRefused("not_an_image", "100 bytes")),
        reject({"source_uri": "s3-gone://bucket/x.jpg"}, RowRefused("unreadable", "no such file")),
    ]
    count = num_shards * shard_rows
    images = [image_row(index) for index in range(count)]

    def cut(rows: list[Row]) -> list[list[Row]]:
        return [rows[start : start + shard_rows] for start in range(0, count, shard_rows)]

    make_table(uri, "images", IMAGES, cut(images), refused)
    for captioner in CAPTIONERS:
        rows = [
            {
                "id": row["id"],
                "caption": text,
                "num_tokens": len(text.split()),
                "finish_reason": "length" if text == LONG else "stop",
                "flags": ["cut_off", "repetition"] if text == LONG else [],
            }
            for index, row in enumerate(images)
            for text in [text_of(captioner, index)]
        ]
        refused = reject(images[0], RowRefused("empty_caption", "it said nothing"))
        make_table(uri, f"captions/{captioner}", CAPTIONS, cut(rows), [refused])
    scores = [{"id": row["id"], "captions": competing(index, row)} for index, row in enumerate(images)]
    make_table(uri, "scores/clip", SCORES, cut(scores))
    latents = [latents_row(index, row) for index, row in enumerate(images)]
    make_table(uri, "latents/tiny-64", LATENTS, cut(latents), dtype="float16")
    return uri


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("report"))


def best(captions: list[Row]) -> Row:
    return max(captions, key=lambda caption: caption["clip_score"])


def test_images_report_shows_each_image_and_counts(dataset: str) -> None:
    table = Table(dataset, "images", IMAGES)
    page = check_page(images_report(dataset, sample=ReportScope(num_images=100)), table)
    rows = [row for shard in table.list_shards() for row in table.read_shard(shard).to_pylist()]
    for row in rows:
        assert row["id"][:12] in page.text
        assert not row["caption"] or row["caption"] in page.text
        assert f"{row['width']} × {row['height']} px · {row['format']}" in page.text
    assert "Rows 30 Rejects 4 Shards 3" in page.text
    assert "PNG 24 80.0%" in page.text and "JPEG 6 20.0%" in page.text
    assert "15 of the images (50.0%) came with one" in page.text
    assert len(page.all("svg")) == 3


def test_rejects_show_reason_and_what_the_bytes_are(dataset: str) -> None:
    page = check_page(images_report(dataset))
    assert "not_an_image 2 50.0%" in page.text
    assert "Dear diary, <b>this is</b> not a picture." in page.text  # as text: the page has no <b> from it
    assert "00 00 00 00" in page.text
    assert "bytes not at hand" in page.text
    assert any(image["alt"] == "rejected: truncated" for image in page.all("img"))


def test_rejects_show_members_of_a_local_tar(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        member = tarfile.TarInfo("folder/x.jpg")
        member.size = 14
        archive.addfile(member, BytesIO(b"no picture but"))
    refused = reject({"source_uri": f"{tmp_path}/a.tar#folder/x.jpg"}, RowRefused("not_an_image", "14 bytes"))
    gone = reject({"source_uri": f"{tmp_path}/a.tar#folder/y.jpg"}, RowRefused("not_an_image", "14 bytes"))
    make_table(str(tmp_path), "images", IMAGES, [[image_row(0)]], [refused, gone])
    page = check_page(images_report(str(tmp_path)))
    assert "no picture but" in page.text and page.text.count("bytes not at hand") == 1


def test_rejects_of_later_stages_show_the_image(dataset: str) -> None:
    page = check_page(captions_report(dataset, "llava"), Table(dataset, "captions/llava", CAPTIONS))
    assert "empty_caption 1 100.0%" in page.text
    assert any(image["alt"] == "rejected: empty_caption" for image in page.all("img"))


def test_captions_report_counts_and_escapes(dataset: str) -> None:
    html = captions_report(dataset, "llava", sample=ReportScope(num_images=30))
    page = check_page(html)
    assert HOSTILE in page.text and "<script" not in html
    assert LONG.strip() in page.text  # whole, behind the cut
    assert "show all 5,000 characters" in page.text
    assert "stop 29 96.7%" in page.text and "length 1 3.3%" in page.text
    assert "cut_off 1 3.3%" in page.text and "repetition 1 3.3%" in page.text
    for index in range(3, 30):
        assert text_of("llava", index) in page.text


def test_repeated_captions_are_counted(dataset: str) -> None:
    page = check_page(captions_report(dataset, "idefics"))
    assert "a photo of a thing 8 26.7%" in page.text


def test_scores_report_shows_every_caption_and_marks_the_selected(dataset: str) -> None:
    table = Table(dataset, "scores/clip", SCORES)
    html = scores_report(dataset, "clip", BEST, sample=ReportScope(num_images=30))
    page = check_page(html, table)
    cards = re.findall(r'<article class="card contest">.*?</article>', html, re.DOTALL)
    rows = [row for shard in table.list_shards() for row in table.read_shard(shard).to_pylist()]
    assert len(cards) == len(rows) == 30
    for card, row in zip(cards, rows, strict=True):
        assert row["id"][:12] in card
        entries = re.findall(r"<li .*?</li>", card, re.DOTALL)
        assert len(entries) == len(row["captions"])
        selected = best(row["captions"])
        for entry, caption in zip(entries, row["captions"], strict=True):
            assert unescape(caption["caption"]).strip() in unescape(entry)
            assert caption["captioner"] in entry and f"{caption['clip_score']:.2f}" in entry
            assert ("✓ selected" in entry) == (caption == selected)
    wins = [best(row["captions"])["captioner"] for row in rows]
    assert f"{wins.count('llava') / 30:.1%}" in page.text
    mean = np.mean([best(row["captions"])["clip_score"] for row in rows])
    assert f"selected 30 {mean:.2f} 30 100.0%" in page.text


def test_a_policy_may_select_none(dataset: str) -> None:
    page = check_page(scores_report(dataset, "clip", SelectionConfig(policy="best", min_best_score=99.0)))
    assert page.text.count("the policy picks none of these") == 24
    assert "of 30 images it picks none" in page.text


def test_captioners_keep_their_colours_on_a_page(dataset: str) -> None:
    html = scores_report(dataset, "clip", BEST)
    colors = dict(re.findall(r'<span class="s-(\d)"><span class="dot"></span>(\w+)</span>', html))
    assert list(colors.values()) == ["original", "idefics", "llava"]
    for color, name in re.findall(r'<li class="s-(\d)[^"]*"><div><span class="dot"></span>(\w+)', html):
        assert colors[color] == name


def test_latents_report_measures_values_and_shows_reconstructions(dataset: str) -> None:
    def decode(latents: np.ndarray) -> Image.Image:
        assert latents.shape == (4, 8, 8) and latents.dtype == np.float32
        return Image.fromarray((latents[0].clip(-1, 1) * 127 + 128).astype(np.uint8))

    table = Table(dataset, "latents/tiny-64", LATENTS)
    page = check_page(latents_report(dataset, table.path, decode, sample=ReportScope(num_images=30)), table)
    values = np.concatenate([latents_row(index, image_row(index))["latents"] for index in range(30)], axis=None)
    values = np.frombuffer(b"".join(values.tolist()), np.float16).astype(np.float32)
    assert f"with mean {values.mean():.2f}" in page.text
    assert f"here it is {values.std():.4g}" in page.text
    assert "64x64 20 66.7%" in page.text
    assert sum(image["alt"].startswith("decoded: ") for image in page.all("img")) == 30
    assert "what the autoencoder makes" not in check_page(latents_report(dataset, table.path)).text


def test_latents_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    uri = str(tmp_path)
    row = image_row(0)
    latents = latents_row(0, row)
    broken = np.frombuffer(latents["latents"], np.float16).copy()
    broken[:5] = np.nan
    make_table(uri, "images", IMAGES, [[row]])
    make_table(uri, "latents/tiny-64", LATENTS, [[latents | {"latents": broken.tobytes()}]], dtype="float16")
    assert "5 values are not finite" in check_page(latents_report(uri, "latents/tiny-64")).text


def test_training_and_demo_reports(dataset: str, tmp_path: Path) -> None:
    grid = tmp_path / "grid.png"
    grid.write_bytes(encode(Image.fromarray(np.tile(draw_row(0)[1], (2, 2, 1))), "PNG"))
    losses = [(step, 1 / (1 + step)) for step in range(1, 200)]
    page = check_page(training_report(dataset, "latents/tiny-64", losses, [(0, grid), (100, grid)], facts={"Steps": 199}))
    assert "Steps 199" in page.text and "step 100" in page.text
    assert [image["alt"] for image in page.all("img")] == ["samples at step 0", "samples at step 100"]
    table = Section(
        title="Results", columns=("stage", "rows"), rows=[("ingest", 1234), (HOSTILE, None)], pictures=[("after", grid)]
    )
    links = [Link(name="Images", href="dataset/images/report.html")]
    html = demo_report(dataset, [table], links=links, notice="captions are nonsense on photos")
    page = check_page(html)
    assert page.all("a") == [{"href": "dataset/images/report.html"}]
    assert "ingest 1,234" in page.text and HOSTILE in page.text and "captions are nonsense on photos" in page.text


def test_empty_tables_make_pages(tmp_path: Path) -> None:
    uri = str(tmp_path)
    tables = {"images": IMAGES, "captions/llava": CAPTIONS, "scores/clip": SCORES, "latents/tiny-64": LATENTS}

    def pages() -> list[str]:
        return [
            images_report(uri),
            captions_report(uri, "llava"),
            scores_report(uri, "clip", BEST),
            latents_report(uri, "latents/tiny-64"),
        ]

    no_rows: list[Row] = []
    for shards in ([], [no_rows]):
        for path, schema in tables.items():
            make_table(uri, path, schema, shards, dtype="bfloat16")
        assert all("The table is empty" in check_page(page).text for page in pages())
    assert "No step has been logged" in check_page(training_report(uri, "latents/tiny-64", [])).text
    check_page(demo_report(uri, []))


def test_a_missing_table_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(MissingTableError, match="captions/llava"):
        captions_report(str(tmp_path), "llava")


def test_a_large_table_is_sampled_and_the_page_says_so(dataset: str) -> None:
    sample = ReportScope(num_images=5, max_shards=2, picture_shards=1)
    page = check_page(images_report(dataset, sample=sample))
    assert "20 rows were read: 2 of 3 shards, spread evenly" in page.text
    assert "5 of 30 images" in page.text
    assert sum(not image["alt"].startswith("rejected") for image in page.all("img")) == 5


def test_write_report_puts_the_page_into_the_table(dataset: str) -> None:
    table = Table(dataset, "images", IMAGES)
    html = images_report(dataset)
    table.write_report(html)
    assert Path(table.uri, "report.html").read_text() == html
    assert json.loads(Path(table.uri, "_manifest.json").read_text())["fingerprint"] == table.require().fingerprint
    assert len(table.list_shards()) == 3


def test_thumbnails_are_small_and_of_any_kind() -> None:
    large = Image.fromarray(np.random.default_rng(0).integers(0, 255, (1500, 3000, 3), dtype=np.uint8))
    picture = thumbnail(encode(large, "JPEG"), "large")
    assert (picture.width, picture.height) == (320, 160) and len(picture.src) < 100_000
    for mode in ("RGBA", "CMYK", "L", "P", "I;16"):
        image = large.resize((20, 10)).convert("L" if mode == "I;16" else mode).convert(mode)
        assert thumbnail(encode(image, "TIFF"), mode).src.startswith("data:image/png;base64,")
    assert not thumbnail(b"text", "t").src


@pytest.mark.parametrize(("kind", "excerpt"), [("folder", "root:x:0"), ("list", "")])
def test_a_list_brings_no_file_of_this_host_onto_a_page(tmp_path: Path, kind: str, excerpt: str) -> None:
    (tmp_path / "passwd").write_text("root:x:0")
    images = Table(str(tmp_path / "data"), IMAGES_PATH, IMAGES)
    images.claim(Identity("ingest", {"source_kind": kind}, {}, {}))
    refused = reject({"source_uri": str(tmp_path / "passwd")}, RowRefused("not_an_image", "no image"))
    images.rejects().write_shard("00000", pa.Table.from_pylist([refused], REJECTS))
    [shown] = read_rejects(images, ReportScope()).samples
    assert (shown.excerpt, shown.picture.src) == (excerpt, "")
