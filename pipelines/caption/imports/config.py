"""Configuration of the import of captions that others made."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from pipelines.ingest.config import CAPTION_KEYS
from pipelines.tables.schema import ORIGINAL_CAPTIONER, check_folder_name

Match = Literal["auto", "id", "url", "file_name"]


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Which files hold the captions, and how each names its image.

    Args:
        name: of the table under captions/, and of the captioner in scores and selection.
        source: files, folders (read at any depth) or patterns (with *, ** or ?), each a path or an fsspec URI. Files are
            Parquet, JSON lines, JSON, CSV or TSV; all but Parquet may end with .gz. A JSON file holds a list of objects, one
            object, or an object with the captions (or objects that hold them) by key; it is read whole.
        vlm: read NVlabs' layout: `<image>_<vlm>.json` beside an image, or `<shard>_<vlm>.json` beside a tar, with the captions
            by the image's key, and their CLIP scores in `..._<vlm>_clip_score.json`. Where files end with `_<name>.json`, it is
            `name` unless given.
        match: what the keys name. id: the hash of the image's bytes. url: where the image came from, or a URL in its metadata.
            file_name: the name of the image's file; folders in the key only decide among images of the same name. auto: an id,
            a URL, or a path that fits as a whole, whichever the key looks like; files that lie beside images or tars are about
            those in their own folder.
        key_column: of tables and JSON objects; found by its name (id, url, file_name, key and the like) unless given.
        caption_keys: names of the columns and JSON keys that hold captions, in any case; the first with a text is used.
        clip: the scores that come with the captions go into scores/<clip>/<name>.
        score_column: found by its name (clip_score, clipscore, similarity) unless given.
        score_scale: the scores are multiplied by it to become 100 times the cosine, as in all tables of scores: 100 for
            cosines. None: they are 100 times the cosine already, as NVlabs' are, and scores that look like cosines are refused.
        max_reject_share: the job fails if a larger share of the images gets no caption.
    """

    NO_VALUE: ClassVar = ("name", "clip", "score_column", "score_scale", "max_reject_share")
    """Settings that change no caption; those of the scores count for the table of scores."""

    name: str
    source: list[str] | str
    vlm: str | None = None
    match: Match = "auto"
    key_column: str | None = None
    caption_keys: tuple[str, ...] = CAPTION_KEYS
    clip: str = "imported"
    score_column: str | None = None
    score_scale: float | None = None
    max_reject_share: float = 1.0

    def __post_init__(self) -> None:
        for setting in ("name", "clip"):
            check_folder_name(setting, getattr(self, setting))
        if self.name == ORIGINAL_CAPTIONER:
            raise ValueError(f"name={self.name!r} is the name of the captions that came with the images: give another")
        if not self.sources or not all(self.sources):
            raise ValueError(f"source={self.source!r} names no file, folder or pattern")
        if self.score_scale is not None and not 0 < self.score_scale < math.inf:
            raise ValueError(f"score_scale={self.score_scale} must be positive")

    @property
    def sources(self) -> list[str]:
        return [self.source] if isinstance(self.source, str) else self.source
