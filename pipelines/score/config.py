"""Configuration of scoring: the CLIP, caption and image scorers, near duplicates, and the policies that select."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal, get_args

from pipelines.stages.contract import Resources
from pipelines.tables.schema import ORIGINAL_CAPTIONER, check_folder_name

NEAR_DUPLICATES = "near_duplicates"  # names of the tables under image_scores/, by hash and by embedding
SEMANTIC_DUPLICATES = "semantic_duplicates"
Policy = Literal["paper", "published", "best", "random", "proportions"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


def check_captioners(captioners: Sequence[str]) -> None:
    """Raise ValueError if nobody is named, somebody twice, or a name is no folder's."""
    for captioner in captioners:
        check_folder_name("captioner", captioner)
    if not captioners:
        raise ValueError(f"captioners=[] names nobody: give tables under captions/, or {ORIGINAL_CAPTIONER!r}")
    if len(set(captioners)) < len(captioners):
        raise ValueError(f"captioners={list(captioners)} must differ from each other")


def check_proportions(proportions: Mapping[str, float], captioners: Sequence[str]) -> None:
    """Raise ValueError if somebody has a share who is not among the captioners that compete."""
    if unknown := sorted({name for name, share in proportions.items() if share}.difference(captioners)):
        raise ValueError(f"proportions gives a share to {', '.join(unknown)}, and only {', '.join(captioners)} compete")


@dataclass(frozen=True, kw_only=True)
class DuplicatesConfig:
    """Which images count as near duplicates by their perceptual hashes.

    Args:
        max_distance: of 64 bits, from 0 (the same hash) to 7. A copy that was scaled or compressed again is mostly within 4.
        resources: of the actors that write; they compute nothing.
    """

    NO_VALUE: ClassVar = ("resources",)

    max_distance: int = 3
    resources: Resources = field(default_factory=lambda: Resources(num_cpus=0.25))

    def __post_init__(self) -> None:
        if not 0 <= self.max_distance <= 7:
            raise ValueError(f"max_distance={self.max_distance} must be from 0 to 7")


@dataclass(frozen=True, kw_only=True)
class SemanticConfig:
    """Which images count as near duplicates by their CLIP embeddings.

    Args:
        clip: name of the table under image_embeds/ that holds the embeddings.
        min_similarity: cosine of two embeddings from which on their images count as near duplicates; above 0.5 and below 1.
            The default was chosen with the tiny zoo://clip, on 300 drawn pictures: all that were compressed (JPEG, quality 50)
            or halved reach it, 80 % of those cropped by 10 % (94 % reach 0.9), 59 % of the mirrored; another picture is as
            alike for 4 %. On 49 cuts of three photographs: all, all, 51 %, 20 %; 8 % (10 % at 0.9). `jobs.benchmark
            duplicates --clip MODEL --pictures FOLDER` measures it with another CLIP.
        resources: of the actors that write; they compute nothing.
    """

    NO_VALUE: ClassVar = ("clip", "resources")  # the inputs of the table's identity name the table of embeddings

    clip: str
    min_similarity: float = 0.95
    resources: Resources = field(default_factory=lambda: Resources(num_cpus=0.25))

    def __post_init__(self) -> None:
        check_folder_name("clip", self.clip)
        if not 0.5 < self.min_similarity < 1:
            raise ValueError(
                f"min_similarity={self.min_similarity} must be above 0.5 (the limit of the filter that leaves duplicates out) "
                "and below 1"
            )


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """A CLIP (any transformers CLIP or SigLIP) that embeds images, once for all that compares them with something.

    Args:
        name: of the table under image_embeds/, and of the folder under scores/.
        model: a local folder, a hub id, or a zoo://, hf:// or fsspec URI.
        revision: of a hub id.
        dtype: of the weights.
        batch_size: images, or captions, in one call of the model; changes no value, and is halved where memory is not enough.
        prepare_threads: that decode and resize, ahead of the model.
        device: "cpu", "cuda"; None: the first GPU that Ray gave the actor, or else the CPU.
        resources: of the stage's actors.
        max_reject_share: the job fails when a larger share of the rows is refused.
    """

    NO_VALUE: ClassVar[tuple[str, ...]] = (
        *("name", "revision", "batch_size", "prepare_threads", "device", "resources", "max_reject_share"),
    )

    name: str
    model: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch_size: int = 64
    prepare_threads: int = 4
    device: str | None = None
    resources: Resources = field(default_factory=Resources)
    max_reject_share: float = 0.1

    def __post_init__(self) -> None:
        check_folder_name("name", self.name)


@dataclass(frozen=True, kw_only=True)
class ScorerConfig(ClipConfig):
    """A CLIP and the captioners whose captions it scores, each into a table of its own, scores/<name>/<captioner>.

    A score is 100 times the cosine of image and caption, with SigLIP too. Its cosines lie lower than CLIP's: the published
    thresholds (25, and 22 for the best) are CLIP ViT-L/14's.

    Args:
        captioners: names of the tables under captions/; "original" are the captions that came with the images.
        long_captions: what is done with a caption over the model's limit (77 tokens for CLIP, 64 for SigLIP): "cut": its
            beginning is scored, as the published code does; "chunks": its score is the mean over as few equal parts as fit.
    """

    NO_VALUE: ClassVar[tuple[str, ...]] = (*ClipConfig.NO_VALUE, "captioners")

    captioners: tuple[str, ...]
    long_captions: Literal["cut", "chunks"] = "cut"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_captioners(self.captioners)

    @property
    def clip(self) -> ClipConfig:
        """The settings of the CLIP alone."""
        return ClipConfig(**{own.name: getattr(self, own.name) for own in fields(ClipConfig)})


@dataclass(frozen=True, kw_only=True)
class ImageScorerConfig:
    """A model that gives each image one number: a classifier that sees the images, or a head that reads a CLIP's embeddings.

    Args:
        name: of the table under image_scores/.
        model: a classifier: a local folder, a hub id, or a zoo://, hf:// or fsspec URI.
        revision: of a hub id.
        label: the name or the number of the class whose probability, from 0 to 1, is the score.
        clip: of a head: name of the table under image_embeds/ that it reads. No image is decoded for it.
        head: a file (.pth, .safetensors) of linear layers over a CLIP's unit embeddings; a path, an hf:// or an fsspec URI.
            What they say is the score: from 1 to 10 for the LAION aesthetic predictors (over CLIP ViT-L/14).
        dtype: of the classifier's weights.
        batch_size: images in one call of the model; changes no value, and is halved where memory is not enough.
        prepare_threads: that decode and resize, ahead of the model.
        device: "cpu", "cuda"; None: the first GPU that Ray gave the actor, or else the CPU.
        resources: of the stage's actors.
        max_reject_share: the job fails when a larger share of the images is refused.
    """

    NO_VALUE: ClassVar = (
        *("name", "revision", "batch_size", "prepare_threads", "device", "resources", "max_reject_share"),
        "clip",  # the fingerprint of its embeddings stands for it
    )

    name: str
    model: str | None = None
    revision: str | None = None
    label: str | None = None
    clip: str | None = None
    head: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch_size: int = 64
    prepare_threads: int = 4
    device: str | None = None
    resources: Resources = field(default_factory=Resources)
    max_reject_share: float = 0.1

    def __post_init__(self) -> None:
        check_folder_name("name", self.name)
        if self.clip is not None:
            check_folder_name("clip", self.clip)
        if self.name in (NEAR_DUPLICATES, SEMANTIC_DUPLICATES):
            raise ValueError(f"name={self.name!r} is taken by the stage that finds near duplicates")
        given = tuple(getattr(self, name) is not None for name in ("model", "label", "clip", "head"))
        if given not in ((True, True, False, False), (False, False, True, True)):
            raise ValueError(
                f"model={self.model!r}, label={self.label!r}, clip={self.clip!r}, head={self.head!r}: give model and label "
                "(a classifier), or clip and head (a head on the embeddings of image_embeds/<clip>)"
            )


@dataclass(frozen=True, kw_only=True)
class ImageFilter:
    """The scores of an image scorer that admit an image: from `min` to `max`, both included; None: no limit."""

    min: float | None = None
    max: float | None = None

    def __post_init__(self) -> None:
        if self.min is None and self.max is None:
            raise ValueError("an image filter needs min, max or both, such as {min: 5.0}")

    def admits(self, score: float | None) -> bool:
        """Whether a score is within the limits. An image without a score is not admitted."""
        if score is None:
            return False
        return (self.min is None or score >= self.min) and (self.max is None or score <= self.max)

    def __str__(self) -> str:
        limits = [f"{name} {limit:g}" for name, limit in (("min", self.min), ("max", self.max)) if limit is not None]
        return ", ".join(limits)


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """A policy over scores c (100 times the cosine of image and text).

    Args:
        policy: "paper": P ~ exp(c / tau) (arXiv 2410.10629, section 3.2); "published": P ~ c^(1 / tau) over captions with
            c >= threshold, or else the best one (NVlabs' code); "best"; "random": all alike, scores unseen;
            "proportions": fixed shares by captioner, of those that have a caption of the image.
        tau: temperature of the first two; small is close to "best".
        threshold: lowest score of "published".
        proportions: of captioners, relative to each other; a captioner that is not named is never chosen.
        min_best_score: an image whose best caption scores less is dropped (Sana 1.5: 22); None: none is.
    """

    policy: Policy = "published"
    tau: float = 0.1
    threshold: float = 25.0
    proportions: dict[str, float] = field(default_factory=dict)
    min_best_score: float | None = None

    def __post_init__(self) -> None:
        if self.tau <= 0:
            raise ValueError(f"tau={self.tau} must be positive")
        if negative := {name: share for name, share in self.proportions.items() if not 0 <= share < math.inf}:
            raise ValueError(f"proportions={negative} must not be negative")
        if self.policy == "proportions" and not sum(self.proportions.values()) > 0:
            raise ValueError(
                f"policy 'proportions' needs proportions={self.proportions} with a positive share, such as {{llava: 1}}"
            )

    @property
    def needs_scores(self) -> bool:
        """Whether the policy looks at scores."""
        return self.policy not in ("random", "proportions") or self.min_best_score is not None
