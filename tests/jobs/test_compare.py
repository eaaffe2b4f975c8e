"""jobs.compare on two small tables of pictures, made without a model."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from jobs import compare
from jobs.common.exit_codes import ExitCode
from pipelines.evaluate.compare import FIGURES, FIGURES_SETTINGS, PUBLISHED, bootstrap, compare_samples, figures_table
from pipelines.evaluate.dpg.config import DpgConfig
from pipelines.evaluate.dpg.questions import ScoreSums
from pipelines.evaluate.geneval.config import GenEvalConfig
from pipelines.evaluate.metric import metric_table
from pipelines.evaluate.registry import metric_class
from pipelines.tables.identity import Identity
from pipelines.tables.schema import SAMPLES
from pipelines.tables.table import Table
from tests.pipelines.evaluate.test_run import drawn_rows

NAMES = ("night", "day")


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    uri = str(tmp_path)
    rows, _ = drawn_rows(6)
    rows[5] = rows[5] | {"prompt": "</script><b>5 | 6"}
    for number, name in enumerate(NAMES):
        samples = Table(uri, f"samples/{name}", SAMPLES)
        settings = {"num_steps": 20, "guidance_scale": 4.5 + number}
        samples.write_manifest(replace(samples.claim(Identity("sample", settings, {}, {})), complete=True))
        samples.write_shard("00000", pa.Table.from_pylist(rows, SAMPLES))
        write_scores(uri, name, [(row["prompt"], 20.0 + 3 * number + at % 3) for at, row in enumerate(rows)])
    return uri


def write_scores(uri: str, name: str, scores: list[tuple[str, float]], *, shards: int = 1) -> Table:
    table = metric_table(uri, name, "clip_score")
    drawn = Table(uri, f"samples/{name}", SAMPLES).read_manifest()
    table.claim(Identity("evaluate", {}, {}, {} if drawn is None else {f"samples/{name}": drawn.fingerprint}))
    for shard, part in enumerate(np.array_split(np.arange(len(scores)), shards)):
        rows = [{"id": f"{at:06d}", "prompt": scores[at][0], "clip_score": scores[at][1]} for at in part]
        table.write_shard(f"{shard:05d}", pa.Table.from_pylist(rows, table.schema))
    figures = {"clip_score": float(np.mean([score for _, score in scores])), "fid": 6.0}
    table.write_file(FIGURES, json.dumps(figures).encode())
    return table


def test_published_figures_of_dpg_bench_are_in_the_unit_of_ours() -> None:
    sums = ScoreSums()
    sums.add("a cat", 0.845, [("entity", True)])
    assert sums.figures()["score"] == pytest.approx(PUBLISHED["Sana-1.5 1.6B"]["dpg"])


def test_a_page_a_table_and_a_vote(dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["--dataset_uri", dataset, "--names", "[night, day]", "--num_pictures", "6"]) == ExitCode.DONE
    folder = Path(dataset, "comparisons/night-day")
    markdown = (folder / "comparison.md").read_text()
    assert re.search(r"^\| night \| 21 \(2\S+ to 2\S+\) \| 6 \|$", markdown, re.MULTILINE), markdown
    assert "| Sana-1.5 1.6B (published) | 29.12 | 5.7 |" in markdown
    assert "| config.guidance_scale | 4.5 | 5.5 |" in markdown and "num_steps" not in markdown
    page = (folder / "index.html").read_text()
    assert page.count("data:image/") == 12 and "</script><b>" not in page
    vote = (folder / "vote.html").read_text()
    content = json.loads(re.findall(r'id="content">(.*?)</script>', vote)[0])
    assert len(content) == 6 and content[5]["prompt"] == "</script><b>5 | 6"
    assert all(len(entry["pictures"]) == 2 and entry["pictures"][0].startswith("data:image/png") for entry in content)
    told = capsys.readouterr().out
    assert f"the page: {folder}/index.html" in told and f"a blind vote between night and day: {folder}/vote.html" in told


def test_a_table_that_was_not_judged_and_shares_no_prompt_is_told(dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    other = Table(dataset, "samples/other", SAMPLES)
    other.write_manifest(replace(other.claim(Identity("sample", {}, {}, {})), complete=True))
    other.write_shard("00000", pa.Table.from_pylist([drawn_rows(1)[0][0] | {"prompt": "another"}], SAMPLES))
    assert compare.main(["--dataset_uri", dataset, "--names", "[night, other]"]) == ExitCode.DONE
    told = capsys.readouterr().out
    assert (
        "not judged yet: other; run jobs.evaluate --evaluate.name other" in told and "night and other share no prompt" in told
    )
    folder = Path(dataset, "comparisons/night-other")
    assert "not judged yet: other" in (folder / "index.html").read_text()


def test_no_published_figure_stands_beside_one_of_a_tiny_model(dataset: str) -> None:
    table = metric_table(dataset, "night", "clip_score")
    manifest = table.require()
    table.write_manifest(replace(manifest, config=manifest.config | {"model": "zoo://clip"}))
    comparison = compare_samples(dataset, NAMES)
    assert set(comparison.by_tiny_models) == {"clip_score", "fid"} and len(figures_table(comparison)[1]) == len(NAMES)


def test_tables_that_were_judged_differently_are_told_and_figures_of_earlier_pictures_left_out(
    dataset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, reference in zip(NAMES, ("mine", "yours"), strict=True):
        settings = json.dumps({"reference": reference, "max_features": 10}).encode()
        metric_table(dataset, name, "clip_score").write_file(FIGURES_SETTINGS, settings)
    differing = compare_samples(dataset, NAMES).settings
    assert dict(differing) == {"config.guidance_scale": [4.5, 5.5], "clip_score.figures.reference": ["mine", "yours"]}
    night = Table(dataset, "samples/night", SAMPLES)
    night.write_manifest(replace(night.require(), fingerprint="another"))
    assert compare.main(["--dataset_uri", dataset, "--names", "[night, day]"]) == ExitCode.DONE
    told = "their pictures were drawn anew since: evaluations/night/clip_score; run jobs.evaluate again"
    assert told in capsys.readouterr().out and told in Path(dataset, "comparisons/night-day/index.html").read_text()
    assert set(compare_samples(dataset, NAMES).figures["clip_score"]) == {"day"}
    metric_table(dataset, "day", "clip_score").write_file(FIGURES, b"{")
    with pytest.raises(ValueError, match=r"clip_score/metrics\.json is damaged .*: run jobs\.evaluate again"):
        compare_samples(dataset, NAMES)


def test_intervals_are_by_prompts_and_depend_on_no_shard(tmp_path: Path) -> None:
    """Ten pictures of each prompt that are all alike say no more than one of each."""
    generator = np.random.default_rng(0)
    scores = {f"prompt {number}": float(generator.normal(25, 3)) for number in range(100)}
    metric = metric_class("clip_score")
    once, often = (
        bootstrap(metric, write_scores(str(tmp_path), f"x{times}", [*scores.items()] * times, shards=times))["clip_score"]
        for times in (1, 10)
    )
    assert once == pytest.approx(often, abs=1e-4)
    mean, error = np.mean([*scores.values()]), 1.96 * np.std([*scores.values()]) / 10
    assert once == pytest.approx((mean - error, mean + error), abs=0.2)
    assert bootstrap(metric, write_scores(str(tmp_path), "single", [("one prompt", 20.0), ("one prompt", 30.0)])) == {}


def test_the_score_of_geneval_has_the_interval_of_a_mean_over_tasks_whose_prompts_are_others(tmp_path: Path) -> None:
    table = metric_table(str(tmp_path), "x", "geneval")
    generator = np.random.default_rng(0)
    rows = [
        {
            "id": f"{at}",
            "prompt": f"{task} {at}",
            "task": task,
            "correct": bool(generator.random() < 0.5),
            "faults": [],
            "objects": [],
        }
        for task in ("counting", "position")
        for at in range(80)
    ]
    table.write_shard("00000", pa.Table.from_pylist(rows, table.schema))
    intervals = bootstrap(metric_class("geneval"), table)
    figures = metric_class("geneval").summarize(table, GenEvalConfig())
    assert intervals.keys() == figures.keys()
    widths = {name: (high - low) / (2 * 1.96) for name, (low, high) in intervals.items()}
    for name, deviation in (
        ("geneval.counting", 0.5 / 80**0.5),
        ("geneval", 0.5 / 160**0.5),
        ("geneval.correct_prompts", 0.5 / 160**0.5),
    ):
        assert widths[name] == pytest.approx(deviation, rel=0.12)
        assert intervals[name][0] < figures[name] < intervals[name][1]


def test_the_intervals_of_dpg_bench_are_in_the_unit_of_its_figures(tmp_path: Path) -> None:
    table = metric_table(str(tmp_path), "x", "dpg")
    said = {"question": 1, "answer": "yes", "counts": True, "unclear": False}
    rows = [
        {
            "id": f"{at}",
            "prompt": f"{at}",
            "dpg": at % 2,
            "answers": [{**said, "category": "entity - whole", "yes": at % 4 > 0}],
        }
        for at in range(40)
    ]
    table.write_shard("00000", pa.Table.from_pylist(rows, table.schema))
    intervals = bootstrap(metric_class("dpg"), table)
    figures = metric_class("dpg").summarize(table, DpgConfig())
    assert figures == {"dpg": 50.0, "dpg.entity": 75.0, "dpg.entity - whole": 75.0, "dpg_unclear": 0.0}
    assert intervals.keys() == figures.keys() and intervals["dpg_unclear"] == (0.0, 0.0)
    assert all(low <= figures[name] <= high for name, (low, high) in intervals.items())


def test_what_cannot_be_compared_is_told(dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["--dataset_uri", dataset, "--names", "[night, noon]"]) == ExitCode.WRONG_INPUT
    assert "there is no table 'samples/noon'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare.main(["--dataset_uri", dataset, "--names", "[night]"])
    assert "two or more different tables" in capsys.readouterr().err
    for name in NAMES:
        Path(metric_table(dataset, name, "clip_score").uri, FIGURES).unlink()
    with pytest.raises(ValueError, match=r"was evaluated: run jobs\.evaluate"):
        compare_samples(dataset, NAMES)
