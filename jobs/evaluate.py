"""`python -m jobs.evaluate --config jobs/configs/evaluate.yaml`: pictures -> a table and figures of each metric."""

import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.common.job import JobConfig, run_job
from jobs.common.metric_job import judge_pictures
from jobs.common.resources import check_local
from jobs.common.stage_job import LazyRun, require_tables
from pipelines.evaluate.config import EvaluateConfig
from pipelines.stages.contract import StageResult
from pipelines.storage.errors import is_expected
from pipelines.tables.schema import samples_path
from pipelines.tables.table import REPORT
from sana_model.files.redact import redact

if TYPE_CHECKING:
    from pipelines.evaluate.metric_config import MetricConfig


@dataclass(frozen=True, kw_only=True)
class EvaluateJob(JobConfig):
    """Configuration of the judgement of drawn pictures.

    Args:
        evaluate: the pictures, the metrics, and the settings of each.
    """

    evaluate: EvaluateConfig


def run(job: EvaluateJob) -> list[StageResult]:
    """Run every metric, also after one has failed, in one MLflow run, on the Ray that is connected.

    Each metric's table gets its figures as `metrics.json`, and its page. Returns the results.

    Raises the first failure at the end.
    """
    results: dict[str, StageResult] = {}
    failures: dict[str, Exception] = {}
    with LazyRun(job, f"evaluate {job.evaluate.name}") as shared:
        for metric, config in job.evaluate.chosen.items():
            try:
                results[metric] = _run_metric(job, metric, config, shared)
            except Exception as error:
                if len(job.evaluate.metrics) == 1:
                    raise
                failures[metric] = error
                told = str(error) if is_expected(error) else traceback.format_exc()
                print(redact(f"evaluate {job.evaluate.name} {metric} failed: {told}"), file=sys.stderr, flush=True)
        for failure in failures.values():
            print(f"metrics that failed: {', '.join(failures)}; done: {', '.join(results) or 'none'}", file=sys.stderr)
            raise failure
    return list(results.values())


def _run_metric(job: EvaluateJob, metric: str, config: "MetricConfig", shared: LazyRun) -> StageResult:
    """Run a metric on what its pictures are compared with, if there is such, and on the pictures."""
    from pipelines.evaluate.pictures import sampled_pictures
    from pipelines.evaluate.registry import metric_class
    from pipelines.evaluate.run import write_figures
    from pipelines.reports.evaluations import evaluation_report

    section = f"evaluate.{metric}"
    check_local(job, section)
    kind = metric_class(metric)
    reference = kind.reference(job.dataset_uri, config)
    drawn = sampled_pictures(job.dataset_uri, job.evaluate.name)
    if reference is not None:
        if reference.name == drawn.name:
            raise ValueError(
                f"evaluate.name={drawn.name} is the name of the reference too, whose features would stand in the same table: "
                f"give {section}.reference_name"
            )
        judge_pictures(job, reference, metric, config, section=section)
    result = judge_pictures(job, drawn, metric, config, shared=shared, section=section)
    figures = write_figures(result.table, metric, config, lease=job.lease)
    html = evaluation_report(job.dataset_uri, drawn, metric, figures, reference=reference)
    result.table.write_report(html)
    if shared.run is not None:
        shared.run.log_metrics(figures)
        shared.run.log_html(html, f"{metric}.html")
    told = "  ".join(f"{name} {value:.4g}" for name, value in figures.items()) or "no picture was judged: no figures"
    print(f"{told}\n{'':<22} the page: {result.table.uri}/{REPORT}", flush=True)
    return result


def look_first(job: EvaluateJob) -> bool:
    """Refuse a job without its input before Ray starts."""
    return require_tables(job.dataset_uri, samples_path(job.evaluate.name))


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(EvaluateJob, run, argv, name="evaluate", look_first=look_first)


if __name__ == "__main__":
    sys.exit(main())
