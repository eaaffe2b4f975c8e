"""Running a command: its configuration from the command line, Ray around it where it needs one, and an exit code."""

import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from jobs.common.commands import COMMANDS, program
from jobs.common.config import parse_config, secrets_of
from jobs.common.exit_codes import ExitCode, exit_code
from jobs.common.output import hiding
from jobs.common.ray import STOPPED, JobStopped, RayConfig, start_ray, stop_on_sigterm
from jobs.common.resources import check_local
from pipelines.storage.errors import is_expected
from pipelines.storage.lease import LeaseConfig
from pipelines.tables.errors import TrainingStopped
from pipelines.tables.table import absolute_uri
from pipelines.tracking.config import TrackingConfig
from sana_model.files.redact import redact


@dataclass(frozen=True, kw_only=True)
class TableJobConfig:
    """Configuration that every job which makes tables shares.

    Args:
        dataset_uri: the folder (any fsspec URI) that holds the dataset's tables.
        tracking: where MLflow keeps the run.
        lease: the lock that keeps a second job from writing the same table.
        on_stale: what to do with a table that was made with other settings, models or inputs. refuse: stop with an error.
            rebuild: delete it with its rejects and make it anew. Tables made from it stay; their own stages rebuild them.
    """

    dataset_uri: str
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    lease: LeaseConfig = field(default_factory=LeaseConfig)
    on_stale: Literal["refuse", "rebuild"] = "refuse"


@dataclass(frozen=True, kw_only=True)
class JobConfig(TableJobConfig):
    """Configuration that every stage's job shares.

    Args:
        ray: the Ray to run on.
    """

    ray: RayConfig = field(default_factory=RayConfig)


Config = TypeVar("Config")
Job = TypeVar("Job", bound=TableJobConfig)


def run_job(
    job_class: type[Job],
    run: Callable[[Job], object],
    argv: Sequence[str] | None,
    *,
    name: str,
    look_first: Callable[[Job], bool] = lambda job: False,
) -> int:
    """Parse the command line, start Ray, run the job; returns the exit code (see `ExitCode`).

    A job whose configuration is no `JobConfig` runs in this process alone, without Ray. An error that a user can fix is one
    message on stderr; any other keeps its traceback.

    Args:
        name: the command's name in `COMMANDS`.
        look_first: called before Ray starts; if it returns True, the job is done.
    """
    return run_parsed(parse_command(job_class, argv, name=name), run, look_first=look_first)


def run_parsed(job: Job, run: Callable[[Job], object], *, look_first: Callable[[Job], bool] = lambda job: False) -> ExitCode:
    """As `run_job`, with a configuration that was read already."""
    job = replace(job, dataset_uri=absolute_uri(job.dataset_uri))
    with hiding(secrets_of(job)):
        try:
            if not look_first(job):
                with start_ray(job.ray) if isinstance(job, JobConfig) else stop_on_sigterm():
                    if isinstance(job, JobConfig):
                        check_local(job)
                    run(job)
        except JobStopped:
            return ExitCode.STOPPED
        except KeyboardInterrupt:
            print(STOPPED.decode(), end="", file=sys.stderr)
            return ExitCode.STOPPED
        except Exception as error:
            return report_error(error, expected=is_expected(error))
    return ExitCode.DONE


def run_command(
    config_class: type[Config], run: Callable[[Config], ExitCode | None], argv: Sequence[str] | None, *, name: str
) -> int:
    """Parse the command line and run a command that needs no Ray; returns the exit code, which is `run`'s if it returns one."""
    return run_reporting(run, parse_command(config_class, argv, name=name))


def run_reporting(run: Callable[[Config], ExitCode | None], config: Config) -> ExitCode:
    """Call `run`; what it raises is printed as `report_error` does, without the configuration's secrets. Returns its code."""
    with hiding(secrets_of(config)):
        try:
            return run(config) or ExitCode.DONE
        except Exception as error:
            return report_error(error, expected=is_expected(error) or isinstance(error, OSError))


def parse_command(config_class: type[Config], argv: Sequence[str] | None, *, name: str) -> Config:
    """The configuration of a command of `COMMANDS`; ends the program as `parse_config` does."""
    return parse_config(config_class, argv, prog=program(name), description=COMMANDS[name])


def report_error(error: Exception, *, expected: bool) -> ExitCode:
    """Print why a command failed, with a traceback unless the error is expected."""
    if not expected:
        print(redact(traceback.format_exc()), file=sys.stderr)
        return ExitCode.FAULT
    label = "" if isinstance(error, TrainingStopped) else "error: "  # a training that was asked to stop did what it should
    print(redact(f"{label}{error}"), file=sys.stderr)
    return exit_code(error)
