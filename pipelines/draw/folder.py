"""Pictures drawn at once, in this process, into a folder: PNG files that say how they were drawn."""

import errno
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from math import ceil, sqrt
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from pipelines.draw.config import SampleConfig
from pipelines.draw.sampler import Drawing, PipelineSource, Sampler, find_drawing, rows_to_draw, steps_of_batch
from pipelines.tables.schema import Row
from pipelines.workers.images import image_grid
from sana_model.files.atomic import write_atomically
from sana_model.files.png import to_png

SLUG_LENGTH = 40
"""Characters of a prompt in the name of its picture."""

OnNote = Callable[[str], None]
"""Called with a sentence for the user."""


def draw_into_folder(
    config: SampleConfig, folder: str, *, grid: bool, on_note: OnNote, source: PipelineSource | None = None
) -> list[Path]:
    """Draw all pictures of a configuration, with a bar of steps, and write each as soon as it is drawn. Starts no Ray.

    A picture is the one that the sample stage draws with this configuration. Existing files are never replaced: a picture whose
    name is taken gets a number behind it, unless the file is the very same.

    Args:
        folder: a local folder; made if it is not there.
        grid: write all pictures side by side too.
        source: how to load what `config.pipeline` names; None: by this name.

    Returns the files, the grid last. Raises what `find_drawing` and `Sampler` raise; ValueError if the folder cannot be
    written, or if a picture cannot be drawn.
    """
    check_folder(folder)
    drawing = find_drawing(config, source, with_versions=False)
    with _telling(on_note):
        files = [_write(Path(folder), _name(row), row["image_bytes"]) for row in _draw(drawing, on_note)]
    if grid:
        images = [Image.open(BytesIO(file.read_bytes())) for file in files]
        files.append(_write(Path(folder), "grid", to_png(image_grid(images, _columns(len(images))))))
    return files


def check_folder(folder: str) -> None:
    """Make the folder, and raise ValueError if nothing can be written there."""
    if "://" in folder:
        raise ValueError(f"out={folder} is a URI: give a folder of this machine")
    with _naming(Path(folder), "cannot be written"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def _draw(drawing: Drawing, on_note: OnNote) -> Iterator[Row]:
    """The rows of samples, one batch after another."""
    config, size = drawing.config, drawing.config.draw.batch_size
    count = len(drawing.prompts.prompts) * config.images_per_prompt
    on_note(f"loading {config.pipeline}")
    sampler = Sampler(config, drawing.pipeline, drawing.start, drawing.control, drawing.loras)
    with tqdm(total=steps_of_batch(config) * -(-count // size), desc=f"drawing {count}", unit="step") as bar:
        sampler.on_step = lambda index, latents: bar.update()
        for first in range(0, count, size):
            output = sampler.process(rows_to_draw(drawing.prompts, config, first, size))
            yield from list(output.rows)
            for refused in output.rejects:
                raise ValueError(f"{refused['id']}: {refused['reject_reason']}, {refused['detail']}")


def _name(row: Row) -> str:
    slug = re.sub(r"[\W_]+", "-", row["prompt"].lower()).strip("-")[:SLUG_LENGTH].strip("-")
    return f"{slug or 'picture'}-{row['seed']}"


def _columns(count: int) -> int:
    """As many as make a grid about square, 8 at most."""
    return min(8, ceil(sqrt(count)))


def _write(folder: Path, name: str, content: bytes) -> Path:
    number, file = 1, folder / f"{name}.png"
    while file.exists() and file.read_bytes() != content:
        number += 1
        file = folder / f"{name}-{number}.png"
    with _naming(file, "cannot be written; those before it are there"):
        write_atomically(file, lambda temporary: temporary.write_bytes(content))
    return file


@contextmanager
def _naming(place: Path, what: str) -> Iterator[None]:
    """Within, an error of the file system becomes a ValueError that names the place and what to do."""
    try:
        yield
    except OSError as error:
        advice = "free some space or give another folder" if error.errno == errno.ENOSPC else "give another folder"
        raise ValueError(f"{place} {what} ({error.strerror}): {advice}") from error


@contextmanager
def _telling(on_note: OnNote) -> Iterator[None]:
    """Within, warnings for users become notes."""
    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: object, **more: object) -> None:
        if category is UserWarning:
            on_note(str(message))
        else:
            usual(message, category, *place, **more)  # type: ignore[arg-type]

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
