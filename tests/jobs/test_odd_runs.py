"""Odd runs of commands: what people write in configurations, and exit codes that tell the truth."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from jobs import sample, train
from jobs.common import job as job_module
from jobs.common.config import parse_config
from jobs.common.exit_codes import ExitCode
from jobs.sample import SampleJob
from jobs.train import TrainJob
from pipelines.draw.prompts import read_prompt_set
from pipelines.storage.home import expand_home
from pipelines.tracking.stores import make_database
from pipelines.tracking.unsent import UNSENT, Entry, write_unsent
from pipelines.train.loop.record import TrainingRecord
from pipelines.train.run import train_identity
from sana_model.pipeline import TextToImage
from tests.support.training_world import CLIP, PATH, make_shards, make_table

TRAIN = """dataset_uri: ~/data
tracking:
ray:
train:
  latents: latents/x
  init: ~/init
  num_steps: 1e5
  micro_batch_size: 2.0
  global_batch_size: 4
  data: {captioners: [a], clip: c}
  grid:
  lora:
  optim: {lr: 1e-4}
"""


def parse(tmp_path: Path, content: str | bytes, *overrides: str) -> TrainJob:
    path = tmp_path / "train.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return parse_config(TrainJob, ["--config", str(path), *overrides], prog="test", description="")


TAKEN: dict[str, tuple[str | bytes, list[str], Callable[[TrainJob], Any], Any]] = {
    "a blank section has its defaults": (TRAIN, [], lambda job: (job.train.grid.every, job.ray.num_cpus), (1000, None)),
    "a blank field has its default": (TRAIN + "name:\n", [], lambda job: job.name, "train"),
    "blank is null for a section that may be null": (TRAIN, [], lambda job: job.train.lora, None),
    "1e5 in a file": (TRAIN, [], lambda job: job.train.num_steps, 100_000),
    "2.0 in a file": (TRAIN, [], lambda job: job.train.micro_batch_size, 2),
    "1e-4 in a file": (TRAIN, [], lambda job: job.train.optim.lr, 1e-4),
    "underscores": (TRAIN, ["--train.num_steps", "100_000_000"], lambda job: job.train.num_steps, 10**8),
    "1e8": (TRAIN, ["--train.num_steps=1e8"], lambda job: job.train.num_steps, 10**8),
    "1.5e3": (TRAIN, ["--train.grid.every", "1.5e3"], lambda job: job.train.grid.every, 1500),
    "a count in a section of an option": (
        TRAIN,
        ["--train.grid", "{every: 1e2}"],
        lambda job: job.train.grid.every,
        100,
    ),
    "a count of a section that may be null": (TRAIN, ["--train.lora", "{rank: 1e1}"], lambda job: job.train.lora.rank, 10),
    "a mark at the head": (TRAIN.encode("utf-8-sig"), [], lambda job: job.train.num_steps, 100_000),
    "UTF-16, as Windows writes it": (TRAIN.encode("utf-16"), [], lambda job: job.train.num_steps, 100_000),
    "lines of Windows": (TRAIN.replace("\n", "\r\n"), [], lambda job: job.train.latents, "latents/x"),
    "~ in a file": (TRAIN, [], lambda job: (job.dataset_uri, job.train.init), ("{home}/data", "{home}/init")),
    "~ after --name=": (TRAIN, ["--dataset_uri=~/other"], lambda job: job.dataset_uri, "{home}/other"),
    "~ in a URI": (TRAIN, ["--tracking.uri", "sqlite:///~/m.db"], lambda job: job.tracking.uri, "sqlite:///{home}/m.db"),
    "~ in a list of sections": (
        TRAIN,
        ["--train.latents", "[{latents: latents/x, dataset_uri: ~/far}]"],
        lambda job: job.train.latents[0].dataset_uri,
        "{home}/far",
    ),
    "quoted numbers stay text": (TRAIN, ["--name", "'1e5'"], lambda job: job.name, "'1e5'"),
    "a quoted text that looks like a number": (TRAIN + 'name: "1e5"\n', [], lambda job: job.name, "1e5"),
    "a name like a date": (TRAIN + "name: 2026-01-31\n", [], lambda job: job.name, "2026-01-31"),
    "a name in Greek": (TRAIN + "name: σάνα\n", [], lambda job: job.name, "σάνα"),
    "an anchor": (TRAIN + "name: &n run\nlease: {}\n", [], lambda job: job.name, "run"),
}


@pytest.mark.parametrize("name", TAKEN)
def test_configurations_are_taken_as_people_write_them(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    content, overrides, value, expected = TAKEN[name]
    found, home = value(parse(tmp_path, content, *overrides)), str(tmp_path / "home")
    if isinstance(expected, tuple):
        expected = tuple(one.format(home=home) if isinstance(one, str) else one for one in expected)
    assert found == (expected.format(home=home) if isinstance(expected, str) else expected)


def test_sections_in_files_of_their_own_are_read_alike(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    fields = "init: i\nnum_steps: 1e3\ngrid: grid.yaml\noptim:\nmicro_batch_size: 1\nglobal_batch_size: 1\n"
    (tmp_path / "parts" / "train.yaml").write_text(f"latents: latents/x\n{fields}data: {{captioners: [a], clip: c}}\n")
    (tmp_path / "parts" / "grid.yaml").write_bytes(b"\xef\xbb\xbfevery: 1e2\n")
    job = parse(tmp_path, "dataset_uri: d\ntrain: parts/train.yaml\n")
    assert (job.train.num_steps, job.train.grid.every, job.train.optim.lr) == (1000, 100, 1e-4)


ANCHORS = "\n".join(f"{name}: &{name} [{','.join([f'*{chr(ord(name) - 1)}'] * 9)}]" for name in "bcdefghi")
REFUSED: dict[str, tuple[str | bytes, list[str], str]] = {
    "a section's own check": (TRAIN, ["--train.grid.every", "0"], "error: train.grid.every=0 must be at least 1"),
    "a section deeper": (TRAIN, ["--train.bad_steps.max_in_a_row", "0"], "train.bad_steps.max_in_a_row=0 must be at least 1"),
    "a check of two fields": (
        TRAIN,
        ["--train.engine.dtype", "fp16", "--train.engine.zero_stage", "0"],
        "train.engine.dtype=fp16 with zero_stage=0",
    ),
    "a check that begins with a word": (TRAIN, ["--train.init", "null"], "train: init and preset are both missing"),
    "NaN": (TRAIN, ["--train.optim.lr", ".nan"], "--train.optim.lr takes a number, not"),
    "nan": (TRAIN, ["--train.grid.guidance_scale", "nan"], "--train.grid.guidance_scale takes a number, not 'nan'"),
    "half a step": (TRAIN, ["--train.num_steps", "1.5"], "--train.num_steps takes a whole number, not '1.5'"),
    "1e-4 steps": (TRAIN, ["--train.num_steps", "1e-4"], "--train.num_steps takes a whole number, not '1e-4'"),
    "a required field left blank": (TRAIN.replace("~/data", ""), [], "required: --dataset_uri"),
    "Latin-1": (TRAIN.encode() + "name: Jörg\n".encode("latin-1"), [], "train.yaml is no text in UTF-8: "),
    "anchors in anchors": (
        "a: &a [x, x]\n" + ANCHORS,
        [],
        "train.yaml holds too much: with its aliases written out it has more than",
    ),
    "a name twice": (TRAIN + "name: a\nname: b\n", [], "this is no YAML: name is given twice, first in line"),
    "a section twice": (
        TRAIN + "tracking: {uri: a}\nlease: {}\ntracking:\n  experiment: b\n",
        [],
        "tracking is given twice, first in line",
    ),
    "nested without end": ("a: " + "[" * 20_000, [], "train.yaml, line 1: this is no YAML: exceeded maximum nesting depth"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_configuration_means_is_told_in_a_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, overrides, message = REFUSED[name]
    with pytest.raises(SystemExit, match="2"):
        parse(tmp_path, content, *overrides)
    told = capsys.readouterr().err
    assert message in told and len(told.splitlines()) == 1, told


def test_the_home_folder_is_that_of_local_paths_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    expected = {
        "~": "/home/me",
        "~/a": "/home/me/a",
        "file://~/a": "file:///home/me/a",
        "~nobody-of-this-name/a": "~nobody-of-this-name/a",
        "s3://~/a": "s3://~/a",
        "a/~/b": "a/~/b",
        "~ about 5 apples": "~ about 5 apples",
        "a~": "a~",
    }
    assert {path: expand_home(path) for path in expected} == expected


def test_prompts_are_a_prompt_a_list_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_bytes("a red circle\r\na blue star\r\n".encode("utf-8-sig"))
    (tmp_path / "wide.txt").write_bytes("a red circle\n".encode("utf-16"))
    (tmp_path / "latin.txt").write_bytes("ein rötlicher Kreis\n".encode("latin-1"))
    taken: dict[str, list[str]] = {
        "a red circle": ["a red circle"],
        "cat": ["cat"],
        "a cat: black, 3/4 view, f/1.8": ["a cat: black, 3/4 view, f/1.8"],
        "a red circle\n\na blue star\n": ["a red circle", "a blue star"],
        "a" * 5000: ["a" * 5000],
        "list.txt": ["a red circle", "a blue star"],
        f"file://{tmp_path}/list.txt": ["a red circle", "a blue star"],
        "wide.txt": ["a red circle"],
    }
    assert {text: read_prompt_set(text).prompts for text in taken} == taken
    for name in ("lists.txt", "my prompts.txt", "./prompts", "prompts/all", "s3x.csv"):
        with pytest.raises(FileNotFoundError, match=f"no file '{name}'"):
            read_prompt_set(name)
    with pytest.raises(ValueError, match=r"latin.txt is no text in UTF-8"):
        read_prompt_set("latin.txt")
    job = parse_config(
        SampleJob,
        ["--dataset_uri", "d", "--sample.name", "n", "--sample.pipeline", "p", "--sample.prompts", "a red circle"],
        prog="test",
        description="",
    )
    assert read_prompt_set(job.sample.prompts).prompts == ["a red circle"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    TextToImage.from_pretrained("zoo://pipeline").save_pretrained(folder)
    return folder


SAMPLES: dict[str, tuple[Callable[[Path], object], list[str], ExitCode, str]] = {
    "a width that does not divide": (
        lambda folder: None,
        ["--sample.draw.width", "65"],
        ExitCode.WRONG_INPUT,
        "error: width=65 must be a positive multiple of 8; the nearest is 64\n",
    ),
    "no text encoder": (
        lambda folder: shutil.rmtree(folder / "text_encoder"),
        [],
        ExitCode.WRONG_INPUT,
        "has no text_encoder/: the pipeline is incomplete",
    ),
    "a pointer in place of weights": (
        lambda folder: (folder / "transformer/model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        [],
        ExitCode.WRONG_INPUT,
        "transformer/model.safetensors is a Git LFS pointer",
    ),
    "a prompt that is cut": (lambda folder: None, [], ExitCode.DONE, ""),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_exit_codes_of_drawing_tell_the_truth(
    name: str,
    pipeline: Path,
    tmp_path: Path,
    local_ray: None,
    without_ray: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil, options, code, message = SAMPLES[name]
    monkeypatch.setattr(job_module, "start_ray", lambda config: nullcontext())
    shutil.copytree(pipeline, tmp_path / "pipeline")
    spoil(tmp_path / "pipeline")
    arguments = ["--dataset_uri", str(tmp_path / "d"), "--sample.name", "n", "--sample.pipeline", str(tmp_path / "pipeline")]
    draw = ["--sample.draw.num_steps", "1", "--sample.draw.resources.num_cpus", "0.5"]
    long = " ".join(["a red circle"] * 400)
    assert sample.main([*arguments, *draw, "--sample.prompts", long, *options]) == code
    shown, told = capsys.readouterr()
    errors = [line for line in told.splitlines() if line.startswith("error:")]
    assert message in told and "Traceback" not in told and len(errors) == (code != ExitCode.DONE), told
    assert ("1 of 1 prompts are longer than the pipeline's max_tokens" in shown) == (code == ExitCode.DONE)


@dataclass(frozen=True)
class TrainWorld:
    """A dataset, and the command line of a training on it."""

    folder: Path
    arguments: list[str]

    def train(self, *options: str) -> int:
        return train.main([*self.arguments, *options])


@pytest.fixture
def training(tmp_path: Path, pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> TrainWorld:
    """Without Ray: what is tried here ends before a worker starts."""
    monkeypatch.setattr(job_module, "start_ray", lambda config: nullcontext())
    make_table(tmp_path / "data", make_shards([8]))
    settings = {"latents": PATH, "init": pipeline, "num_steps": 4, "micro_batch_size": 4, "global_batch_size": 4}
    settings |= {"data.captioners": "[a, b]", "data.clip": CLIP}
    options = [word for name, value in settings.items() for word in (f"--train.{name}", str(value))]
    return TrainWorld(tmp_path, ["--dataset_uri", str(tmp_path / "data"), *options])


def test_a_training_whose_figures_mlflow_would_never_take_does_not_begin(
    local_ray: None, training: TrainWorld, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mlruns")
    assert training.train() == ExitCode.WRONG_INPUT
    assert "error: MLFLOW_TRACKING_URI=mlruns is a folder" in capsys.readouterr().err
    uri = f"sqlite:///{training.folder}/mlflow.db"
    make_database(uri)
    client = MlflowClient(uri)
    client.delete_experiment(client.create_experiment("sana"))
    assert training.train("--tracking.uri", uri) == ExitCode.WRONG_INPUT
    told = capsys.readouterr().err
    assert "'sana' of MLflow at" in told and "give tracking.experiment another name" in told and "Traceback" not in told
    assert not (training.folder / "data" / "train" / "checkpoints").exists()


def test_a_finished_training_says_what_mlflow_still_lacks(
    local_ray: None, training: TrainWorld, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """MLflow was away at the end: the same command ends with the code of a fault until it has sent everything."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    output = training.folder / "data" / "train"
    parsed = parse_config(TrainJob, training.arguments, prog="test", description="")
    result = {"checkpoint": "c", "loss_start": 2.0, "loss_end": 1.0, "losses": [[4, 1.0]], "samples_per_second": 1.0}
    identity = train_identity(parsed.dataset_uri, parsed.train)
    TrainingRecord.claim(str(output), identity).finish(result | {"startup_seconds": 1.0, "seconds": 2.0})
    (output / "pipeline").mkdir()
    (output / "pipeline" / "pipeline.json").touch()
    (output / "report.html").touch()
    write_unsent(str(output), [Entry("metrics", {"loss": 1.0}, 4), Entry("end", "FINISHED")])
    for _ in range(2):
        assert training.train("--tracking.uri", "http://127.0.0.1:9") == ExitCode.FAULT
        shown, told = capsys.readouterr()
        assert "all there already" in shown and "Traceback" not in told
        assert "the training is finished, but 2 entries could not be sent to MLflow at http://127.0.0.1:9" in told
        assert f"they wait in {output}/{UNSENT}; the same command sends them, once MLflow answers" in told
    for _ in range(2):
        assert training.train() == ExitCode.DONE
    client = MlflowClient(f"sqlite:///{training.folder}/data/mlflow.db")
    (run,) = client.search_runs(["1"])
    assert run.info.status == "FINISHED" and run.data.metrics == {"loss": 1.0} and not (output / UNSENT).exists()
