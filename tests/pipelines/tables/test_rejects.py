"""One type says that a row was refused; it survives the ways by which Ray and Arrow take it."""

import pickle

import pyarrow as pa

from pipelines.tables.rejects import RowRefused, reject
from pipelines.tables.schema import REJECTS


def test_a_refusal_becomes_a_row_of_the_rejects_table() -> None:
    refused = RowRefused("truncated", "the file ends early")
    rows = [
        reject({"id": "a", "source_uri": "x.png", "caption": "a cat"}, refused),
        reject({"source_uri": "y.png"}, RowRefused("refusal", "half a character: \ud83d")),
    ]
    assert rows[0] == {"id": "a", "source_uri": "x.png", "reject_reason": "truncated", "detail": "the file ends early"}
    assert pa.Table.from_pylist(rows, REJECTS).to_pylist()[1]["detail"] == r"half a character: \ud83d"


def test_it_goes_from_process_to_process_and_says_what_it_is() -> None:
    sent = pickle.loads(pickle.dumps(RowRefused("too_small", "3x3")))
    assert (sent.reason, sent.detail, str(sent)) == ("too_small", "3x3", "too_small: 3x3")


def test_a_copy_that_is_kept_holds_no_traceback() -> None:
    try:
        raise RowRefused("corrupt", "no header") from ValueError("no header")
    except RowRefused as error:
        kept = error.bare()
    assert (kept.reason, kept.detail) == ("corrupt", "no header")
    assert kept.__traceback__ is None and kept.__cause__ is None and kept.__context__ is None
