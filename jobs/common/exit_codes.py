"""Exit codes, which `ray job` and Kubernetes show: why a job ended."""

from enum import IntEnum

from pipelines.storage.errors import ErrorKind


class ExitCode(IntEnum):
    """Whatever the number, what was written stays, and the same command resumes from there."""

    DONE = 0  # all that was configured is there
    WRONG_INPUT = 1  # a table, a file or a setting will not do: the message says which; another try ends the same way
    USAGE = 2  # the command line or the YAML file cannot be read
    TOO_MANY_REJECTS = 3  # look at the table's rejects, then fix the source or raise max_reject_share
    TRAINING_FAILED = 4  # the loss is not finite, or workers were lost more often than max_failures allows
    FAULT = 5  # a lost node, no memory, a store or server that is down, another writer, a bug: try again, which resumes
    STOPPED = 143  # SIGTERM, as from `ray job stop` or a node that is taken away; or Ctrl-C


CODES: dict[ErrorKind, ExitCode] = {
    "wrong_input": ExitCode.WRONG_INPUT,
    "fault": ExitCode.FAULT,
    "too_many_rejects": ExitCode.TOO_MANY_REJECTS,
    "training_failed": ExitCode.TRAINING_FAILED,
    "stopped": ExitCode.STOPPED,
}


def exit_code(error: Exception) -> ExitCode:
    """The exit code for an error that a user can fix."""
    return CODES[getattr(error, "error_kind", "fault" if isinstance(error, ConnectionError) else "wrong_input")]
