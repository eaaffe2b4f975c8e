"""Nothing on the hosts listens to everybody without asking for the token."""

import time
from collections.abc import Iterator

import pytest

from infra.local.cluster import Cluster
from infra.local.hosts import DASHBOARD_PORT
from tests.support.cluster.faults import Jobs
from tests.support.cluster.sockets import WILDCARDS, Listener, http_status, listeners, server_listeners, unguarded

pytestmark = pytest.mark.cluster

IDLE_JOB = """
import time, ray

class Idle:
    def wait(self): pass

ray.init(log_to_driver=False)
actors = [ray.remote(num_cpus=1, resources={"training": 1})(Idle).remote() for _ in range(2)]
ray.get([actor.wait.remote() for actor in actors])
print("the actors are there", flush=True)
time.sleep(120)
"""


@pytest.fixture(scope="module")
def found(cluster: Cluster, jobs: Jobs) -> Iterator[list[Listener]]:
    """What listens on the hosts while a job has actors on them."""
    job = jobs.start("sockets", ["python", "-c", IDLE_JOB], submission_id="sockets")
    deadline = time.monotonic() + 120
    while "\nthe actors are there\n" not in jobs.log("sockets").read_text():
        assert job.poll() is None and time.monotonic() < deadline, jobs.tail("sockets")
        time.sleep(0.5)
    yield [one for host in cluster.hosts for one in listeners(cluster, host)]
    jobs.stop("sockets")
    job.wait()


def test_what_listens_to_all_demands_the_token(cluster: Cluster, found: list[Listener]) -> None:
    owners = [one.owner for one in found if one.address in WILDCARDS]
    for name in ("gcs_server", "raylet/raylet", "DashboardAgent", "ray::Idle"):
        assert any(name in owner for owner in owners), f"{name} is not among {owners}: is the list whole?"
    assert unguarded(cluster, found) == []


def test_doors_of_one_address_demand_it_too(cluster: Cluster, found: list[Listener]) -> None:
    """The dashboard and the agents of every host."""
    addresses = {cluster.network.address(host) for host in cluster.hosts}
    doors = [one for one in found if one.address in addresses]
    assert (0, DASHBOARD_PORT) in [(one.host, one.port) for one in doors] and len(doors) > 2 * len(addresses)
    assert {http_status(one.address, one.port) for one in doors} == {401}


def test_servers_are_open_to_the_hosts_alone(cluster: Cluster) -> None:
    """S3 and MLflow ask for no token: they are on the bridge's address, PostgreSQL on none at all."""
    found = server_listeners(cluster)
    assert {"s3", "mlflow"} <= found.keys()
    assert {address for addresses in found.values() for address in addresses} == {cluster.network.gateway}
