"""A row that a stage refuses: the reason that a worker raises or returns, and the row of the rejects table that it becomes."""

from pipelines.tables.schema import Row
from sana_model.files.redact import redact, redact_uri


class RowRefused(Exception):
    """A row was refused. Whatever turns a row into something raises it, the worker catches it, and `reject` records it.

    Args:
        reason: a short code, which is counted.
        detail: what was wrong, for people.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"

    def bare(self) -> "RowRefused":
        """A copy to keep for later: one that was raised holds the row's image in memory, through its traceback."""
        return RowRefused(self.reason, self.detail)


def reject(row: Row, refused: RowRefused) -> Row:
    """The row of the rejects table for a refused row, which may have an id, a source_uri, or both. Secrets are hidden."""
    # What a server or a file name says may be no Unicode.
    detail = redact(refused.detail).encode(errors="backslashreplace").decode()
    source_uri = row.get("source_uri")
    return {
        "id": row.get("id"),
        "source_uri": redact_uri(source_uri) if source_uri else source_uri,
        "reject_reason": refused.reason,
        "detail": detail,
    }
