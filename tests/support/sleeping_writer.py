"""A writer of images that sleeps in the middle of a shard until its lease is taken over, and then tries every way of writing.

python sleeping_writer.py <dataset uri> <folder with list.csv>: stops itself, and when it goes on prints a line for each way:
its name and "lost", or "written".
"""

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace

import pyarrow as pa

from pipelines.audit.rebuild import delete_table
from pipelines.ingest.plan import Plan, write_plan
from pipelines.ingest.readers import count_samples
from pipelines.ingest.sources import Part, find_source
from pipelines.stages.contract import Progress
from pipelines.stages.run import _complete
from pipelines.stages.shards import write_output
from pipelines.storage import lease
from pipelines.storage.errors import LeaseLostError
from pipelines.storage.lease import LeaseConfig, Leases
from pipelines.tables import table as tables
from pipelines.tables.identity import Identity
from pipelines.tables.schema import IMAGES, REJECTS
from pipelines.tables.table import Table


def main() -> None:
    uri, folder = sys.argv[1:]
    lease.host_id = lambda: "another host"  # type: ignore[assignment]  # else the lease of a process that lives is not taken over
    with Leases(LeaseConfig(seconds=1.0)) as leases:
        images = Table(uri, "images", IMAGES)
        ticket = leases.take(images.uri).ticket
        manifest = images.claim(Identity("ingest", {"source": "first"}, {}, {}), ticket=ticket)
        rows, rejects = pa.Table.from_pylist([], IMAGES), pa.Table.from_pylist([], REJECTS)
        source = find_source(f"{folder}/list.csv", "list", copies_uri=f"{images.uri}/_lists")
        progress = Progress(1, 1, 0)
        ways: dict[str, Callable[[], object]] = {
            "a shard": lambda: images.write_shard("00000", rows, ticket=ticket),
            "a shard and its rejects": lambda: write_output(images, "00000", rows, rejects, {}, "f", ticket),
            "counts": lambda: _complete(images, ["00000"], progress, 0.0, ticket),
            "a manifest": lambda: images.write_manifest(replace(manifest, license="x"), ticket=ticket),
            "a claim": lambda: Table(uri, "images/new", IMAGES).claim(manifest.identity(), ticket=ticket),
            "a plan": lambda: write_plan(images, Plan("list", "x", {}), ticket),
            "a copied list": lambda: count_samples(source, Part("list.csv", 9), ticket),
            "verdicts": lambda: images.write_file("_verdicts-00000.parquet", b"x", ticket=ticket),
            "a deletion": lambda: delete_table(images, leases),
        }
        write_sealed = tables.write_sealed

        def write_and_sleep(*args: object, **options: object) -> memoryview:
            tables.write_sealed = write_sealed
            content = write_sealed(*args, **options)  # type: ignore[arg-type]
            os.kill(os.getpid(), signal.SIGSTOP)
            return content

        tables.write_sealed = write_and_sleep  # type: ignore[assignment]
        for name, write in ways.items():
            try:
                write()
                print(f"{name} written", flush=True)
            except LeaseLostError:
                print(f"{name} lost", flush=True)


if __name__ == "__main__":
    main()
