"""What the metrics that compare two sets of pictures share: a table of features, a reference, and figures over both."""

import heapq
import io
import zipfile
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from pipelines.evaluate.distances import Array, Moments, frechet_distance
from pipelines.evaluate.feature_config import FeatureConfig
from pipelines.evaluate.metric import Metric, iter_shards, metric_table
from pipelines.evaluate.pictures import Pictures, folder_pictures, table_pictures
from pipelines.storage.files import read_file
from pipelines.tables.chance import uniform
from pipelines.tables.rejects import RowRefused
from pipelines.tables.schema import IMAGES_PATH, Row
from pipelines.tables.table import Table, absolute_uri
from sana_model.files.redact import redact_values

Config = TypeVar("Config", bound=FeatureConfig)
ROWS_AT_ONCE = 1000
SHORT_HASH = 16
NEIGHBORS = 3
"""Of precision and recall, as published: a set needs more features than these."""


class FeatureSet(Protocol):
    """The features of some pictures."""

    def moments(self) -> tuple[Array, Array]:
        """Their mean (D) and covariance (D, D)."""

    def sample(self, limit: int) -> Array | None:
        """At most `limit` of them (N, D), always the same ones; None if only their statistics are known."""


@dataclass(frozen=True)
class TableFeatures:
    """The features of a table, read one shard at a time. Raises ValueError if there are fewer than two."""

    table: Table

    def moments(self) -> tuple[Array, Array]:
        sums = Moments()
        for shard in iter_shards(self.table, ["features"]):
            for at in range(0, shard.num_rows, ROWS_AT_ONCE):
                sums.add(to_array(shard.slice(at, ROWS_AT_ONCE)))
        if sums.count < 2:
            raise ValueError(f"{self.table.uri} holds the features of {sums.count} pictures: at least 2 are needed")
        return sums.mean, sums.covariance

    def sample(self, limit: int) -> Array:
        """Those whose ids have the lowest chance numbers, in the order of their ids: neither shards nor their order matter."""
        lowest: list[tuple[float, str]] = []
        for shard in iter_shards(self.table, ["id"]):
            chances = ((-uniform("features", row_id), row_id) for row_id in shard["id"].to_pylist())
            lowest = heapq.nlargest(limit, [*lowest, *chances])
        places = {row_id: place for place, row_id in enumerate(sorted(row_id for _, row_id in lowest))}
        found: Array | None = None
        for shard in iter_shards(self.table, ["id", "features"]):
            chosen = [(row, places[row_id]) for row, row_id in enumerate(shard["id"].to_pylist()) if row_id in places]
            if chosen:
                rows, at = zip(*chosen, strict=True)
                features = to_array(shard.take(list(rows)))
                found = np.zeros((len(places), features.shape[1]), np.float32) if found is None else found
                found[list(at)] = features
        return np.zeros((0, 0), np.float32) if found is None else found


def to_array(rows: pa.Table, column: str = "features") -> Array:
    """A column of features as (N, D), float32."""
    values = rows[column].combine_chunks().flatten().to_numpy()
    return values.reshape(rows.num_rows, -1) if rows.num_rows else np.zeros((0, 0), np.float32)


@dataclass(frozen=True)
class StoredFeatures:
    """A .npz with `mu` and `sigma` (pytorch-fid, clean-fid), or `feats` (clean-fid's for KID), or all of them.

    Raises FileNotFoundError; ValueError if it holds something else.
    """

    uri: str

    @cached_property
    def arrays(self) -> dict[str, Array]:
        try:
            with np.load(io.BytesIO(read_file(self.uri)), allow_pickle=False) as file:
                found = {name: file[name] for name in ("mu", "sigma", "feats") if name in file.files}
        except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise ValueError(f"{self.uri} is no .npz of statistics: {error}") from error
        if broken := [
            name for name, values in found.items() if values.dtype.kind not in "fiu" or not np.isfinite(values).all()
        ]:
            raise ValueError(f"{self.uri} holds in {broken[0]} what is no finite number: make the statistics anew")
        if "feats" not in found and not {"mu", "sigma"} <= found.keys():
            raise ValueError(f"{self.uri} holds neither mu and sigma (pytorch-fid, clean-fid) nor feats (clean-fid's for KID)")
        return found

    def moments(self) -> tuple[Array, Array]:
        if "mu" not in self.arrays:
            sums = Moments().add(self.arrays["feats"])
            return sums.mean, sums.covariance
        mean, covariance = (np.asarray(self.arrays[name], np.float64) for name in ("mu", "sigma"))
        if covariance.shape != (len(mean),) * 2:
            raise ValueError(f"{self.uri} is no .npz of statistics: mu is {mean.shape}, sigma {covariance.shape}")
        return mean, covariance

    def sample(self, limit: int) -> Array | None:
        features = self.arrays.get("feats")
        return None if features is None else features[:limit]


class FeatureMetric(Metric[Config]):
    """A metric whose rows are features of pictures, and whose figures compare them with those of a reference."""

    @abstractmethod
    def features(self, rows: list[Row]) -> Array:
        """The features (N, D) of a batch, in float32."""

    @classmethod
    @abstractmethod
    def compare(cls, drawn: FeatureSet, real: FeatureSet, config: Config) -> dict[str, float]:
        """The figures by name."""

    def judge(self, rows: list[Row]) -> list[Row | RowRefused]:
        return [{"features": features} for features in self.features(rows)]

    @classmethod
    def reference(cls, dataset_uri: str, config: Config) -> Pictures | None:
        if config.reference is None:
            raise ValueError(
                f"{cls.name} compares pictures with others: give evaluate.{cls.name}.reference, such as images (the images "
                "table), a folder of pictures, or a .npz of statistics"
            )
        if config.is_statistics:
            StoredFeatures(config.reference).moments()  # before any model runs
            return None
        if config.reference == IMAGES_PATH:
            return table_pictures(dataset_uri, config.table_name, f"{dataset_uri.rstrip('/')}/{IMAGES_PATH}")
        uri = absolute_uri(config.reference)
        is_table = uri.endswith(f"/{IMAGES_PATH}") and Table(uri.removesuffix(f"/{IMAGES_PATH}"), IMAGES_PATH, pa.schema([]))
        if is_table and is_table.read_manifest() is not None:
            return table_pictures(dataset_uri, config.table_name, uri)
        return folder_pictures(config.table_name, uri)

    @classmethod
    def summarize(cls, table: Table, config: Config) -> dict[str, float]:
        assert config.reference is not None
        if config.is_statistics:
            real: FeatureSet = StoredFeatures(config.reference)
        else:
            real = TableFeatures(metric_table(table.dataset_uri, config.table_name, cls.name))
        return cls.compare(TableFeatures(table), real, config)

    @classmethod
    def figure_settings(cls, table: Table, config: Config) -> dict[str, Any]:
        settings: dict[str, Any] = {"reference": config.reference, "max_features": config.max_features}
        if not config.is_statistics:
            pictures = metric_table(table.dataset_uri, config.table_name, cls.name)
            settings["reference_fingerprint"] = pictures.require().fingerprint[:SHORT_HASH]
        without_secrets: dict[str, Any] = redact_values(settings)
        return without_secrets


def frechet(drawn: FeatureSet, real: FeatureSet) -> float:
    """The Fréchet distance of two sets. Raises ValueError if they are features of different models."""
    (mean, covariance), (other_mean, other_covariance) = drawn.moments(), real.moments()
    if mean.shape != other_mean.shape:
        raise ValueError(
            f"the reference has features of {len(other_mean)} numbers, the pictures of {len(mean)}: another model's"
        )
    return frechet_distance(mean, covariance, other_mean, other_covariance)


def sample_both(drawn: FeatureSet, real: FeatureSet, limit: int) -> tuple[Array, Array] | None:
    """At most `limit` features of each set, for figures that compare all pairs; None where there are too few or none."""
    some, others = drawn.sample(limit), real.sample(limit)
    if some is None or others is None or min(len(some), len(others)) <= NEIGHBORS:
        return None
    return some, others
