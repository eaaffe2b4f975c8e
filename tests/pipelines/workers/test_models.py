"""What tells one version of a model from another, and who may use a GPU."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

from pipelines.caption.config import CaptionerConfig
from pipelines.workers import models
from pipelines.workers.models import hub_commit, is_hub_id, model_version, pinned
from tests.support.http_server import Handler, Server

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


class Hub(Handler):
    """Answers as the hub does which commit a revision of acme/vlm is."""

    def do_GET(self) -> None:
        commit = COMMITS.get(self.path.removeprefix("/api/models/acme/vlm/revision/"))
        if commit is None:
            missing = "RevisionNotFound" if "acme/vlm" in self.path else "RepoNotFound"
            self.reply(404, b"{}", {"X-Error-Code": missing})
        else:
            self.reply(200, json.dumps({"id": "acme/vlm", "sha": commit}).encode())


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with Server(Hub).running() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(models, "HfApi", partial(HfApi, endpoint=server.url))
        yield


@pytest.mark.usefixtures("hub")
def test_a_revision_of_the_hub_is_pinned_to_its_commit() -> None:
    assert model_version("acme/vlm") == f"acme/vlm@{'a' * 40}"
    assert model_version("acme/vlm", "v1") == f"acme/vlm@{'b' * 40}"
    assert model_version("acme/vlm", "c" * 40) == f"acme/vlm@{'c' * 40}"  # without asking: the hub has no such commit
    config = CaptionerConfig(name="vlm", model="acme/vlm", prompt="Say what you see.")
    assert pinned(config).revision == "a" * 40
    with pytest.raises(ValueError, match="no 'acme/vlm' with revision 'v3'"):
        model_version("acme/vlm", "v3")
    with pytest.raises(ValueError, match="no 'acme/other' with revision 'main'"):
        model_version("acme/other")


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
