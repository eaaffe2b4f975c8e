"""Where checkpoints are kept: storage that refuses, and what stays."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from s3fs import S3FileSystem

from pipelines.storage.errors import StorageError
from pipelines.tables.identity import Identity
from pipelines.train.engine.checkpoint_places import list_checkpoints
from pipelines.train.engine.checkpoint_store import TO_JUDGE, CheckpointStore
from pipelines.train.engine.checkpoints import BadCheckpointError, Checkpoint, Snapshot, UnfinishedCheckpointError, read_weights
from pipelines.train.engine.judgements import BestCheckpoint, Judgement, write_best, write_judgements
from pipelines.train.loop.record import TrainingRecord
from sana_model.files import retry
from sana_model.files.retry import Backoff
from tests.support.s3 import BUCKET, FaultyProxy, s3_environment, serve_s3


def make_snapshot(step: int, *, rank: int = 0, world_size: int = 1, loss: float = 1.0, to_judge: bool = False) -> Snapshot:
    """Of a model with one parameter of 6 elements, shared out evenly."""
    numel = 6 // world_size
    run = torch.arange(6.0)[rank * numel : (rank + 1) * numel] + step
    return Snapshot(
        step=step,
        rank=rank,
        world_size=world_size,
        layout="test",
        tensors={"weights": {"w": run}, "average": {"w": -run}, "moments": {"m/w": run}},
        pieces={"w": (rank * numel, numel)},
        shapes={"w": [2, 3]},
        moments=["m"],
        others={},
        state={"metrics": {"loss": loss}, TO_JUDGE: to_judge},
    )


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """Storage that refuses when its `share` is 1."""
    with serve_s3() as endpoint, FaultyProxy(endpoint, faults=["403"]).running() as proxy:
        for name, value in s3_environment(proxy.url).items():
            monkeypatch.setenv(name, value)
        S3FileSystem.clear_instance_cache()  # of another server
        monkeypatch.setattr(retry, "STORAGE_BACKOFF", Backoff(first=0.01, longest=0.5))
        yield proxy


def test_storage_that_refuses_writes(proxy: FaultyProxy) -> None:
    """A training says so and goes on, its last good checkpoint stays, and a later one is written when it can be."""
    root, said = f"s3://{BUCKET}/run/checkpoints", list[str]()
    store = CheckpointStore(root, keep_last=2, say=said.append)
    store.write(make_snapshot(1))
    assert store.wait() is None and not said
    proxy.share = 1.0
    store.write(make_snapshot(2))
    assert store.given_up() is None  # not yet
    (notice,) = said
    assert notice.startswith("the checkpoint of step 2 was not written, the ones before it stay: cannot write s3://")
    assert "access denied" in notice
    for step in (3, 4):
        store.write(make_snapshot(step))
    assert "access denied" in (store.given_up() or "")
    with pytest.raises(StorageError, match="access denied"):
        TrainingRecord.claim(f"s3://{BUCKET}/other", Identity("train", {}, {}, {}))
    proxy.share = 0.0
    store.write(make_snapshot(5))
    assert store.wait() is None and store.given_up() is None
    whole = [uri for uri in list_checkpoints(root) if uri.endswith(("step-000001", "step-000005"))]
    assert [read_weights(uri, average=False)["w"][0, 0].item() for uri in whole] == [5.0, 1.0]


def test_a_checkpoint_counts_when_all_parts_are_there(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    stores = [CheckpointStore(str(root), keep_last=1, say=print) for _ in range(2)]
    stores[1].write(make_snapshot(3, rank=1, world_size=2))
    stores[1].wait()
    with pytest.raises(UnfinishedCheckpointError, match=r"rank-00000\.json is missing"):
        Checkpoint.open(stores[0].uri(3))
    stores[0].write(make_snapshot(3, rank=0, world_size=2))
    stores[0].wait()
    assert torch.equal(read_weights(stores[0].uri(3))["w"], -(torch.arange(6.0) + 3).view(2, 3))
    for folder in (tmp_path, root):
        with pytest.raises(BadCheckpointError, match=r"is no checkpoint, but holds 1: the last is .*/checkpoints/step-000003$"):
            Checkpoint.open(str(folder))


def test_the_best_the_newest_and_every_fourth_stay(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), keep_last=2, keep_every=4, keep_best="loss", say=print)
    for step, loss in enumerate([5.0, 4.0, 0.5, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0], start=1):
        store.write(make_snapshot(step, loss=loss))
        store.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-00000{step}" for step in (3, 4, 8, 9)]


def test_the_best_judged_one_stays_and_those_that_are_not_judged_yet(tmp_path: Path) -> None:
    def steps() -> list[int]:
        return sorted(int(path.name.removeprefix("step-")) for path in tmp_path.glob("step-*"))

    written: list[int] = []
    store = CheckpointStore(str(tmp_path), keep_last=1, judged=True, say=print)
    for step in range(1, 7):
        store.write(make_snapshot(step, to_judge=step < 4), then=lambda step=step: written.append(step))  # type: ignore[misc]
        store.wait()
        if step == 4:
            assert steps() == [1, 2, 3, 4] and store.unjudged() == [3, 2, 1]
            write_judgements(str(tmp_path), [Judgement(step=1, problems={"task": "died"}), Judgement(step=2)])
            write_best(str(tmp_path), BestCheckpoint(step=2, figure="fid", direction="lowest", value=5.0))
    assert steps() == [2, 3, 6] and store.unjudged() == [3] and written == list(range(1, 7))
    without = CheckpointStore(str(tmp_path), keep_last=1, say=print)  # the training goes on without judging
    without.write(make_snapshot(7))
    without.wait()
    assert steps() == [2, 7] and without.unjudged() == []


def test_what_the_slowest_rank_made_old_is_removed_at_the_end(tmp_path: Path) -> None:
    """Rank 0 has written its part of the last checkpoint before rank 1, and nothing is written after that."""
    stores = [CheckpointStore(str(tmp_path), keep_last=1, say=print) for _ in range(2)]
    for step in (1, 2):
        for rank, store in enumerate(stores):
            store.write(make_snapshot(step, rank=rank, world_size=2))
            store.wait()
    assert len(list_checkpoints(str(tmp_path))) == 2
    stores[0].prune()
    assert list_checkpoints(str(tmp_path)) == [stores[0].uri(2)]


def test_the_newest_is_that_of_the_highest_step(tmp_path: Path) -> None:
    """Whatever the length of its name."""
    store = CheckpointStore(str(tmp_path), keep_last=2, say=print)
    for step in (998_000, 999_000, 1_000_000, 1_001_000):
        store.write(make_snapshot(step))
        store.wait()
    assert [uri.rpartition("/")[2] for uri in list_checkpoints(str(tmp_path))] == ["step-1001000", "step-1000000"]
