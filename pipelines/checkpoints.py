"""What a training leaves on disk: the record of what it is and how it ended, and checkpoints from which it goes on exactly."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from pipelines.ema import EMA
from pipelines.engine import Engine
from pipelines.tables import Identity, StaleTableError, describe_differences
from sana_model.checkpoint_files import read_json, write_json

RECORD = "training.json"


@dataclass(frozen=True)
class TrainingRecord:
    """`training.json` of an output folder. `result` is there once the training has ended."""

    folder: Path
    identity: Identity
    result: dict[str, Any] | None = None

    @classmethod
    def claim(cls, folder: Path, identity: Identity, *, checkpoints: Path) -> "TrainingRecord":
        """Begin or go on with a training in `folder`, that keeps its checkpoints below `checkpoints`.

        Raises StaleTableError if another one has come to a checkpoint or to its end there, with the settings that differ.
        """
        record = cls(folder, identity)
        if (folder / RECORD).exists():
            content = read_json(folder / RECORD)
            found = cls(folder, Identity(*(content[field.name] for field in fields(Identity))), content["result"])
            if found.identity.fingerprint == identity.fingerprint:
                return found
            if found.result is not None or any(checkpoints.glob("*/*")):
                now = Identity(**json.loads(json.dumps(asdict(identity))))  # tuples as the lists that JSON makes of them
                differences = "\n".join(f"  {line}" for line in describe_differences(found.identity, now))
                raise StaleTableError(
                    f"{folder} holds a training with other settings:\n{differences}\n"
                    "Give this one another output folder, put the setting back, or delete the folder."
                )
        record.write()
        return record

    def finish(self, result: Mapping[str, Any]) -> "TrainingRecord":
        """The record with its result, written."""
        record = replace(self, result=dict(result))
        record.write()
        return record

    def write(self) -> None:
        content = {"fingerprint": self.identity.fingerprint, **asdict(self.identity), "result": self.result}
        write_json(self.folder / RECORD, content)


def save_checkpoint(folder: Path, engine: Engine, ema: EMA, state: Mapping[str, Any], *, rank: int) -> None:
    """Write this rank's part; all ranks must. `state`: plain numbers, strings and containers of this rank."""
    engine.save(folder)
    torch.save({**state, "ema": ema.state_dict()}, _rank_file(folder, rank))


def load_checkpoint(folder: Path, engine: Engine, ema: EMA, *, rank: int) -> dict[str, Any]:
    """Put engine and average back and return the rest of the state. World size and ZeRO stage must be those of the save."""
    engine.load(folder)
    state = torch.load(_rank_file(folder, rank), map_location="cpu", weights_only=True)
    ema.load_state_dict(state.pop("ema"))
    return state


def _rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.pt"
