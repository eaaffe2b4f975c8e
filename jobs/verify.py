"""`python -m jobs.verify --dataset_uri data/cats`: reads every byte of a dataset's tables. Needs no Ray cluster.

Exit code 0: all is as it should be; 1: something is not, each with a line that names the file and what to do; 2: the command
line is wrong. Nothing is changed: `jobs.repair` does what the lines propose.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from jobs.common.exit_codes import ExitCode
from jobs.common.job import run_command
from jobs.common.status_line import StatusLine
from pipelines.tables.table import absolute_uri


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Configuration of the check.

    Args:
        dataset_uri: the folder (any fsspec URI) that holds the dataset's tables.
        tables: such as [captions/llava]: check only these; empty: all.
        threads: shards that are read at once.
    """

    dataset_uri: str
    tables: list[str] = field(default_factory=list)
    threads: int = 8

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"threads={self.threads} must be at least 1")


def run(config: VerifyConfig) -> ExitCode:
    """Print a line for each violation, then how much was read."""
    from pipelines.audit.verify import VerifyProgress, verify_dataset

    start, line, progress = time.monotonic(), StatusLine(), VerifyProgress()

    def show(seen: VerifyProgress) -> None:
        nonlocal progress
        progress = seen
        line.show(f"{seen.done_shards}/{seen.num_shards} shards  {seen.num_rows:,} rows  {seen.num_violations} violations")

    uri = absolute_uri(config.dataset_uri)
    try:
        for violation in verify_dataset(uri, paths=config.tables, num_threads=config.threads, on_progress=show):
            line.clear()
            print(violation, flush=True)
    finally:
        line.clear()
    found = progress.num_violations
    result = "clean" if found == 0 else f"{found} violation{'s' * (found != 1)}"
    seconds = time.monotonic() - start
    print(f"{progress.done_shards} shards, {progress.num_rows:,} rows read in {seconds:.0f} s: {result}", flush=True)
    return ExitCode.WRONG_INPUT if found else ExitCode.DONE


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(VerifyConfig, run, argv, name="verify")


if __name__ == "__main__":
    sys.exit(main())
