"""Nodes that load: a model, an adapter, a ControlNet."""

import warnings
from dataclasses import replace
from typing import Any, get_args

import torch

from sana_model.comfyui import files
from sana_model.comfyui.host import device, make_room, offload_device
from sana_model.comfyui.model import CONTROLNET, MODEL, Loaded, LoadedControlNet, Model
from sana_model.files.controlnet import load_controlnet
from sana_model.files.lora import read_lora
from sana_model.memory import MemoryMode, Precision
from sana_model.nn.quantized import precision_of, quantize_blocks
from sana_model.pipeline import TextToImage

PRECISIONS = ("auto", *get_args(Precision))
DTYPES = {"auto": None, "FP32": torch.float32, "FP16": torch.float16, "BF16": torch.bfloat16}
CATEGORY = "sana_model"


class SanaLoader:
    """A pipeline folder, a weights file of a transformer, or a published model by its short name, which is downloaded once."""

    DESCRIPTION = "Loads a Sana: NVlabs' .pth, a folder of diffusers or of this project, or a published model by its name."
    CATEGORY, FUNCTION = CATEGORY, "load"
    RETURN_TYPES, RETURN_NAMES = (MODEL,), ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        own = "own: the one that the checkpoint names; for a .pth the published one, which is downloaded"
        return {
            "required": {
                "ckpt_name": (
                    files.list_checkpoints(),
                    {
                        "tooltip": "From models/sana, checkpoints, diffusion_models and diffusers. zoo://pipeline comes along "
                        "and draws shapes; short names such as sana-1.6b-1024 are downloaded once."
                    },
                ),
                "dtype": (list(DTYPES), {"tooltip": "Type of the weights that are not quantized; auto: as they are stored."}),
            },
            "optional": {
                "memory": (
                    list(get_args(MemoryMode)),
                    {
                        "tooltip": "fast: all in full precision, and ComfyUI moves it; balanced: a smaller text encoder, which "
                        "leaves the GPU after the prompt; small: 8 and 4 bits, one part at a time, decoding in tiles."
                    },
                ),
                "precision": (
                    list(PRECISIONS),
                    {"tooltip": "Of the transformer; auto: as memory says. fp8 needs an NVIDIA Hopper or newer."},
                ),
                "vae_name": (files.list_autoencoders(), {"tooltip": own}),
                "text_encoder_name": (files.list_text_encoders(), {"tooltip": own}),
            },
        }

    @classmethod
    def IS_CHANGED(cls, ckpt_name: str, vae_name: str = files.OWN, text_encoder_name: str = files.OWN, **others: Any) -> str:
        """Differs when the files do, such as those of a training that has gone on."""
        parts = (files.find_part(vae_name, (files.VAE,)), files.find_part(text_encoder_name, (files.TEXT_ENCODERS,)))
        return " ".join(files.stamp(path) for path in (files.find_checkpoint(ckpt_name), *parts))

    def load(
        self,
        ckpt_name: str,
        dtype: str,
        memory: MemoryMode = "fast",
        precision: Any = "auto",
        vae_name: str = files.OWN,
        text_encoder_name: str = files.OWN,
    ) -> tuple[Model]:
        if memory != "fast":
            make_room()
        pipeline = TextToImage.from_pretrained(
            files.find_checkpoint(ckpt_name),
            dtype=DTYPES[dtype],
            autoencoder=files.find_part(vae_name, (files.VAE,)),
            text_encoder=files.find_part(text_encoder_name, (files.TEXT_ENCODERS,)),
            device=device() if memory != "fast" or precision == "fp8" else None,  # fast: ComfyUI moves the parts, not we
            memory=memory,
            precision=None if precision == "auto" else precision,
        )
        if memory == "fast":
            pipeline.to(offload_device())
        return (Model(Loaded(pipeline)),)


class SanaLoraLoader:
    """An adapter (LoRA, LoHa, LoKr) for the nodes behind this one; the model itself stays as it is."""

    DESCRIPTION = "Draws with a LoRA, LoHa or LoKr of this project, diffusers, peft, SimpleTuner, OneTrainer or kohya."
    CATEGORY, FUNCTION = CATEGORY, "load_lora"
    RETURN_TYPES, RETURN_NAMES = (MODEL,), ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (MODEL,),
                "lora_name": (files.list_loras(), {"tooltip": "From models/loras."}),
                "strength_model": ("FLOAT", {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, model: Any, lora_name: str, strength_model: float) -> str:
        return files.stamp(files.find_part(lora_name, (files.LORAS,)))

    def load_lora(self, model: Model, lora_name: str, strength_model: float) -> tuple[Model]:
        path = files.find_part(lora_name, (files.LORAS,))
        assert path is not None
        adapter = read_lora(path, model.loaded.pipeline.transformer)
        if (unread := adapter.describe_unread()) is not None:
            warnings.warn(f"{lora_name}: {unread}", stacklevel=1)
        return (replace(model, adapters=(*model.adapters, (adapter.changes, strength_model))),)


class SanaControlNetLoader:
    """A ControlNet, which must fit the model, in the model's precision."""

    DESCRIPTION = "Loads a ControlNet for a Sana. A checkpoint that holds both needs no such node."
    CATEGORY, FUNCTION = CATEGORY, "load_controlnet"
    RETURN_TYPES, RETURN_NAMES = (CONTROLNET,), ("control_net",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (MODEL,),
                "control_net_name": (
                    files.list_controlnets(),
                    {"tooltip": "From models/controlnet, or a checkpoint with both."},
                ),
            }
        }

    @classmethod
    def IS_CHANGED(cls, model: Any, control_net_name: str) -> str:
        return files.stamp(files.find_part(control_net_name, (files.CONTROLNETS, files.CHECKPOINTS)))

    def load_controlnet(self, model: Model, control_net_name: str) -> tuple[LoadedControlNet]:
        transformer = model.loaded.pipeline.transformer
        path = files.find_part(control_net_name, (files.CONTROLNETS, files.CHECKPOINTS))
        assert path is not None
        dtype, heads = transformer.head.weight.dtype, transformer.config.num_cross_heads
        controlnet = load_controlnet(path, dtype=dtype, num_cross_heads=heads)
        if precision_of(controlnet) == "full":
            quantize_blocks(controlnet, precision_of(transformer))
        return (LoadedControlNet(controlnet),)
