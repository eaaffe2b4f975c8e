"""The captions of a captioner, wherever they lie: in a table of its own, or in `images` if they came with the images."""

from pipelines.tables.schema import CAPTIONS, IMAGES, IMAGES_PATH, ORIGINAL_CAPTIONER, captions_path
from pipelines.tables.table import Table


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
