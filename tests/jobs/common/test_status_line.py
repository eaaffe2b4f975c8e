"""The line of progress: it says that a stage is alive while nothing new comes."""

import io
import re
import sys
import time

import pytest

from jobs.common import status_line
from jobs.common.status_line import CLEAR_LINE, StatusLine, describe_progress
from pipelines.stages.contract import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("output", [io.StringIO(), Terminal()], ids=["log", "terminal"])
def test_what_takes_long_is_shown_again_with_its_seconds(output: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", output)
    for name in ("BEAT", "BEAT_IN_LOG"):
        monkeypatch.setattr(status_line, name, 0.01)

    def wait_for(pattern: str) -> None:
        while not re.search(pattern, output.getvalue()):
            time.sleep(0.01)

    line = StatusLine()
    with line.running("finds its models"):
        wait_for(r"finds its models  0 s")
        line.show("0/1 shards")
        wait_for(r"0/1 shards  [0-9]+ s")
        line.say("a line that stays")
    ended = output.getvalue()
    time.sleep(0.05)
    assert output.getvalue() == ended and "a line that stays\n" in ended
    assert (CLEAR_LINE in ended) == output.isatty()


def test_a_line_wider_than_the_terminal_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "20")
    StatusLine().show("x" * 50)
    assert sys.stderr.getvalue() == CLEAR_LINE + "x" * 19  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("rows", "seconds", "told"), [(8, 182.0, "0.044 rows/s"), (0, 0.0, "0.0 rows/s"), (80, 10.0, "8.0 rows/s")]
)
def test_a_slow_stage_has_a_rate_that_is_not_zero(rows: int, seconds: float, told: str) -> None:
    assert told in describe_progress("sample", Progress(1, 0, 0, new_rows=rows, seconds=seconds))
