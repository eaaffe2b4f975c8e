"""What fewer bits cost and save: SQNR of layers, pictures, bytes on disk, peak memory and time, on the CPU."""

import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from jobs.benchmark.config import FittingConfig
from jobs.benchmark.inputs import make_text_encoder, make_transformer_inputs
from jobs.benchmark.tiling import RETURN_FREED
from jobs.benchmark.timing import measure_seconds
from jobs.benchmark.turns import in_turns
from jobs.common.text_table import format_table
from pipelines.evaluate.shapes import AttributeJudge
from pipelines.workers.clip import ClipModel
from pipelines.zoo.transformer import draw_and_judge
from sana_model.memory import MemoryMode, Precision
from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.nn.quantized import FULL_IN_BLOCKS, QuantizedLinear, linear_layers, quantize_blocks
from sana_model.nn.transformer import SanaTransformer
from sana_model.pipeline import TextToImage

PRECISIONS: tuple[Precision, ...] = ("w8a8", "int8", "int4")
GUIDANCE_SCALE = 4.0
DRAW = """
import re, sys, threading, time, torch
from sana_model.pipeline import TextToImage
def kib(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read()).group(1))
import sana_model.files.models
before, own_before, own = kib("VmHWM"), kib("RssAnon"), 0
def watch():
    global own
    while True:
        own = max(own, kib("RssAnon"))
        time.sleep(0.02)
threading.Thread(target=watch, daemon=True).start()
folder, memory, precision, size, steps = *sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5])
model = TextToImage.from_pretrained(folder, memory=memory, precision=precision or None)
loaded = kib("VmHWM")
model(["w1 w2 w3"], size, size, num_steps=steps, seed=0)
print((loaded - before) / 1024, (kib("VmHWM") - before) / 1024, (own - own_before) / 1024)
"""


def benchmark_fitting(config: FittingConfig) -> None:
    """Print the tables that the configuration asks for. Pictures are of the zoo's pipeline, all else of random weights."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads, {config.preset}", flush=True)
    if "layers" in config.parts:
        print_layers(config)
    if "pictures" in config.parts:
        print_pictures(config)
    if "time" in config.parts:
        print_times(config)
    if "memory" in config.parts:
        with tempfile.TemporaryDirectory(dir=config.folder) as folder:
            print_memory(config, Path(folder))


def layer_sqnr(model: SanaTransformer, run: Callable[[], object]) -> dict[str, dict[Precision, float]]:
    """Signal over quantization noise, in dB, of the outputs of each class of layers, given the inputs that `run` gives them."""
    energies: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    hooks = []

    def watch(name: str, layer: nn.Linear) -> None:
        smaller = {precision: QuantizedLinear(layer, precision) for precision in PRECISIONS}

        def compare(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            energies[name]["signal"] += float(output.float().square().sum())
            for precision, quantized in smaller.items():
                energies[name][precision] += float((quantized(inputs[0]).float() - output.float()).square().sum())

        hooks.append(layer.register_forward_hook(compare))

    for name, layer in linear_layers(cast(nn.Module, model.blocks), FULL_IN_BLOCKS):
        watch(name.partition(".")[2], layer)
    with torch.inference_mode():
        run()
    for hook in hooks:
        hook.remove()
    return {
        name: {precision: 10 * float(np.log10(found["signal"] / found[precision])) for precision in PRECISIONS}
        for name, found in energies.items()
    }


def print_layers(config: FittingConfig) -> None:
    """SQNR by class of layer, for the zoo's pipeline while it draws, and for the preset with random weights."""
    zoo = TextToImage.from_pretrained("zoo://pipeline")
    prompts = ["a large red solid star in the center of a white background"]
    tables = {"zoo://pipeline": layer_sqnr(zoo.transformer, lambda: zoo(prompts, num_steps=20, seed=0))}
    model, inputs = _random_transformer(config, depth=config.depth)
    tables[f"{config.preset}, random, {config.depth} blocks, {config.size} px"] = layer_sqnr(model, lambda: model(*inputs))
    for title, table in tables.items():
        rows = [[name, *(f"{found[precision]:.1f}" for precision in PRECISIONS)] for name, found in table.items()]
        print(f"\nSQNR of layers' outputs, dB: {title}\n{format_table(['layer', *PRECISIONS], rows)}", flush=True)


def print_pictures(config: FittingConfig) -> None:
    """PSNR against full precision and attributes that are right, of the zoo's pipeline."""
    judge = AttributeJudge(ClipModel("zoo://clip"))
    settings: list[tuple[str, MemoryMode, Precision | None]] = [("fast, full", "fast", "full")]
    settings += [(f"fast, {precision}", "fast", precision) for precision in PRECISIONS]
    settings += [("balanced", "balanced", None), ("small", "small", None)]
    rows, reference = [], None
    for title, memory, precision in tqdm(settings, desc="pictures", leave=False):
        pipeline = TextToImage.from_pretrained("zoo://pipeline", memory=memory, precision=precision)
        images, right = draw_and_judge(pipeline, judge, first=10_000_000, count=config.pictures, guidance_scale=GUIDANCE_SCALE)
        values = np.stack([np.asarray(image, dtype=np.float64) for image in images])
        reference = values if reference is None else reference
        error = np.square(values - reference).mean()
        psnr = f"{10 * np.log10(255**2 / error):.1f}" if error else "-"
        rows.append([title, psnr, *(f"{100 * value:.1f}" for value in right.values())])
    print(f"\n{config.pictures} pictures of zoo://pipeline: PSNR in dB, and attributes that are right in %")
    print(format_table(["", "PSNR", *right], rows), flush=True)


def print_times(config: FittingConfig) -> None:
    """Medians of a forward in each precision, and their ratios to bfloat16, in turns."""
    models: dict[str, Any] = {"bfloat16": _random_transformer(config, depth=config.depth)[0]}
    for precision in PRECISIONS:
        models[precision], inputs = _random_transformer(config, depth=config.depth)
        quantize_blocks(models[precision], precision)
    forwards = {name: partial(measure_seconds, partial(model, *inputs), torch.device("cpu")) for name, model in models.items()}
    with torch.inference_mode():
        seconds = in_turns(forwards, config.repeats, label="forward", warm_up=True)
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    rows = [[name, f"{1000 * value:.0f} ms", f"{medians['bfloat16'] / value:.2f}x"] for name, value in medians.items()]
    print(f"\na forward at {config.size} px, {config.depth} blocks\n{format_table(['', 'median', 'speed'], rows)}", flush=True)


def print_memory(config: FittingConfig, folder: Path) -> None:
    """Bytes on disk and peak memory of drawing one picture, each way in a process of its own.

    Resident memory includes the weights' files, which are mapped: the system drops their pages where memory is short. The last
    column is what it cannot drop.

    Weights of fewer bits are saved first, and loaded from there, but in one way, which makes them while it loads.
    """
    _random_pipeline(config).save_pretrained(folder / "full")
    ways: list[tuple[str, MemoryMode, Precision | None, bool]] = [
        ("bfloat16", "fast", "full", False),
        ("bfloat16, one part at a time", "small", "full", False),
        ("small", "small", None, True),
        ("small, made while loading", "small", None, False),
        ("int8", "fast", "int8", True),
        ("int4", "fast", "int4", True),
        ("balanced", "balanced", None, True),
    ]
    print(f"\ndrawing {config.size} px, {config.steps} steps, text encoder of {config.text_layers} layers, MiB", flush=True)
    rows = []
    for title, memory, precision, is_saved in tqdm(ways, desc="memory", leave=False):
        place = folder / "full"
        if is_saved:
            place = folder / f"{memory}-{precision}"
            TextToImage.from_pretrained(folder / "full", memory=memory, precision=precision).save_pretrained(place)
        disk = sum(file.stat().st_size for file in place.rglob("*.safetensors")) / 2**20
        rows.append([title, f"{disk:.0f}", *(f"{peak:.0f}" for peak in _drawing_peaks(config, place, memory, precision))])
        print(" ".join(rows[-1]), flush=True)
    print(format_table(["", "on disk", "resident: loaded", "drawing", "not in files"], rows), flush=True)


def _drawing_peaks(config: FittingConfig, folder: Path, memory: MemoryMode, precision: Precision | None) -> Sequence[float]:
    """MiB above what the libraries take: resident at the peak of loading, of all, and at the peak outside of mapped files."""
    arguments = [str(folder), memory, precision or "", str(config.size), str(config.steps)]
    environment = {**os.environ, **RETURN_FREED}
    run = subprocess.run([sys.executable, "-c", DRAW, *arguments], capture_output=True, text=True, env=environment)
    if run.returncode:
        raise RuntimeError(f"drawing with memory={memory} ended with {run.returncode}: {run.stderr[-500:]}")
    return [float(word) for word in run.stdout.split()]


def _random_transformer(config: FittingConfig, *, depth: int) -> tuple[SanaTransformer, tuple[Tensor, ...]]:
    """The preset with random weights in bfloat16, and inputs of a guided picture (two of a batch)."""
    torch.manual_seed(0)
    model = SanaTransformer.from_preset(config.preset, depth=depth).bfloat16().eval().requires_grad_(False)
    return model, make_transformer_inputs(model, config.size, 2)


def _random_pipeline(config: FittingConfig) -> TextToImage:
    """All three parts with random weights in bfloat16; the text encoder has the width and the vocabulary of gemma-2-2b."""
    transformer, _ = _random_transformer(config, depth=config.memory_depth)
    encoder, _ = make_text_encoder(torch.device("meta"), torch.bfloat16, config.text_layers, 1, vocabulary_size=256_000)
    encoder.model.to_empty(device="cpu")
    for module in encoder.model.modules():
        if any(True for _ in module.buffers(recurse=False)):
            encoder.model._init_weights(module)
    for weight in encoder.model.parameters():
        weight.data.uniform_(-0.02, 0.02)
    return TextToImage(transformer, DCAutoencoder.from_preset("dc-ae-f32c32-sana-1.1").bfloat16(), encoder)
