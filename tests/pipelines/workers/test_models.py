"""What tells one version of a model from another, and who may use a GPU."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
from huggingface_hub import HfApi, constants

from pipelines.caption import run as caption
from pipelines.caption.config import CaptionerConfig, QualityConfig
from pipelines.evaluate import run as evaluate
from pipelines.evaluate.config import ClipScoreConfig
from pipelines.evaluate.pictures import sampled_pictures
from pipelines.extract import embed_captions
from pipelines.extract.config import EmbedConfig
from pipelines.score import captions as score
from pipelines.score import images as score_images
from pipelines.score.config import ImageScorerConfig, ScorerConfig
from pipelines.tables.identity import Identity
from pipelines.tables.schema import CAPTIONS, IMAGES, SAMPLES, image_embeds_schema
from pipelines.tables.table import Table
from pipelines.workers import models
from pipelines.workers.models import find_model, hub_commit, is_hub_id, model_version, pretrained
from tests.support.http_server import Handler, Server

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


class Hub(Handler):
    """Answers as the hub does which commit a revision of acme/vlm is, and notes what it was asked."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        commit = COMMITS.get(self.path.removeprefix("/api/models/acme/vlm/revision/"))
        if commit is None:
            missing = "RevisionNotFound" if "acme/vlm" in self.path else "RepoNotFound"
            self.reply(404, b"{}", {"X-Error-Code": missing})
        else:
            self.reply(200, json.dumps({"id": "acme/vlm", "sha": commit}).encode())


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    Hub.asked.clear()
    with Server(Hub).running() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(models, "HfApi", partial(HfApi, endpoint=server.url))
        yield


@pytest.mark.usefixtures("hub")
def test_a_revision_of_the_hub_is_pinned_to_its_commit() -> None:
    assert model_version("acme/vlm") == f"acme/vlm@{'a' * 40}"
    assert model_version("acme/vlm", "v1") == f"acme/vlm@{'b' * 40}"
    assert model_version("acme/vlm", "c" * 40) == f"acme/vlm@{'c' * 40}"  # without asking: the hub has no such commit
    found = find_model("acme/vlm")
    assert (found.path, found.revision, found.address) == ("acme/vlm", "a" * 40, f"acme/vlm@{'a' * 40}")
    for again in (pretrained(found.path, found.revision), pretrained(found.address)):
        assert again == ("acme/vlm", {"revision": "a" * 40})
    assert pretrained("acme/vlm") == ("acme/vlm", {})
    with pytest.raises(ValueError, match="no 'acme/vlm' with revision 'v3'"):
        model_version("acme/vlm", "v3")
    with pytest.raises(ValueError, match="no 'acme/other' with revision 'main'"):
        model_version("acme/other")


def test_a_short_name_of_a_published_model_is_its_hub_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a cache as the hub's own client lays it out; nothing is fetched."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    commit, repository = "d" * 40, tmp_path / "models--Efficient-Large-Model--Sana_1600M_1024px_BF16"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit / "checkpoints").mkdir(parents=True)
    assert not is_hub_id("sana-1.6b-1024")
    address = f"hf://Efficient-Large-Model/Sana_1600M_1024px_BF16@{commit}"
    assert find_model("sana-1.6b-1024") == models.FoundModel(address, None, commit)
    Path("sana-1.6b-1024").mkdir()
    assert find_model("sana-1.6b-1024").path == "sana-1.6b-1024", "a folder of that name comes first"
    with pytest.raises(FileNotFoundError, match=r"jobs\.zoo published"):
        find_model("sana-1.6b-1025")


REVISION = "/api/models/acme/vlm/revision"
STAGES: dict[str, tuple[Any, Callable[[str], object], list[str]]] = {
    "caption": (
        caption,
        lambda uri: caption.run_caption(
            uri, CaptionerConfig(name="a", model="acme/vlm", revision="v1", quality=QualityConfig(budget_tokenizer="acme/vlm"))
        ),
        [f"{REVISION}/v1", f"{REVISION}/main"],
    ),
    "score": (
        score,
        lambda uri: score.run_score(uri, ScorerConfig(name="clip", model="acme/vlm", captioners=("a",)), "a"),
        [f"{REVISION}/main"],
    ),
    "score_images": (
        score_images,
        lambda uri: score_images.run_image_scores(uri, ImageScorerConfig(name="x", model="acme/vlm", label="1")),
        [f"{REVISION}/main"],
    ),
    "embed_captions": (
        embed_captions,
        lambda uri: embed_captions.run_embed_captions(
            uri, EmbedConfig(name="e", text_encoder="acme/vlm", captioners=("a",)), "a"
        ),
        [f"{REVISION}/main"],
    ),
    "evaluate": (
        evaluate,
        lambda uri: evaluate.run_metric(uri, sampled_pictures(uri, "night"), "clip_score", ClipScoreConfig(model="acme/vlm")),
        [f"{REVISION}/main"],
    ),
}
"""By stage: its module, how it is run, and what it asks the hub."""


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_asks_the_hub_once_for_each_model_and_its_workers_load_that_commit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeds = image_embeds_schema(4)
    tables = {"images": IMAGES, "image_embeds/clip": embeds, "captions/a": CAPTIONS, "samples/night": SAMPLES}
    for path, schema in tables.items():
        table = Table(str(tmp_path), path, schema)
        table.write_manifest(replace(table.claim(Identity("x", {}, {}, {})), complete=True))
    module, run, asked = STAGES[name]
    made: list[tuple[Identity, Any]] = []
    monkeypatch.setattr(module, "run_shards", lambda output, identity, shards, **call: made.append((identity, call)))
    run(str(tmp_path))
    ((identity, call),) = made
    assert Hub.asked == asked
    commits = {COMMITS[path.rpartition("/")[2]] for path in asked}
    assert set(identity.models.values()) == {f"acme/vlm@{commit}" for commit in commits}
    config = call["make_worker"].args[-1]
    assert all(commit in repr(config) for commit in commits)


def test_an_address_of_the_hub_is_pinned_to_the_commit_that_it_was_found_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--acme--vlm/snapshots" / ("e" * 40)
    (snapshot / "tower").mkdir(parents=True)
    (snapshot / "tower/model.safetensors").write_bytes(b"weights")
    places = {"hf://acme/vlm@v2": snapshot, "hf://acme/vlm/tower": snapshot / "tower"}
    monkeypatch.setattr(models, "resolve", places.__getitem__)
    whole, part = (find_model(address) for address in places)
    assert (whole.path, whole.version) == (f"hf://acme/vlm@{'e' * 40}", "e" * 40)
    assert part.path == f"hf://acme/vlm@{'e' * 40}/tower" and part.version.startswith("sha256:")
    assert whole.revision is None and part.revision is None


def test_without_the_hub_the_cache_tells_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"asked which commit of 'acme/vlm' is 'main' .* set the revision to a commit"):
        hub_commit("acme/vlm", None)
    reference = tmp_path / "models--acme--vlm/refs/main"
    reference.parent.mkdir(parents=True)
    reference.write_text("d" * 40)
    assert hub_commit("acme/vlm", None) == "d" * 40


@pytest.mark.parametrize("name", ["pytorch_model.bin", "modeling.py", "tokenizer.json", "model.safetensors"])
def test_every_file_of_a_local_model_counts(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"one")
    before = model_version(str(tmp_path))
    (tmp_path / name).write_bytes(b"other")
    assert model_version(str(tmp_path)) != before
    changed = model_version(str(tmp_path))
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "modeling.pyc").write_bytes(b"compiled")
    assert model_version(str(tmp_path)) == changed


def test_a_model_of_one_file_is_told_by_its_content(tmp_path: Path) -> None:
    one, other = tmp_path / "one.pth", tmp_path / "other.pth"
    one.write_bytes(b"weights")
    other.write_bytes(b"other weights")
    assert model_version(str(one)) != model_version(str(other))


def test_what_is_neither_a_place_nor_an_id_is_refused() -> None:
    assert is_hub_id("acme/vlm") and not is_hub_id("zoo://clip") and not is_hub_id("pipelines")
    with pytest.raises(FileNotFoundError, match="no file or folder 'data/train/pipeline', and no id of the Hugging Face hub"):
        model_version("data/train/pipeline")
    with pytest.raises(
        FileNotFoundError, match=r"no file or folder 'weights/inception\.pth', and no id of the Hugging Face hub"
    ):
        model_version("weights/inception.pth")
