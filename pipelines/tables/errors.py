"""Errors of tables, stages and trainings. Each class says what kind it is; `jobs.common.exit_codes` gives a kind its number."""

from typing import Any, ClassVar

from pipelines.storage.errors import ErrorKind


class StaleTableError(ValueError):
    """A table exists whose identity differs from the one with which it would be made now.

    `table` is that `pipelines.tables.table.Table` if it may be deleted and rebuilt; None if it may not.
    """

    error_kind: ClassVar[ErrorKind] = "wrong_input"

    def __init__(self, message: str, table: Any = None):
        super().__init__(message)
        self.table = table


class MissingTableError(ValueError):
    """A stage's input does not exist."""

    error_kind: ClassVar[ErrorKind] = "wrong_input"


class DamagedShardError(ValueError):
    """A shard's file is not what was written."""

    error_kind: ClassVar[ErrorKind] = "wrong_input"


class WrongInputError(ValueError):
    """A model, a file or a setting that a worker was given will not do, so every shard would fail in the same way."""

    error_kind: ClassVar[ErrorKind] = "wrong_input"


class DamagedFileError(ValueError):
    """A JSON file of a table, such as its manifest, was damaged or edited, or a later version wrote it."""

    error_kind: ClassVar[ErrorKind] = "wrong_input"


class StageError(RuntimeError):
    """No shard can be made now (a server is down). A worker raises it to stop the stage without trying the other shards."""

    error_kind: ClassVar[ErrorKind] = "fault"


class ShardError(RuntimeError):
    """Some shards could not be made; all others are written."""

    error_kind: ClassVar[ErrorKind] = "fault"


class TooManyRejectsError(RuntimeError):
    """More rows were refused than the configuration allows."""

    error_kind: ClassVar[ErrorKind] = "too_many_rejects"


class TrainingError(RuntimeError):
    """A training cannot continue, and another try would fail in the same way. All workers raise it at the same point."""

    error_kind: ClassVar[ErrorKind] = "training_failed"


class TrainingInputError(TrainingError):
    """A training cannot start: models, tables and configuration will not do. All workers found it."""

    error_kind: ClassVar[ErrorKind] = "wrong_input"


class TrainingStopped(TrainingError):
    """A training was asked to end and saved a checkpoint; the next start resumes from it."""

    error_kind: ClassVar[ErrorKind] = "stopped"
