"""The autoencoder that a training starts from."""

from dataclasses import replace

import torch

from pipelines.train_autoencoder.config import TrainAutoencoderConfig
from pipelines.workers.models import naming
from sana_model.nn.autoencoder import DCAutoencoder


def load_start(config: TrainAutoencoderConfig) -> DCAutoencoder:
    """Load or make the autoencoder that training starts from, in float32 on the CPU.

    Raises FileNotFoundError if `init` does not exist; ValueError if it has another shape than the configuration says, or
    crops or channels do not fit it.
    """
    if config.init is not None:
        with naming("init"):
            model = DCAutoencoder.from_pretrained(config.init, dtype=torch.float32)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = DCAutoencoder(config.new_shape())
    config.check_shape(model.config)
    if config.scaling_factor is not None:
        model.config = replace(model.config, scaling_factor=config.scaling_factor)
    return model
