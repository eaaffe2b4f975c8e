"""The head is lost in the middle of a job: the cluster comes back by itself, and the job, submitted again, makes the rest."""

import time
import uuid
from collections.abc import Callable, Iterator, Mapping

import pytest

from infra.local.cluster import Cluster
from infra.local.processes import wait_until
from tests.support.cluster.checks import UNDISTURBED, check_training, contents, copy_inputs, runs_of, verify
from tests.support.cluster.faults import PATIENCE, Jobs, wait_for_middle, working_hosts
from tests.support.cluster.stages import CAPTION, TRAIN, Stage

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]


@pytest.fixture(autouse=True)
def needs_redis(cluster: Cluster) -> Iterator[None]:
    if not cluster.outlives_its_head:
        pytest.skip("there is no `redis-server`, so the cluster ends with its head: install it")
    yield
    cluster.restore(0)
    cluster.wait_until_whole()


def kill_gcs(cluster: Cluster) -> None:
    """Kill -9 of Ray's own store of the cluster's state."""
    (gcs,) = [process for process in cluster.hosts[0].family() if process.name() == "gcs_server"]
    gcs.kill()


def power_off_head(cluster: Cluster) -> None:
    cluster.power_off(0)
    time.sleep(5)
    cluster.restore(0)


@pytest.mark.parametrize(("stage", "lose"), [(CAPTION, kill_gcs), (TRAIN, power_off_head)], ids=["caption", "train"])
def test_a_lost_head(stage: Stage, lose: Callable[[Cluster], None], jobs: Jobs, undisturbed: Mapping[str, float]) -> None:
    """The job ends with its driver; its workers end too; submitted again, it goes on with what it had made."""
    cluster = jobs.cluster
    experiment = f"{stage.name} head {uuid.uuid4().hex[:6]}".replace(" ", "-")  # anew on a cluster that is kept
    dataset_uri = f"s3://bucket/{experiment}"
    copy_inputs(stage, dataset_uri)
    job = jobs.start(experiment, stage.command(dataset_uri, experiment), submission_id=experiment)
    done, _ = wait_for_middle(stage, dataset_uri, job, cluster)
    begin = time.monotonic()
    lose(cluster)
    assert job.wait(PATIENCE) != 0, "whoever waits for the job learns that it is lost"
    wait_until(cluster.alive, "the head does not answer", seconds=PATIENCE)
    cluster.wait_until_whole()
    back = time.monotonic() - begin
    wait_until(lambda: not working_hosts(cluster, stage.process), "workers of the lost job go on", seconds=PATIENCE)
    before = cluster.ask(f"/api/jobs/{experiment}")["status"]
    seconds = jobs.run(f"{experiment} again", stage.command(dataset_uri, experiment))
    assert cluster.ask(f"/api/jobs/{experiment}")["status"] == "FAILED"
    print(
        f"\n{stage.name}, {lose.__name__} after {done} of {stage.num_parts}: the cluster is whole again after {back:.0f} s, "
        f"and says {before}; submitted again, the job ends after {seconds:.0f} s ({undisturbed[stage.name]:.0f} s undisturbed)"
    )
    verify(dataset_uri)
    if stage is TRAIN:
        (run,) = runs_of(experiment, stage.name)
        check_training(dataset_uri, run)
    else:
        assert contents(stage.table(dataset_uri)) == contents(stage.table(UNDISTURBED))
