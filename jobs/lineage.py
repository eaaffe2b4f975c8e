"""`python -m jobs.lineage <dataset uri>`: writes the dataset's lineage card. Needs no Ray cluster."""

import argparse
import sys
from collections.abc import Sequence

from pipelines.audit.lineage import DEFAULT_SHARDS, JSON_FILE, MARKDOWN_FILE, write_lineage
from pipelines.tables.table import absolute_uri


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.lineage", description="Write the lineage card of a dataset.")
    parser.add_argument("dataset_uri", help="the folder (any fsspec URI) that holds the dataset")
    parser.add_argument("--max_shards", type=int, default=DEFAULT_SHARDS, help="of scores, to read (default: %(default)s)")
    options = parser.parse_args(argv)
    if options.max_shards < 1:
        parser.error(f"--max_shards {options.max_shards} must be at least 1")
    uri = absolute_uri(options.dataset_uri)
    try:
        write_lineage(uri, max_shards=options.max_shards)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{uri}/{MARKDOWN_FILE}\n{uri}/{JSON_FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
