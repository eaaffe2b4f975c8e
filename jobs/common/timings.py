"""How long each stage of a job took, and what it made."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from jobs.common.text_table import format_table
from pipelines.stages.contract import StageResult

if TYPE_CHECKING:
    from pipelines.reports.runs import Section

T = TypeVar("T")


@dataclass
class Timings:
    """Seconds by name; results of those that are stages. A job that makes several tables is listed table by table."""

    seconds: dict[str, float] = field(default_factory=dict)
    stages: dict[str, StageResult] = field(default_factory=dict)

    def measure(self, name: str, run: Callable[[], T]) -> T:
        start = time.monotonic()
        result = run()
        if isinstance(result, list):
            for one in result:
                self.stages[one.table.path], self.seconds[one.table.path] = one, one.seconds
            return result
        self.seconds[name] = time.monotonic() - start
        if isinstance(result, StageResult):
            self.stages[name] = result
        return result

    def section(self) -> "Section":
        """The stages as a table, for a page and for the terminal."""
        from pipelines.reports.runs import Section

        rows = []
        for name, seconds in self.seconds.items():
            result = self.stages.get(name)
            if result is None:
                rows.append([name, "", "", f"{seconds:.0f}", ""])
                continue
            reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(result.rejects_by_reason.items()))
            done = "was done" if result.was_done else reasons
            rows.append([name, str(result.num_rows), str(result.num_rejects), f"{seconds:.0f}", done])
        return Section(title="Stages", columns=["stage", "rows", "rejects", "seconds", "rejects by reason"], rows=rows)


def print_section(section: "Section") -> None:
    """Print a section as text."""
    print(f"\n{section.title}")
    print(format_table(section.columns, [[str(cell) for cell in row] for row in section.rows]))
