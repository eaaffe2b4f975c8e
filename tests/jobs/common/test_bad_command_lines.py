"""Bad command lines: each ends with exit code 2 and one line that names the file, the field, what came and what is wanted."""

from pathlib import Path

import pytest

from jobs.caption import CaptionJob
from jobs.common.commands import program
from jobs.common.config import parse_config
from jobs.export import ExportConfig
from jobs.extract import ExtractJob
from jobs.ingest import IngestJob
from jobs.lineage import LineageConfig
from jobs.status import StatusConfig
from jobs.train import TrainJob
from jobs.train_autoencoder import TrainAutoencoderJob
from jobs.verify import VerifyConfig

CONFIGS = {
    "caption": CaptionJob,
    "extract": ExtractJob,
    "export": ExportConfig,
    "ingest": IngestJob,
    "lineage": LineageConfig,
    "status": StatusConfig,
    "train": TrainJob,
    "train_autoencoder": TrainAutoencoderJob,
    "verify": VerifyConfig,
}
FILES = {
    "binary": b"\xff\xfe\x00",
    "control": b"a\x00b",
    "empty.yaml": b"",
    "text.yaml": b"hello there\n",
    "list.yaml": b"- a\n- b\n",
    "broken.yaml": b"dataset_uri: x\ningest: {source: [a\nb: c\n",
    "tab.yaml": b"dataset_uri: x\ningest:\n\tsource: a\n",
    "type.yaml": b"dataset_uri: x\ningest: {source: a, rows_per_shard: many}\n",
    "number.yaml": b"dataset_uri: 5\ningest: {source: a}\n",
    "scalar.yaml": b"dataset_uri: x\ningest: 5\n",
    "key.yaml": b"dataset_uri: x\ningest: {sorce: a}\n",
    "top.yaml": b"dataset_url: x\n",
    "nested.yaml": b"dataset_uri: x\ncaptioner: {name: a, model: a, sampling: {max_new_token: 3}}\n",
    "several.yaml": b"dataset_uri: x\ncaptioners: [{name: a, model: a, sampling: {max_new_token: 3}}]\n",
    "other.yaml": b"captioner: {name: a}\n",
}
GIVEN = "--dataset_uri x --ingest.source a "
EXTRACT = "--extract.name a --extract.autoencoder b "
ROWS = [
    ("ingest", "--config binary", ["binary is no text in UTF-8: "]),
    ("ingest", "--config control", ["control is no YAML file"]),
    ("ingest", "--config empty.yaml", ["empty.yaml is empty"]),
    ("ingest", "--config text.yaml", ["text.yaml holds 'hello there', not fields"]),
    ("ingest", "--config list.yaml", ["list.yaml holds ['a', 'b'], not fields"]),
    ("ingest", "--config broken.yaml", ["broken.yaml, line 3: this is no YAML"]),
    ("ingest", "--config tab.yaml", ["tab.yaml, line 3: this is no YAML"]),
    ("ingest", "--config nowhere.yaml", ["there is no file nowhere.yaml"]),
    ("ingest", "--config folder", ["folder is a folder: --config takes a YAML file"]),
    ("ingest", "--config /dev/zero", ["/dev/zero is a device: --config takes a YAML file"]),
    ("ingest", "--config=", ["an unset variable?"]),
    ("ingest", "--config", ["--config needs the name of a YAML file"]),
    ("ingest", "--ingest nowhere.yaml --dataset_uri x", ["--ingest takes a section", "no file 'nowhere.yaml'"]),
    ("ingest", "--config type.yaml", ["type.yaml: ingest.rows_per_shard takes a whole number, not 'many'"]),
    ("ingest", "--config number.yaml", ["dataset_uri takes text, not 5 (write it in quotes: '5')"]),
    ("ingest", "--config scalar.yaml", ["scalar.yaml: ingest takes a section", "not 5"]),
    ("ingest", "--config key.yaml", ["key.yaml: there is no field ingest.sorce: did you mean ingest.source?"]),
    ("ingest", "--config top.yaml", ["top.yaml: there is no field dataset_url: did you mean dataset_uri?"]),
    ("ingest", "--config other.yaml", ["other.yaml has a section 'captioner' that jobs.ingest does not take"]),
    (
        "caption",
        "--config nested.yaml",
        ["no field captioner.sampling.max_new_token:", "mean captioner.sampling.max_new_tokens?"],
    ),
    (
        "caption",
        "--config several.yaml",
        ["no field captioners[0].sampling.max_new_token: did you mean"],
    ),
    ("ingest", GIVEN + "--ingest.rows_per_shard many", ["--ingest.rows_per_shard takes a whole number, not 'many'"]),
    ("ingest", GIVEN + "--ingest.rows_per_shard 1.5", ["--ingest.rows_per_shard takes a whole number, not '1.5'"]),
    ("ingest", GIVEN + "--ingest.rows_per_shard", ["--ingest.rows_per_shard needs a value: a whole number"]),
    ("ingest", GIVEN + "--on_stale rebild", ["--on_stale takes one of refuse, rebuild, not 'rebild'"]),
    ("ingest", GIVEN + "--ray.num_cpus x", ["--ray.num_cpus takes a whole number or null, not 'x'"]),
    ("ingest", GIVEN + "--lease.seconds x", ["--lease.seconds takes a number, not 'x'"]),
    ("ingest", GIVEN + "--ingest.retry_rejects maybe", ["--ingest.retry_rejects takes true or false, not 'maybe'"]),
    ("verify", "--dataset_uri x --tables a", ["--tables takes a list such as [a, b], not 'a'"]),
    ("train_autoencoder", "--dataset_uri x --train.parts [head]", ["--train.parts takes a list of some of all, encoder,"]),
    ("caption", "--dataset_uri x --captioner 5", ["--captioner takes a section", "there is no file '5'"]),
    (
        "caption",
        "--dataset_uri x --captioner.sampling.max_new_tokens x",
        ["max_new_tokens takes a whole number"],
    ),
    ("caption", "--dataset_uri x --captioner.name a", ["required: --captioner.model"]),
    ("caption", "--dataset_uri x --captioner.modle a", ["no setting --captioner.modle: did you mean --captioner.model?"]),
    ("ingest", "--dataset_uri x --ingest.sorce a", ["no setting --ingest.sorce: did you mean --ingest.source?"]),
    ("ingest", "--dataset_uri x --source a", ["no setting --source: did you mean --ingest.source?"]),
    ("train", "--dataset_uri x --train.steps 3", ["no setting --train.steps: did you mean --train.num_steps?"]),
    ("ingest", "", ["required: --dataset_uri, --ingest.source"]),
    ("extract", "--dataset_uri x " + EXTRACT + "--extract.resolution -64", ["resolution=-64 must be positive"]),
    ("status", "--rows maybe", ["--rows takes true or false, not 'maybe'"]),
    ("status", "--dataset_uri x --rows=maybe", ["--rows takes true or false, not 'maybe'"]),
    ("status", "--dataset_uri x stray", ["'stray' needs the name of a setting before it"]),
    ("ingest", "raw", ["python -m jobs.ingest --dataset_uri raw (the folder that", "--ingest.source raw (a folder of images"]),
    ("status", "--dataset_uri=", ["--dataset_uri is empty: an unset variable?"]),
    ("export", "--source= --output a", ["--source is empty: an unset variable?"]),
    ("lineage", "--dataset_uri s3:/bucket/x", ["--dataset_uri s3:/bucket/x has one slash", "write s3://bucket/x"]),
    ("ingest", "--dataset_uri x --ingest.source s3:/bucket/x", ["write s3://bucket/x"]),
]


@pytest.mark.parametrize(("name", "line", "words"), ROWS, ids=[f"{name} {line}" for name, line, _ in ROWS])
def test_one_line_says_what_is_wrong(
    name: str, line: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for file, content in FILES.items():
        (tmp_path / file).write_bytes(content)
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        parse_config(CONFIGS[name], line.split(), prog=program(name), description="")
    told = capsys.readouterr().err
    assert exit.value.code == 2 and len(told.splitlines()) == 1
    assert told.startswith("error: ") and f"(python -m jobs.{name} --help explains every setting)" in told
    for word in words:
        assert word in told
    assert not any(jargon in told for jargon in ("Parser key", "<class", "typing.", "unicode string"))


def test_a_good_command_line_is_let_through(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text("dataset_uri: s3://bucket/x\ningest: {source: a, rows_per_shard: '5'}\n")
    line = ["--config", str(tmp_path / "good.yaml"), "--ingest.retry_rejects=yes", "--ingest.resources.custom", "{a: 1}"]
    job = parse_config(IngestJob, line, prog="test", description="")
    assert job.dataset_uri == "s3://bucket/x" and job.ingest.rows_per_shard == 5 and job.ingest.retry_rejects


def test_help_says_how_none_is_typed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(IngestJob, ["--help"], prog="test", description="")
    told = " ".join(capsys.readouterr().out.split())
    assert "Where a text says None, type null" in told and "a YAML file with the fields of ingest alone" in told
    assert "GPUs of each actor" in told
