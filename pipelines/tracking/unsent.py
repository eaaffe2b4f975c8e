"""What is logged to a run, as entries that may wait: in memory, and in a file beside the training until the next start."""

import base64
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from typing import Any, Literal

from PIL import Image

from pipelines.storage.errors import StorageError
from pipelines.storage.files import read_file, remove_file, write_file
from pipelines.tracking.faults import first_line, is_refused
from pipelines.tracking.runs import RunRequest, TrackedRun
from sana_model.files.redact import redact, redact_uri

UNSENT = "mlflow_unsent.jsonl"
"""The file of entries that could not be sent, in the output folder of a training; there is none if all were."""

Kind = Literal["metrics", "tags", "inputs", "image", "html", "tables", "end"]


@dataclass(frozen=True)
class Entry:
    """One thing to log to a run.

    kind, content: metrics: {name: value}; tags: {name: value}; tables: {name: fingerprint}; inputs: [dataset_uri, {name:
        fingerprint}, context]; image: [key, PNG in base64]; html: [name, page]; end: the run's status.
    step: that it is about, if it is about one.
    at: `time.time()` when it was made.
    """

    kind: Kind
    content: Any
    step: int | None = None
    at: float = field(default_factory=time.time)

    @classmethod
    def of_image(cls, image: Image.Image, key: str, step: int) -> "Entry":
        """An entry with a picture, which is kept as a PNG file."""
        png = BytesIO()
        image.save(png, "PNG")
        return cls("image", [key, base64.b64encode(png.getvalue()).decode()], step)

    def send(self, run: TrackedRun) -> None:
        """Log it. Raises MLflow's own errors."""
        content: Any = self.content
        match self.kind:
            case "metrics":
                run.log_metrics(content, self.step, at=self.at)
            case "tags":
                run.set_tags(content)
            case "tables":
                run.tag_tables(content)
            case "inputs":
                run.log_inputs(*content)
            case "image":
                run.log_image(Image.open(BytesIO(base64.b64decode(content[1]))), content[0], self.step)
            case "html":
                run.log_html(content[1], content[0])
            case "end":
                run.end(content)

    def describe_refusal(self, uri: str, error: Exception) -> str:
        """Say that MLflow refuses this entry."""
        step = "" if self.step is None else f" of step {self.step}"
        return f"MLflow at {uri} refuses {self.kind}{step}, which are left out: {first_line(error)}"


def read_unsent(folder_uri: str) -> list[Entry]:
    """Read the entries that wait in an output folder, oldest first. Raises StorageError, also if the file is damaged."""
    try:
        content = read_file(f"{folder_uri}/{UNSENT}")
    except FileNotFoundError:
        return []
    try:
        return [Entry(**json.loads(line)) for line in content.decode().splitlines()]
    except (ValueError, TypeError) as error:
        raise StorageError(f"{folder_uri}/{UNSENT} is damaged ({error}): move it away") from error


def write_unsent(folder_uri: str, entries: Sequence[Entry]) -> None:
    """Let these entries, and no others, wait in an output folder. Raises StorageError."""
    if entries:
        content = redact_uri("".join(f"{json.dumps(asdict(entry))}\n" for entry in entries))
        write_file(f"{folder_uri}/{UNSENT}", content.encode())
    elif read_unsent(folder_uri):
        remove_file(f"{folder_uri}/{UNSENT}")


def send_or_keep(
    request: RunRequest, folder_uri: str, entries: Iterable[Entry] = (), *, say: Callable[[str], None]
) -> str | None:
    """Send what waits in an output folder and then `entries`; what cannot be sent waits there. `say` is told what is refused.

    Returns None if all was sent, or else a line that says why not, and where it waits. Raises StorageError.
    """
    waiting = [*read_unsent(folder_uri), *entries]
    sent = 0
    try:
        run = (request.find() or request.connect()) if waiting else None
        for entry in waiting:
            assert run is not None
            try:
                entry.send(run)
            except Exception as error:
                if not is_refused(error):
                    raise
                say(entry.describe_refusal(request.uri, error))
            sent += 1
    except Exception as error:  # of MLflow, its server, its database, the network
        write_unsent(folder_uri, waiting[sent:])
        return (
            f"{len(waiting) - sent} entries could not be sent to MLflow at {redact(request.uri)} ({first_line(error)}): they "
            f"wait in {redact(folder_uri)}/{UNSENT}"
        )
    write_unsent(folder_uri, [])
    return None
