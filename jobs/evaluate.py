"""`python -m jobs.evaluate --config jobs/configs/evaluate.yaml`: pictures -> CLIP scores and attribute accuracy."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.common.job import JobConfig, run_job
from jobs.common.stage_job import require_tables, track_stage
from pipelines.evaluate.config import EvaluateConfig
from pipelines.stages.contract import StageResult
from pipelines.tables.schema import samples_path

if TYPE_CHECKING:
    from pipelines.tracking.runs import TrackedRun

METRICS = "metrics.json"


@dataclass(frozen=True, kw_only=True)
class EvaluateJob(JobConfig):
    """Configuration of the judgement of a samples table.

    Args:
        evaluate: the samples table, and the judge.
    """

    evaluate: EvaluateConfig


def run(job: EvaluateJob) -> StageResult:
    """Run the stage in an MLflow run, on the Ray that is connected; the table gets `metrics.json`."""
    from pipelines.evaluate.run import run_evaluate, summarize

    def log_metrics(run: "TrackedRun", result: StageResult) -> None:
        metrics = summarize(result.table)
        result.table.write_file(METRICS, (json.dumps(metrics, indent=2) + "\n").encode())
        run.log_metrics(metrics)

    result = track_stage(
        job,
        f"evaluate {job.evaluate.name}",
        lambda on_progress, leases: run_evaluate(job.dataset_uri, job.evaluate, on_progress=on_progress, leases=leases),
        log=log_metrics,
    )
    print("  ".join(f"{name} {value:.3g}" for name, value in summarize(result.table).items()), flush=True)
    return result


def look_first(job: EvaluateJob) -> bool:
    """Refuse a job without its input before Ray starts."""
    return require_tables(job.dataset_uri, samples_path(job.evaluate.name))


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(EvaluateJob, run, argv, name="evaluate", look_first=look_first)


if __name__ == "__main__":
    sys.exit(main())
