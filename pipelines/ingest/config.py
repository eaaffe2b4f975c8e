"""Configuration of the ingest stage."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pipelines.stages.contract import Resources
from pipelines.workers.images import ImageLimits

Kind = Literal["folder", "webdataset", "parquet", "list"]
CAPTION_KEYS = ("caption", "text", "txt", "prompt", "captions")
"""Names under which captions usually stand; in NVlabs' WebDatasets it is "prompt"."""
MAX_SHARD_BYTES = 2**30
MAX_TEXT_BYTES = 2**18


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """How the URLs of a list are fetched. The limits of connections hold for each reading task: two run for each of the stage's
    actors (`resources.num_actors`), wherever in the cluster they are.

    Args:
        connections: open at the same time.
        connections_per_host: open at the same time to one host and port.
        timeout: of one attempt, from connecting to the last byte, seconds. Connecting may take 10 of them.
        attempts: at one URL, if its failures may pass (no answer, timeouts, 408, 425, 429, 500, 502, 503, 504, 520 to 530). A
            host that answered none of 16 attempts, over 15 seconds, is not waited for with each of its other URLs in a shard.
        first_wait: seconds before the second attempt; doubled after each. A server's "Retry-After" goes before it.
        max_redirects: how many redirects are followed.
        user_agent: sent to servers. Say who you are, and where you can be reached.
        obey_robots_tag: leave out images whose server answers with "X-Robots-Tag" noai, noimageai, noindex, noimageindex or
            none, for every robot or for the one that `user_agent` names.
        allow_private: a list may name hosts at loopback, link-local, private and other special addresses. Allow it only if you
            trust whoever wrote the list: it could ask services of your own network.
        bytes_in_flight: of images that are being fetched, at most, all together; a download waits until it fits.
    """

    NO_VALUE: ClassVar = (
        "connections",
        "connections_per_host",
        "timeout",
        "attempts",
        "first_wait",
        "max_redirects",
        "user_agent",
        "allow_private",
        "bytes_in_flight",
    )

    connections: int = 64
    connections_per_host: int = 8
    timeout: float = 30.0
    attempts: int = 3
    first_wait: float = 1.0
    max_redirects: int = 5
    user_agent: str = "sana-on-ray/0.1 (image dataset builder)"
    obey_robots_tag: bool = True
    allow_private: bool = False
    bytes_in_flight: int = 256 * 2**20

    def __post_init__(self) -> None:
        counts = (self.connections, self.connections_per_host, self.attempts, self.bytes_in_flight)
        if min(counts) < 1 or self.timeout <= 0 or self.first_wait < 0 or self.max_redirects < 0:
            raise ValueError(
                f"connections, connections_per_host, attempts and bytes_in_flight must be at least 1, times positive: {self}"
            )


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """Which images become the dataset.

    Args:
        source: a folder of images with captions beside them (.txt, .caption, or .json with one of `caption_keys`), of
            WebDataset tars, of Parquet files, or of lists of URLs or keys (csv, tsv, jsonl, parquet), at any depth, or one such
            file; a path or an fsspec URI. What img2dataset writes is read as it is.
        source_kind: which files to take where there are several kinds; auto: the kind that is there.
        image_column: of Parquet files; found by its name unless given.
        caption_column: of Parquet files and lists; found by its name, one of `caption_keys`, unless given.
        caption_keys: names, in any case, of JSON keys and columns that hold captions; of each row the first that is not empty
            is used. Where it holds a list of texts, the first text is the caption, and the metadata keeps the whole list.
        url_column: of lists; found by its name unless given. Columns beside these become the images' metadata.
        base_uri: what the keys of a list are relative to; the folder of the list unless given. A list may name any file below
            these two folders, and no other of this machine.
        download: how URLs are fetched.
        retry_rejects: try again to download what finished shards could not, if the reason may have passed. The images go into
            new shards, since finished shards must stay as they are.
        license: of the images, for the record: it is kept in the manifest, and may be given or changed at any time.
        limits: which images are let in.
        rows_per_shard: at most. A stage works on one shard at a time, and loses that much work if it is killed.
        bytes_per_shard: of image files, at most. Each actor holds several times as much in memory. The sizes of a list's images
            are unknown: only `rows_per_shard` counts there.
        max_shard_bytes: of images that are read for one shard, at most; more are refused as "shard_full". Those of a list can
            be fetched into new shards by `retry_rejects`. This bounds a job's memory: each actor, with the tasks that
            read and write for it, holds at most about 11 times as much (usually 11 times `bytes_per_shard`), besides twice
            `download.bytes_in_flight` and once `limits.decode_bytes`.
        max_text_bytes: of a file beside an image, and of the caption, the URL and the metadata in a row; larger ones are left
            out, and counted.
        text_encoding: of captions that are no UTF-8 and have no byte order mark, such as cp1252 or gb18030. Unless given, those
            whose encoding is not certain are left out, and counted.
        max_reject_share: the job fails if a larger share of the images is refused.
        resources: of the actors that decode.
    """

    NO_VALUE: ClassVar = ("retry_rejects", "license", "max_shard_bytes", "max_reject_share", "resources")

    source: str
    source_kind: Kind | Literal["auto"] = "auto"
    image_column: str | None = None
    caption_column: str | None = None
    caption_keys: tuple[str, ...] = CAPTION_KEYS
    url_column: str | None = None
    base_uri: str | None = None
    download: DownloadConfig = field(default_factory=DownloadConfig)
    retry_rejects: bool = False
    license: str | None = None
    limits: ImageLimits = field(default_factory=ImageLimits)
    rows_per_shard: int = 1000
    bytes_per_shard: int = 256 * 2**20
    max_shard_bytes: int = MAX_SHARD_BYTES
    max_text_bytes: int = MAX_TEXT_BYTES
    text_encoding: str | None = None
    max_reject_share: float = 0.5
    resources: Resources = field(default_factory=Resources)

    def __post_init__(self) -> None:
        try:
            "".encode(self.text_encoding or "utf-8")
        except LookupError as error:
            raise ValueError(
                f"text_encoding={self.text_encoding!r} is none that Python knows: give cp1252, gb18030 and the like"
            ) from error
        if min(self.rows_per_shard, self.bytes_per_shard, self.max_shard_bytes, self.max_text_bytes) < 1:
            raise ValueError(
                f"rows_per_shard={self.rows_per_shard}, bytes_per_shard={self.bytes_per_shard}, "
                f"max_shard_bytes={self.max_shard_bytes}, max_text_bytes={self.max_text_bytes}: all must be positive"
            )
