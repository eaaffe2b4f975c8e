"""The guide says what is true: its exit codes, its capacity table, its commands and its files."""

import importlib.util
import re
import shlex

from infra.local.__main__ import make_parser as local_cluster
from jobs.common.config import parse_config
from jobs.common.exit_codes import ExitCode
from jobs.plan import RATES, PlanConfig, make_plan
from tests.support.manifests import ROOT, find, render

README = (ROOT / "infra/README.md").read_text().replace("\\\n", " ")  # a command on two lines is one


def table(header: str) -> list[list[str]]:
    """The cells of the table whose header begins so."""
    lines = README.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(header))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_exit_codes_are_all_there() -> None:
    assert [int(row[0]) for row in table("| code |")] == [code.value for code in ExitCode]


def test_the_capacity_table_is_what_the_plan_says() -> None:
    rows = {row[0]: row[1:] for row in table("| | 1M images")}
    for column, images in enumerate((1_000_000, 100_000_000, 1_000_000_000)):
        config = parse_config(PlanConfig, ["--config", str(RATES), "--images", str(images)], prog="test", description="")
        plan = make_plan(config)
        cells = {name: row[column] for name, row in rows.items()}
        for stage in ("ingest", "caption", "score", "extract", "train"):
            (cell,) = [cell for name, cell in cells.items() if name.startswith(f"{stage}, ")]
            assert cell == f"{plan.stages[stage].hours:,.0f}", (stage, images)
        assert cells["dollars, all stages"] == f"{plan.dollars:,.0f}"
        assert cells["images table, GB"] == f"{plan.tables['images'].total_bytes / 1e9:,.0f}"
        assert cells["latents table, GB"] == f"{plan.tables['latents'].total_bytes / 1e9:,.0f}"
        assert cells["storage, dollars a month"] == f"{plan.storage_dollars_per_month:,.0f}"
        assert cells["shards of a table (1,000 rows)"] == f"{plan.shards:,}"
        assert cells["objects in all"] == f"{plan.objects:,}"
        assert cells["one listing of a table"].startswith(f"{plan.listing_requests:,} request")


def test_commands_and_files_exist() -> None:
    for module in re.findall(r"python -m (jobs\.\w+)", README):
        assert importlib.util.find_spec(module), module
    for line in re.findall(r"python -m infra\.local (.+?)(?:  |\"|`|$)", README, re.MULTILINE):
        local_cluster().parse_args(shlex.split(line))
    for path in re.findall(r"(?:infra|jobs|tests)/[\w./-]+\w", README):
        assert (ROOT / path).exists(), path
    for row in table("| folder |"):
        assert (ROOT / "infra" / row[0].strip("`")).exists(), row
    documents = render("cluster")
    services = {service["metadata"]["name"] for service in find(documents, "Service")}
    for service in re.findall(r"kubectl -n sana port-forward service/([\w-]+)", README):
        assert service in services | {
            "sana-head-svc",
            "sana-serve-serve-svc",
        }  # the operator's: RayCluster sana, RayService sana-serve
    jobs = {job["metadata"]["name"].removeprefix("sana-") for job in find(documents, "RayJob")}
    started = set(re.findall(r"(?:^|`)start ([a-z]+)", README, re.MULTILINE))
    assert started and started <= jobs
