"""`python -m jobs.zoo clip|autoencoder|text_encoder|captioner|transformer|measure`: makes and measures the tiny checkpoints."""

import json
import sys
from pathlib import Path

from jsonargparse import auto_cli

from pipelines.zoo.autoencoder import train_autoencoder
from pipelines.zoo.captioner_training import train_captioner
from pipelines.zoo.clip import train_clip
from pipelines.zoo.gates import GATES, measure_zoo
from pipelines.zoo.text_encoder import train_text_encoder
from pipelines.zoo.transformer import train_transformer
from sana_model.files.places import ZOO_DIR


def measure(zoo_dir: str = str(ZOO_DIR), output: str = "outputs/zoo/figures.json", grid: str = "outputs/zoo/grid.png") -> None:
    """Measure every gate on held-out scenes; the program ends with 1 if one is missed.

    Args:
        zoo_dir: the folder of the checkpoints.
        output: where the figures go, as JSON.
        grid: where pictures that the transformer drew go.
    """
    for path in (output, grid):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    figures = measure_zoo(zoo_dir, grid=grid)
    Path(output).write_text(json.dumps(figures, indent=2) + "\n")
    missed = [gate for gate in GATES if not gate.is_kept(figures)]
    for gate in GATES:
        verdict = "MISSED" if gate in missed else "kept"
        print(f"{gate.name:<32} {figures[gate.name]:.3f}  in [{gate.lowest:g}, {gate.highest:g}]  {verdict}")
    if missed:
        sys.exit(1)


if __name__ == "__main__":
    auto_cli(
        {
            "clip": train_clip,
            "autoencoder": train_autoencoder,
            "text_encoder": train_text_encoder,
            "captioner": train_captioner,
            "transformer": train_transformer,
            "measure": measure,
        },
        prog="python -m jobs.zoo",
    )
