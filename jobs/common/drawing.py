"""What the commands that draw a table of pictures look at before Ray starts."""

from typing import TYPE_CHECKING

from jobs.common.checkpoints import find_source

if TYPE_CHECKING:
    from pipelines.draw.config import SampleConfig


def require_drawing(sample: "SampleConfig") -> bool:
    """For `run_job`'s `look_first`: raise FileNotFoundError or ValueError if the prompts or the pipeline are not there."""
    from pipelines.draw.prompts import read_prompt_set
    from pipelines.workers.models import find_place

    read_prompt_set(sample.prompts)
    if find_source(sample.pipeline) is None:
        find_place(sample.pipeline, with_version=False)
    return False
