"""Two VLMs and original captions in one dataset, from raw images to scores: all five policies over it, side by side."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipelines.caption.config import CaptionerConfig, SamplingConfig
from pipelines.caption.run import run_caption
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.run import run_ingest
from pipelines.reports.scores import scores_report
from pipelines.score.candidates import Candidates
from pipelines.score.captions import run_score
from pipelines.score.compare import Comparison, compare_table
from pipelines.score.config import POLICIES, ScorerConfig, SelectionConfig
from pipelines.score.embeds import run_image_embeds
from pipelines.score.selection import Caption
from pipelines.shapes.drawing import draw_row, write_folder
from pipelines.shapes.grammar import parse, sample_caption
from pipelines.stages.contract import Resources
from pipelines.tables.schema import SCORES, scores_path
from pipelines.tables.table import Table
from tests.support.html_page import check_page
from tests.support.without_ray import run_without_ray

FIRST, NUM_IMAGES = 10_000_900, 16
CAPTIONERS = {"llava": "zoo://captioner-a", "llava-next": "zoo://captioner-b"}
NAMES = ("original", *CAPTIONERS)
LIGHT = Resources(num_cpus=0.5)
SELECTION = SelectionConfig(tau=1.0, proportions={"original": 0.2, "llava": 0.3, "llava-next": 0.5})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> str:
    folder = tmp_path_factory.mktemp("vlms")
    write_folder(folder / "raw", FIRST, NUM_IMAGES)
    for number in range(0, NUM_IMAGES, 2):  # every other image came with a caption
        told = sample_caption(draw_row(FIRST + number)[0], np.random.default_rng(number))
        (folder / f"raw/{FIRST + number:09d}.json").write_text(json.dumps({"caption": told}))
    uri = str(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        run_without_ray(patch)
        make_tables(folder, uri)
    return uri


def make_tables(folder: Path, uri: str) -> None:
    """Ingest, caption, embed and score, each as the stage does it."""
    run_ingest(uri, IngestConfig(source=str(folder / "raw"), rows_per_shard=8, resources=LIGHT))
    for name, model in CAPTIONERS.items():
        sampling = SamplingConfig(max_new_tokens=48)
        run_caption(uri, CaptionerConfig(name=name, model=model, dtype="float32", sampling=sampling, resources=LIGHT))
    scorer = ScorerConfig(name="clip", model="zoo://clip", captioners=NAMES, resources=LIGHT)
    run_image_embeds(uri, scorer.clip)
    for name in NAMES:
        run_score(uri, scorer, name)


@pytest.fixture(scope="module")
def comparison(dataset: str) -> Comparison:
    return compare_table(dataset, "clip", NAMES, SELECTION)[0]


def contests_of(dataset: str) -> list[list[Caption]]:
    candidates = Candidates(dataset, NAMES, "clip")
    assert len(candidates.list_scored()) == 2
    return [captions for shard in candidates.list_scored() for captions in candidates.read(shard).values()]


def test_every_caption_of_every_image_is_scored(dataset: str) -> None:
    contests = contests_of(dataset)
    names = [tuple(caption["captioner"] for caption in captions) for captions in contests]
    assert sorted(names) == sorted([NAMES, tuple(CAPTIONERS)] * (NUM_IMAGES // 2))
    captions = [caption for contest in contests for caption in contest]
    assert np.mean([parse(caption["caption"]) is not None for caption in captions]) > 0.9  # real captions of real scenes
    counts = {name: Table(dataset, scores_path("clip", name), SCORES).require().num_rows for name in NAMES}
    assert counts == {"original": NUM_IMAGES // 2, "llava": NUM_IMAGES, "llava-next": NUM_IMAGES}


def test_five_policies_choose_differently_over_one_table(dataset: str, comparison: Comparison) -> None:
    contests, policies = contests_of(dataset), comparison.policies
    assert tuple(policies) == POLICIES and comparison.num_images == NUM_IMAGES
    best = [max(caption["clip_score"] for caption in captions) for captions in contests]
    mean = [np.mean([caption["clip_score"] for caption in captions]) for captions in contests]
    scores = {name: policies[name].expected_score for name in POLICIES}
    assert scores["best"] == pytest.approx(np.mean(best)) and scores["random"] == pytest.approx(np.mean(mean))
    assert scores["random"] < scores["paper"] < scores["best"]  # type: ignore[operator]
    assert policies["best"].entropy == 0 and policies["random"].entropy == pytest.approx((np.log(3) + np.log(2)) / 2)
    shares = policies["proportions"].shares  # half of the images have no original caption: its share goes to the others
    assert shares == pytest.approx({"original": 0.1, "llava": 0.15 + 0.1875, "llava-next": 0.25 + 0.3125})
    assert policies["best"].shares["llava"] > policies["best"].shares["llava-next"]  # the better captioner wins
    assert all(sum(figures.shares.values()) == pytest.approx(1) and not figures.num_dropped for figures in policies.values())


def test_the_report_shows_them_side_by_side(dataset: str, comparison: Comparison) -> None:
    page = check_page(scores_report(dataset, "clip", "llava", SELECTION), Table(dataset, scores_path("clip", "llava"), SCORES))
    for name, figures in comparison.policies.items():
        chosen = "✓ selects here " if name == SELECTION.policy else ""
        cells = [f"{figures.shares.get(captioner, 0):.1%}" for captioner in ("original", "llava", "llava-next")]
        assert f"{name} {chosen}{' '.join(cells)} {figures.expected_score:.2f} {figures.entropy:.2f} 0" in page.text
