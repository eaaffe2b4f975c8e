"""`python -m jobs.verify <dataset uri>`: looks at every byte of a dataset's tables. Needs no Ray cluster.

Exit code 0: all is as it should be; 1: something is not, each with a line that names the file and what to do; 2: the command
line is wrong.
"""

import argparse
import sys
import time
from collections.abc import Sequence

from jobs.common.status_line import StatusLine
from pipelines.audit.verify import VerifyProgress, verify_dataset
from pipelines.tables.table import absolute_uri


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.verify", description="Look at every byte of a dataset's tables.")
    parser.add_argument("dataset_uri", help="the folder (any fsspec URI) that holds the dataset")
    parser.add_argument("--table", action="append", default=[], help="such as captions/llava: only this one; may be repeated")
    parser.add_argument("--threads", type=int, default=8, help="shards that are read side by side (default: 8)")
    options = parser.parse_args(argv)
    if options.threads < 1:
        parser.error(f"--threads {options.threads} must be at least 1")
    start, line, progress = time.monotonic(), StatusLine(), VerifyProgress()

    def show(seen: VerifyProgress) -> None:
        nonlocal progress
        progress = seen
        line.show(f"{seen.done_shards}/{seen.num_shards} shards  {seen.num_rows:,} rows  {seen.num_violations} violations")

    try:
        uri = absolute_uri(options.dataset_uri)
        for violation in verify_dataset(uri, paths=options.table, num_threads=options.threads, on_progress=show):
            line.clear()
            print(violation, flush=True)
    except (ValueError, OSError) as error:
        line.clear()
        print(f"error: {error}", file=sys.stderr)
        return 1
    line.clear()
    found = progress.num_violations
    told = "clean" if found == 0 else f"{found} violation{'s' * (found != 1)}"
    seconds = time.monotonic() - start
    print(f"{progress.done_shards} shards, {progress.num_rows:,} rows read in {seconds:.0f} s: {told}", flush=True)
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
