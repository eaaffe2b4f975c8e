"""How a pipeline fits a machine: the precision of its weights, and what lies on the device while it draws.

Imports no torch, so a command line may name the settings.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

Precision = Literal["full", "w8a8", "int8", "int4", "fp8"]
"""How weights are kept and multiplied.

full: as stored. w8a8: 8-bit integers for weights (one scale a row) and activations (one scale a token). int8, int4: integers
for weights alone, which are converted back to multiply; int4 has one scale for 32 weights. fp8: 8-bit floats for weights and
activations, on NVIDIA Hopper and newer.
"""

MemoryMode = Literal["fast", "balanced", "small"]

Kept = Literal["everything", "all but the text encoder", "one part at a time"]
"""What stays on the device."""

SMALL_TILE = 512
"""Side, in pixels, of the tiles in which the mode `small` decodes."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What a memory mode means on a kind of device.

    transformer: precision of the transformer and its ControlNet. asked: it was asked for, and is not the mode's own.
    text_encoder: precision of the text encoder.
    kept: what stays on the device between its turns. A part that does not lies in the computer's memory if the device is a GPU,
        and in a file if it is the CPU.
    tile: side of the tiles in which pictures are decoded, in pixels; None: only pictures over 2048 x 2048 px are tiled.
    """

    transformer: Precision = "full"
    asked: bool = False
    text_encoder: Precision = "full"
    kept: Kept = "everything"
    tile: int | None = None


PARTS = ("text encoder", "transformer", "autoencoder")
"""The parts of a pipeline in the order in which they work."""


def count_moments(plan: MemoryPlan, weights: Mapping[str, int], work: Mapping[str, int]) -> dict[str, int]:
    """Bytes on the device while each of PARTS works: of what lies there, and of that part's intermediate values.

    `weights` and `work`: bytes of a part's weights, and of its intermediate values at their most, by the part's name.
    """
    leaving = {"everything": (), "all but the text encoder": ("text encoder",), "one part at a time": PARTS}[plan.kept]
    return {
        part: work[part] + sum(size for name, size in weights.items() if name == part or name not in leaving) for part in PARTS
    }


_GPU = {
    "fast": MemoryPlan(),
    "balanced": MemoryPlan(text_encoder="int8", kept="all but the text encoder"),
    "small": MemoryPlan(transformer="int8", text_encoder="int4", kept="one part at a time", tile=SMALL_TILE),
}
_CPU = {
    "fast": MemoryPlan(),
    "balanced": MemoryPlan(transformer="w8a8", text_encoder="int8"),
    "small": MemoryPlan(transformer="w8a8", text_encoder="int4", kept="one part at a time", tile=SMALL_TILE),
}


def plan_memory(memory: MemoryMode, precision: Precision | None, device_type: str) -> MemoryPlan:
    """Choose what a mode means on "cpu" or a GPU.

    `precision` replaces that of the transformer; None: the mode's own. The text encoder, whose activations are too uneven for 8
    bits, gets weights of as many bits; the mode's own if they are fewer, and full precision with "full". One that was saved
    quantized keeps its own.

    Raises ValueError for a mode or precision that there is not.
    """
    if memory not in _CPU:
        raise ValueError(f"memory={memory!r} is no mode: choose one of {', '.join(_CPU)}")
    plan = (_CPU if device_type == "cpu" else _GPU)[memory]
    if precision is None:
        return plan
    if precision not in get_args(Precision):
        raise ValueError(f"unknown precision {precision!r}: choose one of {', '.join(get_args(Precision))}")
    text_encoder: Precision = precision if precision in ("full", "int4") else "int8"
    if plan.text_encoder == "int4" and precision != "full":
        text_encoder = "int4"
    return replace(plan, transformer=precision, asked=True, text_encoder=text_encoder)
