"""Hosts are lost and links are cut while jobs run: each job ends well by itself, and makes what it makes undisturbed."""

import time
import uuid
from collections.abc import Mapping

import pytest

from infra.local.cluster import Cluster
from tests.support.cluster.checks import UNDISTURBED, check_training, contents, copy_inputs, runs_of, verify
from tests.support.cluster.faults import FAULTS, Fault, Jobs, longest_pause, wait_for_middle
from tests.support.cluster.sockets import listeners, unguarded
from tests.support.cluster.stages import (
    CAPTION,
    CAPTION_NEXT,
    DATA_STAGES,
    EMBED,
    EXTRACT,
    INGEST,
    NUM_IMAGES,
    PROMPTS,
    TRAIN,
    Stage,
    last_stages,
)

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

POWER_OFF, CUT = FAULTS
DISTURBED = [
    (INGEST, POWER_OFF),
    (CAPTION_NEXT, CUT),
    (EXTRACT, POWER_OFF),
    *(pytest.param(stage, POWER_OFF, marks=pytest.mark.slow) for stage in (CAPTION, EMBED)),  # what INGEST and EXTRACT show
    (TRAIN, POWER_OFF),
    (TRAIN, CUT),
]


def test_the_whole_chain(undisturbed: Mapping[str, float]) -> None:
    print({name: round(seconds) for name, seconds in undisturbed.items()})
    verify(UNDISTURBED)
    assert INGEST.table(UNDISTURBED).require().num_rejects == 1
    for stage in DATA_STAGES:
        manifest = stage.table(UNDISTURBED).require()
        assert manifest.complete and manifest.num_rows == NUM_IMAGES, stage.name
    for stage in last_stages(UNDISTURBED):
        assert stage.table(UNDISTURBED).require().num_rows == len(PROMPTS), stage.name
    for name in undisturbed:
        (run,) = runs_of("undisturbed", name)
        assert run.info.status == "FINISHED", name
        assert str(run.info.artifact_uri).startswith("mlflow-artifacts:/")


@pytest.mark.parametrize(("stage", "what"), DISTURBED, ids=lambda value: str(getattr(value, "name", value)).replace(" ", "-"))
def test_a_fault_changes_nothing(
    stage: Stage, what: str, jobs: Jobs, undisturbed: Mapping[str, float], faults: list[Fault]
) -> None:
    experiment = f"{stage.name} {what} {uuid.uuid4().hex[:6]}".replace(" ", "-")  # anew on a cluster that is kept
    dataset_uri = f"s3://bucket/{experiment}"
    copy_inputs(stage, dataset_uri)
    begin = time.monotonic()
    job = jobs.start(experiment, stage.command(dataset_uri, experiment))
    done, host = wait_for_middle(stage, dataset_uri, job, jobs.cluster)
    loose = loose_doors(jobs.cluster) if stage is TRAIN else []
    with FAULTS[what](jobs.cluster, host):
        assert stage.count_done(dataset_uri) < stage.num_parts - 2, "it was as good as done: nothing was disturbed"
        jobs.finish(experiment, job)
        seconds = time.monotonic() - begin
    faults.append(
        Fault(
            stage=stage.name,
            what=what,
            host=host,
            done=done,
            num_parts=stage.num_parts,
            undisturbed=undisturbed[stage.name],
            seconds=seconds,
            pause=longest_pause(stage.parts_uri(dataset_uri)),
        )
    )
    (run,) = runs_of(experiment, stage.name)
    assert run.info.status == "FINISHED"
    verify(dataset_uri)
    if stage is TRAIN:
        check_training(dataset_uri, run)
        assert not loose, "\n".join(loose)
        return
    assert contents(stage.table(dataset_uri)) == contents(stage.table(UNDISTURBED))
    assert stage.table(dataset_uri).require().fingerprint == stage.table(UNDISTURBED).require().fingerprint


def loose_doors(cluster: Cluster) -> list[str]:
    """What listens to everybody and asks for no token, in words."""
    found = [one for host in cluster.hosts for one in listeners(cluster, host)]
    return [f"{one} answers {answers}" for one, answers in unguarded(cluster, found)]
