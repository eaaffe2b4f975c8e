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
from sana_model.nn.config import NullCaption, TimeInput


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Configuration of a conversion.

    Args:
        source: a pipeline, a transformer or an autoencoder, in any layout: a folder, a weights file, or a zoo://, hf:// or
            fsspec URI. May be given first, without its name.
        output: the folder to write; for nvlabs, the .pth or .safetensors file. May be given second, without its name.
        layout: the code that is to read it.
        dtype: of the weights; None keeps that of the file.
        ema: take the average of the weights, of a file of NVlabs' training that holds one.
        time_input: how the weights were trained to see the noise level, where the file does not tell it.
        null_caption: what the weights were trained to see for a dropped caption; None: as the file's own code does it.
        num_cross_heads: heads of the cross-attention, where the file does not tell them.
    """

    source: str
    output: str
    layout: Layout
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    ema: bool = False
    time_input: TimeInput | None = None
    null_caption: NullCaption | None = None
    num_cross_heads: int | None = None

    @property
    def overrides(self) -> dict[str, Any]:
        """Settings of the transformer that were given."""
        named = {name: getattr(self, name) for name in ("time_input", "null_caption", "num_cross_heads")}
        return {name: value for name, value in named.items() if value is not None}


def run(config: ConvertConfig) -> None:
    """Convert, and print what it was."""
    print(f"{config.output}: {convert(config)}, in the layout {config.layout}")


def convert(config: ConvertConfig) -> str:
    """Write the model in the other layout. Returns what it is.

    Raises FileNotFoundError or ValueError, as loading does, if it is not there, damaged, or no model that is known here.
    """
    import torch

    from sana_model.files.checkpoint import PIPELINE_INDEXES, OtherModelError
    from sana_model.files.places import resolve
    from sana_model.nn.autoencoder import DCAutoencoder
    from sana_model.nn.transformer import SanaTransformer
    from sana_model.pipeline import TextToImage

    local, output = resolve(config.source), Path(config.output)
    dtype = getattr(torch, config.dtype) if config.dtype else None
    if any((local / index).exists() for index in PIPELINE_INDEXES):
        TextToImage.from_pretrained(local, dtype=dtype, **config.overrides).save_pretrained(output, layout=config.layout)
        return "a pipeline"
    try:
        transformer = SanaTransformer.from_pretrained(local, use_ema=config.ema, dtype=dtype, **config.overrides)
    except OtherModelError as no_transformer:
        try:
            autoencoder = DCAutoencoder.from_pretrained(local, dtype=dtype)
        except ValueError as no_autoencoder:
            raise ValueError(f"{no_transformer}; nor is it an autoencoder: {no_autoencoder}") from None
        autoencoder.save_pretrained(output, layout=config.layout)
        return "an autoencoder"
    transformer.save_pretrained(output, layout=config.layout)
    return f"a transformer, time_input={transformer.config.time_input}, null_caption={transformer.config.null_caption}"


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    for name in ("--output", "--source"):
        leading = next((index for index, word in enumerate(given) if word.startswith("-")), len(given))
        if leading == (2 if name == "--output" else 1):
            given.insert(leading - 1, name)
    return run_command(ConvertConfig, run, given, name="convert")


if __name__ == "__main__":
    sys.exit(main())
