"""The record of a training in its output folder: `training.json` says what it is and how it ended."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipelines.storage.files import list_folder, read_file, write_file
from pipelines.tables.errors import StaleTableError
from pipelines.tables.identity import Identity, describe_differences
from pipelines.train.engine.checkpoint_places import CHECKPOINTS_DIR, list_checkpoints
from sana_model.files.json_files import parse_json
from sana_model.files.redact import redact_values

RECORD = "training.json"
CONFIG = "train_config.json"
GRIDS_DIR, PIPELINE_DIR, BEST_DIR, VALIDATION_DIR = "samples", "pipeline", "best", "validation"
"""Folders in the output folder: of grids of pictures on the way, of the trained pipeline, of that of the best checkpoint, and
of the pictures by which checkpoints are judged."""
AUTOENCODER_DIR = "autoencoder"
"""Folder of the trained autoencoder, in the output folder."""
COMPARISON = "comparison.png"
"""File of fixed pictures, as they are, as an autoencoder gave them back before and after its training, and the difference."""

GOES_ON = ("config.num_steps:", "config.data.captioners:", "config.data.clip:", "inputs.captions/", "inputs.scores/")
"""Differences with which a training may go on from another one's checkpoint: it draws the same samples in the same order."""


@dataclass(frozen=True)
class TrainingRecord:
    """The content of `training.json`: what determines the training, and its result, None until it has finished."""

    output_uri: str
    identity: Identity
    result: dict[str, Any] | None = None

    @classmethod
    def claim(cls, output_uri: str, identity: Identity) -> "TrainingRecord":
        """Claim an output folder (any fsspec URI) for a training. Returns its record there, a new one if there is none.

        Raises StaleTableError, naming the settings that differ, if another training has finished or made a checkpoint there;
        StorageError if the folder cannot be written.
        """
        record = cls(output_uri, identity)
        if (found := cls.read(output_uri)) is not None:
            if found.identity.fingerprint == identity.fingerprint:
                return found
            if found.result is not None or list_folder(f"{output_uri}/{CHECKPOINTS_DIR}"):
                now = Identity(**json.loads(json.dumps(asdict(identity))))  # with lists for tuples, like what was read
                lines = describe_differences(found.identity, now)
                differences = "\n".join(f"  {line}" for line in lines)
                advice = "Give this one another output folder, put the setting back, or delete the folder."
                longer = now.config["num_steps"] >= found.identity.config["num_steps"]
                if longer and all(line.startswith(GOES_ON) for line in lines):
                    advice = (
                        "To train longer, or go on with other captions, give this one another output folder (--name), more "
                        f"steps, and the last checkpoint: --train.resume_from {_last_checkpoint(output_uri)}"
                    )
                raise StaleTableError(f"{output_uri} holds a training with other settings:\n{differences}\n{advice}")
        record._write()
        return record

    def finish(self, result: Mapping[str, Any]) -> "TrainingRecord":
        """Write the record with the training's result, and return it."""
        record = replace(self, result=dict(result))
        record._write()
        return record

    @classmethod
    def read(cls, output_uri: str) -> "TrainingRecord | None":
        """Read the record of an output folder; None if there is none."""
        try:
            content = parse_json(read_file(f"{output_uri}/{RECORD}"), f"{output_uri}/{RECORD}")
        except FileNotFoundError:
            return None
        identity = Identity(*(content[name] for name in ("stage", "config", "models", "inputs")))
        return cls(output_uri, identity, content["result"])

    def _write(self) -> None:
        content = {"fingerprint": self.identity.fingerprint, **self.identity.values(), "result": self.result}
        write_file(f"{self.output_uri}/{RECORD}", (json.dumps(content, indent=2) + "\n").encode())


def _last_checkpoint(output_uri: str) -> str:
    folder = f"{output_uri}/{CHECKPOINTS_DIR}"
    return next(iter(list_checkpoints(folder)), f"{folder}/step-...")


def write_config(output_uri: str, config: Any) -> None:
    """Write a training's whole configuration, with its paths, into the output folder, for commands that read checkpoints.

    Passwords in it are hidden: who needs them later gives the address again.
    """
    content = redact_values(asdict(config))
    write_file(f"{output_uri}/{CONFIG}", (json.dumps(content, indent=2) + "\n").encode())


def read_config(output_uri: str) -> dict[str, Any]:
    """Return what `write_config` wrote. Raises FileNotFoundError if it does not exist."""
    return parse_json(read_file(f"{output_uri}/{CONFIG}"), f"{output_uri}/{CONFIG}")
