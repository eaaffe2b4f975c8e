"""`python -m jobs.status --dataset_uri data/cats`: how a dataset's tables and trainings stand. Needs no Ray cluster."""

import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from jobs.common.job import run_command
from pipelines.audit.status import SHORT, DatasetStatus, TableStatus, TrainingStatus, dataset_status
from pipelines.tables.table import absolute_uri

WIDTH = 120
LONGEST_PATH = 40
JSON_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class StatusConfig:
    """Configuration of the status page.

    Args:
        dataset_uri: the folder (any fsspec URI) that holds the dataset's tables.
        rows: count the rows of unfinished tables, from their files' footers.
        json: print JSON.
    """

    dataset_uri: str
    rows: bool = False
    json: bool = False


def run(config: StatusConfig) -> None:
    """Print how everything in the dataset stands."""
    status = dataset_status(absolute_uri(config.dataset_uri), count_rows=config.rows)
    print(to_json(status) if config.json else describe(status))


def to_json(status: DatasetStatus) -> str:
    content = asdict(status)
    for table, content_of_table in zip(status.tables, content["tables"], strict=True):
        content_of_table |= {"complete": table.complete}
    return json.dumps({"version": JSON_VERSION} | content, indent=2)


def describe(status: DatasetStatus) -> str:
    """The page for people: a line for each table, remarks below it, then the trainings."""
    width = min(max([len("table"), *(len(table.path) for table in status.tables)]), LONGEST_PATH)
    lines = [status.dataset_uri, ""]
    lines.append(f"{'table':<{width}}  {'shards':>13}  {'rows':>13}  {'rejects':>11}  {'size':>8}  {'made as':<{SHORT}}  state")
    for table in status.tables:
        lines += _describe_table(table, width)
    if any(table.num_rows is None for table in status.tables):
        lines += ["", "?: known when the stage has ended; --rows counts now"]
    if status.trainings:
        lines += ["", "trainings", *(line for training in status.trainings for line in _describe_training(training))]
    return "\n".join(lines)


def _describe_table(table: TableStatus, width: int) -> list[str]:
    path = table.path if len(table.path) <= width else "…" + table.path[1 - width :]  # the end tells tables apart
    shards = f"{table.num_shards}/{'?' if table.missing is None else table.num_shards + len(table.missing)}"
    rows, rejects = ("?" if count is None else f"{count:,}" for count in (table.num_rows, table.num_rejects))
    size, short = format_bytes(table.num_bytes), table.fingerprint[:SHORT]
    lines = [f"{path:<{width}}  {shards:>13}  {rows:>13}  {rejects:>11}  {size:>8}  {short:<{SHORT}}  {_state(table)}"]
    if table.writer:
        lines += _indent(f"being written by {table.writer}")
    for cause in table.problems + [f"stale: {cause}" for cause in table.stale]:
        lines += _indent(cause)
    if table.rejects_by_reason:
        lines += _indent("rejects: " + ", ".join(f"{reason} {count:,}" for reason, count in table.rejects_by_reason.items()))
    return lines


def _state(table: TableStatus) -> str:
    if table.problems:
        return "BROKEN"
    if table.stale:
        return "STALE"
    if table.missing:
        return f"{len(table.missing)} missing"
    return "complete" if table.complete else "unfinished"


def _describe_training(training: TrainingStatus) -> list[str]:
    result, source = training.result, ", ".join(training.inputs)
    if result is None:
        told = f"not ended, {training.num_steps} steps on {source}"
    else:
        told = f"{training.num_steps} steps on {source}, loss {result['loss_start']:.3f} -> {result['loss_end']:.3f}"
    lines = _indent(f"{training.name}: {told}", "  ")
    for cause in training.stale:
        lines += _indent(f"stale: {cause}")
    return lines


def _indent(text: str, indent: str = "    ") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False)


def format_bytes(count: float) -> str:
    """A size for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(StatusConfig, run, argv, name="status")


if __name__ == "__main__":
    sys.exit(main())
