"""`python -m jobs.repair --dataset_uri data/cats`: does what `jobs.verify` proposes. Needs no Ray cluster.

Damaged files are moved to `_damaged/<time>` in the dataset, and the stages, run again as before, make what is missing then.
What was moved stays until `--remove_aside true` deletes it, which first verifies the whole dataset, and must find nothing.

Exit code 0: nothing is left to do but to run the stages that are named; 1: something is left that a person must decide.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jobs.common.exit_codes import ExitCode
from jobs.common.job import run_command
from jobs.common.status_line import StatusLine
from pipelines.storage.lease import LeaseConfig
from pipelines.tables.table import absolute_uri

if TYPE_CHECKING:
    from pipelines.audit.verify import OnVerifyProgress
    from pipelines.audit.violations import Violation


@dataclass(frozen=True, kw_only=True)
class RepairConfig:
    """Configuration of the repair.

    Args:
        dataset_uri: the folder (any fsspec URI) that holds the dataset's tables.
        tables: such as [captions/llava]: repair only these; empty: all.
        dry_run: change nothing, and say what would be done.
        remove_aside: delete what earlier repairs moved aside, if a verification of all tables finds nothing.
        threads: shards that are read at once.
        lease: the lock that keeps other jobs from writing the tables meanwhile.
    """

    dataset_uri: str
    tables: list[str] = field(default_factory=list)
    dry_run: bool = False
    remove_aside: bool = False
    threads: int = 8
    lease: LeaseConfig = field(default_factory=LeaseConfig)

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"threads={self.threads} must be at least 1")
        if self.remove_aside and (self.dry_run or self.tables):
            raise ValueError("remove_aside=True looks at the whole dataset: give it without dry_run and tables")


def run(config: RepairConfig) -> ExitCode:
    """Print a line for each violation with what was done about it, and the stages to run."""
    from pipelines.audit.repair import Done, repair_dataset
    from pipelines.audit.verify import VerifyProgress, verify_dataset
    from pipelines.storage.lease import Leases

    uri, line = absolute_uri(config.dataset_uri), StatusLine()

    def show(seen: VerifyProgress) -> None:
        line.show(f"{seen.done_shards}/{seen.num_shards} shards  {seen.num_rows:,} rows  {seen.num_violations} violations")

    if config.remove_aside:
        return _remove_aside(uri, config.threads, show, line)
    paths, threads = config.tables, config.threads
    if config.dry_run:
        found = verify_dataset(uri, paths=paths, num_threads=threads, on_progress=show)
        results = [Done(violation, "") for violation in found]
    else:
        with Leases(config.lease) as leases:
            results = list(repair_dataset(uri, leases, paths=paths, num_threads=threads, on_progress=show))
    line.clear()
    for done in results:
        violation = done.violation
        print(f"{violation.file}: {violation.problem}: {done.did}" if done.did else violation)
    return _summarize([done.violation for done in results], dry_run=config.dry_run)


def _summarize(violations: "list[Violation]", *, dry_run: bool) -> ExitCode:
    from pipelines.tables.schema import MADE_BY

    groups = {violation.action.table.split("/")[0] for violation in violations if violation.action is not None}
    left = sum(violation.action is None for violation in violations)
    what = "would be moved aside, mended or counted anew" if dry_run else "moved aside, mended or counted anew"
    print(f"{len(violations) - left} {what}, {left} left to you")
    if groups:
        makers = ", ".join(f"jobs.{maker}" for group, maker in MADE_BY.items() if group in groups)
        print(f"then run, as before, {makers}; and jobs.repair --remove_aside true once all is well")
    return ExitCode.WRONG_INPUT if left or (dry_run and violations) else ExitCode.DONE


def _remove_aside(uri: str, threads: int, show: "OnVerifyProgress", line: StatusLine) -> ExitCode:
    """Delete what was moved aside, unless anything is wrong with the dataset."""
    from pipelines.audit.repair import ASIDE, remove_aside
    from pipelines.audit.verify import verify_dataset

    found = list(verify_dataset(uri, num_threads=threads, on_progress=show))
    line.clear()
    for violation in found:
        print(violation)
    if found:
        print(f"{uri}/{ASIDE} stays until all is well")
        return ExitCode.WRONG_INPUT
    print(f"{remove_aside(uri)} files deleted in {uri}/{ASIDE}")
    return ExitCode.DONE


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(RepairConfig, run, argv, name="repair")


if __name__ == "__main__":
    sys.exit(main())
