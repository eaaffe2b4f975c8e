"""`python -m jobs.paper parameters|macs|attention|solver|autoencoder`; `--help` after any of them."""

import sys
from collections.abc import Sequence

from jobs.common.subcommands import Subcommand, run_subcommand
from jobs.paper.config import AttentionConfig, MacsConfig, ParametersConfig, ReconstructionConfig, SolverCurveConfig


def run_parameters(config: ParametersConfig) -> None:
    from jobs.paper.model import print_parameters

    print_parameters(config)


def run_macs(config: MacsConfig) -> None:
    from jobs.paper.model import print_macs

    print_macs(config)


def run_attention(config: AttentionConfig) -> None:
    from jobs.paper.model import print_attention

    print_attention(config)


def run_solver(config: SolverCurveConfig) -> None:
    from jobs.paper.solver import print_solver

    print_solver(config)


def run_autoencoder(config: ReconstructionConfig) -> None:
    from jobs.paper.autoencoder import print_reconstruction

    print_reconstruction(config)


PARTS = {
    "parameters": Subcommand(line="Count the weights of every model.", config_class=ParametersConfig, run=run_parameters),
    "macs": Subcommand(line="Count the multiply-accumulates of a forward.", config_class=MacsConfig, run=run_macs),
    "attention": Subcommand(
        line="Compare the cost of linear and softmax attention by resolution.", config_class=AttentionConfig, run=run_attention
    ),
    "solver": Subcommand(
        line="Compare Flow-DPM-Solver and flow-Euler by steps, on the shipped tiny model.",
        config_class=SolverCurveConfig,
        run=run_solver,
    ),
    "autoencoder": Subcommand(
        line="Measure PSNR and SSIM of an autoencoder on a folder of pictures.",
        config_class=ReconstructionConfig,
        run=run_autoencoder,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    return run_subcommand("paper", PARTS, argv)


if __name__ == "__main__":
    sys.exit(main())
