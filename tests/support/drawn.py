"""Reads the record of samples that a training with `record_samples` leaves in `drawn/` of its output folder."""

import json

from pipelines.storage.files import list_folder, read_file


def read_drawn(folder_uri: str) -> dict[int, list[tuple[int, str]]]:
    """Return step -> sorted (epoch, id) of its samples, over all ranks and tables."""
    drawn: dict[int, list[tuple[int, str]]] = {}
    for name in list_folder(folder_uri):
        for line in read_file(f"{folder_uri}/{name}").decode().splitlines():
            row = json.loads(line)
            drawn.setdefault(row["step"], []).append((row["epoch"], row["id"]))
    return {step: sorted(samples) for step, samples in sorted(drawn.items())}
