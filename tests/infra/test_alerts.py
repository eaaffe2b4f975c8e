"""Alerts fire, and only when they should: Prometheus' own tool evaluates them over series with the gaps of real ones."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.infra.test_monitoring import ALERTS, MONITORING

CASES = yaml.safe_load((MONITORING / "alerts_test.yaml").read_text())


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: apt-get install prometheus)")
def test_every_alert_fires_and_is_quiet_where_it_should(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(ALERTS["spec"]))  # what the operator writes of a PrometheusRule
    cases = shutil.copy(MONITORING / "alerts_test.yaml", tmp_path)
    run = subprocess.run(["promtool", "test", "rules", cases], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_is_quiet() -> None:
    firing, quiet = set(), set()
    for case in CASES["tests"]:
        checked = [(check["alertname"], bool(check["exp_alerts"])) for check in case["alert_rule_test"]]
        fired = {name for name, fires in checked if fires}
        firing |= fired
        quiet |= {name for name, _ in checked} - fired
        assert any("stale" in series["values"] for series in case["input_series"]), f"no gap in: {case['name']}"
    alerts = {rule["alert"] for group in ALERTS["spec"]["groups"] for rule in group["rules"]}
    assert firing == quiet == alerts
