"""The list of all commands with a line on each, in the order in which data flows, and the choice of one by name."""

import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from jobs.common.exit_codes import ExitCode
from jobs.common.pipes import outlive_readers

Lines = Mapping[str, str]
"""Names and a line on each."""

GROUPS: Mapping[str, Lines] = {
    "Raw images to a training table": {
        "ingest": "Read raw images (a folder, tars, Parquet, lists of URLs) into the images table.",
        "embed_images": "Embed every image with CLIP, for scores, heads and the search for near duplicates.",
        "score_images": "Score images alone: aesthetics, watermarks, not safe for work.",
        "duplicates": "Find images that look alike.",
        "caption": "Have VLMs caption every image, each into a table of its own.",
        "import_captions": "Take captions that others made, and their CLIP scores, into tables. Needs no Ray.",
        "score": "Score every caption against its image with CLIP, each captioner's into a table of its own.",
        "select": "Show what each selection policy would choose among the captions; makes nothing.",
        "extract": "Encode every image as DC-AE latents.",
        "embed_captions": "Compute the text encoder's output for every caption, so that training need not.",
    },
    "Training and pictures": {
        "train": "Train the linear DiT on latents, with Ray Train and DeepSpeed.",
        "train_autoencoder": "Train a DC-AE on images: its three phases, or one's own pictures on a published one.",
        "export": "Write a training's weights for diffusers, NVlabs' code or this project. Needs no Ray and no GPU.",
        "convert": "Write a model that was not trained here in another layout. Needs no Ray and no GPU.",
        "draw": "Draw pictures into a folder, at once: from words, from a picture, or into a part of one. Needs no Ray.",
        "serve": "Draw pictures over HTTP, by OpenAI's API for images, with a web page.",
        "sample": "Draw pictures of prompts, and a grid of them, as a table of a dataset.",
        "evaluate": "Judge drawn pictures by one or several metrics, each into a table of its own.",
        "best_of": "Draw several pictures of each prompt, have a judge keep the best, and say what it costs and gains.",
        "compare": "Put samples tables side by side: figures with intervals, pictures, settings, a blind vote. Needs no Ray.",
    },
    "All stages in one job": {
        "pipeline": "Run every stage, from raw images to judged pictures.",
        "demo": "Run every stage on drawn scenes or your own images, with pictures before and after training.",
        "learning": "Train a fresh transformer on drawn scenes, and measure what it has learned at each grid.",
    },
    "A dataset as it is (needs no Ray)": {
        "status": "Show every table and training: shards, rows, rejects, whether it is stale and why.",
        "verify": "Read every byte of every table, and report what is damaged or missing (exit code 1).",
        "repair": "Move damaged files aside, so that their stages make them again; nothing is deleted.",
        "lineage": "Write lineage.md and lineage.json: sources, counts, captioners' shares, models, versions.",
    },
    "Planning and measuring": {
        "plan": "Estimate the GPU hours, storage and dollars that a dataset of some size takes.",
        "benchmark": "Measure the model, a training step, a stage's overhead and the start of commands.",
        "paper": "Print the paper's checkable tables: ours beside the published numbers.",
        "zoo": "Make and measure the tiny checkpoints of sana_model/zoo.",
    },
}
PROJECT = "sana-on-ray"
COMMANDS: Lines = {name: line for lines in GROUPS.values() for name, line in lines.items()}


def program(name: str) -> str:
    """The command as a user types it."""
    return f"python -m jobs.{name}"


def choose(prog: str, groups: Mapping[str, Lines], argv: Sequence[str] | None) -> tuple[str, list[str]]:
    """The name that a command line begins with, and its other arguments.

    Without one, or with help or --help, the program ends with the list of names; with --version, with the project's; with an
    unknown name, with one line and exit code 2.
    """
    outlive_readers()
    name, *others = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    names = [name for lines in groups.values() for name in lines]
    if name in ("-h", "--help", "help"):
        print(list_names(prog, groups))
        sys.exit(ExitCode.DONE)
    if name == "--version":
        print(find_version())
        sys.exit(ExitCode.DONE)
    if name not in names:
        close = get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the names are {', '.join(names)}"
        print(f"error: {prog} has no {name!r}: {hint}", file=sys.stderr)
        sys.exit(ExitCode.USAGE)
    return name, others


def find_version() -> str:
    """The project and its version, as it was installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"{PROJECT} {version(PROJECT)}"
    except PackageNotFoundError:
        return f"{PROJECT} runs from a folder of its source, without being installed: its pyproject.toml has the version"


def list_names(prog: str, groups: Mapping[str, Lines]) -> str:
    """The names in their groups, a line on each."""
    width = max(len(name) for lines in groups.values() for name in lines)
    parts = [f"{prog} NAME [--config file.yaml] [--part.field value]; --help after a name explains its settings"]
    for title, lines in groups.items():
        parts.append("\n".join([title, *(f"  {name:<{width}}  {line}" for name, line in lines.items())]))
    return "\n\n".join(parts)
