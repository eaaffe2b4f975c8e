"""The nodes by the names that workflows keep. They begin with the project's, for other Sana nodes are named Sana... too."""

from typing import Any

from sana_model.comfyui.latents import SanaDecode, SanaEmptyLatent, SanaEncode
from sana_model.comfyui.loaders import SanaControlNetLoader, SanaLoader, SanaLoraLoader
from sana_model.comfyui.sampling import SanaControlNetApply, SanaSampler, SanaTextEncode

NODE_CLASS_MAPPINGS: dict[str, type[Any]] = {
    "SanaOnRayLoader": SanaLoader,
    "SanaOnRayLoraLoader": SanaLoraLoader,
    "SanaOnRayTextEncode": SanaTextEncode,
    "SanaOnRayEmptyLatent": SanaEmptyLatent,
    "SanaOnRayEncode": SanaEncode,
    "SanaOnRayControlNetLoader": SanaControlNetLoader,
    "SanaOnRayControlNetApply": SanaControlNetApply,
    "SanaOnRaySampler": SanaSampler,
    "SanaOnRayDecode": SanaDecode,
}

NODE_DISPLAY_NAME_MAPPINGS = {
    "SanaOnRayLoader": "Sana Loader",
    "SanaOnRayLoraLoader": "Sana LoRA Loader",
    "SanaOnRayTextEncode": "Sana Text Encode",
    "SanaOnRayEmptyLatent": "Sana Empty Latent",
    "SanaOnRayEncode": "Sana Encode",
    "SanaOnRayControlNetLoader": "Sana ControlNet Loader",
    "SanaOnRayControlNetApply": "Sana ControlNet Apply",
    "SanaOnRaySampler": "Sana Sampler",
    "SanaOnRayDecode": "Sana Decode",
}
