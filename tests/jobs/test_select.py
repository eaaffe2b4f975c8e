"""The command that compares policies: tables, JSON and a page, without Ray."""

import json
from pathlib import Path

import pytest
import ray

from jobs import select
from pipelines.score.config import POLICIES
from pipelines.tables.schema import SCORES as SCORES_SCHEMA
from pipelines.tables.schema import scores_path
from pipelines.tables.table import Table
from tests.support.contests import write_contest

SCORES = {"x": {"original": 24.0, "llava": 30.0, "qwen": 27.0}, "y": {"llava": 20.0, "qwen": 21.0}}


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    uri = str(tmp_path / "data")
    write_contest(uri, {row_id: {name: (f"by {name}", score) for name, score in own.items()} for row_id, own in SCORES.items()})
    return uri


def test_all_five_policies_are_shown_side_by_side(
    dataset: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[object] = []
    monkeypatch.setattr(ray, "init", lambda *args, **options: starts.append(options))  # other tests' Ray may run already
    assert select.main(["--dataset_uri", dataset, "--clip", "clip", "--min_best_score", "22"]) == 0
    shown = capsys.readouterr().out
    assert "scores/clip: 2 images in 1 of 1 shards" in shown
    lines = {line.split()[0]: line.split() for line in shown.splitlines() if line.strip()}
    assert lines["llava"] == ["llava", "2", "25.00"]
    assert lines["best"] == ["best", "0.0%", "100.0%", "0.0%", "30.00", "0.00", "1"]
    assert lines["random"] == ["random", "33.3%", "33.3%", "33.3%", "27.00", "1.10", "1"]
    assert set(POLICIES) <= lines.keys()
    assert not starts


def test_json_and_proportions(dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--policies", "[proportions, best]", "--proportions", "{original: 1, qwen: 3}", "--json"]
    assert select.main(["--dataset_uri", dataset, "--clip", "clip", *arguments]) == 0
    content = json.loads(capsys.readouterr().out)
    assert list(content["policies"]) == ["proportions", "best"]
    assert content["policies"]["proportions"]["shares"] == pytest.approx({"original": 0.125, "qwen": 0.875})
    assert content["policies"]["proportions"]["num_dropped"] == 0
    assert content["num_images"] == 2 and content["captioners"]["original"] == {"num_captions": 1, "mean_score": 24.0}
    assert select.main(["--dataset_uri", dataset, "--clip", "clip", "--policies", "[proportions]", "--json"]) == 0
    equal = json.loads(capsys.readouterr().out)["policies"]["proportions"]["shares"]
    assert equal == pytest.approx({"original": 1 / 6, "llava": 5 / 12, "qwen": 5 / 12})


def test_a_captioner_whose_scores_are_not_all_there_yet_is_told(dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    for captioner in ("original", "llava"):
        table = Table(dataset, scores_path("clip", captioner), SCORES_SCHEMA)
        table.write_shard("00001", table.read_shard("00000"))
    assert select.main(["--dataset_uri", dataset, "--clip", "clip"]) == 0
    told = "scores/clip: 2 images in 1 of 2 shards\nqwen has scores for 1 of 2 shards"
    assert told in capsys.readouterr().out


def test_the_page(dataset: str, tmp_path: Path) -> None:
    page = tmp_path / "pages" / "policies.html"
    assert select.main(["--dataset_uri", dataset, "--clip", "clip", "--policies", "[paper]", "--html", str(page)]) == 0
    assert "Policies compared" in page.read_text()


def test_what_is_wrong_is_said_in_one_line(dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert select.main(["--dataset_uri", dataset, "--clip", "siglip"]) == 1
    told = capsys.readouterr().err
    assert "there is no table 'scores/siglip' in" in told and "which has scores/clip: run the stage that makes it" in told
    assert select.main(["--dataset_uri", dataset, "--clip", "clip", "--captioners", "[llava, phi]"]) == 1
    told = capsys.readouterr().err
    assert "there is no table 'scores/clip/phi'" in told and "which has scores/clip/llava, scores/clip/original" in told
    assert select.main(["--dataset_uri", f"{dataset}/nowhere", "--clip", "clip"]) == 1
    assert "nowhere, where nothing is: is this the dataset? (jobs.ingest begins one)" in capsys.readouterr().err
    assert select.main(["--dataset_uri", dataset, "--clip", "clip", "--tau", "0"]) == 1
    assert "tau=0.0 must be positive" in capsys.readouterr().err
    assert select.main(["--dataset_uri", dataset, "--clip", "clip", "--proportions.lava", "1"]) == 1
    assert "proportions gives a share to lava, and only original, llava, qwen compete" in capsys.readouterr().err
    for arguments in (
        ["--proportions", "llava"],
        ["--captioners", "[llava, llava]"],
        ["--proportions.llava", "-1"],
        ["--max_shards", "0"],
        ["--policies", "[worst]"],
    ):
        with pytest.raises(SystemExit, match="2"):
            select.main(["--dataset_uri", dataset, "--clip", "clip", *arguments])
