"""`fedward simulate` with a readiness plan: no model is made, and no-go is the command's exit code."""

from __future__ import annotations

import json
from pathlib import Path

from fedward_common.errors import NotReadyError
from fedward_server.readiness_report import ReadinessReport
from tests.client.site_workers import a_divided_site
from tests.integration.deployment import SERVER, call

PLAN = Path(__file__).parents[2] / "deploy" / "plans" / "readiness.toml"


def test_sites_with_too_few_cases_end_a_simulation_with_no_go(tmp_path: Path) -> None:
    for name in ("north", "south"):
        a_divided_site(tmp_path / "images" / name)
    out = tmp_path / "out"
    arguments = ("--sites", "2", "--data", str(tmp_path / "images"), "--out", str(out), "--json")
    done = call(*SERVER, "simulate", str(PLAN), *arguments, code=NotReadyError.exit_code)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    (judged,) = [event for event in events if event["kind"] == "judged"]
    assert judged["fields"]["decision"] == "no-go"
    assert {reason["rule"] for reason in judged["fields"]["reasons"]} == {"min_cases"}
    assert events[-1]["fields"]["status"] == "completed"
    report = ReadinessReport.model_validate_json((out / "readiness.json").read_text())
    assert report.counts["num_cases"] == (48,)
    assert not (out / "report.html").exists()
    assert not (out / "checkpoints").exists()
