"""Configuration of scoring: caption scorers, image scorers, near duplicates, and the policy that selects captions."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from pipelines.stages.contract import Resources
from pipelines.tables.schema import ORIGINAL_CAPTIONER

NEAR_DUPLICATES = "near_duplicates"  # names of the tables under image_scores/, by hash and by embedding
SEMANTIC_DUPLICATES = "semantic_duplicates"
Policy = Literal["paper", "published", "best", "random", "proportions"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


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
        if not 0.5 < self.min_similarity < 1:
            raise ValueError(
                f"min_similarity={self.min_similarity} must be above 0.5 (the limit of the filter that leaves duplicates out) "
                "and below 1"
            )


@dataclass(frozen=True, kw_only=True)
class ScorerConfig:
    """A CLIP (any transformers CLIP or SigLIP) and the captioners whose captions compete.

    A score is 100 times the cosine of image and caption, with SigLIP too. Its cosines lie lower than CLIP's: the published
    thresholds (25, and 22 for the best) are CLIP ViT-L/14's.

    Args:
        name: of the table under scores/.
        model: a local folder, a hub id, or a zoo://, hf:// or fsspec URI.
        revision: of a hub id.
        captioners: names of the tables under captions/. The caption that came with an image competes too, as "original".
        dtype: of the weights.
        long_captions: what is done with a caption over the model's limit (77 tokens for CLIP, 64 for SigLIP): "cut": its
            beginning is scored, as the published code does; "chunks": its score is the mean over as few equal parts as fit.
        batch_size: images in one call of the model; changes no value, and is halved where memory is not enough.
        prepare_threads: that decode and resize, ahead of the model.
        device: "cpu", "cuda"; None: the first GPU that Ray gave the actor, or else the CPU.
        resources: of the stage's actors.
        max_reject_share: the job fails when a larger share of the images is refused.
    """

    NO_VALUE: ClassVar = ("name", "revision", "batch_size", "prepare_threads", "device", "resources", "max_reject_share")

    name: str
    model: str
    captioners: tuple[str, ...]
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    long_captions: Literal["cut", "chunks"] = "cut"
    batch_size: int = 64
    prepare_threads: int = 4
    device: str | None = None
    resources: Resources = field(default_factory=Resources)
    max_reject_share: float = 0.1

    def __post_init__(self) -> None:
        if len(set(self.captioners)) < len(self.captioners) or ORIGINAL_CAPTIONER in self.captioners:
            raise ValueError(
                f"captioners={list(self.captioners)} must differ from each other and from {ORIGINAL_CAPTIONER!r}: "
                "what came with the images competes anyway"
            )


@dataclass(frozen=True, kw_only=True)
class ImageScorerConfig:
    """A model that gives each image one number.

    Args:
        name: of the table under image_scores/.
        model: a classifier or a CLIP: a local folder, a hub id, or a zoo://, hf:// or fsspec URI.
        revision: of a hub id.
        label: of a classifier: the name or the number of the class whose probability, from 0 to 1, is the score.
        head: for a CLIP: a file (.pth, .safetensors) of linear layers over its image embedding; a path, an hf:// or an fsspec
            URI. What they say is the score: from 1 to 10 for the LAION aesthetic predictors.
        dtype: of the weights.
        batch_size: images in one call of the model; changes no value, and is halved where memory is not enough.
        prepare_threads: that decode and resize, ahead of the model.
        device: "cpu", "cuda"; None: the first GPU that Ray gave the actor, or else the CPU.
        resources: of the stage's actors.
        max_reject_share: the job fails when a larger share of the images is refused.
    """

    NO_VALUE: ClassVar = ("name", "revision", "batch_size", "prepare_threads", "device", "resources", "max_reject_share")

    name: str
    model: str
    revision: str | None = None
    label: str | None = None
    head: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch_size: int = 64
    prepare_threads: int = 4
    device: str | None = None
    resources: Resources = field(default_factory=Resources)
    max_reject_share: float = 0.1

    def __post_init__(self) -> None:
        if self.name in (NEAR_DUPLICATES, SEMANTIC_DUPLICATES):
            raise ValueError(f"name={self.name!r} is taken by the stage that finds near duplicates")
        if (self.label is None) == (self.head is None):
            raise ValueError(f"label={self.label!r}, head={self.head!r}: give a classifier's label, or a CLIP's head")


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
