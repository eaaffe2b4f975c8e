"""Judge a checkpoint of a training: draw a set of prompts with it, and judge the pictures, all in this process.

The tables lie in the training's folder, under VALIDATION_DIR, which is a dataset of its own: `samples/step-001000`,
`evaluations/step-001000/<metric>`. `jobs.compare` puts steps side by side.
"""

import math
import time
import traceback
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipelines.draw.checkpoints import checkpoint_source
from pipelines.draw.config import SampleConfig
from pipelines.draw.sample import run_sample
from pipelines.evaluate.checkpoint_config import CheckpointMetricsConfig
from pipelines.evaluate.feature_config import FeatureConfig
from pipelines.evaluate.metric_config import MetricConfig
from pipelines.evaluate.pictures import Pictures, sampled_pictures
from pipelines.evaluate.registry import metric_class
from pipelines.evaluate.run import run_metric, write_figures
from pipelines.storage.errors import is_expected
from pipelines.tables.schema import IMAGES_PATH
from pipelines.tables.table import absolute_uri
from pipelines.train.config import TrainConfig
from pipelines.train.engine.judgements import Judgement
from pipelines.train.loop.record import VALIDATION_DIR
from sana_model.files.redact import redact

PICTURES = "pictures"
"""The part of a judgement that draws."""


def with_absolute_references(config: CheckpointMetricsConfig, dataset_uri: str) -> CheckpointMetricsConfig:
    """The configuration with the references of its metrics as seen from any folder and dataset."""
    references: dict[str, Any] = {}
    for name, own in config.chosen.items():
        if isinstance(own, FeatureConfig) and own.reference is not None:
            place = f"{dataset_uri}/{IMAGES_PATH}" if own.reference == IMAGES_PATH else own.reference
            table = None if own.is_statistics else own.table_name
            references[name] = replace(own, reference=absolute_uri(place), reference_name=table)
    return replace(config, **references)


def judge_checkpoint(
    config: CheckpointMetricsConfig, output_uri: str, training: TrainConfig, step: int, checkpoint_uri: str
) -> Judgement:
    """Judge a whole checkpoint. Whatever fails is among the judgement's problems, and in this process' log.

    Args:
        config: how, as `with_absolute_references` returns it.
        output_uri: the training's folder.
        training: its configuration.
    """
    import torch

    torch.set_num_threads(config.resources.num_threads or max(math.ceil(config.resources.num_cpus), 1))
    home, name = f"{output_uri}/{VALIDATION_DIR}", f"step-{step:06d}"
    figures: dict[str, float] = {}
    problems: dict[str, str] = {}
    start = time.monotonic()
    try:
        drawn = _draw(home, name, config, training, checkpoint_uri)
    except Exception as error:  # of a model, the storage, memory: the training goes on without it
        problem = {PICTURES: _describe(error)}
        return Judgement(step=step, figures={}, problems=problem, seconds={PICTURES: time.monotonic() - start})
    seconds = {PICTURES: time.monotonic() - start}
    for metric, own in config.chosen.items():
        start = time.monotonic()
        try:
            figures |= _judge(home, drawn, metric, own)
        except Exception as error:
            problems[metric] = _describe(error)
        seconds[metric] = time.monotonic() - start
    return Judgement(step=step, figures=figures, problems=problems, seconds=seconds)


def _draw(home: str, name: str, config: CheckpointMetricsConfig, training: TrainConfig, checkpoint_uri: str) -> Pictures:
    sample = SampleConfig(
        name=name,
        pipeline=checkpoint_uri,
        prompts=config.prompts,
        num_prompts=config.num_prompts,
        images_per_prompt=config.images_per_prompt,
        draw=config.draw,
    )
    run_sample(home, sample, source=checkpoint_source(training, checkpoint_uri), in_process=True)
    return sampled_pictures(home, name)


def _judge(home: str, drawn: Pictures, metric: str, config: MetricConfig) -> Mapping[str, float]:
    kind = metric_class(metric)
    reference = kind.reference(home, config)
    for pictures in [drawn] if reference is None else [reference, drawn]:
        result = run_metric(home, pictures, metric, config, in_process=True)
    return write_figures(result.table, metric, config)


def _describe(error: Exception) -> str:
    """What a person needs to know of an error; the log has the rest."""
    traceback.print_exception(error)
    return redact(str(error) if is_expected(error) else f"{type(error).__name__}: {error}")
