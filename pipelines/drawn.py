"""A record of which samples each step of a training used: small files of JSON lines in its output folder."""

import json

from pipelines.samples import MicroBatch
from pipelines.storage import list_folder, read_file, remove_file, write_file

DRAWN_DIR = "drawn"


class DrawnLog:
    """Of one rank. A file holds the steps since the one before."""

    def __init__(self, folder_uri: str, rank: int):
        self.folder_uri = folder_uri
        self.rank = rank
        self._lines: list[str] = []
        self._first_step = 0

    def add(self, step: int, batch: MicroBatch) -> None:
        if not self._lines:
            self._first_step = step
        self._lines += [
            json.dumps({"step": step, "table": table, "epoch": epoch, "id": sample})
            for table, epoch, sample in zip(batch.tables, batch.epochs, batch.ids, strict=True)
        ]

    def flush(self, step: int) -> None:
        """Write down the samples up to this step. Raises StorageError, and keeps them for the next time."""
        if self._lines:
            name = f"steps-{self._first_step:06d}-{step:06d}-rank-{self.rank:05d}.jsonl"
            write_file(f"{self.folder_uri}/{name}", "".join(f"{line}\n" for line in self._lines).encode())
            self._lines = []


def forget_after(folder_uri: str, step: int) -> None:
    """Take the steps after this one, which come again, out of the record."""
    for name in list_folder(folder_uri):
        first, last = (int(number) for number in name.split("-")[1:3])
        if first > step:
            remove_file(f"{folder_uri}/{name}")
        elif last > step:
            lines = read_file(f"{folder_uri}/{name}").decode().splitlines(keepends=True)
            kept = "".join(line for line in lines if json.loads(line)["step"] <= step)
            write_file(f"{folder_uri}/{name}", kept.encode())


def read_drawn(folder_uri: str) -> dict[int, list[tuple[int, str]]]:
    """(epoch, id) of the samples of each step, over all ranks and tables, sorted."""
    drawn: dict[int, list[tuple[int, str]]] = {}
    for name in list_folder(folder_uri):
        for line in read_file(f"{folder_uri}/{name}").decode().splitlines():
            row = json.loads(line)
            drawn.setdefault(row["step"], []).append((row["epoch"], row["id"]))
    return {step: sorted(samples) for step, samples in sorted(drawn.items())}
