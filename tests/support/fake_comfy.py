"""A stand-in for ComfyUI: the few functions that our nodes call, with its signatures, and its way to run a graph.

ComfyUI is no package, so it cannot be installed for tests. What is here was read in Comfy-Org/ComfyUI of October 2025, in the
modules that `install` names, and in `execution.py`. The previewer reads `latent_rgb_factors_reshape` as newer ones do.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sana_model.comfyui.nodes import NODE_CLASS_MAPPINGS

Graph = dict[str, dict[str, Any]]
"""A workflow in ComfyUI's API format: node id -> its class and inputs; an input [id, slot] is another node's output."""


class InterruptProcessingException(Exception):
    """ComfyUI's: the user has cancelled."""


@dataclass
class FakeComfy:
    """What the nodes have shown, and whether the user has cancelled.

    cancel_at: the progress at which the user cancels; None: not at all. device: where ComfyUI computes. unloaded: so often its
    models were taken off it.
    """

    models_dir: Path
    progress: list[tuple[int, int]] = field(default_factory=list)
    previews: list[Image.Image] = field(default_factory=list)
    cancel_at: int | None = None
    device: str = "cpu"
    unloaded: int = 0

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Put the modules where the nodes import them."""
        folders = ("checkpoints", "diffusion_models", "vae", "loras", "controlnet", "text_encoders", "diffusers")
        paths = {name: ([str(self.models_dir / name)], {".pth", ".safetensors"}) for name in folders}

        def get_filename_list(folder_name: str) -> list[str]:
            roots = [Path(root) for root in paths[folder_name][0]]
            return sorted(file.relative_to(root).as_posix() for root in roots for file in root.rglob("*") if file.is_file())

        def add_model_folder_path(folder_name: str, full_folder_path: str, is_default: bool = False) -> None:
            listed = paths.setdefault(folder_name, ([], set()))[0]
            if full_folder_path not in listed:
                listed.append(full_folder_path)

        def throw_exception_if_processing_interrupted() -> None:
            if self.cancel_at is not None and self.progress and self.progress[-1][0] >= self.cancel_at:
                raise InterruptProcessingException

        def load_models_gpu(
            models: list[Any],
            memory_required: int = 0,
            force_patch_weights: bool = False,
            minimum_memory_required: int | None = None,
            force_full_load: bool = False,
        ) -> None:
            for patcher in models:
                patcher.model.to(patcher.load_device)

        def unload_all_models() -> None:
            self.unloaded += 1

        modules: dict[str, dict[str, Any]] = {
            "folder_paths": {
                "models_dir": str(self.models_dir),
                "folder_names_and_paths": paths,
                "get_filename_list": get_filename_list,
                "get_folder_paths": lambda folder_name: list(paths[folder_name][0]),
                "add_model_folder_path": add_model_folder_path,
            },
            "comfy": {},
            "comfy.utils": {"ProgressBar": lambda total, node_id=None: SimpleNamespace(update_absolute=self._show)},
            "comfy.model_management": {
                "get_torch_device": lambda: torch.device(self.device),
                "unet_offload_device": lambda: torch.device("cpu"),
                "load_models_gpu": load_models_gpu,
                "unload_all_models": unload_all_models,
                "throw_exception_if_processing_interrupted": throw_exception_if_processing_interrupted,
            },
            "comfy.model_patcher": {"ModelPatcher": FakePatcher},
            "latent_preview": {"get_previewer": FakePreviewer},
        }
        for name, content in modules.items():
            module = ModuleType(name)
            vars(module).update(content)
            patch.setitem(sys.modules, name, module)
            if name.startswith("comfy."):
                setattr(sys.modules["comfy"], name.removeprefix("comfy."), module)

    def _show(self, value: int, total: int | None = None, preview: Any = None) -> None:
        self.progress.append((value, total or 0))
        if preview is not None:
            self.previews.append(preview[1])


class FakePatcher:
    def __init__(self, model: nn.Module, load_device: torch.device, offload_device: torch.device, size: int = 0) -> None:
        self.model, self.load_device, self.offload_device = model, load_device, offload_device


class FakePreviewer:
    """ComfyUI's Latent2RGBPreviewer."""

    def __init__(self, device: torch.device, latent_format: Any) -> None:
        assert latent_format.taesd_decoder_name is None
        self.factors = torch.tensor(latent_format.latent_rgb_factors)
        self.bias = torch.tensor(latent_format.latent_rgb_factors_bias)
        self.reshape = latent_format.latent_rgb_factors_reshape

    def decode_latent_to_preview_image(self, preview_format: str, x0: Tensor) -> tuple[str, Image.Image, int]:
        x0 = x0 if self.reshape is None else self.reshape(x0)
        colors = x0[0].movedim(0, -1) @ self.factors + self.bias
        return "JPEG", Image.fromarray(((colors + 1) / 2).clamp(0, 1).mul(255).byte().numpy()), 512


def check_inputs(graph: Graph, types_of_others: dict[str, tuple[str, ...]]) -> None:
    """Check our nodes' inputs as ComfyUI's validate_inputs does: required ones are there, values allowed, types equal.

    Args:
        types_of_others: RETURN_TYPES of the graph's nodes that are not ours.
    """
    for node in graph.values():
        if node["class_type"] not in NODE_CLASS_MAPPINGS:
            continue
        wanted = NODE_CLASS_MAPPINGS[node["class_type"]].INPUT_TYPES()
        known = wanted["required"] | wanted.get("optional", {})
        assert set(wanted["required"]) <= set(node["inputs"]) <= set(known), node
        for name, value in node["inputs"].items():
            kind, options = (*known[name], {})[:2]
            if isinstance(value, list):
                source = graph[value[0]]["class_type"]
                ours = NODE_CLASS_MAPPINGS.get(source)
                returned = types_of_others[source] if ours is None else ours.RETURN_TYPES
                assert returned[value[1]] == kind, (node, name)
            elif isinstance(kind, list):
                assert value in kind, f"Value not in list: {name}: {value!r} not in {kind}"
            else:
                assert options.get("min", value) <= value <= options.get("max", value), (node, name)


def run(graph: Graph, node: str, results: dict[str, tuple[Any, ...]]) -> tuple[Any, ...]:
    """The outputs of a node: those of the nodes before it are made first, unless they are in `results`, and kept there.

    As in ComfyUI each node is an object of its class, called with its inputs by name, in inference mode.
    """
    if node not in results:
        cls = NODE_CLASS_MAPPINGS[graph[node]["class_type"]]
        given = {
            name: run(graph, value[0], results)[value[1]] if isinstance(value, list) else value
            for name, value in graph[node]["inputs"].items()
        }
        with torch.inference_mode():
            results[node] = getattr(cls(), cls.FUNCTION)(**given)
        assert isinstance(results[node], tuple) and len(results[node]) == len(cls.RETURN_TYPES)
    return results[node]
