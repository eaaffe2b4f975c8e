"""How far a training is, told by its workers to whoever looks: a small file in the output folder."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from sana_model.checkpoint_files import read_json, write_json

PROGRESS = "progress.json"
POLL_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class TrainProgress:
    """How far a training is: `step` of `num_steps` are done. The figures are those since the last report.

    data_wait_share: of the time, in which the training waited for samples. checkpoint_time: time.time() of the last checkpoint,
    or of the start.
    """

    step: int
    num_steps: int
    loss: float
    samples_per_second: float
    data_wait_share: float
    seconds_left: float
    checkpoint_time: float

    def write(self, folder: Path) -> None:
        write_json(folder / PROGRESS, asdict(self))


OnTrainProgress = Callable[[TrainProgress], None]


@contextmanager
def watch_progress(folder: Path, on_progress: OnTrainProgress) -> Iterator[None]:
    """Within, a thread calls `on_progress` whenever a worker has written something new."""
    (folder / PROGRESS).unlink(missing_ok=True)
    ended = threading.Event()

    def watch() -> None:
        shown = None
        while True:
            last_look = ended.wait(POLL_SECONDS)
            if (folder / PROGRESS).exists():
                progress = TrainProgress(**read_json(folder / PROGRESS))
                if progress != shown:
                    shown = progress
                    on_progress(progress)
            if last_look:
                return

    thread = threading.Thread(target=watch, name="training-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
