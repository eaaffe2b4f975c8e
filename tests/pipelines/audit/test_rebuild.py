"""What is finished is not done again; what is stale is refused, or deleted and made anew, and nothing else is touched."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from shutil import copytree

import pytest

from jobs import caption, extract, ingest, score
from jobs.common.job import JobConfig
from jobs.common.stage_job import track_stage
from pipelines.audit import rebuild
from pipelines.audit.rebuild import delete_table
from pipelines.audit.status import TableStatus, dataset_status
from pipelines.audit.verify import verify_dataset
from pipelines.caption.config import CaptionerConfig
from pipelines.extract.run import ExtractConfig
from pipelines.ingest.config import IngestConfig
from pipelines.score.config import ScorerConfig
from pipelines.shapes.drawing import write_folder
from pipelines.stages.contract import OnProgress, StageResult
from pipelines.storage.errors import LeaseHeldError, StorageError
from pipelines.storage.lease import LEASE, Leases, hold, read_lease
from pipelines.tables.errors import DamagedFileError, StaleTableError
from pipelines.tables.hashed_json import from_hashed_json
from pipelines.tables.identity import MANIFEST, Identity
from pipelines.tables.table import REBUILD, Table
from pipelines.workers.images import ImageLimits
from sana_model.files.places import ZOO_DIR
from tests.support.counted_stages import count_workers
from tests.support.old_forms import write_old_manifest, write_old_scores
from tests.support.whole_dataset import SHARDS, edit_manifest, make_dataset, write_table

SCORED = ["image_embeds/clip", "scores/clip/a", "scores/clip/b"]
Jobs = dict[str, tuple[Callable[[JobConfig], object], JobConfig]]


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_ray: None, without_ray: None) -> Path:
    count_workers(monkeypatch, tmp_path / "workers.log")
    return tmp_path / "workers.log"


def make_jobs(folder: Path) -> Jobs:
    """Every data stage, on six drawn scenes, in the order in which they run."""
    write_folder(folder / "raw", 10_000_900, 6)
    uri = str(folder / "data")
    captioner = CaptionerConfig(name="a", model="zoo://captioner-a")
    job = {
        "images": (
            ingest.run,
            ingest.IngestJob(dataset_uri=uri, ingest=IngestConfig(source=f"{folder}/raw", rows_per_shard=3)),
        ),
        "captions/a": (caption.run_captioner, caption.CaptionJob(dataset_uri=uri, captioner=captioner)),
        "captions/b": (caption.run_captioner, caption.CaptionJob(dataset_uri=uri, captioner=replace(captioner, name="b"))),
        "scores/clip": (
            score.run,
            score.ScoreJob(dataset_uri=uri, scorer=ScorerConfig(name="clip", model="zoo://clip", captioners=("a", "b"))),
        ),
        "latents/ae-64": (
            extract.run,
            extract.ExtractJob(
                dataset_uri=uri,
                extract=ExtractConfig(name="ae", autoencoder="zoo://pipeline/autoencoder", resolution=64),
            ),
        ),
    }
    return job  # type: ignore[return-value]  # each job's run takes its own kind


def run(jobs: Jobs, path: str, *, on_stale: str = "refuse") -> list[StageResult]:
    """Run a job; some make several tables."""
    run_stage, job = jobs[path]
    made = run_stage(replace(job, on_stale=on_stale))  # type: ignore[arg-type]
    return made if isinstance(made, list) else [made]  # type: ignore[list-item]


def change(jobs: Jobs, path: str, name: str, **settings: object) -> Jobs:
    run_stage, job = jobs[path]
    return jobs | {path: (run_stage, replace(job, **{name: replace(getattr(job, name), **settings)}))}


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}


def state(folder: Path) -> dict[str, TableStatus]:
    return {table.path: table for table in dataset_status(str(folder / "data")).tables}


def stale(folder: Path) -> set[str]:
    return {path for path, table in state(folder).items() if table.stale}


def test_finished_stages_are_not_done_again_and_stale_ones_are_rebuilt_alone(
    tmp_path: Path, log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = make_jobs(tmp_path)
    assert not any(result.was_done for path in jobs for result in run(jobs, path))
    made = log.read_text().split()
    assert made == ["images", "captions/a", "captions/b", *SCORED, "latents/ae-64"]

    # a second start of each constructs no worker, and writes no shard
    before = files(tmp_path)
    assert all(result.was_done for path in jobs for result in run(jobs, path))
    assert log.read_text().split() == made and files(tmp_path) == before
    assert all(table.complete for table in state(tmp_path).values()) and stale(tmp_path) == set()

    # a changed prompt: refused, with the field that differs and the way out; nothing is touched
    prompted = change(jobs, "captions/a", "captioner", prompt="What is this?")
    with pytest.raises(
        StaleTableError, match=r"config\.prompt: 'Describe the image\.' -> 'What is this\?'(.|\n)*--on_stale rebuild"
    ):
        run(prompted, "captions/a")
    assert files(tmp_path) == before

    # rebuilt: that table alone
    capsys.readouterr()
    run(prompted, "captions/a", on_stale="rebuild")
    assert "captions/a is stale: deleting it, to make it anew" in capsys.readouterr().out
    changed = {
        path.relative_to(tmp_path / "data").parent for path, stamp in files(tmp_path).items() if before.get(path) != stamp
    }
    assert {str(path) for path in changed} == {"captions/a", "rejects/captions/a"}
    assert stale(tmp_path) == {"scores/clip/a"}
    assert "captions/a was made anew" in state(tmp_path)["scores/clip/a"].stale[0]

    # what was made from it: by its own stage's run
    with pytest.raises(StaleTableError, match=r"inputs\.captions/a: "):
        run(prompted, "scores/clip")
    for path in prompted:
        run(prompted, path, on_stale="rebuild")
    assert log.read_text().split() == [*made, "captions/a", "scores/clip/a"]
    assert stale(tmp_path) == set() and list(verify_dataset(str(tmp_path / "data"))) == []

    # a third captioner: its captions and their scores are made, and of all else not a shard is touched
    before = files(tmp_path)
    caption_b, job_b = prompted["captions/b"]
    assert isinstance(job_b, caption.CaptionJob) and job_b.captioner is not None
    third = (caption_b, replace(job_b, captioner=replace(job_b.captioner, name="c")))
    jobs = change(prompted, "scores/clip", "scorer", captioners=("a", "b", "c")) | {"captions/c": third}
    for path in ("captions/c", "scores/clip", "latents/ae-64"):
        run(jobs, path)
    assert log.read_text().split()[len(made) + 2 :] == ["captions/c", "scores/clip/c"]
    assert before.items() <= files(tmp_path).items() and stale(tmp_path) == set()
    assert state(tmp_path)["scores/clip/c"].num_rows == 6 and list(verify_dataset(str(tmp_path / "data"))) == []


def test_of_several_stale_tables_each_is_deleted_once(tmp_path: Path) -> None:
    """As extraction of several resolutions meets them."""
    tables = make_dataset(str(tmp_path))
    paths, other = ["latents/ae-64", "captions/b"], Identity("another", {}, {}, {})
    tokens: set[str] = set()

    def run_stage(on_progress: OnProgress, leases: Leases) -> StageResult:
        for path in paths:
            leases.take(tables[path].uri)
            tables[path].claim(other)
            tokens.add(leases.take(tables[path].uri).ticket.token)
        raise StorageError("the disk is full")

    job = JobConfig(dataset_uri=str(tmp_path), on_stale="rebuild")
    with pytest.raises(StorageError):
        track_stage(job, "extract", run_stage)
    assert all(tables[path].require().fingerprint == other.fingerprint and not tables[path].list_shards() for path in paths)
    assert len(tokens) == 2  # one lease each, from before the deletion until the end


def test_while_a_stage_rebuilds_its_table_no_other_writer_gets_at_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make_dataset(str(tmp_path))["captions/b"]
    other = Identity("another", {}, {}, {})
    remove = rebuild.remove_files

    def remove_and_compete(uris: list[str]) -> None:
        with pytest.raises(LeaseHeldError), hold(table.uri):
            pass
        remove(uris)

    def run_stage(on_progress: OnProgress, leases: Leases) -> StageResult:
        leases.take(table.uri)
        table.claim(other)
        with pytest.raises(LeaseHeldError), hold(table.uri):
            pass
        raise StorageError("the disk is full")

    monkeypatch.setattr(rebuild, "remove_files", remove_and_compete)
    with pytest.raises(StorageError):
        track_stage(JobConfig(dataset_uri=str(tmp_path), on_stale="rebuild"), "caption", run_stage)
    assert table.require().fingerprint == other.fingerprint and read_lease(table.uri) is None


def test_changed_models_and_inputs_are_rebuilt_too_images_with_their_plan(tmp_path: Path, log: Path) -> None:
    jobs = make_jobs(tmp_path)
    for path in ("images", "captions/a"):
        run(jobs, path)

    copytree(ZOO_DIR / "captioner-a", tmp_path / "model")
    (tmp_path / "model/extra.json").write_text("{}")
    model = change(jobs, "captions/a", "captioner", model=str(tmp_path / "model"))
    with pytest.raises(StaleTableError, match=r"models\.a: 'sha256"):
        run(model, "captions/a")
    run(model, "captions/a", on_stale="rebuild")

    limited = change(model, "images", "ingest", limits=ImageLimits(min_size=8), rows_per_shard=2)
    with pytest.raises(StaleTableError, match=r"config\.rows_per_shard: 3 -> 2"):
        run(limited, "images")
    assert run(limited, "images", on_stale="rebuild")[0].num_shards == 3
    assert stale(tmp_path) == {"captions/a"}
    with pytest.raises(StaleTableError, match=r"inputs\.images: "):
        run(limited, "captions/a")
    (result,) = run(limited, "captions/a", on_stale="rebuild")
    assert (result.num_shards, result.num_rows) == (3, 6)
    assert list(verify_dataset(str(tmp_path / "data"))) == []


def test_a_deletion_that_was_broken_off_goes_on_at_the_next_start_whatever_it_is_told(
    tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = make_jobs(tmp_path)
    run(jobs, "images")
    run(jobs, "captions/a")
    prompted = change(jobs, "captions/a", "captioner", prompt="What is this?")
    with monkeypatch.context() as patch:
        patch.setattr(rebuild, "remove_files", partial(_die_at, [0], 2, rebuild.remove_files))
        with pytest.raises(KeyboardInterrupt):
            run(prompted, "captions/a", on_stale="rebuild")
    assert state(tmp_path)["captions/a"].problems == ["its deletion was begun and not ended: start its stage again"]
    assert any("broken off" in found.problem for found in verify_dataset(str(tmp_path / "data")))
    (result,) = run(prompted, "captions/a")
    assert not result.was_done and result.num_rows == 6
    assert list(verify_dataset(str(tmp_path / "data"))) == []


def test_tables_of_an_old_form_are_refused_and_rebuilding_puts_the_new_ones_in_their_place(tmp_path: Path, log: Path) -> None:
    """The scores of all captioners lie where the folder of their tables goes, and the latents hold captions."""
    jobs = make_jobs(tmp_path)
    for path in ("images", "captions/a", "captions/b"):
        run(jobs, path)
    scores = write_old_scores(str(tmp_path / "data"), "clip")
    latents = Table(scores.dataset_uri, "latents/ae-64", scores.schema)
    write_old_manifest(latents, "extract", {"dtype": "float16"})
    before = files(tmp_path)
    for path, maker in (("scores/clip", "score"), ("latents/ae-64", "extract")):
        with pytest.raises(StaleTableError, match=rf"{path} is of form 1.* jobs\.{maker} make it anew with --on_stale rebuild"):
            run(jobs, path)
    assert scores.list_shards() == ["00000"] and before.items() <= files(tmp_path).items()
    assert not (tmp_path / "data/image_embeds").exists()  # no image is embedded before the scores are refused
    results = [result for path in jobs for result in run(jobs, path, on_stale="rebuild")]
    assert [result.num_rows for result in results[-4:]] == [6, 6, 6, 6]
    assert scores.list_shards() == scores.rejects().list_shards() == [] and stale(tmp_path) == set()
    assert list(state(tmp_path)) == ["images", "image_embeds/clip", "captions/a", "captions/b", *SCORED[1:], "latents/ae-64"]
    assert list(verify_dataset(str(tmp_path / "data"))) == []


def _die_at(calls: list[int], last: int, remove: Callable[[list[str]], None], uris: list[str]) -> None:
    """Deletes half of the files of the call number `last`, and dies."""
    calls[0] += 1
    if calls[0] - 1 == last:
        remove(uris[: len(uris) // 2])
        raise KeyboardInterrupt
    remove(uris)


@pytest.mark.parametrize("last", range(4))
def test_while_a_table_is_being_deleted_nothing_is_written_into_it(
    tmp_path: Path, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = make_dataset(str(tmp_path / "data"))
    table, others = tables["captions/a"], files(tmp_path)
    identity = table.require().identity()
    with monkeypatch.context() as patch:
        patch.setattr(rebuild, "remove_files", partial(_die_at, [0], last, rebuild.remove_files))
        with pytest.raises(KeyboardInterrupt):
            delete_table(table)
    for claimed in (identity, Identity("caption", {"prompt": "other"}, {}, {})):
        with pytest.raises(StaleTableError, match="is being deleted") as refused:
            table.claim(claimed)
        assert refused.value.table == table
    delete_table(table)
    assert {path.name for path in Path(table.uri).iterdir()} == {f"{LEASE}.lock"}
    assert files(tmp_path) == {path: stamp for path, stamp in others.items() if "captions/a" not in str(path)}
    assert table.claim(identity).fingerprint == identity.fingerprint


@pytest.mark.parametrize("damage", ["cut", "edited", "edited by an earlier version", "of a later version", "of a later form"])
def test_a_table_whose_manifest_was_damaged_or_edited_is_never_deleted(tmp_path: Path, damage: str) -> None:
    table = make_dataset(str(tmp_path))["captions/a"]
    identity, path = table.require().identity(), Path(table.uri, MANIFEST)
    text = path.read_text()
    if damage == "cut":
        path.write_text(text[:100])
    elif damage == "edited":
        path.write_text(text.replace("Describe.", "Tell."))
    elif damage == "of a later version":
        table.write_json(MANIFEST, from_hashed_json(text.encode()) | {"new": 1})
    elif damage == "of a later form":
        table.write_json(MANIFEST, from_hashed_json(text.encode()) | {"schema_version": 9})
    else:
        edit_manifest(table, config={"prompt": "Tell.", "model": "vlm"})
    before = files(tmp_path)

    def run_stage(on_progress: OnProgress, leases: Leases) -> StageResult:
        table.claim(identity)
        raise AssertionError

    remedy = "use that version" if "later" in damage else r"jobs\.repair"
    with pytest.raises(DamagedFileError, match=rf"_manifest\.json .*(not what this version wrote|was edited).*{remedy}"):
        track_stage(JobConfig(dataset_uri=str(tmp_path), on_stale="rebuild"), "caption", run_stage)
    assert files(tmp_path) == before


def test_shards_without_a_manifest_are_taken_over_by_the_settings_that_made_them_and_else_may_be_rebuilt(
    tmp_path: Path,
) -> None:
    table = make_dataset(str(tmp_path / "data"))["captions/a"]
    identity = table.require().identity()
    Path(table.uri, MANIFEST).unlink()
    with pytest.raises(StaleTableError, match=r"2 shards and no _manifest.*--on_stale rebuild") as refused:
        table.claim(replace(identity, config={"prompt": "Tell."}))
    assert refused.value.table == table
    assert not table.claim(identity).complete and table.list_shards() == list(SHARDS)
    Path(table.uri, MANIFEST).unlink()
    delete_table(table)
    assert table.claim(identity).fingerprint == identity.fingerprint and table.list_shards() == []


def test_a_table_that_is_being_read_or_written_is_not_deleted(tmp_path: Path) -> None:
    tables = make_dataset(str(tmp_path / "data"))
    before = files(tmp_path)
    with hold(tables["scores/clip/a"].uri):
        with pytest.raises(LeaseHeldError, match=r"captions/a cannot be changed now: scores/clip/a is made from it by"):
            delete_table(tables["captions/a"])
        delete_table(tables["latents/ae-64"])
    assert files(tmp_path) == {path: stamp for path, stamp in before.items() if "latents" not in str(path)}
    assert not Path(tables["captions/a"].uri, REBUILD).exists()


def test_what_a_stage_keeps_in_its_table_goes_too_and_a_table_in_it_stays(tmp_path: Path) -> None:
    images = make_dataset(str(tmp_path))["images"]
    for path in ("images/_lists", "rejects/images/_notes", "images/other"):
        (tmp_path / path).mkdir()
        (tmp_path / path / "0-00000.parquet").write_bytes(b"copied")
    delete_table(images)
    left = [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*images*/**/*.parquet")]
    assert left == ["images/other/0-00000.parquet"]


def test_on_s3_only_the_table_goes_and_none_whose_name_begins_alike(bucket_uri: str) -> None:
    tables = make_dataset(f"{bucket_uri}/data")
    first = tables["captions/a"]
    other = Table(first.dataset_uri, "captions/a-next", first.schema)
    write_table(other, first.require().identity(), {shard: (first.read_shard(shard).to_pylist(), []) for shard in SHARDS})
    assert list(verify_dataset(first.dataset_uri)) == []
    delete_table(first)
    found = {table.path: table for table in dataset_status(first.dataset_uri).tables}
    assert list(found) == ["images", "image_embeds/clip", "captions/a-next", "captions/b", *SCORED[1:], "latents/ae-64"]
    assert found["captions/a-next"].complete and found["scores/clip/a"].stale == ["captions/a is gone"]
    assert first.rejects().list_shards() == [] and other.rejects().list_shards() == list(SHARDS)
