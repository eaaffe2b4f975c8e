"""Near duplicates: images that look alike, found across the whole dataset by their perceptual hashes or their CLIP embeddings.

Of images that look alike the best stays (the largest, then the first); every other one looks like one that stays. Nothing is
deleted: the table `image_scores/near_duplicates` (by hash) or `image_scores/semantic_duplicates` (by embedding) has for each
image how alike it is to the image that stands for it (the share of equal bits, or the cosine), and 0 for one that stays. Where
images are read, a filter on it (at most 0.5) leaves the others out.

The images of an earlier run keep their verdict: a new image that resembles one of them is its duplicate, whatever its size. So
shards are written once. What a run decides about is noted before it begins, and its verdicts are written as a whole before
its first shard: a run that was killed resumes with the same verdicts, and seeks no pair again.

How time and memory grow depends on the method: see `hash_pairs.py` and `semantic_pairs.py`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.exceptions import RayTaskError

from pipelines.score.config import NEAR_DUPLICATES, SEMANTIC_DUPLICATES, DuplicatesConfig, SemanticConfig
from pipelines.score.hash_pairs import decide_by_hash
from pipelines.score.semantic_pairs import decide_by_embedding
from pipelines.score.verdicts import GENERATIONS, VERDICTS, Verdicts, to_generations
from pipelines.stages.contract import OnProgress, ShardOutput, StageResult
from pipelines.stages.run import run_shards
from pipelines.storage.files import read_file
from pipelines.storage.lease import Leases, Ticket, shared
from pipelines.tables.errors import DamagedShardError, MissingTableError
from pipelines.tables.identity import Identity, value_settings
from pipelines.tables.schema import (
    IMAGE_SCORES,
    IMAGES,
    IMAGES_PATH,
    MADE_BY,
    image_embeds_path,
    image_embeds_schema,
    image_scores_path,
)
from pipelines.tables.table import REMAKE, Table

Decide = Callable[[list[str], list[str]], Verdicts]
"""Takes the shards of earlier generations and those of a new one, and returns the verdicts on the images of the new one."""


def run_duplicates(
    dataset_uri: str,
    config: DuplicatesConfig | SemanticConfig,
    *,
    on_progress: OnProgress = lambda _: None,
    leases: Leases | None = None,
) -> StageResult:
    """Find for every image the image that stands for it, if any, and write the table of the configuration's method.

    Raises as `run_shards`, and MissingTableError if there are no images or no embeddings.
    """
    images = Table(dataset_uri, IMAGES_PATH, IMAGES)
    inputs = {IMAGES_PATH: images.require().fingerprint}
    if isinstance(config, DuplicatesConfig):
        source, output = images, Table(dataset_uri, image_scores_path(NEAR_DUPLICATES), IMAGE_SCORES)
        identity = Identity("duplicates", value_settings(config), models={}, inputs=inputs)
        decide: Decide = partial(decide_by_hash, images, output, config)
    else:
        source = Table(dataset_uri, image_embeds_path(config.clip), image_embeds_schema(-1))
        output = Table(dataset_uri, image_scores_path(SEMANTIC_DUPLICATES), IMAGE_SCORES)
        inputs[source.path] = source.require().fingerprint
        identity = Identity("duplicates", value_settings(config), models={}, inputs=inputs, rows_of=source.path)
        decide = partial(decide_by_embedding, images, source, output, config)
    with shared(leases) as held:
        ticket = held.take(output.uri).ticket  # before the run notes which shards it decides about
        output.claim(identity, ticket=ticket)
        write = partial(
            run_shards,
            output,
            identity,
            make_worker=DuplicatesWorker,
            resources=config.resources,
            max_reject_share=0.0,
            on_progress=on_progress,
            leases=held,
        )
        return _run(source, output, decide, write, ticket)


class DuplicatesWorker:
    """Passes the verdicts on and counts them."""

    def process(self, table: pa.Table) -> ShardOutput:
        return ShardOutput(table, [], {"duplicates": float(table.num_rows - table["detail"].null_count)})


def _run(source: Table, output: Table, decide: Decide, write: Callable[..., StageResult], ticket: Ticket) -> StageResult:
    """Decide and write one generation after another; `write` takes the shards and `read_shard` as `run_shards` does."""
    generations = _plan_generations(source, output, ticket)
    found = set(output.list_shards())
    result: StageResult | None = None
    older: list[str] = []
    for number, generation in enumerate(generations):
        shards = [*older, *generation]
        done = set(output.list_shards())
        is_last = number == len(generations) - 1
        if is_last or not done.issuperset(generation):
            missing = not done.issuperset(shards)
            verdicts = ray.put(_find_verdicts(output, number, decide, older, generation, ticket)) if missing else None
            result = write(shards, read_shard=partial(_read_verdicts, source, verdicts))
        older = shards
    if result is None:
        raise MissingTableError(f"{source.uri} holds no shard yet: run jobs.{MADE_BY[source.path.split('/')[0]]} first")
    return replace(result, found_shards=len(found.intersection(older)))


def _find_verdicts(
    output: Table, number: int, decide: Decide, older: list[str], generation: list[str], ticket: Ticket
) -> Verdicts:
    """The verdicts on a generation, from their file; sought and written there first if there is none."""
    name = VERDICTS.format(number)
    uri = output.shard_uri(name)
    try:
        content = read_file(uri)
    except FileNotFoundError:
        verdicts = _seek(decide, older, generation)
        output.write_file(f"{name}.parquet", verdicts.to_bytes(output.path, name), ticket=ticket)
        return verdicts
    try:
        return Verdicts.from_bytes(content, output.path, name)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DamagedShardError(f"{uri} is damaged ({error}): {REMAKE}") from error


def _seek(decide: Decide, older: list[str], generation: list[str]) -> Verdicts:
    """`decide`; an error of one of its Ray tasks is raised as the task raised it, without Ray's traceback around it."""
    try:
        return decide(older, generation)
    except RayTaskError as error:
        cause: Exception = error
        while isinstance(cause, RayTaskError):
            cause = cause.cause
        raise cause from error


def _read_verdicts(source: Table, verdicts: Any, shard: str) -> pa.Table:
    """A shard of IMAGE_SCORES."""
    ids = source.read_shard(shard, ["id"])["id"].to_pylist()
    found: Verdicts = ray.get(verdicts)
    first = np.uint64(int(shard)) << np.uint64(32)
    low, high = np.searchsorted(found.positions, [first, first + np.uint64(2**32 - 1)])
    rows, twins = (found.positions[low:high] - first).tolist(), found.twins[low:high]
    numbers, places = (twins >> np.uint64(32)).tolist(), (twins & np.uint64(2**32 - 1)).tolist()
    twin_ids = {number: source.read_shard(f"{number:05}", ["id"])["id"] for number in sorted(set(numbers))}
    scores, details = np.zeros(len(ids), np.float32), np.full(len(ids), None)
    scores[rows] = found.scores[low:high]
    for row, number, place in zip(rows, numbers, places, strict=True):
        details[row] = f"{number:05}/{twin_ids[number][place]}"
    return pa.table({"id": ids, "score": scores, "detail": pa.array(details, pa.string())}, IMAGE_SCORES)


def _plan_generations(source: Table, output: Table, ticket: Ticket | None) -> list[list[str]]:
    """The shards that were there when each run began: each generation is decided as a whole, whatever is killed."""
    try:
        generations = output.read_json(GENERATIONS, to_generations)
    except FileNotFoundError:
        generations = []
    known = {shard for generation in generations for shard in generation}
    there = source.list_shards()
    new = [shard for shard in there if shard not in known]
    gone = known.difference(there)
    if gone and (new or known.difference(output.list_shards())):
        maker = MADE_BY[source.path.split("/")[0]]
        raise MissingTableError(
            f"{source.uri} has no shard {min(gone)}, which it had when {output.uri} was begun: run jobs.{maker} again"
        )
    if new:
        generations.append(new)
        output.write_json(GENERATIONS, {"generations": generations}, ticket=ticket)
    return generations
