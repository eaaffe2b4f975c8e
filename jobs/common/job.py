"""A job: a configuration from the command line, Ray around it, and an exit code."""

import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from jobs.common.config import parse_config
from jobs.common.exit_codes import ExitCode, exit_code, is_expected
from jobs.common.ray import JobStopped, RayConfig, start_ray
from pipelines.storage.lease import LeaseConfig
from pipelines.tables.table import absolute_uri
from pipelines.tracking.config import TrackingConfig


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """What every stage's job is told.

    Args:
        dataset_uri: the folder (any fsspec URI) that holds the dataset's tables.
        ray: the Ray to run on.
        tracking: where MLflow keeps the run.
        lease: what keeps a second job from writing the same table.
        on_stale: what to do with a table that was made in another way than it would be made now. rebuild: delete it with its
            rejects and make it anew. What was made from it is not touched: it is stale then, for its own stage to rebuild.
    """

    dataset_uri: str
    ray: RayConfig = field(default_factory=RayConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    lease: LeaseConfig = field(default_factory=LeaseConfig)
    on_stale: Literal["refuse", "rebuild"] = "refuse"


Job = TypeVar("Job", bound=JobConfig)


def run_job(
    job_class: type[Job],
    run: Callable[[Job], object],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    look_first: Callable[[Job], bool] = lambda job: False,
) -> int:
    """Parse the command line, start Ray, run the job; returns the exit code (see `ExitCode`). `look_first` is called before Ray
    starts: if it returns True, the job is done.

    What a user can put right is one message on stderr; anything else keeps its traceback.
    """
    job = parse_config(job_class, argv, prog=prog, description=description)
    job = replace(job, dataset_uri=absolute_uri(job.dataset_uri))
    try:
        if not look_first(job):
            with start_ray(job.ray):
                run(job)
    except JobStopped:
        return ExitCode.STOPPED
    except Exception as error:
        if not is_expected(error):
            traceback.print_exc()
            return ExitCode.FAULT
        print(f"error: {error}", file=sys.stderr)
        return exit_code(error)
    return ExitCode.DONE
