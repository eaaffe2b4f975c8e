"""A program: a training on a node that is drained, as infra/kuberay/base/drain.sh does it, and lost once a checkpoint is there.

Another node takes the training over. Prints the checkpoints that were there when the node went, and the reported steps.
"""

import json
import sys
import threading
import time
from pathlib import Path

import psutil
import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from pipelines.train import run_train
from pipelines.train_config import TrainConfig, WorkerResources
from pipelines.train_progress import TrainProgress
from tests.pipelines.training_world import PATH, make_pipeline, make_shards, make_table

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
        checkpoint_every=600,
        log_every=5,
        resources=WorkerResources(custom={"trainer": 1}),
    )
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4})
    node = cluster.add_node(num_cpus=2, resources={"trainer": 1})
    ray.init(address=cluster.address, log_to_driver=False)
    checkpoints: list[str] = []
    workers: list[psutil.Process] = []
    leaving = threading.Event()

    def leave() -> None:
        """What happens to the node: notice, a checkpoint, the end; then a new node."""
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline = int((time.time() + PATIENCE) * 1000)
        accepted, why = GcsClient(address=cluster.address).drain_node(
            node.node_id, reason, "the pod is being deleted", deadline
        )
        assert accepted, why
        cluster.add_node(num_cpus=2, resources={"trainer": 1})
        while not checkpoints and time.time() * 1000 < deadline:
            time.sleep(0.5)
            checkpoints.extend(path.name for path in (folder / "run/checkpoints").rglob("step-*"))
        time.sleep(3)  # for the controller, which looks every 2 s
        cluster.remove_node(node, allow_graceful=False)

    def on_progress(progress: TrainProgress) -> None:
        if progress.step >= 10 and not leaving.is_set():
            leaving.set()
            own = psutil.Process().children(recursive=True)
            workers.extend(process for process in own if process.cmdline()[:1] and process.cmdline()[0].startswith(WORKER))
            threading.Thread(target=leave, daemon=True).start()

    result = run_train(str(folder / "dataset"), config, output_dir=str(folder / "run"), on_progress=on_progress)
    return {"checkpoints": checkpoints, "steps": [step for step, _ in result.losses], "workers": len(workers)}


if __name__ == "__main__":
    outcome = main(Path(sys.argv[1]))
    print(f"\n{json.dumps(outcome)}", flush=True)
