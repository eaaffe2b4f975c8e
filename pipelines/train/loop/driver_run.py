"""The MLflow run of a training as the driver sees it: made before the first step, and ended after the last."""

from dataclasses import dataclass

from pipelines.storage.errors import StorageError
from pipelines.tracking.faults import describe, is_passing, tell_waiting
from pipelines.tracking.runs import RunEnd, RunRequest
from pipelines.tracking.unsent import Entry, read_unsent, send_or_keep, write_unsent
from pipelines.train.loop.desk import OnNotice


@dataclass(frozen=True)
class DriverRun:
    """What the driver logs. What cannot be sent waits in the training's output folder, for the next start to send.

    Args:
        request: the run; None: no MLflow, and no call does anything.
        output_uri: the training's output folder.
        say: called with messages for a person.
    """

    request: RunRequest | None
    output_uri: str
    say: OnNotice

    def begin(self) -> None:
        """Make or find the run. If MLflow cannot be reached now, say so: the workers try again.

        Raises TrackingError if it will never take the run, before any worker starts.
        """
        if self.request is None:
            return
        try:
            self.request.connect()
        except Exception as error:
            if not is_passing(error):
                raise describe(error, self.request.uri) from error
            self.say(tell_waiting(error, self.request.uri))

    def mark_killed(self) -> None:
        """End the run as KILLED if MLflow can be reached; nothing waits for it."""
        if self.request is not None:
            self.request.try_to(lambda run: run.end("KILLED"))

    def end(self, status: RunEnd) -> None:
        """End the run. What cannot be sent waits, and the reason is said."""
        if (problem := self.send(Entry("end", status))) is not None:
            self.say(problem)

    def keep(self, *entries: Entry) -> None:
        """Let these entries wait in the output folder too, for `send`: whatever ends this process, the next start has them."""
        if self.request is not None:
            try:
                write_unsent(self.output_uri, [*read_unsent(self.output_uri), *entries])
            except StorageError as error:
                self.say(f"entries for MLflow at {self.request.uri} are lost: {error}")

    def send(self, *entries: Entry) -> str | None:
        """Send what waits in the output folder, and then these entries. Returns why something waits still; None if nothing."""
        if self.request is None:
            return None
        try:
            return send_or_keep(self.request, self.output_uri, entries, say=self.say)
        except StorageError as error:  # nothing of a training is undone for it
            return f"entries for MLflow at {self.request.uri} are lost: {error}"
