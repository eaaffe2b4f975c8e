"""Configuration of MLflow tracking."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where MLflow keeps its runs.

    Args:
        uri: URI of an MLflow server or database. Default: MLFLOW_TRACKING_URI, or else a SQLite file in `output_dir`.
        experiment: the experiment's name.
    """

    uri: str | None = None
    experiment: str = "sana"
