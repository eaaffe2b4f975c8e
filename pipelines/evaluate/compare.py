"""Compare samples tables by their evaluations: figures with intervals, and what differs in how the pictures were drawn."""

import json
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipelines.evaluate.metric import metric_table
from pipelines.evaluate.metric_config import FIGURES, FIGURES_SETTINGS
from pipelines.evaluate.registry import METRICS, metric_class
from pipelines.storage.files import read_file
from pipelines.tables.errors import MissingTableError
from pipelines.tables.identity import flatten
from pipelines.tables.schema import SAMPLES, samples_path
from pipelines.tables.table import Table

NUM_RESAMPLES = 1000
PUBLISHED: Mapping[str, Mapping[str, float]] = {
    "Sana-0.6B, 1024 px": {"fid": 5.61, "clip_score": 28.80, "geneval": 0.68, "dpg": 84.2},
    "Sana-1.6B, 1024 px": {"fid": 5.92, "clip_score": 28.94, "geneval": 0.69, "dpg": 84.5},
    "Sana-1.5 1.6B": {"fid": 5.70, "clip_score": 29.12, "geneval": 0.82, "dpg": 84.5},
    "Sana-1.5 4.8B": {"fid": 5.99, "clip_score": 29.23, "geneval": 0.81, "dpg": 84.7},
    "FLUX-dev": {"fid": 10.15, "clip_score": 27.47, "geneval": 0.67, "dpg": 84.0},
}
"""Of NVlabs' README: FID and CLIP score on 30,000 prompts of MJHQ, GenEval on 553, DPG-Bench on 1,065."""


@dataclass(frozen=True)
class Figure:
    """A figure of one samples table; `low` and `high` are the ends of its 95 % interval, if it has one (see `bootstrap`)."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def interval(self) -> str | None:
        """The interval in words."""
        return None if self.low is None or self.high is None else f"{self.low:.4g} to {self.high:.4g}"

    def __str__(self) -> str:
        return f"{self.value:.4g}" if self.interval is None else f"{self.value:.4g} ({self.interval})"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Samples tables side by side.

    Args:
        names: of the tables.
        figures: by the figure's name, then by the table's; a table whose metric was not run lacks it.
        settings: those that differ between the tables, by name: the values in the order of `names`, None where there is none.
            Those of a metric begin with its name, and differ only between tables that it has judged.
        outdated: paths of the evaluations that are left out: the pictures were drawn anew since.
        by_tiny_models: the figures that a tiny model of the zoo gave: no published figure compares with them.
    """

    names: Sequence[str]
    figures: Mapping[str, Mapping[str, Figure]]
    settings: Mapping[str, Sequence[Any]]
    outdated: Sequence[str] = ()
    by_tiny_models: Collection[str] = ()


def compare_samples(dataset_uri: str, names: Sequence[str], *, seed: int = 0) -> Comparison:
    """Compare samples tables by all that was evaluated of them.

    Intervals are by bootstrap over prompts: pictures of one prompt are drawn together, for they are alike.

    Raises MissingTableError if a table is not there, or nothing was evaluated; ValueError for damaged figures.
    """
    manifests = {name: Table(dataset_uri, samples_path(name), SAMPLES).require() for name in names}
    drawn = {name: flatten(asdict(manifest.identity())) for name, manifest in manifests.items()}
    figures: dict[str, dict[str, Figure]] = {}
    settings = _differing(names, drawn)
    outdated: list[str] = []
    by_tiny_models: set[str] = set()
    for metric in METRICS:
        judged: dict[str, dict[str, Any]] = {}
        for name, manifest in manifests.items():
            table = metric_table(dataset_uri, name, metric)
            own = table.read_manifest()
            values = None if own is None else _read_json(table, FIGURES)
            if own is None or values is None:
                continue
            if own.inputs.get(samples_path(name)) != manifest.fingerprint:
                outdated.append(table.path)
                continue
            if str(own.config.get("model")).startswith("zoo://"):
                by_tiny_models.update(values)
            intervals = bootstrap(metric_class(metric), table, seed=seed)
            for figure, value in values.items():
                figures.setdefault(figure, {})[name] = Figure(value, *intervals.get(figure, ()))
            by = {"config": own.config, "models": own.models, "figures": _read_json(table, FIGURES_SETTINGS) or {}}
            judged[name] = flatten(by, metric)
        settings |= _differing(names, judged)
    if not figures:
        since = f" since they were drawn anew ({', '.join(outdated)} are older)" if outdated else ""
        raise MissingTableError(
            f"none of {', '.join(names)} was evaluated{since}: run jobs.evaluate --evaluate.name {names[0]} first"
        )
    return Comparison(names=names, figures=figures, settings=settings, outdated=outdated, by_tiny_models=by_tiny_models)


def _differing(names: Sequence[str], settings: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The settings that are not the same for all tables that have any, by name: the values in the order of `names`."""
    keys = dict.fromkeys(key for own in settings.values() for key in own)
    differing = [key for key in keys if len({repr(own.get(key)) for own in settings.values()}) > 1]
    return {key: [settings.get(name, {}).get(key) for name in names] for key in differing}


def _read_json(table: Table, name: str) -> dict[str, Any] | None:
    """What a metric's job wrote beside its table; None if it did not. Raises ValueError if that is damaged."""
    try:
        content: dict[str, Any] = json.loads(read_file(f"{table.uri}/{name}"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{table.uri}/{name} is damaged ({error}): run jobs.evaluate again, which writes it anew") from error
    return content


def bootstrap(metric: Any, table: Table, *, seed: int = 0) -> dict[str, tuple[float, float]]:
    """The 95 % intervals of those of a metric's figures that are means over pictures, or means of such, by prompts.

    They are those of `Metric.scores` and `Metric.means_of`; the prompts of each are drawn by themselves. A figure over a single
    prompt has none: nothing tells how much prompts differ.
    """
    sums: dict[str, dict[str, list[float]]] = {}
    for figure, prompt, value in metric.scores(table):
        total = sums.setdefault(figure, {}).setdefault(prompt, [0.0, 0.0])
        total[0] += value
        total[1] += 1
    means: dict[str, Any] = {}
    for figure, by_prompt in sums.items():
        totals = np.array([by_prompt[prompt] for prompt in sorted(by_prompt)])  # neither shards nor their order matter
        generator = np.random.default_rng([seed, zlib.crc32(figure.encode())])
        drawn = [totals[generator.integers(0, len(totals), len(totals))].sum(0) for _ in range(NUM_RESAMPLES)]
        means[figure] = np.array([total / count for total, count in drawn])
    single = {figure for figure, by_prompt in sums.items() if len(by_prompt) < 2}
    for mean, names in metric.means_of(means).items():
        if names:
            means[mean] = np.mean([means[name] for name in names], 0)
            single |= {mean} if single.intersection(names) else set()
    ends = {figure: np.percentile(drawn, [2.5, 97.5]) for figure, drawn in means.items() if figure not in single}
    return {figure: (float(low), float(high)) for figure, (low, high) in ends.items()}


def figures_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Columns and cells: a row for each samples table and each published model, a column for each figure.

    Figures that tiny models gave have no published ones beside them.
    """
    figures = list(comparison.figures)
    rows = [[name, *(str(comparison.figures[figure].get(name, "")) for figure in figures)] for name in comparison.names]
    for model, published in PUBLISHED.items():
        comparable = published.keys() - set(comparison.by_tiny_models)
        cells = [f"{published[figure]:g}" if figure in comparable else "" for figure in figures]
        if any(cells):
            rows.append([f"{model} (published)", *cells])
    return ["", *figures], rows


def to_markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [list(columns), ["---"] * len(columns), *([str(cell) for cell in row] for row in rows)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |\n" for line in lines)
