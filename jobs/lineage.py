"""`python -m jobs.lineage --dataset_uri data/cats`: writes the dataset's lineage card. Needs no Ray cluster."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.common.job import run_command
from pipelines.tables.table import absolute_uri


@dataclass(frozen=True, kw_only=True)
class LineageConfig:
    """Configuration of the lineage card.

    Args:
        dataset_uri: the folder (any fsspec URI) that holds the dataset's tables.
        max_shards: read at most this many shards of the scores of each CLIP.
    """

    dataset_uri: str
    max_shards: int = 64

    def __post_init__(self) -> None:
        if self.max_shards < 1:
            raise ValueError(f"max_shards={self.max_shards} must be at least 1")


def run(config: LineageConfig) -> None:
    """Write the card, and print where it is."""
    from pipelines.audit.lineage import JSON_FILE, MARKDOWN_FILE, write_lineage

    uri = absolute_uri(config.dataset_uri)
    write_lineage(uri, max_shards=config.max_shards)
    print(f"{uri}/{MARKDOWN_FILE}\n{uri}/{JSON_FILE}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(LineageConfig, run, argv, name="lineage")


if __name__ == "__main__":
    sys.exit(main())
