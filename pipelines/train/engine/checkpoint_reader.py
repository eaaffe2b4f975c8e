"""Loading a checkpoint of any world size and ZeRO stage into the engines of a training."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from safetensors import safe_open
from torch import Tensor

from pipelines.train.engine.checkpoints import AVERAGE, MOMENTS, OPTIMIZER, WEIGHTS, Checkpoint, overlap, part_name
from pipelines.train.engine.deepspeed import WHOLE, Engine
from pipelines.train.engine.ema import EMA


class CheckpointReader:
    """The files of a checkpoint that this rank needs, fetched and verified when opened, so that `load` finds no damage.

    `companions`: the engines of the training's further models, by name.

    Raises BadCheckpointError if a file has changed since it was written; ValueError if the checkpoint is of another model.
    """

    def __init__(self, checkpoint: Checkpoint, engine: Engine, companions: Mapping[str, Engine] | None = None):
        self.checkpoint = checkpoint
        self.engine = engine
        pieces = {fragment.name: (fragment.start, fragment.numel) for fragment in engine.fragments}
        first = checkpoint.parts[0]
        if first["shapes"] != engine.shapes:
            raise ValueError(
                f"{checkpoint.uri} is of another model: its weights have other names or shapes than this training's; "
                "set init, preset and lora as they were when it was written, or leave resume_from out"
            )
        wanted = companions or {}
        if wanted.keys() != checkpoint.companions.keys():
            names = [", ".join(sorted(one)) or "none" for one in (checkpoint.companions, wanted)]
            raise ValueError(
                f"{checkpoint.uri} is of another training: further models in it: {names[0]}, in this training: {names[1]}; set "
                "the losses as they were when it was written, or leave resume_from out"
            )
        rank = torch.distributed.get_rank()
        own = rank if first["layout"] == engine.layout != WHOLE else 0
        self._others = f"{part_name(own)}-{OPTIMIZER}"
        names = [name for kind in (WEIGHTS, AVERAGE, MOMENTS) for name in checkpoint.files_with(kind, pieces)]
        self._open = ExitStack()
        self._paths = self._open.enter_context(checkpoint.fetch([*names, self._others]))
        self._companions = [CheckpointReader(checkpoint.companions[name], other) for name, other in wanted.items()]

    def load(self, ema: EMA | None) -> None:
        """Load weights and optimizer into the engine and those of companions, and the average into `ema`. Collective call."""
        first = self.checkpoint.parts[0]
        others = torch.load(self._paths[self._others], map_location="cpu", weights_only=True)
        self.engine.prepare_states(first["moments"], others, layout=first["layout"])
        self._copy(WEIGHTS, {"": self.engine.master_weights()})
        if ema is not None:
            self._copy(AVERAGE, {"": ema.averages})
            ema.num_updates = first["state"]["ema_updates"]
        self._copy(MOMENTS, {f"{name}/": tensors for name, tensors in self.engine.moments().items()})
        self.engine.apply_master_weights()
        for companion in self._companions:
            companion.load(None)

    def close(self) -> None:
        """Delete the fetched files."""
        for companion in self._companions:
            companion.close()
        self._open.close()

    @torch.no_grad()
    def _copy(self, kind: str, lists: Mapping[str, Sequence[Tensor]]) -> None:
        for rank, part in enumerate(self.checkpoint.parts):
            path = self._paths.get(f"{part_name(rank)}-{kind}.safetensors")
            if path is None:
                continue
            with safe_open(path, "pt") as file:
                for fragment in self.engine.fragments:
                    piece = part["pieces"].get(fragment.name)
                    if piece is None or not (common := overlap(piece, (fragment.start, fragment.numel))):
                        continue
                    for prefix, masters in lists.items():
                        source = file.get_slice(prefix + fragment.name)[common.start - piece[0] : common.stop - piece[0]]
                        fragment.of(masters)[common.start - fragment.start : common.stop - fragment.start].copy_(source)
