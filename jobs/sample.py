"""`python -m jobs.sample --config jobs/configs/sample.yaml`: prompts -> pictures and a grid."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.common.checkpoints import find_source
from jobs.common.drawing import GRID, require_drawing, write_grid
from jobs.common.job import JobConfig, report_error, run_job
from jobs.common.stage_job import track_stage
from pipelines.draw.config import SampleConfig
from pipelines.stages.contract import StageResult
from pipelines.storage.errors import is_expected

if TYPE_CHECKING:
    from pipelines.tracking.runs import TrackedRun

FROM_PICTURE = "--from_picture"


@dataclass(frozen=True, kw_only=True)
class SampleJob(JobConfig):
    """Configuration of drawing pictures.

    Args:
        sample: the prompts, the pipeline and how it draws.
        step: the training step that the pictures belong to; MLflow orders the grids of a run by it.
        from_picture: draw a picture again: a PNG that this project drew, or <dataset>/samples/<name>#<id>. Its prompt, seed,
            pipeline and settings are taken in place of those in a YAML file; others on the command line replace them. Only on
            the command line.
    """

    sample: SampleConfig
    step: int = 0
    from_picture: str | None = None


def run(job: SampleJob) -> StageResult:
    """Run the stage in an MLflow run, on the Ray that is connected; the table gets a grid of the first pictures."""
    from pipelines.draw.sample import run_sample
    from pipelines.draw.sampler import CUT_PROMPTS

    def log_grid(run: "TrackedRun", result: StageResult) -> None:
        run.log_image(write_grid(result.table), "samples", job.step)

    source = find_source(job.sample.pipeline)
    result = track_stage(
        job,
        f"sample {job.sample.name}",
        lambda on_progress, leases: run_sample(
            job.dataset_uri, job.sample, source=source, on_progress=on_progress, leases=leases
        ),
        log=log_grid,
    )
    print(f"{'':<22} the first pictures: {result.table.uri}/{GRID}", flush=True)
    if num_cut := int(result.figures.get(CUT_PROMPTS, 0)):
        print(f"{num_cut} of {result.num_rows} prompts are longer than the pipeline's max_tokens: cut there", flush=True)
    if job.from_picture is not None:
        note_other_version(job.from_picture, result)
    return result


def note_other_version(address: str, result: StageResult) -> None:
    """Print a line if the pipeline's weights are not those that drew the picture before."""
    from pipelines.draw.again import facts_of

    manifest, drawn = result.table.read_manifest(), facts_of(address).get("model_version")
    if manifest is not None and drawn not in (None, manifest.models["pipeline"]):
        version = manifest.models["pipeline"]
        print(f"note: {address} was drawn by version {drawn} of the pipeline, which is {version} now", file=sys.stderr)


def take_from_picture(arguments: list[str]) -> list[str]:
    """Add to a command line with `--from_picture` the settings of that picture: after `--config`, before all overrides.

    Without `--from_picture` it is returned as it is.

    Raises FileNotFoundError or ValueError if the picture is not there or does not say how it was drawn.
    """
    addresses = [
        argument.partition("=")[2] or following
        for argument, following in zip(arguments, [*arguments[1:], ""], strict=False)
        if argument.partition("=")[0] == FROM_PICTURE
    ]
    if not addresses:
        return arguments
    from pipelines.draw.again import settings_of

    configs = [index for index, argument in enumerate(arguments) if argument.partition("=")[0] == "--config"]
    place = configs[-1] + (1 if "=" in arguments[configs[-1]] else 2) if configs else 0
    found = settings_of(addresses[-1])
    for part in ("start", "control"):
        needed = f"sample.{part}.image"
        began = any(name.startswith(f"sample.{part}.") for name in found) and needed not in found
        if began and not any(argument.startswith(f"--{needed}") for argument in arguments):
            raise ValueError(f"{addresses[-1]} does not say which picture its {part} was: give it by --{needed}")
    settings = [f"--{name}={_spell(value)}" for name, value in found.items()]
    return [*arguments[:place], *settings, *arguments[place:]]


def _spell(value: object) -> str:
    """A value as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        arguments = take_from_picture(list(sys.argv[1:] if argv is None else argv))
    except Exception as error:
        return report_error(error, expected=is_expected(error))

    def look_first(job: SampleJob) -> bool:
        if job.from_picture is not None and not any(argument.startswith(FROM_PICTURE) for argument in arguments):
            raise ValueError(f"from_picture={job.from_picture} stands in a YAML file: give it on the command line")
        return require_drawing(job.sample)

    return run_job(SampleJob, run, arguments, name="sample", look_first=look_first)


if __name__ == "__main__":
    sys.exit(main())
