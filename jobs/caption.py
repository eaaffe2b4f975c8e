"""`python -m jobs.caption --config jobs/configs/captioners.yaml`: images -> the captions of one captioner after another."""

import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from jobs.common.job import JobConfig, run_job
from jobs.common.stage_job import require_tables, track_stage
from jobs.common.text_table import format_table
from pipelines.caption.config import CaptionerConfig
from pipelines.stages.contract import StageResult
from pipelines.storage.errors import is_expected
from pipelines.tables.errors import StageError
from pipelines.tables.schema import IMAGES_PATH


@dataclass(frozen=True, kw_only=True)
class CaptionJob(JobConfig):
    """Configuration of captioning. Each captioner writes a table of its own, in an MLflow run of its own.

    Args:
        captioner: one VLM, its prompt and its sampling.
        captioners: several, run one after another; if one fails, the others still run.
        only: the name of a captioner: run this one alone.
    """

    captioner: CaptionerConfig | None = None
    captioners: list[CaptionerConfig] = field(default_factory=list)
    only: str | None = None

    def __post_init__(self) -> None:
        names = [captioner.name for captioner in self.all]
        if not names:
            raise ValueError("no captioner is configured: give captioner (one) or captioners (a list)")
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"captioners named {twice[0]!r} are there twice: each needs a table of its own")
        if self.only is not None and self.only not in names:
            raise ValueError(f"only={self.only!r} is none of the captioners {', '.join(names)}")

    @property
    def all(self) -> list[CaptionerConfig]:
        return [*([self.captioner] if self.captioner else []), *self.captioners]

    def single(self, captioner: CaptionerConfig) -> "CaptionJob":
        """This job with one captioner."""
        return replace(self, captioner=captioner, captioners=[], only=None)


def run(job: CaptionJob) -> None:
    """Run each captioner in turn. Raises what a single one raises, and StageError at the end if any of several failed."""
    chosen = [captioner for captioner in job.all if job.only in (None, captioner.name)]
    if len(chosen) == 1:
        run_captioner(job.single(chosen[0]))
        return
    told: dict[str, list[str]] = {}
    failed = []
    for captioner in chosen:
        try:
            result = run_captioner(job.single(captioner))
            told[captioner.name] = ["done", str(result.num_rows), str(result.num_rejects), f"{result.seconds:.0f}", ""]
        except Exception as error:  # whatever it is, it must not stop the others; it is shown in full
            if not is_expected(error):
                traceback.print_exc()
            print(f"error: captioner {captioner.name}: {error}", file=sys.stderr, flush=True)
            told[captioner.name] = ["failed", "", "", "", (str(error).splitlines() or [type(error).__name__])[0][:100]]
            failed.append(captioner.name)
    columns = ["captioner", "", "rows", "rejects", "seconds", "reason"]
    print(format_table(columns, [[name, *cells] for name, cells in told.items()]), flush=True)
    done = [name for name in told if name not in failed]
    if len(done) > 1:
        from pipelines.reports.captions import write_captioners_report

        print(f"side by side: {write_captioners_report(job.dataset_uri, done)}", flush=True)
    if failed:
        raise StageError(f"{len(failed)} of {len(chosen)} captioners failed: {', '.join(failed)}")


def run_captioner(job: CaptionJob) -> StageResult:
    """Run the stage of `job.captioner` in an MLflow run, on the Ray that is connected."""
    from pipelines.caption.run import run_caption
    from pipelines.reports.captions import captions_report

    captioner = job.captioner
    assert captioner is not None
    return track_stage(
        job,
        f"caption {captioner.name}",
        lambda on_progress, leases: run_caption(job.dataset_uri, captioner, on_progress=on_progress, leases=leases),
        make_report=lambda: captions_report(job.dataset_uri, captioner.name),
    )


def look_first(job: CaptionJob) -> bool:
    """Refuse a job without its input before Ray starts."""
    return require_tables(job.dataset_uri, IMAGES_PATH)


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(CaptionJob, run, argv, name="caption", look_first=look_first)


if __name__ == "__main__":
    sys.exit(main())
