"""`python -m jobs.benchmark model|train|solver|tiling|stage`; `--help` after any of them."""

from jsonargparse import auto_cli

from jobs.benchmark.model import benchmark_model
from jobs.benchmark.solver import benchmark_solver
from jobs.benchmark.stage import benchmark_stage
from jobs.benchmark.tiling import benchmark_tiling
from jobs.benchmark.train import benchmark_train

if __name__ == "__main__":
    auto_cli(
        {
            "model": benchmark_model,
            "train": benchmark_train,
            "solver": benchmark_solver,
            "tiling": benchmark_tiling,
            "stage": benchmark_stage,
        },
        prog="python -m jobs.benchmark",
    )
