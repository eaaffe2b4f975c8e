"""`python -m jobs.convert model.pth converted --layout diffusers`: a model that was not trained here, in another layout.

Starts no Ray, and needs no GPU. For what was trained here there is `python -m jobs.export`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jobs.common.job import run_command
from sana_model.files.layout import Layout
from sana_model.memory import MemoryMode
from sana_model.nn.config import NullCaption, TimeInput

OF_TRANSFORMERS = ("time_input", "null_caption", "num_cross_heads", "position_scale", "base_size")
"""Settings that say what a transformer's weights do not."""


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Configuration of a conversion.

    Args:
        source: a pipeline, a transformer, a ControlNet or an autoencoder, in any layout: a folder, a weights file, or a
            zoo://, hf:// or fsspec URI. May be given first, without its name.
        output: the folder to write; for nvlabs, the .pth or .safetensors file. May be given second, without its name.
        layout: the code that is to read it.
        dtype: of the weights; None keeps that of the file.
        precision: write a pipeline with weights of fewer bits, in the layout sana. int8 and int4 are for weights alone, w8a8
            computes in 8 bits too.
        memory: write a pipeline in the precisions that this mode has on the CPU, in the layout sana. They load faster, and need
            less memory at the start, than weights that are made smaller each time.
        ema: take the average of the weights, of a file of NVlabs' training that holds one.
        time_input: how the weights were trained to see the noise level, where the file does not tell it.
        null_caption: what the weights were trained to see for a dropped caption; None: as the file's own code does it.
        num_cross_heads: heads of the cross-attention, where the file does not tell them.
        position_scale: interpolation of the positional embedding, where the file does not tell it; 0: there is none.
        base_size: side, in tokens, of the square picture that the model was made for, where the file does not tell it.
        scaling_factor: of an autoencoder's latents, where the file does not tell it.
    """

    source: str
    output: str
    layout: Layout
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    precision: Literal["w8a8", "int8", "int4"] | None = None
    memory: MemoryMode = "fast"
    ema: bool = False
    time_input: TimeInput | None = None
    null_caption: NullCaption | None = None
    num_cross_heads: int | None = None
    position_scale: float | None = None
    base_size: int | None = None
    scaling_factor: float | None = None

    @property
    def overrides(self) -> dict[str, Any]:
        """Settings of the transformer that were given."""
        given = {name: value for name in OF_TRANSFORMERS if (value := getattr(self, name)) is not None}
        return given | ({"position_scale": None} if self.position_scale == 0 else {})

    @property
    def quantizes(self) -> bool:
        """Whether weights of fewer bits are asked for."""
        return self.precision is not None or self.memory != "fast"

    def refuse(self, what: str, *names: str) -> None:
        """Raise ValueError for settings that were given and that a model of this kind, `what`, has not."""
        for name in sorted(names):
            if (value := getattr(self, name)) not in (None, False):
                raise ValueError(f"{name}={value} does not apply: {self.source} is {what}; leave it out")


def run(config: ConvertConfig) -> None:
    """Convert, and print what it was."""
    print(f"{config.output}: {convert(config)}, in the layout {config.layout}")


def convert(config: ConvertConfig) -> str:
    """Write the model in the other layout. Returns what it is.

    Raises FileNotFoundError or ValueError, as loading does, if it is not there, damaged, or no model that is known here.
    """
    import torch

    from jobs.common.instruction import note_instruction
    from sana_model.files.checkpoint import PIPELINE_INDEXES, OtherModelError
    from sana_model.files.pipeline import in_one_file
    from sana_model.files.places import resolve
    from sana_model.nn.controlnet import SanaControlNet
    from sana_model.nn.quantized import precision_of
    from sana_model.nn.transformer import SanaTransformer
    from sana_model.pipeline import TextToImage

    local, output = resolve(config.source), Path(config.output)
    _check_output(config.layout, output)
    dtype = getattr(torch, config.dtype) if config.dtype else None
    if config.quantizes and config.layout != "sana":
        raise ValueError(f"layout={config.layout} has no place for weights of fewer bits: write the layout sana")
    if any((local / index).exists() for index in PIPELINE_INDEXES):
        config.refuse("a pipeline's folder", "ema", "scaling_factor")
        smaller: dict[str, Any] = {"memory": config.memory, "precision": config.precision}
        pipeline = TextToImage.from_pretrained(local, dtype=dtype, **smaller, **config.overrides)
        pipeline.save_pretrained(output, layout=config.layout)
        note_instruction(config.layout, pipeline.text_encoder.config)
        if config.layout == "nvlabs":
            return "a pipeline's transformer, without its other models"
        parts = f"transformer {precision_of(pipeline.transformer)}, text encoder {precision_of(pipeline.text_encoder)}"
        return f"a pipeline, {parts}" if config.quantizes else "a pipeline"
    if config.quantizes:
        raise ValueError(f"memory and precision apply to a pipeline's folder, and {config.source} is none")
    try:
        transformer = SanaTransformer.from_pretrained(local, use_ema=config.ema, dtype=dtype, **config.overrides)
    except OtherModelError as no_transformer:
        return _convert_other(config, local, no_transformer)
    config.refuse("a transformer", "scaling_factor")
    named = f"time_input={transformer.config.time_input}, null_caption={transformer.config.null_caption}"
    file = in_one_file(local)
    if file is None:
        transformer.save_pretrained(output, layout=config.layout)
        return f"a transformer, {named}"
    heads = transformer.config.num_cross_heads
    controlnet = SanaControlNet.from_pretrained(file, dtype=dtype, num_cross_heads=heads, use_ema=config.ema)
    if config.layout == "sana":
        transformer.save_pretrained(output)
        controlnet.save_pretrained(output / "controlnet")
    else:
        controlnet.save_pretrained(output, layout=config.layout, transformer=transformer)
    return f"a transformer with its ControlNet, {named}"


def _check_output(layout: Layout, output: Path) -> None:
    """Raise ValueError if a folder lies where the layout writes a file, or a file where it writes a folder."""
    if layout == "nvlabs" and output.is_dir():
        raise ValueError(f"output={output} is a folder, and layout nvlabs writes a file: name one, such as {output}/model.pth")
    if layout != "nvlabs" and output.is_file():
        raise ValueError(f"output={output} is a file, and layout {layout} writes a folder: give another name")


def _convert_other(config: ConvertConfig, local: Path, no_transformer: Exception) -> str:
    """Convert what is no transformer: a ControlNet or an autoencoder. Returns what it is; raises as `convert`."""
    import torch

    from sana_model.files.checkpoint import OtherModelError
    from sana_model.nn.autoencoder import DCAutoencoder
    from sana_model.nn.controlnet import SanaControlNet

    dtype, output = getattr(torch, config.dtype) if config.dtype else None, Path(config.output)
    try:
        controlnet = SanaControlNet.from_pretrained(
            local, dtype=dtype, num_cross_heads=config.num_cross_heads, use_ema=config.ema
        )
    except OtherModelError:
        pass
    else:
        config.refuse("a ControlNet", "scaling_factor", *set(OF_TRANSFORMERS) - {"num_cross_heads"})
        controlnet.save_pretrained(output, layout=config.layout)
        return f"a ControlNet of the form {controlnet.config.form}"
    try:
        autoencoder = DCAutoencoder.from_pretrained(local, dtype=dtype, scaling_factor=config.scaling_factor)
    except ValueError as no_autoencoder:
        raise ValueError(f"{no_transformer}; nor is it an autoencoder: {no_autoencoder}") from None
    config.refuse("an autoencoder", "ema", *OF_TRANSFORMERS)
    autoencoder.save_pretrained(output, layout=config.layout)
    return "an autoencoder"


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    for name in ("--output", "--source"):
        leading = next((index for index, word in enumerate(given) if word.startswith("-")), len(given))
        if leading == (2 if name == "--output" else 1):
            given.insert(leading - 1, name)
    return run_command(ConvertConfig, run, given, name="convert")


if __name__ == "__main__":
    sys.exit(main())
