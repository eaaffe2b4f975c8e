"""`python -m jobs.benchmark PART`, where PART is one of those below; `--help` after any."""

import sys
from collections.abc import Sequence

from jobs.benchmark.config import (
    AutoencoderStepConfig,
    DuplicatesConfig,
    FittingConfig,
    GpuConfig,
    JudgingConfig,
    ModelConfig,
    ServeBenchmarkConfig,
    SolverConfig,
    StageConfig,
    StartupConfig,
    TilingConfig,
    TrainStepConfig,
)
from jobs.common.subcommands import Subcommand, run_subcommand


def run_gpu(config: GpuConfig) -> None:
    from jobs.benchmark.gpu.run import benchmark_gpu

    benchmark_gpu(config)


def run_model(config: ModelConfig) -> None:
    from jobs.benchmark.model import benchmark_model

    benchmark_model(config)


def run_train(config: TrainStepConfig) -> None:
    from jobs.benchmark.train import benchmark_train

    benchmark_train(config)


def run_autoencoder(config: AutoencoderStepConfig) -> None:
    from jobs.benchmark.autoencoder import benchmark_autoencoder

    benchmark_autoencoder(config)


def run_solver(config: SolverConfig) -> None:
    from jobs.benchmark.solver import benchmark_solver

    benchmark_solver(config)


def run_tiling(config: TilingConfig) -> None:
    from jobs.benchmark.tiling import benchmark_tiling

    benchmark_tiling(config)


def run_fitting(config: FittingConfig) -> None:
    from jobs.benchmark.fitting import benchmark_fitting

    benchmark_fitting(config)


def run_stage(config: StageConfig) -> None:
    from jobs.benchmark.stage import benchmark_stage

    benchmark_stage(config)


def run_judging(config: JudgingConfig) -> None:
    from jobs.benchmark.judging import benchmark_judging

    benchmark_judging(config)


def run_duplicates(config: DuplicatesConfig) -> None:
    from jobs.benchmark.duplicates import benchmark_duplicates

    benchmark_duplicates(config)


def run_serve(config: ServeBenchmarkConfig) -> None:
    from jobs.benchmark.serve import benchmark_serve

    benchmark_serve(config)


def run_startup(config: StartupConfig) -> None:
    from jobs.benchmark.startup import benchmark_startup

    benchmark_startup(config)


PARTS = {
    "gpu": Subcommand(
        line="Measure all that a few minutes on a GPU can tell, without Ray or a network.", config_class=GpuConfig, run=run_gpu
    ),
    "model": Subcommand(line="Time the model against diffusers, part by part.", config_class=ModelConfig, run=run_model),
    "train": Subcommand(
        line="Time a training step against the published recipe's.", config_class=TrainStepConfig, run=run_train
    ),
    "autoencoder": Subcommand(
        line="Time a training step of DC-AE against diffusers'.", config_class=AutoencoderStepConfig, run=run_autoencoder
    ),
    "solver": Subcommand(
        line="Compare the solvers' errors where the velocity is known exactly.", config_class=SolverConfig, run=run_solver
    ),
    "tiling": Subcommand(line="Measure the memory of DC-AE with and without tiles.", config_class=TilingConfig, run=run_tiling),
    "fitting": Subcommand(
        line="Measure what weights of fewer bits cost and save, and parts that take turns.",
        config_class=FittingConfig,
        run=run_fitting,
    ),
    "stage": Subcommand(
        line="Measure a stage's speed against the bare loop over its model, and its memory.",
        config_class=StageConfig,
        run=run_stage,
    ),
    "judging": Subcommand(
        line="Measure how fast metrics judge pictures, against the bare loop over their models.",
        config_class=JudgingConfig,
        run=run_judging,
    ),
    "duplicates": Subcommand(
        line="Measure the search for near duplicates by embeddings, and which changed pictures it finds.",
        config_class=DuplicatesConfig,
        run=run_duplicates,
    ),
    "serve": Subcommand(
        line="Measure pictures a second over HTTP against the bare loop over the same batches.",
        config_class=ServeBenchmarkConfig,
        run=run_serve,
    ),
    "startup": Subcommand(
        line="Measure the CPU seconds of --help of every command, and of status.", config_class=StartupConfig, run=run_startup
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    return run_subcommand("benchmark", PARTS, argv)


if __name__ == "__main__":
    sys.exit(main())
