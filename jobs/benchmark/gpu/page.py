"""The page of a run: a JSON file and a Markdown file that are whole after every line."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Literal

from jobs.benchmark.timing import readable
from sana_model.files.atomic import write_atomically

State = Literal["done", "wrong", "skipped", "failed"]
COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "seconds": ("time", readable),
    "plain_s": ("plain", readable),
    "fused_s": ("fused", readable),
    "compiled_s": ("compiled", readable),
    "images_per_s": ("images/s", lambda value: f"{value:.3g}"),
    "tflops": ("TFLOP/s", lambda value: f"{value:.3g}"),
    "gb_per_s": ("GB/s", lambda value: f"{value:.4g}"),
    "share": ("of the ceiling", lambda value: f"{value:.0%}"),
    "peak_gib": ("peak GiB", lambda value: f"{value:.2f}"),
    "forecast_gib": ("forecast GiB", lambda value: f"{value:.2f}"),
    "float32": ("float32", lambda value: f"{value:.1e}"),
    "bfloat16": ("bfloat16", lambda value: f"{value:.1e}"),
    "float16": ("float16", lambda value: f"{value:.1e}"),
}
"""Figures by name: heading and form."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the page.

    section, name: where it stands. state: "wrong" is a result beyond its limit. took_s: seconds that it took in all.
    figures: by the names of COLUMNS. remark: what differs from what was asked, or why there is no figure.
    """

    section: str
    name: str
    state: State
    took_s: float
    figures: Mapping[str, float] = field(default_factory=dict)
    remark: str = ""


class Page:
    """Writes `gpu.json` and `gpu.md` into a folder, whole or not at all, before and after every line.

    Args:
        folder: made if need be; files of an earlier run are replaced.
        facts: about machine and run, by name.
        num_lines: that the run has.
    """

    def __init__(self, folder: Path, facts: Mapping[str, str], num_lines: int):
        self.folder, self.facts, self.num_lines = folder, dict(facts), num_lines
        self.entries: list[Entry] = []
        self.write("has not begun")

    def add(self, entry: Entry) -> None:
        self.entries.append(entry)

    def write(self, status: str) -> None:
        """Write both files. `status`: what the run is doing, for a reader who finds the page of a run that was cut off."""
        done = f"{len(self.entries)} of {self.num_lines} lines; {status}"
        data = {"status": done, "facts": self.facts, "lines": [_as_json(entry) for entry in self.entries]}
        self._write_text("gpu.json", json.dumps(data, indent=1, allow_nan=False))
        self._write_text("gpu.md", self._markdown(done))

    def _write_text(self, name: str, text: str) -> None:
        write_atomically(self.folder / name, lambda path: path.write_text(text + "\n"))

    def _markdown(self, done: str) -> str:
        parts = ["# The first minutes on this device", "", f"**{done}**", ""]
        parts += [f"- {name}: {value}" for name, value in self.facts.items()]
        if wrong := [entry.name for entry in self.entries if entry.state == "wrong"]:
            parts += ["", f"**Beyond its limit: {', '.join(wrong)}**"]
        for section, entries in groupby(self.entries, key=lambda entry: entry.section):
            parts += ["", f"## {section}", "", *format_section(list(entries))]
        return "\n".join(parts)


def _as_json(entry: Entry) -> dict[str, object]:
    """Its fields; null for a figure that is not a number, for which JSON has no word."""
    figures = {name: value if math.isfinite(value) else None for name, value in entry.figures.items()}
    return asdict(entry) | {"figures": figures}


def format_section(entries: list[Entry]) -> list[str]:
    """A Markdown table with those columns for which any line has a figure."""
    names = [name for name in COLUMNS if any(name in entry.figures for entry in entries)]
    rows = [["", *(COLUMNS[name][0] for name in names), "remark"], ["---"] * (len(names) + 2)]
    for entry in entries:
        cells = [COLUMNS[name][1](entry.figures[name]) if name in entry.figures else "" for name in names]
        rows.append([entry.name, *cells, describe(entry)])
    return [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]


def describe(entry: Entry) -> str:
    """State and remark in one cell."""
    state = {"done": "", "wrong": "WRONG", "skipped": "skipped", "failed": "FAILED"}[entry.state]
    return ": ".join(part for part in (state, entry.remark) if part)
