"""Scores of captions by the truth, where it is known: what share of a drawn scene a caption says right. No CLIP is asked."""

from collections.abc import Iterator
from functools import partial

import pyarrow as pa

from pipelines.shapes.drawing import read_truth
from pipelines.shapes.grammar import parse
from pipelines.shapes.scenes import Scene
from pipelines.stages.contract import Resources, ShardOutput, StageResult
from pipelines.stages.run import run_shards
from pipelines.tables.captions import captions_table, read_captions
from pipelines.tables.identity import Identity
from pipelines.tables.rejects import RowRefused, reject
from pipelines.tables.schema import IMAGES, IMAGES_PATH, SCORES, Row, scores_path
from pipelines.tables.table import Table

TRUTH = "truth"
"""Folder of these scores under scores/, in the place of a CLIP's name."""


def run_truth_scores(dataset_uri: str, captioner: str) -> StageResult:
    """Score the captions of a captioner about images of the Shapes world into `scores/truth/<captioner>`.

    A score is 100 times the share of the scene's attributes that the caption says right. Raises as `run_shards`.
    """
    images, captions = Table(dataset_uri, IMAGES_PATH, IMAGES), captions_table(dataset_uri, captioner)
    inputs = {table.path: table.require().fingerprint for table in (images, captions)}
    return run_shards(
        Table(dataset_uri, scores_path(TRUTH, captioner), SCORES),
        Identity("score", {"by": TRUTH}, {}, inputs, rows_of=captions.path),
        sorted(set(images.list_shards()).intersection(captions.list_shards())),
        read_shard=partial(read_captions_with_truth, images, captioner),
        make_worker=TruthScorer,
        resources=Resources(num_cpus=0.25),
        max_reject_share=0.0,
    )


def read_captions_with_truth(images: Table, captioner: str, shard: str) -> pa.Table:
    """id, caption, and the image's metadata (null for an image that is not there) of each caption of a shard."""
    facts = {row["id"]: row["metadata"] for row in images.read_shard(shard, ["id", "metadata"]).to_pylist()}
    captions = read_captions(images.dataset_uri, captioner, shard)
    metadata = pa.array([facts.get(row_id) for row_id in captions], pa.string())
    return pa.table({"id": pa.array(captions, pa.string()), "caption": pa.array(captions.values()), "metadata": metadata})


class TruthScorer:
    """Ray Data actor: captions with the truth about their images -> scores."""

    def process(self, table: pa.Table) -> ShardOutput:
        """A score for each caption; a reject for one whose image is no drawn scene."""
        rows: list[Row] = []
        rejects: list[Row] = []
        for row in table.to_pylist():
            if (truth := read_truth(row["metadata"])) is None:
                rejects.append(reject(row, RowRefused("no_truth", "the image is no scene of the Shapes world")))
            else:
                rows.append({"id": row["id"], "clip_score": 100 * share_right(row["caption"], truth)})
        return ShardOutput(rows, rejects)


def share_right(caption: str, truth: Scene) -> float:
    """The share of a scene's attributes that a caption says right, from 0 to 1; 0 for a caption outside the grammar."""
    said = parse(caption)
    known = dict(_attributes(truth))
    if said is None:
        return 0.0
    told = dict(_attributes(said))
    return sum(told.get(name) == value for name, value in known.items()) / len(known)


def _attributes(scene: Scene) -> Iterator[tuple[str, str]]:
    """The attributes of a scene that are not None, by name."""
    for number, thing in enumerate(scene.things):
        yield from ((f"{name} {number}", value) for name, value in vars(thing).items() if value is not None)
    places = {"background": scene.background, "size": scene.size, "position": scene.position, "relation": scene.relation}
    yield from ((name, value) for name, value in places.items() if value is not None)
