"""Every metric by its name. Nothing is imported before a metric runs."""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.evaluate.metric import Metric

METRICS: Mapping[str, str] = {
    "clip_score": "pipelines.evaluate.clip_score.ClipScore",
    "inception": "pipelines.evaluate.inception.Inception",
    "cmmd": "pipelines.evaluate.cmmd.Cmmd",
    "dino": "pipelines.evaluate.dino.Dino",
    "geneval": "pipelines.evaluate.geneval.metric.GenEval",
    "dpg": "pipelines.evaluate.dpg.metric.DpgBench",
    "image_reward": "pipelines.evaluate.preference.image_reward.ImageReward",
    "hps": "pipelines.evaluate.preference.hps.Hps",
    "pick_score": "pipelines.evaluate.preference.pick_score.PickScore",
    "aesthetic": "pipelines.evaluate.preference.aesthetic.Aesthetic",
    "verifier": "pipelines.evaluate.verifier.Verifier",
    "reconstruction": "pipelines.evaluate.reconstruction.Reconstruction",
    "shapes": "pipelines.evaluate.shapes.ShapesJudge",
}
"""The class of each metric, by the metric's name."""


def metric_class(name: str) -> "type[Metric[Any]]":
    """The class of a metric; its module is imported."""
    module, _, own = METRICS[name].rpartition(".")
    found: type[Metric[Any]] = getattr(import_module(module), own)
    return found
