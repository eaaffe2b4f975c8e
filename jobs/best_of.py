"""`python -m jobs.best_of --config jobs/configs/best_of.yaml`: the best of several pictures of each prompt."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from jobs.common.checkpoints import find_source
from jobs.common.drawing import GRID, require_drawing, write_grid
from jobs.common.job import JobConfig, run_job
from jobs.common.metric_job import judge_pictures
from jobs.common.stage_job import LazyRun, track_stage
from jobs.common.text_table import format_table
from pipelines.draw.config import SampleConfig
from pipelines.evaluate.best_of.config import BestOfConfig
from pipelines.stages.contract import StageResult

FIGURES = "best_of.json"
"""The file beside the kept pictures with the figures by the number of candidates."""


@dataclass(frozen=True, kw_only=True)
class BestOfJob(JobConfig):
    """Configuration of drawing several pictures of each prompt and keeping the best.

    Args:
        sample: the candidates: prompts, pipeline, how it draws, and how many of each prompt (`images_per_prompt`).
        best_of: the judge, and how many it keeps.
    """

    sample: SampleConfig
    best_of: BestOfConfig

    def __post_init__(self) -> None:
        self.best_of.check(self.sample.images_per_prompt)
        if self.sample.name == self.best_of.name:
            raise ValueError(f"sample.name and best_of.name are both {self.sample.name}: candidates need a table of their own")

    @property
    def candidates(self) -> SampleConfig:
        """`sample`, with as many pictures in a shard as keep those of one prompt together."""
        each = self.sample.images_per_prompt
        rows = max(self.sample.draw.rows_per_shard // each, 1) * each
        return replace(self.sample, draw=replace(self.sample.draw, rows_per_shard=rows))


def run(job: BestOfJob) -> StageResult:
    """Draw, judge and choose, in one MLflow run, on the Ray that is connected; print what it cost and what it gained."""
    from pipelines.draw.sample import run_sample
    from pipelines.evaluate.best_of.figures import best_of_figures
    from pipelines.evaluate.best_of.run import NO_PICTURE, run_best_of
    from pipelines.evaluate.pictures import sampled_pictures

    sample, best_of = job.candidates, job.best_of
    source = find_source(sample.pipeline)
    with LazyRun(job, f"best_of {best_of.name}") as shared:
        drawn = track_stage(
            job,
            f"sample {sample.name}",
            lambda on_progress, leases: run_sample(
                job.dataset_uri, sample, source=source, on_progress=on_progress, leases=leases
            ),
            shared=shared,
        )
        pictures = sampled_pictures(job.dataset_uri, sample.name)
        judged = {
            metric: judge_pictures(job, pictures, metric, config, shared=shared) for metric, config in best_of.chosen.items()
        }
        kept = track_stage(
            job,
            f"best_of {best_of.name}",
            lambda on_progress, leases: run_best_of(
                job.dataset_uri, sample.name, best_of, on_progress=on_progress, leases=leases
            ),
            shared=shared,
        )
        figures = best_of_figures(job.dataset_uri, sample.name, best_of)
        kept.table.write_file(FIGURES, (json.dumps(figures, indent=2) + "\n").encode())
        grid = write_grid(kept.table) if kept.num_rows else None
        if shared.run is not None:
            if grid is not None:
                shared.run.log_image(grid, "kept")
            for size, values in figures.items():
                shared.run.log_metrics({f"best_of.{name}": value for name, value in values.items()}, step=size)
    if num_without := int(kept.figures.get(NO_PICTURE, 0)):
        print(f"{num_without} prompts have no picture: {best_of.judge} refused all their candidates", flush=True)
    where = [f"the first kept pictures: {kept.table.uri}/{GRID}"] if kept.num_rows else []
    print("\n".join([_gain(figures, best_of.keep), *_cost(job, drawn, judged), *where]), flush=True)
    return kept


def _gain(figures: Mapping[int, Mapping[str, float]], keep: int) -> str:
    """A table of the figures by the number of candidates, with the gain over one picture."""
    names = list(figures[1])
    rows = [
        [f"{min(keep, size)} of {size}", *(f"{values[name]:.4g} ({values[name] - figures[1][name]:+.4g})" for name in names)]
        for size, values in figures.items()
    ]
    return format_table(["kept", *names], rows)


def _cost(job: BestOfJob, drawn: StageResult, judged: Mapping[str, StageResult]) -> list[str]:
    """What the pictures cost, on a line each: drawing and every metric. Seconds are told of what this run made."""
    each, keep = job.sample.images_per_prompt, job.best_of.keep
    lines = [f"drawn: {drawn.num_rows} pictures, {each} of each prompt: {each / keep:g} times the compute of {keep}"]
    for name, result in {"drawing": drawn, **judged}.items():
        made = result.rows_per_second * result.seconds
        told = f"{result.seconds:.1f} s, {result.rows_per_second:.3g} pictures/s" if made else "made by an earlier run"
        lines.append(f"  {name}: {told}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(BestOfJob, run, argv, name="best_of", look_first=lambda job: require_drawing(job.sample))


if __name__ == "__main__":
    sys.exit(main())
