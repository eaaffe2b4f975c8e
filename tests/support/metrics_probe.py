"""A program that runs an ingest, and shows a training's figures meanwhile, on its own Ray; prints what Prometheus would read.

python -m tests.support.metrics_probe FOLDER PORT [LIST]: the ingest reads drawn images and a broken one; or the list's URLs,
each into a shard of its own. With a list, the program prints no metrics and keeps Ray until its standard input is closed.
"""

import sys
import time
import urllib.request
from pathlib import Path

import ray

from jobs import ingest
from jobs.common.prometheus import TrainMetrics
from jobs.ingest import IngestJob
from pipelines.ingest.config import DownloadConfig, IngestConfig
from pipelines.shapes.drawing import write_folder
from pipelines.shapes.scenes import ShapesConfig

PATIENCE = 120.0  # seconds
WANTED = ("ray_sana_stage_rejects", "ray_sana_train_loss", "ray_resources", "ray_object_store_memory")
WANTED += ("ray_node_disk_free", "ray_node_network_receive_speed")


def main(folder: Path, port: int, urls: str | None) -> None:
    ray.init(num_cpus=4, include_dashboard=False, _metrics_export_port=port, log_to_driver=False)
    with TrainMetrics(str(folder / "data"), "train") as metrics:
        now = time.time()
        metrics.update(step=3, num_steps=9, loss=0.5, samples_per_second=20.0, data_wait_share=0.01, checkpoint_time=now)
        ingest.run(IngestJob(dataset_uri=str(folder / "data"), ingest=from_list(urls) if urls else from_drawn(folder / "raw")))
        if not urls:
            print(f"\nEXPORTED\n{wait_for_export(port)}")
    if urls:
        print("ENDED", flush=True)
        sys.stdin.read()


def from_drawn(folder: Path) -> IngestConfig:
    write_folder(str(folder), 0, 12, ShapesConfig())
    (folder / "broken.png").write_bytes(b"no image")
    return IngestConfig(source=str(folder), rows_per_shard=4)


def from_list(urls: str) -> IngestConfig:
    patient = DownloadConfig(allow_private=True, timeout=1000.0)
    return IngestConfig(source=urls, source_kind="list", rows_per_shard=1, download=patient)


def wait_for_export(port: int) -> str:
    start, text = time.time(), ""
    while missing := [name for name in WANTED if f"\n{name}{{" not in text]:
        if time.time() > start + PATIENCE:
            raise TimeoutError(f"not exported: {missing}")
        time.sleep(1)
        text = read(port)
    return text


def read(port: int) -> str:
    try:
        return str(urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode())
    except OSError:
        return ""


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
