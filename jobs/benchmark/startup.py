"""CPU seconds until a command has answered: `--help` of every command, and the status of a small dataset."""

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial

import pyarrow as pa

from jobs.benchmark.config import StartupConfig
from jobs.benchmark.turns import in_turns
from jobs.common.commands import COMMANDS
from jobs.common.text_table import format_table
from pipelines.tables.identity import Identity
from pipelines.tables.schema import CAPTIONS, REJECTS, captions_path
from pipelines.tables.table import Table


def benchmark_startup(config: StartupConfig) -> None:
    """Print the median CPU seconds (user and system, of all its processes) of each command, and the most of all."""
    with tempfile.TemporaryDirectory() as folder:
        make_small_dataset(folder)
        names = config.commands or list(COMMANDS)
        commands = {f"{name} --help": [f"jobs.{name}", "--help"] for name in names}
        commands["status of a dataset"] = ["jobs.status", "--dataset_uri", folder]
        measures = {name: partial(cpu_seconds, [sys.executable, "-m", *words]) for name, words in commands.items()}
        taken = in_turns(measures, config.repeats, label="rounds", warm_up=True)  # which fills the file cache
    seconds = {name: statistics.median(values) for name, values in taken.items()}
    print(format_table(["command", "CPU seconds"], [[name, f"{value:.2f}"] for name, value in seconds.items()]))
    print(f"\n  most: {max(seconds.values()):.2f}")


def cpu_seconds(command: Sequence[str]) -> float:
    """User and system seconds of a process and of those that it waited for. Raises CalledProcessError if it fails."""
    before = os.times()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def make_small_dataset(dataset_uri: str) -> None:
    """One finished table of one shard and one row."""
    table = Table(dataset_uri, captions_path("example"), CAPTIONS)
    identity = Identity("caption", {}, {}, {})
    table.claim(identity)
    row = {"id": "0" * 64, "caption": "a red square", "num_tokens": 3, "finish_reason": "stop"}
    table.write_shard("00000", pa.Table.from_pylist([row], CAPTIONS))
    table.rejects().write_shard("00000", pa.Table.from_pylist([], REJECTS))
