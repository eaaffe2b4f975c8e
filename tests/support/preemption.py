"""A program that trains on a node that is drained, as infra/kuberay/base/drain.sh does it, and lost once a checkpoint is there.

Another node takes the training over. Prints the checkpoints that were there when the node went, and the reported steps.
"""

import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from pipelines.train.config import TrainConfig
from pipelines.train.loop.config import WorkerResources
from pipelines.train.loop.desk import TrainProgress
from pipelines.train.run import run_train
from tests.support.training_world import PATH, STREAM, make_pipeline, make_shards, make_table

PATIENCE = 100  # seconds
WORKER = "ray::RayTrainWorker"


def main(folder: Path) -> dict[str, object]:
    make_table(folder / "dataset", make_shards([30, 20]))
    config = TrainConfig(
        latents=PATH,
        init=make_pipeline(folder / "init"),
        num_steps=600,
        micro_batch_size=4,
        global_batch_size=4,
        data=STREAM,
        checkpoint_every=600,
        log_every=5,
        resources=WorkerResources(custom={"trainer": 1}),
    )
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4})
    node = cluster.add_node(num_cpus=2, resources={"trainer": 1})
    ray.init(address=cluster.address, log_to_driver=False)
    workers: list[psutil.Process] = []
    trains = threading.Event()

    def on_progress(progress: TrainProgress) -> None:
        if progress.step >= 10 and not trains.is_set():
            own = psutil.Process().children(recursive=True)
            workers.extend(process for process in own if process.cmdline()[:1] and process.cmdline()[0].startswith(WORKER))
            trains.set()

    with ThreadPoolExecutor(1) as pool:  # nodes are started from the main thread alone
        training = pool.submit(
            run_train, str(folder / "dataset"), config, output_dir=str(folder / "run"), on_progress=on_progress
        )
        while not trains.wait(1.0):
            assert not training.done(), training.result()
        checkpoints = replace_node(cluster, node, folder / "run/checkpoints")
        result = training.result()
    return {"checkpoints": checkpoints, "steps": [step for step, _ in result.losses], "workers": len(workers)}


def replace_node(cluster: Any, node: Any, folder: Path) -> list[str]:
    """Give the node notice, wait for a checkpoint, end the node, add a new one. Return the checkpoints at that moment."""
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline = time.time() + PATIENCE
    accepted, why = GcsClient(address=cluster.address).drain_node(
        node.node_id, reason, "the pod is being deleted", int(deadline * 1000)
    )
    assert accepted, why
    cluster.add_node(num_cpus=2, resources={"trainer": 1})
    checkpoints: list[str] = []
    while not checkpoints and time.time() < deadline:
        time.sleep(0.5)
        checkpoints = [path.name for path in folder.rglob("step-*")]
    time.sleep(3)  # for the controller, which looks every 2 s
    cluster.remove_node(node, allow_graceful=False)
    return checkpoints


if __name__ == "__main__":
    outcome = main(Path(sys.argv[1]))
    print(f"\n{json.dumps(outcome)}", flush=True)
