"""`python -m jobs.compare --dataset_uri data --names '[a, b]'`: samples tables side by side. Needs no Ray."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.common.job import run_command
from jobs.common.text_table import format_table
from pipelines.tables.schema import check_folder_name
from pipelines.tables.table import absolute_uri


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Configuration of a comparison of samples tables.

    Args:
        dataset_uri: the folder (any fsspec URI) that holds the dataset's tables.
        names: of at least two tables under samples/; each should have been evaluated.
        output: folder for index.html, comparison.md and vote.html; None: comparisons/<a>-<b> in the dataset.
        num_pictures: of each table that the pages show.
        seed: of the bootstrap.
    """

    dataset_uri: str
    names: list[str]
    output: str | None = None
    num_pictures: int = 48
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.names:
            check_folder_name("names", name)
        if len(set(self.names)) < 2 or len(set(self.names)) < len(self.names):
            raise ValueError(f"names={self.names} must be two or more different tables")
        if self.num_pictures < 1:
            raise ValueError(f"num_pictures={self.num_pictures} must be at least 1")


def run(config: CompareConfig) -> None:
    """Write the pages, print the figures, and where the pages are."""
    from pipelines.evaluate.compare import compare_samples, figures_table, to_markdown
    from pipelines.reports.comparison import comparison_page, missing_note, read_pairs, vote_page
    from pipelines.storage.files import write_file

    uri = absolute_uri(config.dataset_uri)
    comparison = compare_samples(uri, config.names, seed=config.seed)
    pairs = read_pairs(uri, config.names, config.num_pictures)
    columns, rows = figures_table(comparison)
    settings = [[name, *values] for name, values in comparison.settings.items()]
    markdown = f"{to_markdown(columns, rows)}\n{to_markdown(['setting', *config.names], settings)}"
    output = absolute_uri(config.output or f"{uri}/comparisons/{'-'.join(config.names)}")
    write_file(f"{output}/index.html", comparison_page(uri, comparison, pairs).encode())
    write_file(f"{output}/comparison.md", markdown.encode())
    write_file(f"{output}/vote.html", vote_page(config.names, pairs).encode())
    if note := missing_note(comparison):
        print(note, flush=True)
    if not pairs:
        print(f"{' and '.join(config.names)} share no prompt: there are no pictures to put side by side", flush=True)
    vote = f"a blind vote between {config.names[0]} and {config.names[1]}"
    files = [["the page", "index.html"], ["its tables in Markdown", "comparison.md"], [vote, "vote.html"]]
    print(f"{format_table(columns, rows)}\n", *(f"{what}: {output}/{file}" for what, file in files), sep="\n", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(CompareConfig, run, argv, name="compare")


if __name__ == "__main__":
    sys.exit(main())
