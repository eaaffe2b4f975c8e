"""`python -m jobs.select data --scorer clip`: what each selection policy would choose over a table of scores.

It reads the scores alone, shard by shard, and needs no Ray: look at the policies before anything is extracted or trained.
"""

import json
import math
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs.common.exit_codes import is_expected
from jobs.common.status_line import StatusLine
from jobs.common.text_table import format_table
from pipelines.reports.scores import scores_report
from pipelines.score.compare import Comparison, Scope, compare_table, table_captioners
from pipelines.score.config import POLICIES, Policy, SelectionConfig
from pipelines.tables.table import absolute_uri

DEFAULT = SelectionConfig()


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, print; returns the exit code: 0, or 1 with one message for what a user can put right."""
    arguments = _parser().parse_args(argv)
    dataset_uri = absolute_uri(arguments.dataset_uri)
    try:
        selection = _selection(arguments, table_captioners(dataset_uri, arguments.scorer))
        comparison, scope = _compare(dataset_uri, selection, arguments)
        if arguments.html is not None:
            arguments.html.parent.mkdir(parents=True, exist_ok=True)
            arguments.html.write_text(scores_report(dataset_uri, arguments.scorer, selection))
    except Exception as error:
        if not is_expected(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    shown = arguments.policy or list(POLICIES)
    if arguments.json:
        print(json.dumps(to_json(comparison, scope, shown), indent=2))
    else:
        print(describe(arguments.scorer, comparison, scope, shown))
        if arguments.html is not None:
            print(f"\nreport  {arguments.html}")
    return 0


def _compare(dataset_uri: str, selection: SelectionConfig, arguments: Namespace) -> tuple[Comparison, Scope]:
    line = StatusLine()

    def on_shard(done: int, total: int) -> None:
        line.show(f"scores/{arguments.scorer}  {done}/{total} shards")

    try:
        return compare_table(dataset_uri, arguments.scorer, selection, max_shards=arguments.max_shards, on_shard=on_shard)
    finally:
        line.clear()


def describe(scorer: str, comparison: Comparison, scope: Scope, policies: Sequence[Policy]) -> str:
    """Captioners, then policies, as tables for a terminal."""
    captioners = list(comparison.captioners)
    rows = [[name, f"{row.num_captions}", f"{row.mean_score:.2f}"] for name, row in comparison.captioners.items()]
    head = f"scores/{scorer}: {comparison.num_images} images in {len(scope.shards)} of {scope.total_shards} shards"
    table = []
    for name in policies:
        figures = comparison.policies[name]
        shares = [f"{figures.shares.get(captioner, 0.0):.1%}" for captioner in captioners]
        means = ["-" if value is None else f"{value:.2f}" for value in (figures.expected_score, figures.entropy)]
        table.append([name, *shares, *means, f"{figures.num_dropped}"])
    columns = ["policy", *captioners, "expected score", "entropy (nats)", "dropped"]
    return "\n\n".join(
        [
            head,
            format_table(["captioner", "captions", "mean score"], rows),
            format_table(columns, table),
            "  captioners: share of the kept images that train on their caption; dropped: images of which none is chosen",
        ]
    )


def to_json(comparison: Comparison, scope: Scope, policies: Sequence[Policy]) -> dict[str, Any]:
    content = asdict(comparison) | {"num_shards": len(scope.shards), "total_shards": scope.total_shards}
    return content | {"policies": {name: content["policies"][name] for name in policies}}


def _selection(arguments: Namespace, captioners: Sequence[str]) -> SelectionConfig:
    policy = (arguments.policy or [DEFAULT.policy])[0]
    equal = dict.fromkeys(captioners, 1.0) if policy == "proportions" else {}
    return SelectionConfig(
        policy=policy,
        tau=arguments.tau,
        threshold=arguments.threshold,
        proportions=dict(arguments.proportions) or equal,
        min_best_score=arguments.min_best_score,
    )


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m jobs.select",
        description="What each selection policy would choose over a table of scores.",
        allow_abbrev=False,
    )
    parser.add_argument("dataset_uri", help="the folder (any fsspec URI) that holds the dataset's tables")
    parser.add_argument("--scorer", required=True, help="name of the table under scores/")
    parser.add_argument("--policy", nargs="+", choices=POLICIES, help="those to show; the page shows what the first selects")
    parser.add_argument("--tau", type=float, default=DEFAULT.tau, help="temperature of 'paper' and 'published'")
    parser.add_argument("--threshold", type=float, default=DEFAULT.threshold, help="lowest score of 'published'")
    parser.add_argument(
        "--proportions", nargs="+", type=_share, default=[], metavar="CAPTIONER=SHARE", help="default: equal shares"
    )
    parser.add_argument("--min_best_score", type=float, help="images whose best caption scores less are dropped")
    parser.add_argument("--max_shards", type=_positive, help="read only so many, spread evenly; default: all")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--html", type=Path, help="write the page of the scores, with the policies side by side, to this file")
    return parser


def _share(text: str) -> tuple[str, float]:
    name, _, share = text.rpartition("=")
    try:
        value = float(share)
    except ValueError:
        value = math.nan
    if not name or not 0 <= value < math.inf:
        raise ArgumentTypeError(f"{text!r} must be CAPTIONER=SHARE with a share of 0 or more, such as llava=0.5")
    return name, value


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} must be a whole number of 1 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
