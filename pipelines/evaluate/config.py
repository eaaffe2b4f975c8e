"""Configuration of the evaluate stage."""

from dataclasses import dataclass, field
from typing import ClassVar

from pipelines.stages.contract import Resources
from pipelines.tables.schema import check_folder_name


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Which pictures are judged, and the model that judges them.

    Args:
        name: of the table under samples/, and of the one written under evaluations/.
        model: a transformers CLIP or SigLIP: a local folder, a hub id, or a zoo://, hf:// or fsspec URI.
        revision: of a hub id.
        batch_size: pictures in one call of the model; changes no value.
        device: "cpu" or "cuda"; None picks the first GPU that Ray gave the actor, otherwise the CPU.
        resources: what Ray reserves for the stage's actors.
    """

    NO_VALUE: ClassVar = ("name", "revision", "batch_size", "device", "resources")

    name: str
    model: str
    revision: str | None = None
    batch_size: int = 64
    device: str | None = None
    resources: Resources = field(default_factory=Resources)

    def __post_init__(self) -> None:
        check_folder_name("name", self.name)
