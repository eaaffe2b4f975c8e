"""The capacity plan: its formulas by hand, its provenance, its command line."""

from pathlib import Path

import pytest
import yaml

from jobs.common.config import parse_config
from jobs.plan import RATES, PlanConfig, Rate, main, make_plan, rates_of


def config(*arguments: str) -> PlanConfig:
    return parse_config(PlanConfig, ["--config", str(RATES), *arguments], prog="test", description="")


def test_formulas_by_hand() -> None:
    plan = make_plan(config("--images", "1_000_000", "--keep_share.value", "0.8", "--days", "2"))
    assert plan.shards == 1000 and plan.listing_requests == 1
    assert plan.objects == 2 * (1 + 2 + 1 + 3 + 1) * 1000  # eight tables with their rejects
    caption = plan.stages["caption"]
    assert caption.images == 2 * 800_000
    assert caption.hours == pytest.approx(1_600_000 / 6 / 3600)
    assert caption.count == 2  # 74 hours of work in 48
    assert caption.dollars == pytest.approx(caption.hours * 1.9)
    assert plan.stages["ingest"].images == 1_000_000
    assert plan.stages["train"].images == 100_000 * 2048
    assert plan.tables["images"].total_bytes == 1_000_000 * 300_000
    assert plan.tables["captions"].total_bytes == 2 * 800_000 * 246
    assert plan.tables["latents"].shard_bytes == pytest.approx(800 * 15_097)
    total = sum(table.total_bytes for table in plan.tables.values())
    assert plan.storage_dollars_per_month == pytest.approx(total / 1e9 * 0.023)
    assert plan.driver_bytes == 1000 * 191
    assert plan.dollars == pytest.approx(sum(stage.dollars for stage in plan.stages.values()) + 16_000 / 1000 * 0.005)


def test_everything_but_the_training_grows_with_the_images() -> None:
    small, large = (make_plan(config("--images", str(images))) for images in (1_000_000, 1_000_000_000))
    for name, stage in small.stages.items():
        factor = 1 if name == "train" else 1000
        assert large.stages[name].hours == pytest.approx(factor * stage.hours)
    assert large.shards == 1000 * small.shards and large.listing_requests == 1000
    assert large.tables["images"].shard_bytes == pytest.approx(small.tables["images"].shard_bytes)


def test_every_rate_says_where_it_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    rates = rates_of(config())
    assert len(rates) > 15
    assert rates["tables.latents.bytes_per_row"].source.startswith("measured, ")
    assert main(["--images", "1000000"]) == 0
    told = capsys.readouterr().out
    for place, rate in rates.items():
        assert f"  {place} = {rate.value:g}: {rate.source}" in told
    with pytest.raises(ValueError, match="must begin with measured, published or assumed"):
        Rate(value=1.0, source="a guess")


def test_measured_rates_replace_assumed_ones(tmp_path: Path) -> None:
    """A file of one's own, read after the shipped one."""
    own = tmp_path / "own.yaml"
    values = yaml.safe_load(RATES.read_text())["stages"]
    values["caption"]["images_per_second"] = {"value": 12, "source": "measured, our first shard"}
    own.write_text(yaml.safe_dump({"stages": values}))
    plan, before = make_plan(config("--config", str(own))), make_plan(config())
    assert plan.stages["caption"].hours == pytest.approx(before.stages["caption"].hours / 2)
    assert plan.stages["train"] == before.stages["train"]


def test_nonsense_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--images", "0"])
    assert ended.value.code == 2 and "images=0 must be positive" in capsys.readouterr().err
