"""Why a job ended, as a number that `ray job` and Kubernetes show. The one list of them; `jobs.runner` returns them."""

from enum import IntEnum

from pipelines.lease import LeaseHeldError, LeaseLostError
from pipelines.stage import ShardError, StageError, TooManyRejectsError
from pipelines.storage import StorageError
from pipelines.train_config import TrainingError, TrainingStopped


class ExitCode(IntEnum):
    """What was written stays, whatever the number is: the same command goes on from there. What else to do is beside each."""

    DONE = 0  # all that was configured is there
    WRONG_INPUT = 1  # a table, a file or a setting will not do: the message says which; another try ends alike
    USAGE = 2  # the command line or the YAML file cannot be read
    TOO_MANY_REJECTS = 3  # look at the table's rejects, then fix the source or raise max_reject_share
    TRAINING_FAILED = 4  # the loss is not finite, or workers were lost more often than max_failures allows
    FAULT = 5  # a lost node, no memory, a store or server that is down, another writer, a bug: try again, which goes on
    STOPPED = 143  # SIGTERM, as from `ray job stop` or a node that is taken away


def exit_code(error: Exception) -> ExitCode:
    """The number for an error that a user can put right."""
    if isinstance(error, TooManyRejectsError):
        return ExitCode.TOO_MANY_REJECTS
    if isinstance(error, (ShardError, StageError, StorageError, LeaseHeldError, LeaseLostError)):
        return ExitCode.FAULT
    if isinstance(error, TrainingStopped):
        return ExitCode.STOPPED
    if isinstance(error, TrainingError):
        return ExitCode.TRAINING_FAILED
    return ExitCode.WRONG_INPUT
