"""`python -m jobs.paper parameters|macs|attention|solver|autoencoder|blocks|captions`; `--help` after any of them."""

import sys
from collections.abc import Sequence

from jobs.common.exit_codes import ExitCode
from jobs.common.job import run_parsed
from jobs.common.subcommands import Subcommand, run_subcommand
from jobs.paper.config import (
    AttentionConfig,
    BlocksConfig,
    CaptionsJob,
    MacsConfig,
    ParametersConfig,
    ReconstructionConfig,
    SolverCurveConfig,
)


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


def run_blocks(config: BlocksConfig) -> None:
    from jobs.paper.block_training import compare_blocks

    compare_blocks(config)


def run_captions(job: CaptionsJob) -> ExitCode:
    def ablate(job: CaptionsJob) -> None:
        from jobs.paper.captions import ablate_captions

        ablate_captions(job)

    return run_parsed(job, ablate)


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
    "blocks": Subcommand(
        line="Compare designs of the block: their cost, and how fast they learn drawn scenes.",
        config_class=BlocksConfig,
        run=run_blocks,
    ),
    "captions": Subcommand(
        line="Train on captions chosen at random, by CLIP and by the truth, on drawn scenes.",
        config_class=CaptionsJob,
        run=run_captions,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    return run_subcommand("paper", PARTS, argv)


if __name__ == "__main__":
    sys.exit(main())
