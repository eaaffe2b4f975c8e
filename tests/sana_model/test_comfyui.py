"""The nodes for ComfyUI, driven as ComfyUI drives them, against `TextToImage`. Their host is a stand-in (`fake_comfy`)."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

import sana_model.comfyui
from sana_model.comfyui import files
from sana_model.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from sana_model.comfyui.tensors import from_pictures
from sana_model.nn.controlnet import SanaControlNet
from sana_model.nn.quantized import precision_of
from sana_model.nn.transformer import SanaTransformer
from sana_model.pipeline import TextToImage
from sana_model.previews import fit_colors
from tests.support.fake_comfy import FakeComfy, Graph, InterruptProcessingException, check_inputs, run

FOLDER = Path(sana_model.comfyui.__file__).parent
WORKFLOWS = sorted((FOLDER / "workflows" / "api").glob("*.json"))
OF_COMFY = {
    "SaveImage": (),
    "PreviewImage": (),
    "SolidMask": ("MASK",),
    "MaskComposite": ("MASK",),
    "ImageCompositeMasked": ("IMAGE",),
    "Canny": ("IMAGE",),
}
"""RETURN_TYPES of ComfyUI's own nodes that the workflows use."""
CONTROL_AFTER_GENERATE = ("fixed", "randomize", "increment", "decrement")
"""What ComfyUI's page keeps behind a seed."""
PROMPT = "a large red circle on a white background"


@pytest.fixture(scope="module")
def model() -> TextToImage:
    return TextToImage.from_pretrained("zoo://pipeline")


@pytest.fixture
def comfy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeComfy:
    found = FakeComfy(tmp_path / "models")
    found.install(monkeypatch)
    return found


def workflow(name: str) -> Graph:
    return json.loads((FOLDER / "workflows" / "api" / f"{name}.json").read_text())


def save_lora(model: TextToImage, folder: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    dim = model.transformer.config.dim
    shapes = {"lora_A": (4, dim), "lora_B": (dim, 4)}
    tensors = {
        f"transformer.transformer_blocks.{index}.attn1.to_out.0.{part}.weight": torch.randn(shape, generator=generator) / 8
        for index in range(model.transformer.config.depth)
        for part, shape in shapes.items()
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "style.safetensors")
    return folder / "style.safetensors"


def save_controlnet(model: TextToImage, folder: Path) -> Path:
    controlnet = SanaControlNet.from_transformer(model.transformer, depth=1)
    generator = torch.Generator().manual_seed(0)
    for weight in controlnet.parameters():
        if not weight.any():
            weight.data.normal_(std=0.05, generator=generator)
    controlnet.save_pretrained(folder / "sana_controlnet")
    return folder / "sana_controlnet"


def assert_same(images: torch.Tensor, pictures: list[Image.Image]) -> None:
    """Within 1/255, which rounding makes."""
    assert images.dtype == torch.float32 and images.shape == from_pictures(pictures).shape
    assert (images - from_pictures(pictures)).abs().max() <= 1 / 255
    assert all(np.asarray(picture).std() > 10 for picture in pictures)


def test_text_to_image_draws_what_the_pipeline_draws_with_progress_and_previews(comfy: FakeComfy, model: TextToImage) -> None:
    graph = workflow("text_to_image")
    graph["4"]["inputs"]["steps"] = 6
    (images,) = run(graph, "5", {})
    expected = model([PROMPT], 64, 64, seed=0, num_steps=6, num_images_per_prompt=2)
    assert_same(images, expected)
    assert comfy.progress == [(step, 6) for step in range(1, 7)] and len(comfy.previews) == 6
    small = np.asarray(expected[0].resize(comfy.previews[-1].size, Image.Resampling.BOX))
    assert np.corrcoef(np.asarray(comfy.previews[-1])[..., 1].flat, small[..., 1].flat)[0, 1] > 0.6  # no green in the circle


def test_a_masked_part_is_drawn_anew_as_the_pipeline_does(comfy: FakeComfy, model: TextToImage) -> None:
    start = model([PROMPT], 64, 64, seed=0, num_steps=6)[0]
    mask = Image.new("L", start.size)
    mask.paste(255, (32, 0, 64, 64))
    graph = workflow("image_to_image_with_mask")
    graph["12"]["inputs"]["steps"] = 6
    given = {"5": (from_pictures([start]),), "9": (from_pictures([mask]),)}
    results: dict[str, tuple[Any, ...]] = dict(given)
    (drawn,) = run(graph, "13", results)
    _, pixels, fitted = results["10"]
    put_back = torch.where(fitted[..., None] > 0, drawn, pixels)  # ComfyUI's ImageCompositeMasked, with a mask without gray
    words = graph["11"]["inputs"]["text"]
    assert_same(put_back, model([words], image=start, mask=mask, strength=0.9, seed=1, num_steps=6))
    assert comfy.progress[-1] == (6, 6)

    unmasked = run({**graph, "10": {**graph["10"], "inputs": {"pixels": ["5", 0], "model": ["1", 0]}}}, "13", {**given})[0]
    assert_same(unmasked, model([words], image=start, strength=0.9, seed=1, num_steps=6))


def test_a_picture_of_another_size_is_cut_and_a_mask_of_another_size_is_scaled(comfy: FakeComfy) -> None:
    (loaded,) = NODE_CLASS_MAPPINGS["SanaOnRayLoader"]().load("zoo://pipeline", "auto")
    pixels, mask = torch.rand(2, 67, 50, 3), torch.zeros(1, 64, 64)
    latent, fitted, fitted_mask = NODE_CLASS_MAPPINGS["SanaOnRayEncode"]().encode(pixels, loaded, mask)
    assert latent["samples"].shape == (2, 8, 8, 6) and latent["noise_mask"].shape == (2, 1, 64, 48)
    assert fitted.shape == (2, 64, 48, 3) and fitted_mask.shape == (2, 64, 48)
    decode = NODE_CLASS_MAPPINGS["SanaOnRayDecode"]()
    whole, tiled = (decode.decode(latent, loaded, tile_size, 0)[0] for tile_size in (0, 32))
    assert whole.shape == (2, 64, 48, 3) and (whole - tiled).abs().max() > 0 and (whole - tiled).abs().mean() < 0.1


def test_adapter_and_controlnet_steer_as_in_the_pipeline_and_leave_the_model_as_it_was(
    comfy: FakeComfy, model: TextToImage
) -> None:
    lora, controlnet = (
        save_lora(model, comfy.models_dir / "loras"),
        save_controlnet(model, comfy.models_dir / "controlnet"),
    )
    graph = workflow("controlnet_and_lora")
    check_inputs(graph, OF_COMFY)
    graph["12"]["inputs"]["steps"] = 4
    edges = Image.new("RGB", (64, 64))
    edges.paste((255, 255, 255), (20, 20, 44, 44))
    results: dict[str, tuple[Any, ...]] = {"7": (from_pictures([edges]),)}
    (images,) = run(graph, "13", results)

    other = TextToImage.from_pretrained("zoo://pipeline", controlnet=controlnet)
    other.load_lora(lora, scale=0.8)
    settings: dict[str, Any] = {"seed": 1, "num_steps": 4, "height": 64, "width": 64}
    words = [graph["10"]["inputs"]["text"]]
    assert_same(images, other(words, control_image=edges, **settings))
    for less in ({"control_image": edges, "control_scale": 0}, {}):  # both are seen
        if not less:
            other.unload_lora()
        assert (from_pictures(other(words, **settings, **less)) - images).abs().max() > 0.05

    graph["12"]["inputs"] |= {"model": ["1", 0], "conditioning": ["10", 0]}
    graph["10"]["inputs"]["model"] = ["1", 0]
    results = {name: results[name] for name in ("1", "3")}
    assert_same(run(graph, "13", results)[0], model(words, **settings))


def test_cancelling_stops_at_the_next_step_and_takes_the_adapter_off(comfy: FakeComfy, model: TextToImage) -> None:
    save_lora(model, comfy.models_dir / "loras")
    graph = workflow("controlnet_and_lora")
    graph["12"]["inputs"]["conditioning"] = ["10", 0]
    results: dict[str, tuple[Any, ...]] = {}
    comfy.cancel_at = 3
    with pytest.raises(InterruptProcessingException):
        run(graph, "12", results)
    assert comfy.progress[-1] == (3, 20)
    transformer = results["1"][0].loaded.pipeline.transformer
    assert not any(hasattr(module, "lora") for module in transformer.modules())


def test_sprint_draws_with_its_own_sampler_and_takes_no_negative_prompt(comfy: FakeComfy, model: TextToImage) -> None:
    torch.manual_seed(0)
    config = replace(model.transformer.config, guidance_embeds=True, time_input="unit")
    sprint = TextToImage(SanaTransformer(config), model.autoencoder, model.text_encoder)
    sprint.save_pretrained(comfy.models_dir / "sana" / "my" / "sprint")
    graph = workflow("text_to_image")
    graph["1"]["inputs"]["ckpt_name"] = "my/sprint"
    graph["4"]["inputs"]["steps"] = 0
    check_inputs(graph, OF_COMFY)
    results: dict[str, tuple[Any, ...]] = {}
    run(graph, "5", results)
    expected = sprint([PROMPT], 64, 64, seed=0, num_images_per_prompt=2)
    assert (results["5"][0] - from_pictures(expected)).abs().max() <= 1 / 255
    assert comfy.progress == [(1, 2), (2, 2)]
    graph["2"]["inputs"]["negative"] = "blue"
    with pytest.raises(ValueError, match="takes neither a negative_prompt"):
        run(graph, "4", {"1": results["1"]})


def test_a_memory_mode_draws_what_the_pipeline_draws_in_it(comfy: FakeComfy) -> None:
    graph = workflow("text_to_image")
    graph["1"]["inputs"] |= {"memory": "small", "precision": "int8"}
    graph["3"]["inputs"]["batch_size"] = 1
    graph["4"]["inputs"]["steps"] = 2
    check_inputs(graph, OF_COMFY)
    (images,) = run(graph, "5", {})
    small = TextToImage.from_pretrained("zoo://pipeline", memory="small", precision="int8")
    assert_same(images, small([PROMPT], 64, 64, seed=0, num_steps=2))
    assert comfy.unloaded == 4  # ComfyUI's models made room at each node but that of the empty latent


def test_a_controlnet_has_the_precision_of_its_model(comfy: FakeComfy, model: TextToImage) -> None:
    save_controlnet(model, comfy.models_dir / "controlnet")
    loaded = NODE_CLASS_MAPPINGS["SanaOnRayLoader"]().load("zoo://pipeline", "auto", precision="int8")
    (controlnet,) = NODE_CLASS_MAPPINGS["SanaOnRayControlNetLoader"]().load_controlnet(*loaded, "sana_controlnet")
    assert precision_of(controlnet.controlnet) == "int8"


def test_what_comfyui_moves_is_not_on_its_device_before(comfy: FakeComfy) -> None:
    comfy.device = "meta"
    (loaded,) = NODE_CLASS_MAPPINGS["SanaOnRayLoader"]().load("zoo://pipeline", "auto")
    pipeline = loaded.loaded.pipeline
    assert {tensor.device.type for tensor in (*pipeline.parameters(), *pipeline.buffers())} == {"cpu"} and not comfy.unloaded


def test_the_instruction_can_be_left_out(comfy: FakeComfy, model: TextToImage) -> None:
    graph = workflow("text_to_image")
    graph["2"]["inputs"]["complex_human_instruction"] = False
    (conditioning,) = run(graph, "2", {})
    torch.testing.assert_close(conditioning.captions[0], model.text_encoder.encode([PROMPT], use_instruction=False)[0])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_workflows_give_the_nodes_what_they_take(comfy: FakeComfy, path: Path) -> None:
    for name in ("loras/style.safetensors", "controlnet/sana_controlnet/config.json"):
        (comfy.models_dir / name).parent.mkdir(parents=True)
        (comfy.models_dir / name).write_text("{}")
    graph = json.loads(path.read_text())
    check_inputs(graph, OF_COMFY)
    assert {node["class_type"] for node in graph.values()} <= {*NODE_CLASS_MAPPINGS, *OF_COMFY}


def test_what_comfyui_keeps_can_be_chosen_and_is_found(comfy: FakeComfy) -> None:
    for name in (
        "checkpoints/a/Sana_600M_512px.pth",
        "checkpoints/notes.txt",
        "diffusers/theirs/model_index.json",
        "diffusers/theirs/vae/config.json",
        "sana/ours/pipeline.json",
        "vae/dc-ae.safetensors",
        "text_encoders/gemma/config.json",
    ):
        (comfy.models_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (comfy.models_dir / name).write_text("{}")
    listed = files.list_checkpoints()
    assert listed[:4] == ["zoo://pipeline", "ours", "theirs", "a/Sana_600M_512px.pth"]
    assert "sana-1.6b-1024" in listed and "notes.txt" not in listed
    assert files.find_checkpoint("theirs") == str(comfy.models_dir / "diffusers" / "theirs")
    assert files.find_checkpoint("sana-1.6b-1024") == "sana-1.6b-1024"
    assert files.list_autoencoders() == ["own", "dc-ae.safetensors"] and files.list_text_encoders() == ["own", "gemma"]
    loader = NODE_CLASS_MAPPINGS["SanaOnRayLoader"]
    before = loader.IS_CHANGED(ckpt_name="ours", dtype="auto")
    assert loader.IS_CHANGED(ckpt_name="ours", dtype="auto") == before
    (comfy.models_dir / "sana/ours/pipeline.json").write_text("{} ")
    assert loader.IS_CHANGED(ckpt_name="ours", dtype="auto") != before
    for part in ({"vae_name": "dc-ae.safetensors"}, {"text_encoder_name": "gemma"}):
        before = loader.IS_CHANGED(ckpt_name="ours", **part)
        kind, name = ("vae", "dc-ae.safetensors") if "vae_name" in part else ("text_encoders", "gemma/config.json")
        (comfy.models_dir / kind / name).write_text("{} ")
        assert loader.IS_CHANGED(ckpt_name="ours", **part) != before


def test_wrong_files_and_latents_are_named(comfy: FakeComfy) -> None:
    (comfy.models_dir / "checkpoints").mkdir(parents=True)
    save_file({"model.diffusion_model.input_blocks.0.weight": torch.ones(2)}, comfy.models_dir / "checkpoints/sdxl.safetensors")
    loader = NODE_CLASS_MAPPINGS["SanaOnRayLoader"]()
    with pytest.raises(ValueError, match=r"sdxl\.safetensors"):
        loader.load("sdxl.safetensors", "auto")
    with pytest.raises(FileNotFoundError, match=r"'gone\.safetensors' is in none of ComfyUI's folders vae"):
        loader.load("zoo://pipeline", "auto", vae_name="gone.safetensors")
    graph = workflow("text_to_image")
    results: dict[str, tuple[Any, ...]] = {"3": ({"samples": torch.zeros(1, 4, 64, 64)},)}
    with pytest.raises(ValueError, match=r"\(1, 4, 64, 64\).*Sana Empty Latent"):
        run(graph, "4", results)


def test_fitted_colors_are_near_those_of_other_pictures(model: TextToImage) -> None:
    factors, bias = fit_colors(model.autoencoder)
    images = F.interpolate(torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(1)) * 2 - 1, (64, 64), mode="bicubic")
    with torch.inference_mode():
        latents = model.autoencoder.encode(images.clamp(-1, 1).to(model.autoencoder.decoder.conv_in.weight)).float()
    colors, true = torch.einsum("bchw,cd->bdhw", latents, factors) + bias[:, None, None], F.avg_pool2d(images, 8)
    assert (colors - true).square().mean() < 0.3 * (true - true.mean((0, 2, 3), keepdim=True)).square().mean()


def test_a_link_to_the_folder_installs_the_nodes(tmp_path: Path) -> None:
    """ComfyUI imports `__init__.py` by its path; the package is not installed, and is found where the link leads."""
    (tmp_path / "sana").symlink_to(FOLDER)
    program = f"""
import sys, types
from importlib.util import module_from_spec, spec_from_file_location
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.path = [folder for folder in sys.path if folder not in ("", {str(FOLDER.parents[1])!r})]
nodes = types.ModuleType("sana_model.comfyui.nodes")  # its imports take long
nodes.NODE_CLASS_MAPPINGS, nodes.NODE_DISPLAY_NAME_MAPPINGS = {{"a": 1}}, {{"a": "A"}}
sys.modules[nodes.__name__] = nodes
spec = spec_from_file_location({str(tmp_path / "sana")!r}, {str(tmp_path / "sana" / "__init__.py")!r})
module = module_from_spec(spec)
spec.loader.exec_module(module)
import sana_model
assert sana_model.__file__ == {str(FOLDER.parent / "__init__.py")!r}
assert module.NODE_CLASS_MAPPINGS == {{"a": 1}} and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


def test_every_node_has_a_name_and_says_what_it_does() -> None:
    assert set(NODE_CLASS_MAPPINGS) == set(NODE_DISPLAY_NAME_MAPPINGS)
    for node in NODE_CLASS_MAPPINGS.values():
        assert node.DESCRIPTION and node.CATEGORY and hasattr(node, node.FUNCTION)
        assert len(getattr(node, "RETURN_NAMES", node.RETURN_TYPES)) == len(node.RETURN_TYPES)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_for_the_page_is_the_one_of_the_api(comfy: FakeComfy, path: Path) -> None:
    graph = json.loads(path.read_text())
    page = json.loads((FOLDER / "workflows" / path.name).read_text())
    links = {number: [str(source), slot] for number, source, slot, *_ in page["links"]}
    assert {str(node["id"]): node["type"] for node in page["nodes"]} == {key: node["class_type"] for key, node in graph.items()}
    for node in page["nodes"]:
        inputs = graph[str(node["id"])]["inputs"]
        linked = {slot["name"]: links[slot["link"]] for slot in node["inputs"] if slot["link"] is not None}
        assert linked == {name: value for name, value in inputs.items() if isinstance(value, list)}
        values = [value for value in node.get("widgets_values", []) if value not in CONTROL_AFTER_GENERATE]
        assert values == [inputs[slot["name"]] for slot in node["inputs"] if "widget" in slot]
