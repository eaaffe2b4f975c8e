"""Checkpoints on any storage: each rank writes its own part, and any world size and ZeRO stage can read them.

The part of a rank is a few files and, written last, `rank-00000.json`, which lists these files with their sizes and hashes. The
files hold weights, averages and moments of the optimizer as safetensors: by the name of each parameter, the run of elements of
the flattened parameter that this rank holds. A checkpoint is whole when the parts of all ranks are there with the listed files.

A training of several models, each with its optimizer, has a checkpoint of each further one, its companions, in a folder within.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipelines.storage.files import find_files, is_local, read_file, remove_file, write_file
from pipelines.storage.retry import call
from pipelines.train.engine.checkpoint_places import CHECKPOINTS_DIR, list_checkpoints
from pipelines.train.engine.deepspeed import WHOLE, Engine
from pipelines.train.engine.ema import EMA
from sana_model.files.filesystems import open_filesystem
from sana_model.files.inside import path_inside
from sana_model.files.json_files import parse_json

WEIGHTS, AVERAGE, MOMENTS = "weights", "average", "moments"
OPTIMIZER = "optimizer.pt"
MOST_RANKS = 100_000  # their names have five digits


class BadCheckpointError(ValueError):
    """A checkpoint is not whole. The message says what is missing or damaged."""


class UnfinishedCheckpointError(BadCheckpointError):
    """A checkpoint was never finished, because the training was killed while it was written."""


@dataclass(frozen=True)
class Snapshot:
    """A rank's part of a checkpoint, copied to the CPU's memory, so that training can go on while it is written.

    layout: see `Engine.layout`.
    tensors: kind ("weights", "average", "moments") -> key -> a run of elements of a flattened parameter. The key is the name of
        the parameter; for moments the name of the moment comes first ("exp_avg/blocks.0...").
    pieces: name of the parameter -> (start, numel) of the run.
    shapes: name of the parameter -> its full shape.
    moments: names of the optimizer's moments.
    others: the optimizer's other states, see `Engine.other_states`.
    state: this rank's state of the training (stream, losses, ...), which JSON can hold.
    companions: name -> the part of a further model.
    """

    step: int
    rank: int
    world_size: int
    layout: str
    tensors: Mapping[str, Mapping[str, Tensor]]
    pieces: Mapping[str, tuple[int, int]]
    shapes: Mapping[str, Sequence[int]]
    moments: Sequence[str]
    others: Mapping[str, Any]
    state: Mapping[str, Any]
    companions: Mapping[str, "Snapshot"] = field(default_factory=dict)


def take_snapshot(
    engine: Engine,
    ema: EMA | None,
    state: Mapping[str, Any],
    *,
    step: int,
    companions: Mapping[str, Snapshot] | None = None,
) -> Snapshot:
    """Copy this rank's part of a checkpoint; later steps do not change the copy.

    Args:
        engine: holds the weights and the optimizer.
        ema: the average of the weights, if there is one.
        state: this rank's other state: numbers, strings and containers that JSON can hold.
        step: number of steps done.
        companions: name -> snapshot of a further model of the training.
    """
    lists = {WEIGHTS: {"": engine.master_weights()}, AVERAGE: {"": [] if ema is None else ema.averages}}
    lists[MOMENTS] = {f"{name}/": tensors for name, tensors in engine.moments().items()}
    fragments = engine.own_fragments
    tensors = {
        kind: {
            prefix + fragment.name: fragment.of(masters).to("cpu", copy=True)
            for prefix, masters in prefixed.items()
            for fragment in fragments
            if masters
        }
        for kind, prefixed in lists.items()
    }
    others = engine.other_states() if engine.layout != WHOLE or torch.distributed.get_rank() == 0 else {}
    return Snapshot(
        step=step,
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
        layout=engine.layout,
        tensors=tensors,
        pieces={fragment.name: (fragment.start, fragment.numel) for fragment in fragments},
        shapes=engine.shapes,
        moments=list(engine.moments()),
        others=others,
        state=deepcopy({**state, **({} if ema is None else {"ema_updates": ema.num_updates})}),
        companions=companions or {},
    )


def write_part(folder_uri: str, snapshot: Snapshot) -> None:
    """Write a rank's part into the checkpoint's folder, its JSON file last. Raises StorageError."""
    for companion, part_of_it in snapshot.companions.items():
        write_part(f"{folder_uri}/{companion}", part_of_it)
    name = part_name(snapshot.rank)
    files: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=_scratch(folder_uri)) as scratch:
        for kind, tensors in snapshot.tensors.items():
            save_file(dict(tensors), Path(scratch, f"{name}-{kind}.safetensors"))
        torch.save(snapshot.others, Path(scratch, f"{name}-{OPTIMIZER}"))
        for path in sorted(Path(scratch).iterdir()):
            files[path.name] = {"size": path.stat().st_size, "sha256": _hash(path)}
            _put(path, f"{folder_uri}/{path.name}")
    names = ("step", "rank", "world_size", "layout", "pieces", "shapes", "moments", "state")
    part = {one: getattr(snapshot, one) for one in names} | {"files": files, "companions": list(snapshot.companions)}
    write_file(f"{folder_uri}/{name}.json", json.dumps(part).encode())


def part_name(rank: int) -> str:
    return f"rank-{rank:05d}"


def _scratch(uri: str) -> str | None:
    """Return where to make temporary files: for a local checkpoint in its own folder, so that they are only renamed."""
    if not is_local(uri):
        return None
    _, path = open_filesystem(uri)
    Path(path).mkdir(parents=True, exist_ok=True)
    return path


def _put(source: Path, uri: str) -> None:
    filesystem, path = open_filesystem(uri)
    if is_local(uri):
        source.replace(path)
    else:
        call(lambda: filesystem.put_file(str(source), path), "write", uri)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files all exist with their listed sizes.

    parts: content of each rank's JSON file. companions: the checkpoints of the training's further models, by name.
    """

    uri: str
    parts: Sequence[Mapping[str, Any]]
    companions: Mapping[str, "Checkpoint"] = field(default_factory=dict)

    @classmethod
    def open(cls, uri: str) -> "Checkpoint":
        """Read the JSON files and compare sizes. Raises BadCheckpointError if a file is missing or has another size."""
        found = find_files(uri)
        if f"{part_name(0)}.json" not in found:
            if inside := list_checkpoints(uri) or list_checkpoints(f"{uri}/{CHECKPOINTS_DIR}"):
                raise BadCheckpointError(f"{uri} is no checkpoint, but holds {len(inside)}: the last is {inside[0]}")
            raise UnfinishedCheckpointError(f"{uri} is not whole: {part_name(0)}.json is missing, it was never finished")
        first = _read_part(f"{uri}/{part_name(0)}.json")
        if first["world_size"] > MOST_RANKS:
            raise BadCheckpointError(f"{uri} says that it is of {first['world_size']} workers, over {MOST_RANKS}")
        names = [f"{part_name(rank)}.json" for rank in range(first["world_size"])]
        if missing := [name for name in names if name not in found]:
            raise UnfinishedCheckpointError(f"{uri} is not whole: {missing[0]} is missing, it was never finished")
        parts = [first, *(_read_part(f"{uri}/{name}") for name in names[1:])]
        for part in parts:
            for name, file in part["files"].items():
                if found.get(name) != file["size"]:
                    raise BadCheckpointError(
                        f"{uri} is not whole: {name} has {found.get(name, 'no')} bytes in place of {file['size']}"
                    )
        return cls(uri, parts, {name: cls.open(f"{uri}/{name}") for name in first.get("companions", ())})

    @property
    def step(self) -> int:
        return self.parts[0]["step"]

    @property
    def states(self) -> list[dict[str, Any]]:
        """State of each rank, as given to `take_snapshot`."""
        return [dict(part["state"]) for part in self.parts]

    def hash_of(self, kind: str) -> str:
        """A hash of the contents of all files of a kind."""
        listed = [part["files"].get(f"{part_name(rank)}-{kind}.safetensors") for rank, part in enumerate(self.parts)]
        return f"sha256:{hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:32]}"

    @contextmanager
    def fetch(self, names: Sequence[str]) -> Iterator[dict[str, Path]]:
        """Within, these files are on this machine: name -> path. Raises BadCheckpointError if a file's hash has changed."""
        hashes = {name: file["sha256"] for part in self.parts for name, file in part["files"].items()}
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as scratch:
            paths = {}
            for name in names:
                paths[name] = _get(f"{self.uri}/{name}", path_inside(Path(scratch), name))
                if _hash(paths[name]) != hashes[name]:
                    raise BadCheckpointError(f"{self.uri} is not whole: the content of {name} has changed since it was written")
            yield paths

    def files_with(self, kind: str, pieces: Mapping[str, tuple[int, int]]) -> list[str]:
        """Return the names of the files of a kind that hold any of these runs of elements: parameter -> (start, numel)."""
        return [
            f"{part_name(rank)}-{kind}.safetensors"
            for rank, part in enumerate(self.parts)
            if any(name in pieces and overlap(pieces[name], piece) for name, piece in part["pieces"].items())
        ]


def _read_part(uri: str) -> dict[str, Any]:
    """The content of a rank's JSON file. Raises BadCheckpointError if it is none."""
    try:
        part = parse_json(read_file(uri), uri)
    except ValueError as error:
        raise BadCheckpointError(str(error)) from error
    names = {"step", "rank", "world_size", "layout", "pieces", "shapes", "moments", "state", "files"}
    if missing := names - (part.keys() if isinstance(part, dict) else set()):
        raise BadCheckpointError(f"{uri} is no part of a checkpoint: it lacks {', '.join(sorted(missing))}")
    return part


def _get(uri: str, scratch: Path) -> Path:
    filesystem, path = open_filesystem(uri)
    if is_local(uri):
        return Path(path)
    call(lambda: filesystem.get_file(path, str(scratch)), "read", uri)
    return scratch


def overlap(one: Sequence[int], other: Sequence[int]) -> range:
    """Return the elements that two runs (start, numel) have in common."""
    return range(max(one[0], other[0]), min(one[0] + one[1], other[0] + other[1]))


def read_weights(uri: str, *, average: bool = True) -> dict[str, Tensor]:
    """Read the trained weights of a checkpoint: name -> full tensor, float32, on the CPU. Frozen weights are not among them.

    Args:
        uri: folder of the checkpoint.
        average: read the moving average instead of the weights of the last step.

    Raises BadCheckpointError if the checkpoint is not whole.
    """
    kind = AVERAGE if average else WEIGHTS
    checkpoint = Checkpoint.open(uri)
    shapes = checkpoint.parts[0]["shapes"]
    weights = {name: torch.zeros(shape) for name, shape in shapes.items()}
    everything = {name: (0, weight.numel()) for name, weight in weights.items()}
    with checkpoint.fetch(checkpoint.files_with(kind, everything)) as paths:
        for rank, part in enumerate(checkpoint.parts):
            if not part["pieces"]:
                continue
            with safe_open(paths[f"{part_name(rank)}-{kind}.safetensors"], "pt") as file:
                for name, (start, numel) in part["pieces"].items():
                    weights[name].view(-1)[start : start + numel] = file.get_tensor(name)
    return weights


def remove_checkpoint(uri: str) -> None:
    """Delete a checkpoint, its JSON files first, so that it is never whole while files are missing. Raises StorageError."""
    for name in sorted(find_files(uri), key=lambda name: (not name.endswith(".json"), name.count("/"))):
        remove_file(f"{uri}/{name}")
    if is_local(uri):
        _, path = open_filesystem(uri)
        shutil.rmtree(path, ignore_errors=True)
