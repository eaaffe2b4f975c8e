"""Foreign names stay below the folder that they are appended to, wherever they come from."""

import ast
import io
import json
import zipfile
from pathlib import Path

import pytest

from sana_model.files import places
from sana_model.files.inside import check_inside, path_inside
from sana_model.files.tensors import read_safetensors_folder

ROOT = Path(__file__).parents[3]
OUTSIDE = {
    "parent": "../x",
    "two floors up": "../../x",
    "down and up": "a/../../x",
    "only up": "..",
    "absolute": "/tmp/x",
    "with a backslash": "..\\x",
    "absolute on Windows": "\\x",
    "empty": "",
    "NUL": "a\0b",
    "line break": "a\nb",
    "terminal's escape": "a\x1b[2Jb",
    "no text": "a\udcffb",
    "too long for a file system": "x" * 256,
}


@pytest.mark.parametrize("name", OUTSIDE.values(), ids=OUTSIDE)
def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="the name "):
        check_inside(name)
    with pytest.raises(ValueError, match="the name "):
        path_inside(tmp_path, name)


@pytest.mark.parametrize(
    "name", ["a", "a/b.c", "a b", "模型/模 型.pth", "..a", "a..", "a/.hidden", "x" * 255, "a:b", "-rf", "~"]
)
def test_any_other_name_lies_below_the_folder(tmp_path: Path, name: str) -> None:
    assert path_inside(tmp_path, name) == tmp_path / name


def test_symbolic_links_are_followed_only_inside(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    (inside / "real").mkdir(parents=True)
    outside.mkdir()
    (inside / "in").symlink_to("real")
    (inside / "out").symlink_to("../outside")
    (inside / "file").symlink_to(outside / "not there yet")
    assert path_inside(inside, "in/x") == inside / "in" / "x"
    for name in ("out/x", "file", "out"):
        with pytest.raises(ValueError, match="by a symbolic link"):
            path_inside(inside, name)


def zip_of(names: list[str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"{}")
    return buffer.getvalue()


MEMBERS = {
    "../../evil": "leads out of its folder",
    "a/../../../evil": "leads out of its folder",
    "/evil": "absolute",
    "..\\..\\evil": "leads out of its folder",
    "e\x1bvil": "control characters",
    "config.json/evil": "beside a file of that name",
    "x" * 300: "longer than 255 bytes",
}


@pytest.mark.parametrize(("member", "told"), MEMBERS.items(), ids=range(len(MEMBERS)))
def test_a_model_in_a_zip_writes_nothing_outside_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, member: str, told: str
) -> None:
    monkeypatch.setattr(places, "CACHE_DIR", tmp_path / "deep" / "er" / "cache")
    archive = tmp_path / "deep" / "model.zip"
    archive.parent.mkdir()
    archive.write_bytes(zip_of(["config.json", member]))
    with pytest.raises(ValueError, match=f"zip://.*cannot be copied.*({told})"):
        places.resolve(f"zip://::{archive}")
    left = [path.name for path in tmp_path.rglob("*") if path.is_file() and path != archive]
    assert [name for name in left if not name.endswith(".lock")] == []


@pytest.mark.parametrize("uri", ["zoo://../nn", "zoo://clip/../../nn", "zoo://", "hf://a/b/../../..", "hf://a/b@main/x/../.."])
def test_addresses_of_models_stay_in_their_place(uri: str) -> None:
    with pytest.raises(ValueError, match="the name "):
        places.resolve(uri)


def test_an_index_names_only_files_beside_it(tmp_path: Path) -> None:
    (tmp_path / "secret.safetensors").write_bytes(b"")
    (tmp_path / "model").mkdir()
    index = tmp_path / "model" / "model.safetensors.index.json"
    for content, told in [
        ({"weight_map": {"a": "../secret.safetensors"}}, "leads out of its folder"),
        ({"weight_map": {"a": str(tmp_path / "secret.safetensors")}}, "absolute"),
        ({"weight_map": {"a": 3}}, "no index of shards"),
        ({"weight_map": ["a"]}, "no index of shards"),
        ({}, "no index of shards"),
    ]:
        index.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=rf"model\.safetensors\.index\.json.*{told}"):
            read_safetensors_folder(index.parent)


COPIES = {"get_file", "extractall", "unpack_archive", "download_file", "urlretrieve"}
"""Methods that write what they fetch or unpack to a local path."""


def test_whatever_is_copied_to_this_machine_goes_through_one_function() -> None:
    found = []
    for package in ("sana_model", "pipelines", "jobs", "infra"):
        for path in sorted((ROOT / package).rglob("*.py")):
            tree = ast.parse(path.read_text())
            functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
            guarded = {name for function in functions for name in names_of(function) if "path_inside" in names_of(function)}
            copies = {name for function in functions for name in names_of(function) & COPIES}
            found += [(path.relative_to(ROOT).as_posix(), name) for name in copies]
            assert not copies or "path_inside" in guarded, f"{path} copies files by names that path_inside has not seen"
    assert {path for path, _ in found} == {"sana_model/files/places.py", "pipelines/train/engine/checkpoints.py"}


def names_of(function: ast.FunctionDef) -> set[str]:
    """The names and attributes that a function uses."""
    nodes = list(ast.walk(function))
    return {node.attr for node in nodes if isinstance(node, ast.Attribute)} | {
        node.id for node in nodes if isinstance(node, ast.Name)
    }
