"""The checkpoints of one training: written in the background, deleted when no longer wanted, the last good one found again."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch.distributed

from pipelines.storage.errors import StorageError
from pipelines.train.engine.checkpoint_places import checkpoint_uri, list_checkpoints
from pipelines.train.engine.checkpoint_reader import CheckpointReader
from pipelines.train.engine.checkpoints import (
    BadCheckpointError,
    Checkpoint,
    Snapshot,
    UnfinishedCheckpointError,
    remove_checkpoint,
    write_part,
)
from pipelines.train.engine.collective import from_rank_zero, gather_objects
from pipelines.train.engine.deepspeed import Engine
from pipelines.train.engine.judgements import read_best, read_judgements

MAX_FAILED_WRITES = 3
"""Failed writes in a row after which the training should stop."""
TO_JUDGE = "to_judge"
"""The key, in the state of a checkpoint, that says whether it is to be judged."""


class CheckpointStore:
    """One rank's access to the checkpoints of a training.

    The checkpoint that was judged the best (`judgements.py`) is always kept.

    Args:
        root_uri: folder of the checkpoints, any fsspec URI.
        keep_last: how many of the newest checkpoints are kept.
        keep_every: checkpoints whose step is a multiple of this are kept too.
        keep_best: the checkpoint with the lowest value of this metric is kept too.
        judged: those whose state says TO_JUDGE are kept until they are judged.
        say: called with messages for a person.
    """

    def __init__(
        self,
        root_uri: str,
        *,
        keep_last: int,
        keep_every: int | None = None,
        keep_best: str | None = None,
        judged: bool = False,
        say: Callable[[str], None],
    ):
        self.root_uri = root_uri
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.keep_best = keep_best
        self.judged = judged
        self.say = say
        self._thread: threading.Thread | None = None
        self._error: StorageError | None = None
        self._num_failed = 0
        self.last_written: str | None = None
        """URI of the last checkpoint whose part of this rank was written."""
        self.written_at = time.time()
        """`time.time()` of that write; before the first one, of this object's creation."""

    def uri(self, step: int) -> str:
        return checkpoint_uri(self.root_uri, step)

    def write(self, snapshot: Snapshot, *, then: Callable[[], None] | None = None) -> None:
        """Write this rank's part in the background; wait first for the pending write, if any.

        `then` is called in the background once this part is written.
        """
        self._join()
        self._thread = threading.Thread(target=self._write, args=(snapshot, then), name="checkpoint-writer")
        self._thread.start()

    def wait(self) -> str | None:
        """Wait for the pending write. Returns the error message of the last write, None if it succeeded."""
        self._join()
        return str(self._error) if self._error is not None else None

    def given_up(self) -> str | None:
        """Wait for the pending write. Returns its error message after MAX_FAILED_WRITES failures in a row, else None."""
        problem = self.wait()
        return problem if self._num_failed >= MAX_FAILED_WRITES else None

    def prune(self) -> None:
        """Remove checkpoints that need not be kept. For one rank, once all have waited: `write` cannot count the newest yet.

        A storage that refuses is told, and they stay.
        """
        try:
            self._prune()
        except StorageError as error:
            self.say(f"checkpoints that are no longer wanted stay: {error}")

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, snapshot: Snapshot, then: Callable[[], None] | None) -> None:
        uri = self.uri(snapshot.step)
        try:
            write_part(uri, snapshot)
            if then is not None:
                then()
            if snapshot.rank == 0:
                self._prune()
            self._error, self._num_failed, self.last_written, self.written_at = None, 0, uri, time.time()
        except StorageError as error:
            self._error, self._num_failed = error, self._num_failed + 1
            self.say(f"the checkpoint of step {snapshot.step} was not written, the ones before it stay: {error}")

    def _prune(self) -> None:
        """Remove checkpoints that need not be kept. Only whole ones count: other ranks may still write the newest."""
        whole = []
        for uri in list_checkpoints(self.root_uri):
            try:
                whole.append(Checkpoint.open(uri))
            except BadCheckpointError:
                if whole:  # a newer one is whole, so nobody writes this one any more
                    remove_checkpoint(uri)
        kept = {checkpoint.uri for checkpoint in whole[: self.keep_last]}
        if self.keep_every:
            kept |= {checkpoint.uri for checkpoint in whole if checkpoint.step % self.keep_every == 0}
        if self.keep_best:
            kept |= best_of(whole, self.keep_best)
        kept |= {self.uri(step) for step in self._steps_in_use(whole)}
        for checkpoint in whole:
            if checkpoint.uri not in kept:
                remove_checkpoint(checkpoint.uri)

    def _steps_in_use(self, whole: Sequence[Checkpoint]) -> list[int]:
        """The steps of checkpoints that are to be judged, and of the best one. All are in use if that cannot be read."""
        try:
            best = read_best(self.root_uri)
            return [*self._find_unjudged(whole), *([best.step] if best is not None else [])]
        except ValueError as error:
            self.say(f"no checkpoint is removed: {error}")
            return [checkpoint.step for checkpoint in whole]

    def _find_unjudged(self, whole: Sequence[Checkpoint]) -> list[int]:
        due = [checkpoint.step for checkpoint in whole if self.judged and checkpoint.states[0].get(TO_JUDGE)]
        judged = read_judgements(self.root_uri) if due else {}
        return [step for step in due if step not in judged]

    def unjudged(self) -> list[int]:
        """The steps of whole checkpoints that are to be judged still, newest first. Raises ValueError, StorageError."""
        whole = []
        for uri in list_checkpoints(self.root_uri) if self.judged else []:
            with suppress(BadCheckpointError):
                whole.append(Checkpoint.open(uri))
        return self._find_unjudged(whole)

    def find(
        self, engine: Engine, *, companions: Mapping[str, Engine] | None = None, fallback: str | None = None
    ) -> CheckpointReader | None:
        """Open the newest whole checkpoint and remove newer ones, whose steps will be repeated. Collective call.

        Args:
            engine: what the checkpoint will be loaded into.
            companions: the engines of the training's further models, by name.
            fallback: URI of the checkpoint to open if the training has none yet.

        Returns the same checkpoint on all ranks, fetched and ready to be loaded; None if there is none to resume from.

        Raises BadCheckpointError if no checkpoint is whole and at least one was damaged after it was finished, or if `fallback`
        is not whole; ValueError if the checkpoint is that of another model.
        """
        candidates = from_rank_zero(lambda: list_checkpoints(self.root_uri))
        damaged: list[str] = []
        for index, uri in enumerate(candidates):
            reader, problems = self._open(uri, engine, companions)
            if not problems:
                self._remove(candidates[:index])
                return reader
            self._tell(f"{problems[0]}: the one before it is taken")
            damaged += [str(error) for error in problems if not isinstance(error, UnfinishedCheckpointError)][:1]
        if damaged:
            raise BadCheckpointError(
                f"none of the {len(candidates)} checkpoints in {self.root_uri} can be read, the oldest because: {damaged[-1]}; "
                "delete the folder to begin from the start"
            )
        self._remove(candidates)
        if fallback is None:
            return None
        reader, problems = self._open(fallback, engine, companions)
        if problems:
            raise problems[0]
        return reader

    def _open(
        self, uri: str, engine: Engine, companions: Mapping[str, Engine] | None
    ) -> tuple[CheckpointReader | None, list[BadCheckpointError]]:
        """Open a checkpoint on all ranks or on none: returns the reader, and the problems that ranks found. Collective call."""
        reader, problem = None, None
        try:
            reader = CheckpointReader(Checkpoint.open(uri), engine, companions)
        except BadCheckpointError as error:
            problem = error
        problems = [error for error in gather_objects(problem) if error is not None]
        if problems and reader is not None:
            reader.close()
        return reader, problems

    def _remove(self, uris: Sequence[str]) -> None:
        if torch.distributed.get_rank() == 0:
            for uri in uris:
                remove_checkpoint(uri)
        torch.distributed.barrier()

    def _tell(self, message: str) -> None:
        if torch.distributed.get_rank() == 0:
            self.say(message)


def best_of(checkpoints: Sequence[Checkpoint], metric: str) -> set[str]:
    """Return the URI of the checkpoint with the lowest value of a metric; empty if no checkpoint has this metric."""
    values: Mapping[str, Any] = {
        checkpoint.uri: checkpoint.states[0]["metrics"][metric]
        for checkpoint in checkpoints
        if metric in checkpoint.states[0].get("metrics", {})
    }
    return {min(values, key=values.__getitem__)} if values else set()
