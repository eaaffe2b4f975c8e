"""The end of the demo: the closing tables, the front page, and where to look."""

from collections.abc import Sequence

from jobs.common.drawing import GRID
from jobs.common.timings import Timings, print_section
from jobs.demo.config import DemoJob
from jobs.demo.figures import CaptionFigures, caption_figures
from pipelines.evaluate.metric import iter_shards, metric_table
from pipelines.evaluate.shapes import accuracy_figures, asks_for_color, read_judgements
from pipelines.reports.runs import Link, Section, demo_report
from pipelines.shapes.scenes import KNOWN_COLORS, NEW_COLORS
from pipelines.stages.contract import StageResult
from pipelines.storage.files import write_file
from pipelines.tables.schema import IMAGES_PATH, Row, captions_path, samples_path, scores_path
from pipelines.tables.table import REPORT
from pipelines.tracking.runs import tracking_uri
from pipelines.train.run import TrainResult

NONSENSE = (
    "These are your own images. The tiny models of this demo have only ever seen drawn shapes: their captions of photographs, "
    "the scores and the pictures they draw are nonsense. What is real here is the path of the data."
)


def summarize_demo(job: DemoJob, trained: TrainResult, joined: Sequence[StageResult], timings: Timings) -> list[Section]:
    """The closing tables: pictures, captioners, training, stages, and what the late captioner cost."""
    return [
        _pictures_section(job),
        _captions_section(caption_figures(job.candidates, job.train.data.selection)),
        _training_section(trained),
        _joined_section(job, joined),
        timings.section(),
    ]


def _captions_section(figures: dict[str, CaptionFigures]) -> Section:
    rows = [
        [name, _number(row.mean_score, "{:.1f}"), _percent(row.selected_share), _percent(row.exact_share)]
        for name, row in figures.items()
    ]
    return Section(title="Captions", columns=["captioner", "mean CLIP score", "selected", "exact captions"], rows=rows)


def _training_section(trained: TrainResult) -> Section:
    done = "was done" if trained.was_done else f"{trained.samples_per_second:.0f} samples/s"
    row = [str(trained.num_steps), f"{trained.loss_start:.3f}", f"{trained.loss_end:.3f}", done]
    return Section(title="Training", columns=["steps", "loss at start", "loss at end", "speed"], rows=[row])


def _joined_section(job: DemoJob, joined: Sequence[StageResult]) -> Section:
    """What was made when the late captioner joined the finished dataset: of all tables only its own."""
    rows = [[result.table.path, f"{result.num_shards - result.found_shards} of {result.num_shards}"] for result in joined]
    rows.append([job.extract.path, "0: not asked for"])
    captioners = [*job.train.data.captioners, job.late_captioner.name]
    text = f"The dataset was finished. To train with it too: --train.data.captioners '[{', '.join(captioners)}]'."
    return Section(title=f"{job.late_captioner.name} joins", text=text, columns=["table", "shards made now"], rows=rows)


def _pictures_section(job: DemoJob) -> Section:
    """Figures before and after training; for drawn scenes, new colors and known colors apart."""
    groups: dict[str, Sequence[str] | None] = {"all prompts": None}
    if job.images is None:
        groups = {"prompts with a new color": NEW_COLORS, "other prompts": KNOWN_COLORS}
    rows = []
    for label, colors in groups.items():
        before, after = (_figures(job, name, colors) for name in ("before", "after"))
        for name in before:
            form = "{:.1f}" if name == "clip_score" else "{:.0%}"
            title = name.removeprefix("accuracy.").replace("clip_score", "CLIP score").replace("all", "all three right")
            rows.append([label, title, form.format(before[name]), form.format(after[name])])
    pictures = [(name, f"{job.dataset_uri}/{samples_path(name)}/{GRID}") for name in ("before", "after")]
    return Section(title="Pictures", columns=["of", "", "before", "after"], rows=rows, pictures=pictures)


def _figures(job: DemoJob, name: str, colors: Sequence[str] | None) -> dict[str, float]:
    """The mean CLIP score and the accuracies of pictures; if `colors` are given, of those whose prompts ask for one of them."""

    def counts(prompt: str) -> bool:
        return colors is None or asks_for_color(prompt, colors)

    scores: list[Row] = []
    for shard in iter_shards(metric_table(job.dataset_uri, name, "clip_score"), ["prompt", "clip_score"]):
        scores += [row for row in shard.to_pylist() if counts(row["prompt"])]
    mean = {"clip_score": sum(row["clip_score"] for row in scores) / len(scores)} if scores else {}
    if colors is None:
        return mean
    judged = read_judgements(metric_table(job.dataset_uri, name, "shapes"))
    return mean | accuracy_figures([row for row in judged if counts(row["asked"])])


def _percent(share: float | None) -> str:
    return _number(share, "{:.0%}")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def write_demo_report(job: DemoJob, sections: list[Section]) -> str:
    """Write the front page, `report.html` of the dataset. Returns its URI."""
    captioners = [captioner.name for captioner in (*job.captioners, job.late_captioner)]
    scores = scores_path(job.scorer.name, job.late_captioner.name)  # its page shows all captioners side by side
    tables = [IMAGES_PATH, *map(captions_path, captioners), scores]
    links = [Link(name=path, href=f"{path}/{REPORT}") for path in [*tables, job.extract.path, "train"]]
    notice = "" if job.images is None else NONSENSE
    uri = f"{job.dataset_uri}/{REPORT}"
    write_file(uri, demo_report(job.dataset_uri, sections, links=links, notice=notice).encode())
    return uri


def print_summary(job: DemoJob, sections: list[Section], report: str) -> None:
    """Print the closing tables, and where to look."""
    for section in sections:
        print_section(section)
    grid = f"{job.dataset_uri}/{samples_path('after')}/{GRID}"
    if job.images is not None:
        print(f"\n{NONSENSE}")
    print(f"\npictures  {grid}\nreport    {report}")
    runs = tracking_uri(job.tracking, job.dataset_uri)
    print(f"MLflow    {runs if runs.startswith('http') else f'mlflow ui --backend-store-uri {runs}'}", flush=True)
