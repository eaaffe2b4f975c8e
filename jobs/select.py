"""`python -m jobs.select --dataset_uri data/cats --clip clip`: what each selection policy would choose.

It reads the scores alone, shard by shard, and needs no Ray: compare policies before anything is extracted or trained.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.common.job import run_command
from jobs.common.status_line import StatusLine
from jobs.common.text_table import format_table
from pipelines.score.config import POLICIES, Policy, SelectionConfig, check_captioners, check_proportions
from pipelines.tables.schema import SCORES, check_folder_name
from pipelines.tables.table import Table, absolute_uri

if TYPE_CHECKING:
    from pipelines.score.compare import Comparison, Scope

DEFAULT = SelectionConfig()


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Configuration of the comparison.

    Args:
        dataset_uri: the folder (any fsspec URI) that holds the dataset's tables.
        clip: whose scores under scores/<clip>/ are compared.
        captioners: those that compete; empty: all that this CLIP has scored.
        policies: those to show; empty: all. The page shows what the first selects.
        tau: temperature of the policies paper and published.
        threshold: lowest score of the policy published.
        proportions: share of each captioner in the policy proportions; empty: equal shares.
        min_best_score: images whose best caption scores less are dropped.
        max_shards: read only this many shards, spread evenly; null: all.
        json: print JSON.
        html: write the page of the scores, with all captioners and policies side by side, to this file.
    """

    dataset_uri: str
    clip: str
    captioners: tuple[str, ...] = ()
    policies: list[Policy] = field(default_factory=list)
    tau: float = DEFAULT.tau
    threshold: float = DEFAULT.threshold
    proportions: dict[str, float] = field(default_factory=dict)
    min_best_score: float | None = None
    max_shards: int | None = None
    json: bool = False
    html: str | None = None

    def __post_init__(self) -> None:
        check_folder_name("clip", self.clip)
        if self.captioners:
            check_captioners(self.captioners)
        if self.max_shards is not None and self.max_shards < 1:
            raise ValueError(f"max_shards={self.max_shards} must be at least 1")
        for captioner, share in self.proportions.items():
            if not 0 <= share < math.inf:
                raise ValueError(f"proportions: the share of {captioner}, {share}, must be 0 or more")

    @property
    def shown(self) -> list[Policy]:
        return self.policies or list(POLICIES)

    def selection(self, captioners: Sequence[str]) -> SelectionConfig:
        """The settings of all policies; those that are not given are the defaults. Raises ValueError for what is wrong."""
        check_proportions(self.proportions, captioners)
        policy = (self.policies or [DEFAULT.policy])[0]
        equal = dict.fromkeys(captioners, 1.0) if policy == "proportions" else {}
        return SelectionConfig(
            policy=policy,
            tau=self.tau,
            threshold=self.threshold,
            proportions=self.proportions or equal,
            min_best_score=self.min_best_score,
        )


def run(config: SelectConfig) -> None:
    """Print the policies side by side, and write the page if one is asked for."""
    dataset_uri = absolute_uri(config.dataset_uri)
    captioners = find_captioners(dataset_uri, config)
    selection = config.selection(captioners)
    comparison, scope = _compare(dataset_uri, captioners, selection, config)
    if config.html is not None:
        from pipelines.reports.scores import scores_report

        page = Path(config.html)
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(scores_report(dataset_uri, config.clip, captioners[0], selection, captioners))
    if config.json:
        print(json.dumps(to_json(comparison, scope, config.shown), indent=2))
    else:
        print(describe(config.clip, comparison, scope, config.shown))
        if config.html is not None:
            print(f"\nreport  {config.html}")


def find_captioners(dataset_uri: str, config: SelectConfig) -> tuple[str, ...]:
    """Those that compete. Raises MissingTableError if there are no scores."""
    from pipelines.score.candidates import scored_captioners

    found = config.captioners or scored_captioners(dataset_uri, config.clip)
    if not found:
        Table(dataset_uri, f"scores/{config.clip}", SCORES).require()  # says what is there instead
    return found


def _compare(
    dataset_uri: str, captioners: Sequence[str], selection: SelectionConfig, config: SelectConfig
) -> "tuple[Comparison, Scope]":
    from pipelines.score.compare import compare_table

    line = StatusLine()

    def on_shard(done: int, total: int) -> None:
        line.show(f"scores/{config.clip}  {done}/{total} shards")

    try:
        return compare_table(dataset_uri, config.clip, captioners, selection, max_shards=config.max_shards, on_shard=on_shard)
    finally:
        line.clear()


def describe(clip: str, comparison: "Comparison", scope: "Scope", policies: Sequence[Policy]) -> str:
    """The captioners and the policies as tables for a terminal."""
    captioners = list(comparison.captioners)
    rows = [[name, f"{row.num_captions}", f"{row.mean_score:.2f}"] for name, row in comparison.captioners.items()]
    head = f"scores/{clip}: {comparison.num_images} images in {len(scope.shards)} of {scope.total_shards} shards"
    table = []
    for name in policies:
        figures = comparison.policies[name]
        shares = [f"{figures.shares.get(captioner, 0.0):.1%}" for captioner in captioners]
        means = ["-" if value is None else f"{value:.2f}" for value in (figures.expected_score, figures.entropy)]
        table.append([name, *shares, *means, f"{figures.num_dropped}"])
    columns = ["policy", *captioners, "expected score", "entropy (nats)", "dropped"]
    return "\n\n".join(
        [
            head + (f"\n{scope.lacking}" if scope.lacking else ""),
            format_table(["captioner", "captions", "mean score"], rows),
            format_table(columns, table),
            "  captioners: share of the kept images that train on their caption; dropped: images without a chosen caption",
        ]
    )


def to_json(comparison: "Comparison", scope: "Scope", policies: Sequence[Policy]) -> dict[str, Any]:
    content = asdict(comparison) | {"num_shards": len(scope.shards), "total_shards": scope.total_shards}
    content |= {"lacking": scope.lacking or None}
    return content | {"policies": {name: content["policies"][name] for name in policies}}


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(SelectConfig, run, argv, name="select")


if __name__ == "__main__":
    sys.exit(main())
