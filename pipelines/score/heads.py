"""Heads that rate images by a CLIP's embeddings of them: a few linear layers, and no image is decoded."""

import math
import re
from dataclasses import dataclass
from typing import Self

import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.score.embeds import to_vectors
from pipelines.stages.contract import ShardOutput
from pipelines.tables.rejects import RowRefused, reject
from pipelines.tables.schema import Row
from sana_model.files.places import resolve
from sana_model.files.tensors import read_weights_file


@dataclass(frozen=True)
class Head:
    """Linear layers over unit embeddings, kept as "layers.<n>.weight" and "layers.<n>.bias"; the last gives one number.

    So are the aesthetic predictors of LAION (christophschuhmann/improved-aesthetic-predictor): from 768 to 1 in five layers,
    with nothing between them but dropout.
    """

    layers: list[tuple[Tensor, Tensor]]

    @classmethod
    def read(cls, address: str) -> Self:
        """Read a .pth or .safetensors file: a path, an hf:// or an fsspec URI. Raises ValueError if it holds no such layers."""
        weights = read_weights_file(resolve(address))
        numbers = sorted(int(name.split(".")[1]) for name in weights if re.fullmatch(r"layers\.\d+\.weight", name))
        has_biases = all(f"layers.{n}.bias" in weights for n in numbers)
        if not numbers or not has_biases or len(weights[f"layers.{numbers[-1]}.weight"]) != 1:
            raise ValueError(
                f"{address} is no head: it needs layers.<n>.weight and layers.<n>.bias, the last weight of one row; "
                f"it holds {', '.join(weights)}"
            )
        return cls([(weights[f"layers.{n}.weight"].float(), weights[f"layers.{n}.bias"].float()) for n in numbers])

    @property
    def width(self) -> int:
        """Numbers of an embedding that it takes."""
        return self.layers[0][0].shape[1]

    @torch.inference_mode()
    def score(self, embeddings: Tensor) -> Tensor:
        """Unit embeddings (N, width) -> scores (N,)."""
        hidden = embeddings
        for weight, bias in self.layers:
            hidden = F.linear(hidden, weight, bias)
        return hidden[:, 0]


class EmbeddingScorer:
    """Ray Data actor: embeddings of images -> scores of a head."""

    def __init__(self, head: Head):
        self.head = head

    def process(self, table: pa.Table) -> ShardOutput:
        """A score for each embedding, or a reject where it is not finite."""
        rows: list[Row] = []
        rejects: list[Row] = []
        scores = self.head.score(to_vectors(table)).tolist()
        for row_id, score in zip(table["id"].to_pylist(), scores, strict=True):
            if math.isfinite(score):
                rows.append({"id": row_id, "score": score})
            else:
                rejects.append(reject({"id": row_id}, RowRefused("bad_score", "the head gives a score that is not finite")))
        return ShardOutput(rows, rejects)
