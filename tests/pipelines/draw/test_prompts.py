"""Prompt sets: the shipped ones, files in every form, and what those are told whose set is not here."""

import json
from collections import Counter
from pathlib import Path

import pytest

from pipelines.draw.config import DrawConfig, SampleConfig
from pipelines.draw.prompts import SETS, SHIPPED, SHIPPED_DIR, read_prompt_set
from pipelines.draw.sample import _read_prompts_shard, sample_identity
from pipelines.tables.schema import SAMPLES, samples_schema

COUNTS = {"geneval": 553, "dpg-bench": 1065, "partiprompts": 1632, "imagereward": 100}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_set_is_whole_and_says_its_license(name: str) -> None:
    found = read_prompt_set(name)
    assert found.ids is not None and len(found.prompts) == len(set(found.ids)) == COUNTS[name]
    assert all(prompt == prompt.strip() and "\n" not in prompt for prompt in found.prompts)
    (line,) = [line for line in (SHIPPED_DIR / "README.md").read_text().splitlines() if line.startswith(f"| `{name}`")]
    assert "MIT" in line or "Apache-2.0" in line


def test_geneval_keeps_what_its_judge_needs() -> None:
    found = read_prompt_set("GenEval")
    assert found.metadata is not None
    rows = [json.loads(row) for row in found.metadata]
    counts = Counter(row["tag"] for row in rows)
    assert counts == {
        "single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100
    }  # fmt: skip
    assert all(row["include"] for row in rows) and all("exclude" in row for row in rows if row["tag"] == "counting")


FORMS = {
    "x.jsonl": ('{"prompt": "a cat", "tag": 1}\n\n{"id": "b", "prompt": " a dog "}\n', ["00000", "b"], [{"tag": 1}, {}]),
    "meta_data.json": (
        '{"f1": {"category": "animals", "prompt": "a cat"}, "f2": {"prompt": "a dog"}}',
        ["f1", "f2"],
        [{"category": "animals"}, {}],
    ),
    "list.json": ('["a cat", "a dog"]', ["00000", "00001"], [{}, {}]),
    "coco.json": (
        '{"images": [], "annotations": [{"id": 7, "caption": "a cat", "image_id": 1}, {"id": 9, "caption": "a dog"}]}',
        ["7", "9"],
        [{"image_id": 1}, {}],
    ),
    "drawbench.csv": (
        'Prompts,Category\n"a cat",Colors\na dog,Text\n',
        ["00000", "00001"],
        [{"Category": "Colors"}, {"Category": "Text"}],
    ),
    "parti.tsv": ("Prompt\tNote\na cat\tx, y\na dog\t\n", ["00000", "00001"], [{"Note": "x, y"}, {"Note": ""}]),
}


@pytest.mark.parametrize("name", FORMS)
def test_files_in_every_form(tmp_path: Path, name: str) -> None:
    content, ids, metadata = FORMS[name]
    (tmp_path / name).write_text(content)
    found = read_prompt_set(str(tmp_path / name))
    assert found.prompts == ["a cat", "a dog"] and found.ids == ids and found.metadata is not None
    assert [json.loads(row) for row in found.metadata] == metadata


def test_a_folder_with_a_prompt_in_each_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a cat\nand a dog\n")
    (tmp_path / "b.txt").write_text("a bird")
    found = read_prompt_set(str(tmp_path))
    assert found.prompts == ["a cat and a dog", "a bird"] and found.ids == ["a", "b"]


def test_a_folder_whose_name_is_one_word_is_no_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cats").mkdir()
    for name in ("cats", "cats/"):
        with pytest.raises(ValueError, match=rf"{name}' is a folder without \.txt files.*given as \[prompt\]"):
            read_prompt_set(name)
    (tmp_path / "cats/a.txt").write_text("a cat")
    assert read_prompt_set("cats").prompts == ["a cat"] and read_prompt_set(["cats"]).prompts == ["cats"]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    bad = {
        "x.json": ("{", "x.json is no JSON"),
        "y.jsonl": ('{"a": 1}', "row 0: it has no text under prompt"),
        "z.json": ("{}", "no prompt"),
    }
    for name, (content, told) in bad.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=told):
            read_prompt_set(str(tmp_path / name))
    assert read_prompt_set(["geneval"]).prompts == ["geneval"]
    for name in set(SETS) - set(SHIPPED):
        with pytest.raises(FileNotFoundError, match=rf"the prompts of {name} are not shipped.*as sample\.prompts"):
            read_prompt_set(name)


def test_some_of_a_set_are_spread_over_all_of_it() -> None:
    found = read_prompt_set("geneval")
    some = found.spread(6)
    assert some.metadata is not None and some.ids is not None
    assert some.ids == ["00000", "00092", "00184", "00276", "00368", "00460"]
    tags = [json.loads(row)["tag"] for row in some.metadata]
    assert tags == ["single_object", "two_object", "counting", "colors", "position", "color_attr"]
    assert found.spread(None) is found and found.spread(1000) is found
    assert read_prompt_set(["a", "b", "c"]).spread(2).prompts == ["a", "b"]


def test_rows_of_samples_keep_id_and_metadata_and_plain_prompts_stay_as_they_were() -> None:
    draw = DrawConfig(rows_per_shard=3)
    config = SampleConfig(name="x", pipeline="p", prompts="geneval", images_per_prompt=4, draw=draw)
    found = read_prompt_set(config.prompts)
    rows = _read_prompts_shard(found, config, "00001").to_pylist()
    assert [(row["id"], row["prompt_id"]) for row in rows] == [("000003", "00000"), ("000004", "00001"), ("000005", "00001")]
    assert json.loads(rows[1]["metadata"])["tag"] == "single_object"
    identity = sample_identity(config, found.prompts, {}, prompt_metadata=found.hash)
    assert samples_schema(identity.config).names == [*SAMPLES.names, "prompt_id", "metadata"]
    plain = sample_identity(config, found.prompts, {}, prompt_metadata=read_prompt_set(found.prompts).hash)
    assert samples_schema(plain.config) == SAMPLES and plain.fingerprint != identity.fingerprint
