"""What the stage jobs share, without Ray: a stage whose shards are made in this process."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from jobs.common.job import JobConfig
from jobs.common.stage_job import track_stage
from pipelines.stages.contract import OnProgress, Outcome, StageResult
from pipelines.stages.run import run_stream
from pipelines.stages.shards import write_output
from pipelines.storage.lease import Leases, Ticket
from pipelines.tables.identity import Identity
from pipelines.tables.schema import IMAGE_SCORES, REJECTS
from pipelines.tables.table import REPORT, Table

IDENTITY = Identity("score_images", {}, {}, {})


def test_a_table_whose_job_was_killed_before_its_report_gets_one(tmp_path: Path) -> None:
    table = Table(str(tmp_path), "image_scores/x", IMAGE_SCORES)
    reports: list[str] = []

    def stream(missing: list[str], ticket: Ticket) -> Iterator[Outcome]:
        for shard in missing:
            empty = (pa.Table.from_pylist([], schema) for schema in (IMAGE_SCORES, REJECTS))
            write_output(table, shard, *empty, {}, IDENTITY.fingerprint, ticket)
            yield Outcome(shard=shard, num_rows=0, rejects_by_reason={}, figures={}, error=None, stops="")

    def stage(on_progress: OnProgress, leases: Leases | None = None) -> StageResult:
        return run_stream(table, IDENTITY, ["00000"], stream, max_reject_share=1.0, on_progress=on_progress, leases=leases)

    def make_report() -> str:
        reports.append(f"<p>report {len(reports)}</p>")
        return reports[-1]

    stage(lambda progress: None)
    for _ in range(2):
        assert track_stage(JobConfig(dataset_uri=str(tmp_path)), "x", stage, make_report=make_report).was_done
        assert [(tmp_path / "image_scores/x" / REPORT).read_text()] == reports
    assert not (tmp_path / "mlflow.db").exists()
