"""A survey with real processes over mutual TLS, and in a simulation: the same counts, and no identifier."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedward_common.audit import AuditLog
from fedward_common.errors import NotReadyError
from fedward_server.readiness_report import ReadinessReport
from fedward_server.run_records import Event
from tests.integration.deployment import NAMES, SERVER, SITE, a_deployment, alive, call, children, wait_for
from tests.integration.test_canary import Evidence, TappedFederation, _collect, found_in

pytestmark = pytest.mark.integration

PLAN = """
kind = "readiness"
name = "{name}"

[participation]
quorum = 2
deadline_s = 90
gather_s = 60

[task]
labels = ["normal", "abnormal"]

[survey.intensity]
bins = 8

[privacy]
min_cases = 3

[rules]
min_cases = {min_cases}
min_patients = 10
min_cases_per_label = 3
min_patients_per_label = 3
max_repeated_share = 1.0
max_label_distance = 1.0
max_age_distance = 1.0
max_sex_distance = 1.0
min_intensity_overlap = 0.2
"""


def a_plan(folder: Path, name: str = "survey", min_cases: int = 20) -> Path:
    path = folder / f"{name}.toml"
    path.write_text(PLAN.format(name=name, min_cases=min_cases))
    return path


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TappedFederation]:
    with a_deployment(tmp_path_factory.mktemp("survey"), cases_per_site=40) as place:
        federation = TappedFederation(place)
        place.start_server()
        for name in NAMES:
            federation.start_site(name)
        place.await_sites(*NAMES)
        yield federation


@pytest.fixture(scope="module")
def report(federation: TappedFederation) -> ReadinessReport:
    """A survey of three sites, of which the third's operator does not approve."""
    place = federation.place
    text = a_plan(place.root).read_text().replace("gather_s = 60", "gather_s = 6")
    plan = place.root / "survey.toml"
    plan.write_text(text)
    signed = place.sign(plan)
    place.approve(signed, "site-1", "site-2")
    return ReadinessReport.model_validate(place.finish(place.launch(signed)))


def test_sites_that_approved_are_counted_and_the_other_is_named(report: ReadinessReport) -> None:
    assert report.verdict == "completed"
    assert [site.site for site in report.sites] == ["site-1", "site-2"]
    assert [(absent.site, absent.reason) for absent in report.absent] == [
        ("site-3", "waiting for the site's operator to approve the plan")
    ]
    assert report.decision == "go", report.stops
    (num_cases,) = report.counts["num_cases"]
    assert 60 <= num_cases <= 80  # canaries in every element make the gate refuse some
    assert sum(report.counts["label"]) == num_cases


def test_a_simulation_of_the_same_images_counts_the_same(
    federation: TappedFederation, report: ReadinessReport, tmp_path: Path
) -> None:
    for name in ("site-1", "site-2"):
        planted, folder = federation.planted[name], tmp_path / "images" / name
        folder.mkdir(parents=True)
        (folder / "dicom").symlink_to(planted.dicom)
        (folder / "labels.csv").symlink_to(planted.labels)
    out = tmp_path / "out"
    images = ("--data", str(tmp_path / "images"), "--out", str(out))
    call(*SERVER, "simulate", str(a_plan(tmp_path)), "--sites", "2", *images, "--json")
    simulated = ReadinessReport.model_validate_json((out / "readiness.json").read_text())
    assert [site.counts for site in simulated.sites] == [site.counts for site in report.sites]
    assert simulated.decision == "go"
    assert (out / "readiness.html").stat().st_size > 10_000


def test_no_identifier_leaves_a_site_or_reaches_the_server(
    federation: TappedFederation, report: ReadinessReport, tmp_path: Path
) -> None:
    place = federation.place
    call(
        *(*SERVER, "run", "report", report.run_id, "--identity", str(place.coordinator)),
        *("--out", str(place.root / "readiness.html")),
    )
    evidence = Evidence(federation.planted)
    _collect(federation, evidence)
    assert {"site-1/audit.jsonl", "site-1/site.log"} <= set(evidence.home)
    assert any(name.startswith("site-1/surveys/") for name in evidence.home)
    assert found_in(evidence.outside, evidence.wire) == {}
    assert found_in(evidence.outside, evidence.server) == {}
    assert found_in(evidence.everywhere, evidence.home) == {}
    assert found_in(evidence.outside, evidence.stays) != {}  # the needles are of what was really read


def test_what_left_is_one_small_state_a_site(federation: TappedFederation, report: ReadinessReport) -> None:
    home = federation.place.home("site-1")
    sent = [
        entry.fields
        for entry in AuditLog(home / "audit.jsonl").entries()
        if entry.event == "outbound" and entry.fields["run_id"] == report.run_id
    ]
    answers = [fields for fields in sent if fields["action"] == "survey"]
    (kept,) = (home / "surveys").glob("*.counts")
    assert [fields["payload_bytes"] for fields in answers] == [kept.stat().st_size]
    assert kept.stat().st_mode & 0o777 == 0o600
    shown = call(*SITE, "outbound", "show", "--home", str(home)).stdout
    assert "counts of a survey of the site's cases" in shown


def test_no_go_ends_the_command_with_its_own_exit_code_and_the_reasons(
    federation: TappedFederation, tmp_path: Path
) -> None:
    place = federation.place
    signed = place.sign(a_plan(tmp_path, "strict", min_cases=41))
    place.approve(signed)
    identity = ("--identity", str(place.coordinator))
    done = call(*SERVER, "run", "start", str(signed), *identity, code=NotReadyError.exit_code)
    assert "no-go" in done.stdout
    assert re.search(r"site-1: \d\d cases, 41 required", done.stdout)
    assert "no-go: 3 rules are not met at 3 sites" in done.stderr


def test_a_signed_survey_is_checked_and_serves_one_run_only(
    federation: TappedFederation, report: ReadinessReport
) -> None:
    place = federation.place
    signed = place.root / "survey.signed"
    identity = ("--identity", str(place.coordinator))
    checked: dict[str, Any] = json.loads(
        call(*SERVER, "plan", "check", str(signed), *identity, "--json").stdout
    )
    assert checked["plan"]["kind"] == "readiness"
    assert checked["signature_checked"] is True
    assert checked["bytes_per_update"] == 0
    again = call(*SERVER, "run", "start", str(signed), *identity, code=2)
    assert "already used by run" in again.stderr


def test_a_survey_whose_server_was_killed_is_resumed_and_every_site_repeats_its_answer(
    federation: TappedFederation, tmp_path: Path
) -> None:
    place = federation.place
    signed = place.sign(a_plan(tmp_path, "killed"))
    place.approve(signed)
    run_id = place.launch(signed)
    place.events(run_id, lambda event: event.kind == "sites" and event.fields["ready"] == list(NAMES))
    os.kill(place.processes["site-3"].pid, signal.SIGSTOP)  # what it counts cannot leave it
    try:
        answered: set[str] = set()

        def both_answered(event: Event) -> bool:
            if event.kind == "site_surveyed":
                answered.add(str(event.fields["site"]))
            return answered == {"site-1", "site-2"}

        place.events(run_id, both_answered)
        runner = children(place.processes["server"].pid)
        place.kill("server")
        wait_for(lambda: not any(alive(pid) for pid in runner), "the dead server's runner to end")
    finally:
        os.kill(place.processes["site-3"].pid, signal.SIGCONT)
    place.kill("site-2")  # what it answered must outlive it
    for name in ("site-1", "site-2"):  # counted anew, the answers would differ
        for path in sorted(federation.planted[name].dicom.rglob("*"))[:8]:
            if path.is_file():
                path.unlink()
    place.start_server()
    federation.start_site("site-2")
    place.await_sites(*NAMES)
    call(*SERVER, "run", "resume", run_id, "--identity", str(place.coordinator))
    report = ReadinessReport.model_validate(place.finish(run_id))

    assert report.verdict == "completed"
    assert [site.site for site in report.sites] == list(NAMES)
    for name in ("site-1", "site-2"):
        sent = _surveys_sent(place.home(name), run_id)
        assert len(sent) == 2
        assert sent[0] == sent[1]
    assert len(set(_surveys_sent(place.home("site-3"), run_id))) == 1


def _surveys_sent(home: Path, run_id: str) -> list[str]:
    """Digests of the answers to a survey, from the site's audit log."""
    return [
        str(entry.fields["payload_digest"])
        for entry in AuditLog(home / "audit.jsonl").entries()
        if entry.event == "outbound"
        and (entry.fields["run_id"], entry.fields["action"], entry.fields["code"]) == (run_id, "survey", 0)
    ]
