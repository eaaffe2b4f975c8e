"""`python -m jobs.draw "a red star on a white background"`: pictures into a folder. Needs no dataset and starts no Ray."""

import json
import re
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from jobs.common.checkpoints import find_source
from jobs.common.exit_codes import ExitCode
from jobs.common.job import report_error, run_command
from pipelines.draw.config import ControlConfig, DrawConfig, LoraFileConfig, SampleConfig, StartConfig, read_size
from pipelines.draw.prompts import names_file
from pipelines.storage.errors import is_expected
from pipelines.train.engine.checkpoint_places import is_checkpoint
from sana_model.memory import MemoryMode, Precision

TINY = "zoo://pipeline"
STDIN, STDIN_TYPED = "<stdin>", "-"
"""What `prompts` is for prompts from another program, and how it is typed; a YAML reader takes a dash for a list."""
TYPED = {
    "start.image": "--from",
    "start.mask": "--mask",
    "control.image": "--control",
    "control.controlnet": "--controlnet",
    "draw.height and draw.width": "--size",
    "draw.negative_prompt": "--negative",
    "draw.memory": "--memory",
    "draw.precision": "--precision",
    "sample.prompts": "prompts",
}
"""Settings as the sample stage calls them -> as they are typed here; for messages."""


@dataclass(frozen=True, kw_only=True)
class DrawJob:
    """Configuration of drawing into a folder.

    Args:
        prompts: what the pictures shall show, in quotes right behind the command: python -m jobs.draw "a large red
            solid star in the center of a white background". Several, each in quotes of its own, are several pictures. Or the
            name of a text file with a prompt on each line (also CSV, TSV, JSON lines); or - for prompts from another program.
        model: what draws. zoo://pipeline is small, comes along, and knows drawn shapes only. Real ones: a short name such as
            sana-1.6b-1024 (`python -m jobs.zoo published` lists them; it is fetched once, several GB), a folder, a .pth, or
            a URI; or a checkpoint of a training here, <training>/checkpoints/best.
        count: how many pictures of each prompt.
        grid: write one more file, with all pictures side by side.
        seed: a number. The same seed, prompt and settings draw the same picture again; picture i has seed + i. None: a new one
            every time; it is in the file's name.
        size: width x height in pixels, such as 1024x768; 1024 is a square. None: what the model was made for, or the size of
            the picture in `from`.
        steps: more steps draw more carefully, and take longer. None: 20, or 2 with Sana-Sprint.
        guidance: how closely the picture follows the prompt. 1 is loose; 4 to 7 are usual; much more looks harsh.
        negative: what the pictures shall not show.
        from_image: a picture to start from. May be typed --from.
        strength: how much of that picture is drawn anew, from 0 (nothing) to 1 (all). None: 0.6, or 1 with a mask.
        mask: a black and white picture of the same size as the one in `from`: white is drawn anew, black stays as it is.
        control: a picture whose outlines, edges or depth say where things are. Needs a model with a ControlNet, or
            `controlnet`.
        controlnet: the ControlNet, a folder, a file or a URI; None: the model's own.
        control_scale: how strongly it steers, 0: not at all.
        detector: what is made of the picture in `control` first: canny (edges) or hed (outlines). None: it is ready to be used.
        lora: an adapter (LoRA, LoHa, LoKr) for a style or a thing, a file, a folder or a URI; give it again for another.
            A number behind a colon says how strongly it acts, style.safetensors:0.7.
        dtype: precision of the weights; None: as they are stored. bfloat16 halves the memory of float32.
        memory: how the model fits this machine. fast: all of it in memory, in full precision. balanced: less memory, nearly the
            same pictures. small: the least memory; its parts take turns, in 8 and 4 bits, and pictures differ a little.
        precision: bits of the weights, instead of what `memory` says: full, w8a8 (8 bits, also while computing), int8, int4
            (smallest, and coarse), fp8 (NVIDIA Hopper only).
        device: cuda or cpu; None: the GPU if there is one.
        batch: pictures drawn together. More are faster on a GPU, and need more memory.
        out: the folder for the pictures. Files that are there are kept.
        dry_run: draw nothing; say how much memory and time it would take.
    """

    prompts: list[str] | str
    model: str = TINY
    count: int = 1
    grid: bool = False
    seed: int | None = None
    size: str | None = None
    steps: int | None = None
    guidance: float = 4.5
    negative: str = ""
    from_image: str | None = None
    strength: float | None = None
    mask: str | None = None
    control: str | None = None
    controlnet: str | None = None
    control_scale: float = 1.0
    detector: Literal["canny", "hed"] | None = None
    lora: list[str] = field(default_factory=list)
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    memory: MemoryMode = "fast"
    precision: Precision | None = None
    device: str | None = None
    batch: int = 4
    out: str = "pictures"
    dry_run: bool = False

    def __post_init__(self) -> None:
        for name, needed in {
            "strength": "from_image",
            "mask": "from_image",
            "detector": "control",
            "controlnet": "control",
        }.items():
            if getattr(self, name) is not None and getattr(self, needed) is None:
                shown = needed.removesuffix("_image")
                raise ValueError(f"{name}={getattr(self, name)} came without a picture: give --{shown} picture.png too")
        for name in ("count", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        read_size(self.size)

    def to_sample(self) -> SampleConfig:
        """The configuration of the sample stage that draws the same."""
        width, height = read_size(self.size)
        start = control = None
        if self.from_image is not None:
            start = StartConfig(image=self.from_image, mask=self.mask, strength=self.strength)
        if self.control is not None:
            control = ControlConfig(
                image=self.control, controlnet=self.controlnet, scale=self.control_scale, detector=self.detector
            )
        return SampleConfig(
            name="drawn",
            pipeline=self.model,
            prompts=sys.stdin.read().splitlines() if self.prompts == STDIN else self.prompts,
            images_per_prompt=self.count,
            start=start,
            control=control,
            lora=[read_lora_argument(text) for text in self.lora],
            draw=DrawConfig(
                height=height,
                width=width,
                num_steps=self.steps,
                guidance_scale=self.guidance,
                negative_prompt=self.negative,
                seed=secrets.randbelow(2**31) if self.seed is None else self.seed,
                batch_size=self.batch,
                dtype=self.dtype,
                memory=self.memory,
                precision=self.precision,
                device=self.device,
            ),
        )


def read_lora_argument(text: str) -> LoraFileConfig:
    """The adapter of "path" or "path:scale"."""
    match = re.fullmatch(r"(.+):([-+]?\d*\.?\d+)", text)
    return LoraFileConfig(path=text) if match is None else LoraFileConfig(path=match[1], scale=float(match[2]))


def run(job: DrawJob) -> ExitCode:
    """Draw, and print each file; or print what it would take."""
    config = job.to_sample()
    given = job.prompts if isinstance(job.prompts, list) else []
    if len(given) > 1 and all(text.isascii() and " " not in text for text in given):
        note(f"{len(given)} prompts of one word each: a prompt of several words needs quotes around it")
    try:
        if job.dry_run:
            if is_checkpoint(job.model):
                raise ValueError(f"model={job.model} is a training's checkpoint: dry_run takes the training's pipeline folder")
            from pipelines.draw.estimate import estimate_drawing

            print(estimate_drawing(config).describe())
            return ExitCode.DONE
        from pipelines.draw.folder import draw_into_folder

        if job.model == TINY:
            note(what_the_tiny_model_knows())
        for file in draw_into_folder(config, job.out, grid=job.grid, on_note=note, source=find_source(job.model)):
            print(file)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(as_typed(str(error))) from error
    except KeyboardInterrupt:
        print("stopped; the pictures that were finished are there", file=sys.stderr)
        return ExitCode.STOPPED
    return ExitCode.DONE


def what_the_tiny_model_knows() -> str:
    """A sentence on the shipped model, with an example."""
    from pipelines.shapes.scenes import BACKGROUNDS, KNOWN_COLORS, SHAPES

    return (
        f"{TINY} knows drawn shapes only: a {', '.join(SHAPES)} in {', '.join(KNOWN_COLORS)}, on a "
        f"{', '.join(BACKGROUNDS)} background; real models are listed by python -m jobs.zoo published"
    )


def note(text: str) -> None:
    print(f"note: {as_typed(text)}", file=sys.stderr)


def as_typed(message: str) -> str:
    """A message with the settings called as they are typed here."""
    for theirs, ours in TYPED.items():
        message = re.sub(rf"(?<![\w/.-]){re.escape(theirs)}(?![\w/.-])", ours, message)
    return message


def spell_out(arguments: list[str]) -> list[str]:
    """A designer's command line as the parser takes it: prompts by their name, `--from`, and `--lora` given several times.

    Raises ValueError for prompts both behind the command and by their name, and for a `--lora` without a value.
    """
    leading = next(
        (index for index, word in enumerate(arguments) if word.startswith("-") and word != STDIN_TYPED), len(arguments)
    )
    prompts, rest = arguments[:leading], []
    loras: list[str] = []
    words = iter(arguments[leading:])
    for word in words:
        name, equals, value = word.partition("=")
        if name == "--lora":
            given = value if equals else next(words, "")
            if not given or given.startswith("--"):
                raise ValueError("--lora: give a file, a folder or a URI behind it")
            loras += json.loads(given) if given.startswith('["') else [given]
            continue
        rest.append(f"--from_image{equals}{value}" if name == "--from" else word)
    if prompts and any(word.partition("=")[0] == "--prompts" for word in rest):
        raise ValueError(f"prompts={prompts} stand behind the command, and --prompts came too: give one of them")
    if prompts == [STDIN_TYPED]:
        rest = [f"--prompts={STDIN}", *rest]
    elif len(prompts) == 1 and names_file(prompts[0]):
        rest = [f"--prompts={prompts[0]}", *rest]
    elif prompts:
        rest = [f"--prompts={json.dumps(prompts)}", *rest]
    return [*rest, f"--lora={json.dumps(loras)}"] if loras else rest


def main(argv: Sequence[str] | None = None) -> int:
    try:
        arguments = spell_out(list(sys.argv[1:] if argv is None else argv))
    except Exception as error:
        return report_error(error, expected=is_expected(error))
    return run_command(DrawJob, run, arguments, name="draw")


if __name__ == "__main__":
    sys.exit(main())
