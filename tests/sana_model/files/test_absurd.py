"""Absurd checkpoints of strangers end within seconds, with a message that names the file and what is wrong with it."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.train.engine.checkpoints import BadCheckpointError, Checkpoint
from pipelines.train.loop.record import TrainingRecord, read_config
from pipelines.workers.clip import ClipModel
from pipelines.workers.models import pretrained
from sana_model.files.models import load_autoencoder, load_text_encoder, load_transformer
from sana_model.files.places import ZOO_DIR

pytestmark = pytest.mark.timeout(120)  # they took minutes, hours or all memory
DEEP = '{"a":' * 1_000_000 + "1" + "}" * 1_000_000
LOADERS: dict[str, Callable[[Path], object]] = {
    "pipeline/transformer": load_transformer,
    "pipeline/autoencoder": load_autoencoder,
    "pipeline/text_encoder": load_text_encoder,
    "clip": lambda path: ClipModel(str(path)),
    "captioner-a": lambda path: pretrained(str(path)),
}
SETTINGS: list[tuple[str, str, Any, str]] = [
    ("pipeline/transformer", "depth", 10**7, "depth=10000000 must be a whole number from 1 to 1000"),
    ("pipeline/transformer", "depth", -1, "depth=-1 must be"),
    ("pipeline/transformer", "depth", "7", "depth='7' must be"),
    ("pipeline/transformer", "depth", 1e3, r"depth=1000\.0 must be"),
    ("pipeline/transformer", "depth", True, "depth=True must be"),
    ("pipeline/transformer", "dim", 2**40, "dim=1099511627776 must be"),
    ("pipeline/transformer", "ffn_dim", 2**62, "ffn_dim=4611686018427387904 must be"),
    ("pipeline/transformer", "num_cross_heads", 0, "num_cross_heads=0 must be"),
    ("pipeline/transformer", "base_size", 10**9, "base_size=1000000000 must be"),
    ("pipeline/autoencoder", "encoder_depths", [10**7] * 4, r"encoder_depths\[0\]=10000000 must be"),
    ("pipeline/autoencoder", "widths", [2**40] * 4, r"widths\[0\]=1099511627776 must be"),
    ("pipeline/text_encoder", "num_hidden_layers", 10**7, "num_hidden_layers=10000000 is more than any model has"),
    ("clip", "text_config.num_hidden_layers", 10**7, "num_hidden_layers=10000000 is more"),
    ("clip", "vision_config.num_hidden_layers", 10**7, "num_hidden_layers=10000000 is more"),
    ("captioner-a", "text_config.num_hidden_layers", 10**7, "num_hidden_layers=10000000 is more"),
]


def copy_with(tmp_path: Path, source: str, setting: str, value: Any) -> Path:
    """A copy of a shipped model with one setting of its config.json changed; of a list, each entry."""
    folder = tmp_path / "model"
    shutil.copytree(ZOO_DIR / source, folder)
    config = json.loads((folder / "config.json").read_text())
    *parts, last = setting.split(".")
    section = config
    for part in parts:
        section = section[part]
    if isinstance(value, list):
        value = value[:1] * len(section[last])
    section[last] = value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("source", "setting", "value", "told"), SETTINGS)
def test_a_size_that_no_model_has_is_refused(tmp_path: Path, source: str, setting: str, value: Any, told: str) -> None:
    folder = copy_with(tmp_path, source, setting, value)
    with pytest.raises(ValueError, match=told):
        LOADERS[source](folder)


@pytest.mark.parametrize("source", LOADERS)
def test_a_configuration_without_end_is_refused(tmp_path: Path, source: str) -> None:
    for name in ("tokenizer_config.json", "config.json"):
        if (ZOO_DIR / source / name).exists():
            folder = tmp_path / name
            shutil.copytree(ZOO_DIR / source, folder)
            (folder / name).write_text(DEEP)
            with pytest.raises(ValueError, match=rf"{name} is nested too deeply"):
                LOADERS[source](folder)


def write_empty_tensors(path: Path, count: int) -> None:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"a{index}": empty for index in range(count)}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


@pytest.mark.parametrize("source", ["pipeline/transformer", "pipeline/text_encoder", "clip"])
def test_two_hundred_thousand_empty_tensors_are_refused(tmp_path: Path, source: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(ZOO_DIR / source, folder)
    write_empty_tensors(folder / "model.safetensors", 200_000)
    with pytest.raises(ValueError, match=r"model\.safetensors holds 200000 tensors, more than any model has"):
        LOADERS[source](folder)


def test_records_of_trainings_are_read_with_a_message(tmp_path: Path) -> None:
    for name, read in (("training.json", TrainingRecord.read), ("train_config.json", read_config)):
        (tmp_path / name).write_text(DEEP)
        with pytest.raises(ValueError, match=f"{name} is nested too deeply"):
            read(str(tmp_path))
    part = {name: {} for name in ("step", "rank", "layout", "pieces", "shapes", "moments", "state", "files")}
    for content, told in [
        (DEEP, "nested too deeply"),
        ("{", "not valid JSON"),
        ("[]", "no part of a checkpoint"),
        (json.dumps(part), "lacks world_size"),
        (json.dumps({**part, "world_size": 10**12}), "of 1000000000000 workers"),
    ]:
        (tmp_path / "rank-00000.json").write_text(content)
        with pytest.raises(BadCheckpointError, match=told):
            Checkpoint.open(str(tmp_path))
