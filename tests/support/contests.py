"""Write captions and their scores, as captioners and a CLIP would, for tests that look at which caption is chosen."""

from collections.abc import Mapping

import pyarrow as pa

from pipelines.tables.captions import captions_table
from pipelines.tables.identity import Identity
from pipelines.tables.schema import ORIGINAL_CAPTIONER, SCORES, Row, scores_path
from pipelines.tables.table import Table

Contest = Mapping[str, Mapping[str, tuple[str, float]]]
"""By id of an image, and captioner: caption and score."""
FACTS = {"image_bytes": b"", "format": "PNG", "width": 64, "height": 64, "phash": "0" * 16, "source_uri": "x"}


def write_contest(uri: str, contest: Contest, *, clip: str = "clip", metadata: Mapping[str, str] | None = None) -> None:
    """Write one shard of images, and of each captioner's captions and scores. `metadata`: of the images, by id."""
    captioners = dict.fromkeys(name for own in contest.values() for name in own)
    for captioner in (ORIGINAL_CAPTIONER, *captioners):
        said = {row_id: own[captioner] for row_id, own in contest.items() if captioner in own}
        if captioner == ORIGINAL_CAPTIONER:
            rows = [
                {"id": row_id, **FACTS, "caption": said.get(row_id, (None,))[0], "metadata": (metadata or {}).get(row_id)}
                for row_id in contest
            ]
        else:
            rows = [
                {"id": row_id, "caption": caption, "num_tokens": 1, "finish_reason": "stop"}
                for row_id, (caption, _) in said.items()
            ]
        _write(captions_table(uri, captioner), rows)
        if captioner in captioners:
            scores = [{"id": row_id, "clip_score": score} for row_id, (_, score) in said.items()]
            _write(Table(uri, scores_path(clip, captioner), SCORES), scores)


def _write(table: Table, rows: list[Row]) -> None:
    table.claim(Identity("test", {}, {}, {}))
    table.write_shard("00000", pa.Table.from_pylist(rows, table.schema))
