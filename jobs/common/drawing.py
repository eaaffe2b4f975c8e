"""What the commands that draw a table of pictures share: what they look at before Ray starts, and the sheet of pictures."""

from typing import TYPE_CHECKING

from jobs.common.checkpoints import find_source

if TYPE_CHECKING:
    from PIL import Image

    from pipelines.draw.config import SampleConfig
    from pipelines.tables.table import Table

GRID = "grid.png"
"""The file beside a samples table with a sheet of its first pictures."""


def require_drawing(sample: "SampleConfig") -> bool:
    """For `run_job`'s `look_first`: raise FileNotFoundError or ValueError if the prompts or the pipeline are not there."""
    from pipelines.draw.prompts import read_prompt_set
    from pipelines.workers.models import find_place

    read_prompt_set(sample.prompts)
    if find_source(sample.pipeline) is None:
        find_place(sample.pipeline, with_version=False)
    return False


def write_grid(table: "Table") -> "Image.Image":
    """Put a sheet of the first pictures of a samples table beside it, as GRID, and return it."""
    from pipelines.draw.sample import read_pictures
    from pipelines.workers.images import image_grid, to_png

    grid = image_grid(read_pictures(table)[1])
    table.write_file(GRID, to_png(grid))
    return grid
