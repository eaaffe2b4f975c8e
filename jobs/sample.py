"""`python -m jobs.sample --config jobs/configs/sample.yaml`: prompts -> pictures and a grid."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.common.job import JobConfig, run_job
from jobs.common.stage_job import track_stage
from pipelines.draw.config import SampleConfig
from pipelines.stages.contract import StageResult

if TYPE_CHECKING:
    from pipelines.tracking.runs import TrackedRun

GRID = "grid.png"


@dataclass(frozen=True, kw_only=True)
class SampleJob(JobConfig):
    """Configuration of drawing pictures.

    Args:
        sample: the prompts, the pipeline and how it draws.
        step: the training step that the pictures belong to; MLflow orders the grids of a run by it.
    """

    sample: SampleConfig
    step: int = 0


def run(job: SampleJob) -> StageResult:
    """Run the stage in an MLflow run, on the Ray that is connected; the table gets a grid of the first pictures."""
    from pipelines.draw.sample import CUT_PROMPTS, read_pictures, run_sample
    from pipelines.workers.images import image_grid, to_png

    def log_grid(run: "TrackedRun", result: StageResult) -> None:
        grid = image_grid(read_pictures(result.table)[1])
        result.table.write_file(GRID, to_png(grid))
        run.log_image(grid, "samples", job.step)

    result = track_stage(
        job,
        f"sample {job.sample.name}",
        lambda on_progress, leases: run_sample(job.dataset_uri, job.sample, on_progress=on_progress, leases=leases),
        log=log_grid,
    )
    if num_cut := int(result.figures.get(CUT_PROMPTS, 0)):
        print(f"{num_cut} of {result.num_rows} prompts are longer than the pipeline's max_tokens: cut there", flush=True)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(SampleJob, run, argv, name="sample")


if __name__ == "__main__":
    sys.exit(main())
