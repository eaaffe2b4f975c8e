"""The pipeline with the average weights of a training: it draws pictures during the training, and is written at its end."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from pipelines.storage.files import upload_folder
from pipelines.train.checkpoint_pipeline import with_weights
from pipelines.train.config import GridConfig, TrainConfig
from pipelines.train.engine.deepspeed import Engine
from pipelines.train.engine.ema import EMA
from pipelines.train.engine.lora import adapters_in, merge_lora, save_lora
from pipelines.train.loop.record import PIPELINE_DIR
from pipelines.train.models import TrainModels, load_start_transformer
from pipelines.workers.images import image_grid
from sana_model.nn.finite import NotFiniteError
from sana_model.nn.transformer import SanaTransformer
from sana_model.pipeline import TextToImage

LORA_DIR = "lora"
"""Folder of the trained adapters, in the output folder."""


class TrainedPipeline:
    """One rank's part in making the trained pipeline. Rank 0 gathers the weights of all ranks: all methods are collective.

    Args:
        engine: holds the weights.
        ema: the average of the weights.
        models: the other models of the pipeline.
        config: the training's; its `lora` are the adapters that are trained, None: all weights are.
    """

    def __init__(self, engine: Engine, ema: EMA, models: TrainModels, config: TrainConfig):
        self.engine = engine
        self.ema = ema
        self.models = models
        self.config = config
        self._drawn = False

    def gather_average(self) -> dict[str, Tensor] | None:
        """Return the average weights, adapters included, in float32 on the CPU, on rank 0; None on other ranks."""
        with self.ema.in_place_of(self.engine.master_weights()):
            return self.engine.gather_weights()

    def gather(self, dtype: torch.dtype) -> TextToImage | None:
        """Return the pipeline with the average weights on rank 0, its transformer in `dtype`; None on other ranks.

        Adapters are merged into the weights.
        """
        weights = self.gather_average()
        if weights is None:
            return None
        if self.config.lora is not None:
            weights = merge_lora(weights, self.config.lora)
        with torch.device("meta"):
            transformer = SanaTransformer(self.models.transformer_config)
        transformer.load_state_dict(weights, assign=True)
        for name, tensor in self.models.logvar.items():
            setattr(transformer, name, tensor.clone())
        return self._around(transformer.to(self.engine.device, dtype))

    def _around(self, transformer: SanaTransformer) -> TextToImage:
        models = self.models
        assert models.autoencoder is not None and models.text_encoder is not None
        return TextToImage(transformer, models.autoencoder, models.text_encoder, flow_shift=models.shift)

    def draw(self, grid: GridConfig, *, say: Callable[[str], None]) -> Image.Image | None:
        """Draw the grid's pictures. Returns them as one image on rank 0; None on other ranks, or if they cannot be drawn.

        `say` is told, on rank 0, why they cannot be drawn, and which prompts are cut, once.
        """
        pipeline = self.gather(self.engine.config.torch_dtype)
        if pipeline is None:
            return None
        if not self._drawn and (cut := pipeline.describe_cut(grid.prompts)) is not None:
            say(f"in grids, {cut}")
        self._drawn = True
        seeds = range(grid.seed, grid.seed + len(grid.prompts))
        try:
            images = pipeline(grid.prompts, num_steps=grid.num_steps, guidance_scale=grid.guidance_scale, seed=seeds)
        except NotFiniteError as error:
            say(f"a grid is not drawn: {error}")
            return None
        return image_grid(images, grid.columns)

    def write(self, output_uri: str) -> None:
        """Write the pipeline, and the adapters if there are any, into the output folder. Raises StorageError.

        Adapters are merged into the weights that the training began with, which are loaded anew: the engine has them rounded to
        its dtype.
        """
        if self.config.lora is None:
            pipeline = self.gather(torch.float32)
        elif (weights := self.gather_average()) is not None:
            with tempfile.TemporaryDirectory() as folder:
                save_lora(Path(folder), weights, self.config.lora)
                upload_folder(folder, f"{output_uri}/{LORA_DIR}")
            pipeline = self._around(with_weights(load_start_transformer(self.config), self.config, adapters_in(weights)))
        else:
            pipeline = None
        if pipeline is not None:
            with tempfile.TemporaryDirectory() as folder:
                pipeline.save_pretrained(Path(folder))
                upload_folder(folder, f"{output_uri}/{PIPELINE_DIR}")
