"""A program that runs an ingest with a bad image and reports a training, on its own Ray; prints what Prometheus would read."""

import sys
import time
import urllib.request
from pathlib import Path

import ray

from jobs import ingest
from jobs.common.prometheus import TrainMetrics
from jobs.ingest import IngestJob
from pipelines.ingest.config import IngestConfig
from pipelines.shapes.drawing import write_folder
from pipelines.shapes.scenes import ShapesConfig

PATIENCE = 120.0  # seconds


def main(folder: Path, port: int) -> str:
    write_folder(str(folder / "raw"), 0, 12, ShapesConfig())
    (folder / "raw" / "broken.png").write_bytes(b"no image")
    ray.init(num_cpus=4, include_dashboard=False, _metrics_export_port=port, log_to_driver=False)
    ingest.run(IngestJob(dataset_uri=str(folder / "data"), ingest=IngestConfig(source=str(folder / "raw"), rows_per_shard=4)))
    now = time.time()
    TrainMetrics(str(folder / "data")).update(
        step=3, num_steps=9, loss=0.5, samples_per_second=20.0, data_wait_share=0.01, checkpoint_time=now
    )
    wanted = ["ray_sana_stage_rejects_total", "ray_sana_train_loss", "ray_resources", "ray_object_store_memory"]
    wanted += ["ray_node_disk_free", "ray_node_network_receive_speed"]
    text = ""
    while not all(f"\n{name}{{" in text for name in wanted):
        if time.time() > now + PATIENCE:
            raise TimeoutError(f"not exported: {[name for name in wanted if name not in text]}")
        time.sleep(1)
        text = read(port)
    return text


def read(port: int) -> str:
    try:
        return str(urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode())
    except OSError:
        return ""


if __name__ == "__main__":
    exported = main(Path(sys.argv[1]), int(sys.argv[2]))
    print(f"\nEXPORTED\n{exported}")
