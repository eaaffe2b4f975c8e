"""Peak memory of DC-AE with and without tiles."""

import os
import subprocess
import sys
from collections.abc import Sequence

from tqdm import tqdm

from jobs.benchmark.config import TilingConfig

MEASURE = """
import re, sys, torch
from sana_model.nn.autoencoder import DCAutoencoder
what, preset, dtype = sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3])
model = DCAutoencoder.from_preset(preset).to(dtype).eval()
factor, channels = model.compression, model.config.latent_channels
def memory_kib(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read()).group(1))
for run in sys.argv[4:]:
    size, tile = map(int, run.split(":"))
    shape = (1, 3, size, size) if what == "encode" else (1, channels, size // factor, size // factor)
    x = torch.randn(shape, dtype=dtype)
    open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
    before = memory_kib("VmRSS")
    with torch.no_grad():
        getattr(model, what)(x, tile_size=tile or None)
    print((memory_kib("VmHWM") - before) / 1024)
"""
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""For glibc: what is freed goes back at once, so that the peak is what is in use, the same in every run."""


def peaks_mib(what: str, runs: Sequence[tuple[int, int | None]], preset: str, dtype: str) -> list[float]:
    """MiB by which encoding or decoding raises a fresh process's peak over what the loaded model takes (CPU, Linux).

    Args:
        what: "encode" or "decode".
        runs: the image's side and the tile's (None: no tiles), in pixels; one after another, in the same process.
    """
    arguments = [what, preset, dtype, *(f"{size}:{tile or 0}" for size, tile in runs)]
    environment = {**os.environ, **RETURN_FREED}
    run = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, env=environment)
    if run.returncode:
        raise RuntimeError(f"{what} at {runs} px ended with {run.returncode}: {run.stderr[-500:]}")
    return [float(line) for line in run.stdout.splitlines()]


def benchmark_tiling(config: TilingConfig) -> None:
    """Print the peak memory of encode and decode in one piece and in tiles, each in a process of its own, on the CPU."""
    tile, preset, dtype = config.tile, config.preset, config.dtype
    print(f"{preset}, {dtype}: peak MiB above the loaded model")
    print(f"{'':14}{'whole':>10}{f'tile {tile}':>12}{'image':>10}")
    for what in ("encode", "decode"):
        for size in tqdm(config.sizes, desc=what, leave=False):
            in_one = f"{peaks_mib(what, [(size, None)], preset, dtype)[0]:.0f}" if config.whole else "-"
            image = 3 * size * size * (4 if dtype == "float32" else 2) / 2**20
            (tiled,) = peaks_mib(what, [(size, tile)], preset, dtype)
            print(f"{what} {size:<7}{in_one:>10}{tiled:>12.0f}{image:>10.0f}", flush=True)
