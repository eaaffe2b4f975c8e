"""The captions of a captioner, wherever they lie: in a table of its own, or in `images` if they came with the images."""

from pipelines.storage.files import list_folder
from pipelines.tables.schema import CAPTIONS, IMAGES, IMAGES_PATH, ORIGINAL_CAPTIONER, SCORES, captions_path, scores_path
from pipelines.tables.table import Table

IMPORT_STAGE = "import_captions"  # makes tables of captions, and of scores, that others made


def captions_table(dataset_uri: str, captioner: str) -> Table:
    """The table that holds the captions of a captioner: `captions/<captioner>`, or `images` for "original"."""
    if captioner == ORIGINAL_CAPTIONER:
        return Table(dataset_uri, IMAGES_PATH, IMAGES)
    return Table(dataset_uri, captions_path(captioner), CAPTIONS)


def read_captions(dataset_uri: str, captioner: str, shard: str) -> dict[str, str]:
    """The captions of a shard by id, in the order of the rows. Images without a caption are left out.

    Raises as `Table.read_shard`.
    """
    rows = captions_table(dataset_uri, captioner).read_shard(shard, ["id", "caption"])
    pairs = zip(rows["id"].to_pylist(), rows["caption"].to_pylist(), strict=True)
    return {row_id: caption for row_id, caption in pairs if caption}


def check_scorer(dataset_uri: str, clip: str, stage: str) -> None:
    """Check that all scores under `scores/<clip>` can be compared with those that a stage makes there.

    Raises ValueError if scores of this dataset's own CLIP would stand beside imported ones, which another one may have made.
    """
    for name in list_folder(f"{dataset_uri.rstrip('/')}/scores/{clip}", with_files=False):
        if name[0] in "._":
            continue
        table = Table(dataset_uri, scores_path(clip, name), SCORES)
        made = table.read_manifest()
        if made is not None and (made.stage == IMPORT_STAGE) != (stage == IMPORT_STAGE):
            raise ValueError(
                f"{table.uri} was made by jobs.{made.stage}, and cannot be compared with scores that jobs.{stage} would put "
                "beside it: give them another folder (captions.clip of jobs.import_captions, scorer.name of jobs.score)"
            )
