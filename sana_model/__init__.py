"""Sana in plain torch: linear DiT, DC-AE, text encoder, rectified flow and Flow-DPM-Solver.

The folder needs nothing else of this repository; it needs torch, transformers, safetensors, numpy, pillow, fsspec, filelock,
huggingface_hub, tenacity and tqdm, and OpenCV for two kinds of control pictures. `import sana_model` alone imports none of
them: a module is imported when its names are asked for.
"""
# ruff: noqa: F401  the imports below are for type checkers and editors

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sana_model.controls import CannyDetector, DepthDetector, OutlineDetector
    from sana_model.files.png import read_facts, save_picture
    from sana_model.flow import (
        add_noise,
        flow_loss,
        loss_by_sigma,
        sample_sigmas,
        shift_sigmas,
        sigma_to_timestep,
        velocity_target,
    )
    from sana_model.guidance import guided_velocity
    from sana_model.nn.autoencoder import DCAutoencoder
    from sana_model.nn.config import AutoencoderConfig, ControlNetConfig, SanaConfig, TextEncoderConfig
    from sana_model.nn.controlnet import SanaControlNet
    from sana_model.nn.text_encoder import TextEncoder
    from sana_model.nn.transformer import SanaTransformer
    from sana_model.pipeline import TextToImage
    from sana_model.solver import (
        classifier_free_guidance,
        cut_sigmas,
        euler_sigmas,
        flow_dpm_solver,
        flow_euler,
        keep_known,
        sampling_sigmas,
    )

_MODULE_OF = {
    "AutoencoderConfig": "nn.config",
    "CannyDetector": "controls",
    "ControlNetConfig": "nn.config",
    "DCAutoencoder": "nn.autoencoder",
    "DepthDetector": "controls",
    "OutlineDetector": "controls",
    "SanaConfig": "nn.config",
    "SanaControlNet": "nn.controlnet",
    "SanaTransformer": "nn.transformer",
    "TextEncoder": "nn.text_encoder",
    "TextEncoderConfig": "nn.config",
    "TextToImage": "pipeline",
    "add_noise": "flow",
    "classifier_free_guidance": "solver",
    "cut_sigmas": "solver",
    "euler_sigmas": "solver",
    "flow_dpm_solver": "solver",
    "flow_euler": "solver",
    "flow_loss": "flow",
    "guided_velocity": "guidance",
    "keep_known": "solver",
    "loss_by_sigma": "flow",
    "read_facts": "files.png",
    "sample_sigmas": "flow",
    "sampling_sigmas": "solver",
    "save_picture": "files.png",
    "shift_sigmas": "flow",
    "sigma_to_timestep": "flow",
    "velocity_target": "flow",
}
"""Public name -> the module of this package that defines it."""

if not TYPE_CHECKING:  # a type checker would take every name for a member of a module that has __getattr__

    def __getattr__(name):
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
