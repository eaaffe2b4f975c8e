"""`python -m jobs` (or `sana`) lists the commands; `python -m jobs ingest ...` is `python -m jobs.ingest ...`."""

import runpy
import sys
from collections.abc import Sequence

from jobs.common.commands import GROUPS, choose


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the first argument names; it ends the program with its exit code."""
    name, arguments = choose("python -m jobs", GROUPS, argv)
    sys.argv[1:] = arguments
    runpy.run_module(f"jobs.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
