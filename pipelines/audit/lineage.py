"""The lineage card of a dataset: where its images come from, and how, from what and when each stage made its table.

`lineage.json` is for programs and `lineage.md` for people; both are written to the dataset's folder. Making the card costs as
much as `dataset_status`, and reads the scores of at most `max_shards` shards of each CLIP, spread evenly.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from pipelines.audit.status import DatasetStatus, TableStatus, dataset_status, find_tables, find_trainings
from pipelines.ingest.plan import read_plan
from pipelines.score.candidates import Candidates, scored_captioners
from pipelines.score.config import SelectionConfig
from pipelines.score.selection import Caption, caption_probabilities
from pipelines.storage.files import write_file
from pipelines.tables.identity import Manifest, software_versions
from pipelines.tables.sampling import spread
from pipelines.tables.schema import IMAGES, IMAGES_PATH
from pipelines.tables.table import Table
from sana_model.files.redact import redact

LINEAGE_VERSION = 1  # of the schema of lineage.json
JSON_FILE, MARKDOWN_FILE = "lineage.json", "lineage.md"
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)  # of CLIP scores


@dataclass(frozen=True, kw_only=True)
class CaptionerShare:
    """How much a captioner contributes under a selection policy.

    `selected_share` is the expected share, from 0 to 1, of the images that train on a caption by this captioner.
    `score_quantiles` are the quantiles (QUANTILES) of the CLIP scores of all its captions.
    """

    captioner: str
    num_captions: int
    selected_share: float
    score_quantiles: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """The content of the card. `stages` are in the order of the tables; `scores` (by path) are under the policy `selection`."""

    dataset_uri: str
    made: str
    sources: list[dict[str, Any]]
    stages: list[dict[str, Any]]
    selection: dict[str, Any]
    scores: dict[str, dict[str, Any]]
    trainings: list[dict[str, Any]]
    software: dict[str, str]


def write_lineage(dataset_uri: str, *, max_shards: int) -> Lineage:
    """Make the card and write both its files to the dataset's folder. Raises ValueError if there is no dataset."""
    lineage = make_lineage(dataset_uri, max_shards=max_shards)
    content = json.dumps({"version": LINEAGE_VERSION, **asdict(lineage)}, indent=2, ensure_ascii=False) + "\n"
    write_file(f"{dataset_uri}/{JSON_FILE}", redact(content).encode())
    write_file(f"{dataset_uri}/{MARKDOWN_FILE}", redact(to_markdown(lineage)).encode())
    return lineage


def make_lineage(dataset_uri: str, *, max_shards: int) -> Lineage:
    """The card of a dataset in its present state. Raises ValueError if there is no dataset."""
    status = dataset_status(dataset_uri, count_rows=True)
    manifests = {found.path: found.manifest for found in find_tables(dataset_uri) if found.manifest is not None}
    trainings = dict(find_trainings(dataset_uri))
    selection, competing, chosen_by = _selection(trainings)
    scored = [table.path.split("/") for table in status.tables if table.path.startswith("scores/")]
    clips = {clip for _, clip, *captioner in scored if captioner}  # a table of the old form has no captioner in its path
    return Lineage(
        dataset_uri=dataset_uri,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        sources=[_describe_source(dataset_uri, manifests[IMAGES_PATH])] if IMAGES_PATH in manifests else [],
        stages=[_describe_stage(table, manifests.get(table.path)) for table in status.tables],
        selection={"of": chosen_by, **asdict(selection)} | ({"captioners": competing} if competing else {}),
        scores={f"scores/{clip}": _scores(dataset_uri, clip, selection, competing, max_shards) for clip in sorted(clips)},
        trainings=_describe_trainings(status, trainings),
        software=software_versions(),
    )


def _describe_source(dataset_uri: str, manifest: Manifest) -> dict[str, Any]:
    facts = {name: manifest.config[name] for name in ("source", "source_kind") if manifest.config.get(name) is not None}
    if manifest.license is not None:
        facts["license"] = manifest.license
    plan = read_plan(Table(dataset_uri, IMAGES_PATH, IMAGES))
    if plan is not None:
        facts["num_files"] = len({part.path for parts in plan.shards.values() for part in parts})
    return facts


def _describe_stage(table: TableStatus, manifest: Manifest | None) -> dict[str, Any]:
    return {
        "table": table.path,
        "stage": table.stage,
        "rows": table.num_rows,
        "rejects": table.num_rejects,
        "rejects_by_reason": table.rejects_by_reason,
        "shards": table.num_shards,
        "bytes": table.num_bytes,
        "complete": table.complete,
        "stale": table.stale,
        "fingerprint": table.fingerprint,
        "inputs": manifest.inputs if manifest else {},
        "models": manifest.models if manifest else {},
        "config": manifest.config if manifest else {},
        "figures": manifest.figures if manifest else {},
        "begun": manifest.begun if manifest else "",
        "updated": table.updated,
        "software": manifest.versions if manifest else {},
    }


def _selection(trainings: dict[str, dict[str, Any]]) -> tuple[SelectionConfig, list[str], str]:
    """The selection policy of the dataset's training (the last by name), or the default policy; the captioners that compete
    in that training, none for all; and whose policy it is."""
    for name, record in sorted(trainings.items(), reverse=True):
        data, latents = record["config"].get("data", {}), record["config"].get("latents", "")
        if settings := data.get("selection"):
            lists = [data.get("captioners"), *(entry.get("captioners") for entry in latents if isinstance(entry, dict))]
            competing = dict.fromkeys(captioner for names in lists for captioner in names or [])
            return SelectionConfig(**settings), list(competing), f"the training {name!r}"
    return SelectionConfig(), [], "the default configuration"


def _scores(
    dataset_uri: str, clip: str, selection: SelectionConfig, competing: Sequence[str], max_shards: int
) -> dict[str, Any]:
    candidates = Candidates(dataset_uri, scored_captioners(dataset_uri, clip), clip)
    found = candidates.find_scored()
    chosen = [found.common[index] for index in spread(len(found.common), max_shards)]
    contests = [contest for shard in chosen for contest in candidates.read_scored(shard).values()]
    read = f"{len(contests):,} images of {len(chosen):,} of {found.total:,} shards were read"
    if lacking := found.explain():
        read += f"; {lacking}"
    return {"read": read, "captioners": [asdict(share) for share in captioner_shares(contests, selection, competing)]}


def captioner_shares(
    contests: Iterable[Sequence[Caption]], selection: SelectionConfig, competing: Sequence[str] = ()
) -> list[CaptionerShare]:
    """The shares of all captioners, by name, from the scored captions of each image.

    Args:
        competing: the captioners among whom the policy selects; empty: all.
    """
    scores: dict[str, list[float]] = defaultdict(list)
    chances: dict[str, float] = defaultdict(float)
    for contest in contests:
        for caption in contest:
            scores[caption["captioner"]].append(caption["clip_score"])
        rivals = [caption for caption in contest if not competing or caption["captioner"] in competing]
        for caption, chance in zip(rivals, caption_probabilities(rivals, selection), strict=True):
            chances[caption["captioner"]] += chance
    total = sum(chances.values()) or 1.0
    return [
        CaptionerShare(
            captioner=captioner,
            num_captions=len(values),
            selected_share=chances[captioner] / total,
            score_quantiles={f"{quantile:g}": float(np.quantile(values, quantile)) for quantile in QUANTILES},
        )
        for captioner, values in sorted(scores.items())
    ]


def _describe_trainings(status: DatasetStatus, trainings: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    described = []
    for training in status.trainings:
        record = trainings[training.name]
        result = {name: record["result"][name] for name in ("loss_start", "loss_end")} if record["result"] else None
        facts = {name: record[name] for name in ("fingerprint", "inputs", "models", "config")}
        described.append(
            {"name": training.name, "ended": result is not None, "result": result, "stale": training.stale, **facts}
        )
    return described


def to_markdown(lineage: Lineage) -> str:
    """Write the card as Markdown."""
    parts = [f"# Lineage of {lineage.dataset_uri}", f"Made {lineage.made}."]
    parts += ["## Sources", *(_facts(source) for source in lineage.sources)] if lineage.sources else []
    parts += ["## Tables", _tables(lineage.stages)]
    refused = [
        (stage["table"], reason, count) for stage in lineage.stages for reason, count in stage["rejects_by_reason"].items()
    ]
    if refused:
        rows = [[f"`{table}`", reason, f"{count:,}"] for table, reason, count in refused]
        parts += ["## What was refused", _grid(["table", "reason", "rows"], rows, right=1)]
    for path, scores in lineage.scores.items():
        parts += [f"## Captioners in `{path}`", *_captioners(scores, lineage.selection)]
    parts += ["## How each table was made"]
    for stage in lineage.stages:
        parts += [f"### `{stage['table']}`", _stage(stage)]
    for training in lineage.trainings:
        parts += [f"## Training `{training['name']}`", _training(training)]
    parts += ["## Software that wrote this card", _facts(lineage.software)]
    return "\n\n".join(parts) + "\n"


def _tables(stages: list[dict[str, Any]]) -> str:
    rows = []
    for stage in stages:
        state = "stale: " + "; ".join(stage["stale"]) if stage["stale"] else "complete" if stage["complete"] else "unfinished"
        counts = [f"{stage[name]:,}" if stage[name] is not None else "?" for name in ("rows", "rejects", "shards", "bytes")]
        rows.append([f"`{stage['table']}`", state, f"`{stage['fingerprint'][:12]}`", *counts])
    return _grid(["table", "state", "fingerprint", "rows", "rejects", "shards", "bytes"], rows, right=4)


def _captioners(scores: dict[str, Any], selection: dict[str, Any]) -> list[str]:
    names = [f"{100 * quantile:g}%" for quantile in QUANTILES]
    rows = [
        [share["captioner"], f"{share['num_captions']:,}", f"{share['selected_share']:.1%}"]
        + [f"{value:.1f}" for value in share["score_quantiles"].values()]
        for share in scores["captioners"]
    ]
    settings = ", ".join(f"{name} {value}" for name, value in selection.items() if name != "of" and value not in (None, {}))
    return [
        f"Expected share of the images that train on a captioner's caption, under the selection of {selection['of']} "
        f"({settings}); and quantiles of its CLIP scores. {scores['read']}.",
        _grid(["captioner", "captions", "selected", *names], rows, right=2 + len(names)),
    ]


def _stage(stage: dict[str, Any]) -> str:
    facts = {"stage": stage["stage"], "begun": stage["begun"], "ended" if stage["complete"] else "updated": stage["updated"]}
    facts |= {"made from": ", ".join(f"`{path}` {fingerprint[:12]}" for path, fingerprint in stage["inputs"].items())}
    facts |= {f"model {name}": f"`{version}`" for name, version in stage["models"].items()}
    facts |= {f"{name}": f"{value:.4g}" for name, value in stage["figures"].items()}
    facts |= {"software": ", ".join(f"{name} {version}" for name, version in stage["software"].items())}
    return f"{_facts(facts)}\n\n{_config(stage['config'])}"


def _training(training: dict[str, Any]) -> str:
    result = training["result"]
    facts = {"fingerprint": f"`{training['fingerprint'][:12]}`", "stale": "; ".join(training["stale"])}
    facts |= {"made from": ", ".join(f"`{path}` {fingerprint[:12]}" for path, fingerprint in training["inputs"].items())}
    facts |= {f"model {name}": f"`{version}`" for name, version in training["models"].items()}
    facts["loss"] = f"{result['loss_start']:.4f} -> {result['loss_end']:.4f}" if result else "has not ended"
    return f"{_facts(facts)}\n\n{_config(training['config'])}"


def _facts(facts: dict[str, Any]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in facts.items() if value)


def _config(config: dict[str, Any]) -> str:
    return f"```json\n{json.dumps(config, indent=2, ensure_ascii=False)}\n```"


def _grid(names: Sequence[str], rows: list[list[str]], *, right: int) -> str:
    """A Markdown table whose last `right` columns are numbers."""
    marks = ["---"] * (len(names) - right) + ["--:"] * right
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in [list(names), marks, *rows]]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
