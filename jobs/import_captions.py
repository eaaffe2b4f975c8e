"""`python -m jobs.import_captions --config jobs/configs/import_captions.yaml`: captions that others made -> tables.

It needs no Ray.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.common.job import TableJobConfig, run_job
from jobs.common.stage_job import track_stage
from jobs.common.status_line import StatusLine
from pipelines.caption.imports.config import ImportConfig
from pipelines.stages.contract import StageResult


@dataclass(frozen=True, kw_only=True)
class ImportJob(TableJobConfig):
    """Configuration of taking captions that others made into a dataset.

    Args:
        captions: where they are, and how they name their images.
    """

    captions: ImportConfig


def run(job: ImportJob) -> StageResult:
    """Import captions, and the scores that came with them, each in an MLflow run. Returns the result of the captions."""
    from pipelines.caption.imports.run import NOT_IMPORTED, CaptionImport
    from pipelines.reports.captions import captions_report
    from pipelines.reports.scores import scores_report
    from pipelines.score.config import SelectionConfig

    line = StatusLine()
    name = job.captions.name
    stage = CaptionImport(job.dataset_uri, job.captions, lambda text: line.show(f"{f'import {name}':<22} {text}"))
    result = track_stage(
        job,
        f"import {name}",
        lambda on_progress, leases: stage.run(on_progress=on_progress, leases=leases),
        make_report=lambda: captions_report(job.dataset_uri, name),
        log=lambda run, _: run.log_metrics(to_metrics(stage.read_counts())),
    )
    if result.num_shards and stage.has_scores():
        track_stage(
            job,
            f"import scores {name}",
            lambda on_progress, leases: stage.run_scores(on_progress=on_progress, leases=leases),
            make_report=lambda: scores_report(job.dataset_uri, job.captions.clip, name, SelectionConfig()),
            is_due=not result.was_done,
        )
    if result.num_shards:
        print(describe(stage.read_counts(), result, f"{result.table.uri}/{NOT_IMPORTED}"), flush=True)
    return result


def describe(counts: Mapping[str, Any], result: StageResult, told_uri: str) -> str:
    """What became of the captions, by kind, and of the images."""
    matched = sum(counts["matched"].values())
    by_kind = ", ".join(f"by {kind} {count}" for kind, count in counts["matched"].items())
    keys = ", ".join(f"{key} {count}" for key, count in counts["keys"].items())
    lost = ", ".join(f"{reason} {count}" for reason, count in sorted(counts["not_taken"].items()))
    without = ", ".join(f"{reason} {count}" for reason, count in sorted(result.rejects_by_reason.items()))
    others = ", ".join(f"{ending} {count}" for ending, count in sorted(counts["other_files"].items()))
    parts = [
        f"{matched} of {counts['captions']} captions matched ({by_kind}; found under {keys})",
        f"not taken: {lost} (see {told_uri})" if lost else "all captions were taken",
        f"images without a caption: {without}" if without else "every image has a caption",
        f"{counts['scores']} of the captions came with a CLIP score",
        *([f"other files there: {others}"] if others else []),
    ]
    return "\n".join(f"{'':<22} {part}" for part in parts)


def to_metrics(counts: Mapping[str, Any]) -> dict[str, float]:
    """The counts as metrics of a run."""
    metrics = {"captions": counts["captions"], "captions_with_score": counts["scores"]}
    metrics |= {f"matched.{kind}": count for kind, count in counts["matched"].items()}
    return metrics | {f"not_taken.{reason}": count for reason, count in counts["not_taken"].items()}


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(ImportJob, run, argv, name="import_captions")


if __name__ == "__main__":
    sys.exit(main())
