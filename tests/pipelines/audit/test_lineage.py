"""The lineage card says what is in the dataset, and where it comes from."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from jobs import lineage as job
from pipelines.audit.lineage import LINEAGE_VERSION, captioner_shares, make_lineage, to_markdown
from pipelines.score.config import SelectionConfig
from pipelines.score.selection import choose_caption
from pipelines.tables.identity import Identity
from tests.support.whole_dataset import make_dataset


def test_the_card_of_a_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = make_dataset(str(tmp_path))
    settings = {"num_steps": 9, "data": {"selection": asdict(SelectionConfig(policy="random"))}}
    inputs = {"latents/ae-64": tables["latents/ae-64"].require().fingerprint}
    identity = Identity("train", settings, {"init": "sha256:i"}, inputs)
    (tmp_path / "train").mkdir()
    result = {"loss_start": 1.0, "loss_end": 0.5}
    (tmp_path / "train/training.json").write_text(json.dumps({"fingerprint": "f" * 64, **asdict(identity), "result": result}))
    assert job.main(["--dataset_uri", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{tmp_path}/lineage.md", f"{tmp_path}/lineage.json"]
    card = json.loads((tmp_path / "lineage.json").read_text())
    assert card["version"] == LINEAGE_VERSION and card["sources"] == [{"source": "photos"}]
    stages = {stage["table"]: stage for stage in card["stages"]}
    assert [(stage["rows"], stage["rejects"]) for stage in stages.values()] == [
        *((40, 2), (39, 1), (40, 0), (39, 1), (39, 1), (38, 1), (39, 1)),
    ]
    assert stages["images"]["rejects_by_reason"] == {"truncated": 2}
    assert stages["captions/a"]["models"] == {"a": "sha256:a"} and stages["captions/a"]["config"]["prompt"] == "Describe."
    assert stages["captions/a"]["software"]["torch"] and stages["captions/a"]["begun"] <= stages["captions/a"]["updated"]
    assert card["selection"]["policy"] == "random" and card["selection"]["of"] == "the training 'train'"
    shares = {share["captioner"]: share for share in card["scores"]["scores/clip"]["captioners"]}
    assert (shares["a"]["num_captions"], shares["b"]["num_captions"]) == (39, 38)  # of one image, a alone has a caption
    assert shares["a"]["selected_share"] == pytest.approx(20 / 39) and shares["b"]["selected_share"] == pytest.approx(19 / 39)
    table = tables["scores/clip/b"]
    scores = [score for shard in table.list_shards() for score in table.read_shard(shard)["clip_score"].to_pylist()]
    assert shares["b"]["score_quantiles"]["0.5"] == pytest.approx(np.quantile(scores, 0.5))
    (training,) = card["trainings"]
    assert training["ended"] and training["models"] == {"init": "sha256:i"} and training["result"] == result


def test_a_captioner_that_came_after_the_training_has_no_share_in_it(tmp_path: Path) -> None:
    make_dataset(str(tmp_path))
    data = {"selection": asdict(SelectionConfig(policy="random")), "captioners": ["a"]}
    identity = Identity("train", {"num_steps": 9, "data": data, "latents": "latents/ae-64"}, {}, {})
    (tmp_path / "train").mkdir()
    (tmp_path / "train/training.json").write_text(json.dumps({"fingerprint": "f", **asdict(identity), "result": None}))
    card = make_lineage(str(tmp_path), max_shards=64)
    shares = {
        share["captioner"]: (share["num_captions"], share["selected_share"])
        for share in card.scores["scores/clip"]["captioners"]
    }
    assert shares == {"a": (39, 1.0), "b": (38, 0.0)}
    assert "(policy random, " in to_markdown(card) and "captioners ['a'])" in to_markdown(card)


def test_the_page_for_people_is_whole_markdown(tmp_path: Path) -> None:
    make_dataset(str(tmp_path))
    page = to_markdown(make_lineage(str(tmp_path), max_shards=64))
    lines = page.splitlines()
    for title in ("## Sources", "## Tables", "## What was refused", "## Captioners in `scores/clip`", "### `latents/ae-64`"):
        assert title in lines
    grids = [line.count("|") for line in lines if line.startswith("| ")]
    rows = [line for line in lines if line.startswith("| `images`")]
    assert grids and rows[0].split(" | ")[3:] == ["40", "2", "2", rows[0].split(" | ")[-1]]
    assert "| `captions/b` | empty_caption | 1 |" in lines
    assert page.count("```json") == page.count("```") / 2 == 7
    assert "the default configuration" in page


def test_expected_shares_are_those_of_the_draws() -> None:
    generator = np.random.default_rng(0)
    rows = [
        [{"captioner": name, "caption": name, "clip_score": float(generator.uniform(20, 32))} for name in ("a", "b", "c")]
        for _ in range(400)
    ]
    selection = SelectionConfig(policy="paper", tau=2.0)
    shares = {share.captioner: share.selected_share for share in captioner_shares(rows, selection)}
    drawn = [
        choose_caption(row, selection, seed=0, epoch=epoch, sample_id=str(index))
        for index, row in enumerate(rows)
        for epoch in range(20)
    ]
    for name, share in shares.items():
        times = [caption is not None and caption["captioner"] == name for caption in drawn]
        assert share == pytest.approx(np.mean(times), abs=0.02)
    assert sum(shares.values()) == pytest.approx(1)


def test_where_there_is_no_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.main(["--dataset_uri", str(tmp_path)]) == 1
    assert "there is no dataset" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
