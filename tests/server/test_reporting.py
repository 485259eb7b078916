"""From a run's records to its report: whatever state the run is in, nothing lost and nothing invented."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedward_common.errors import RefusalCode, RunFailedError, UsageError
from fedward_common.evaluation.report import RunReport
from fedward_server.reporting import build_report, every_site_in_every_round, result_document, write_report
from fedward_server.rounds import RunOutcome
from tests.messages import a_plan, an_answer, signed
from tests.server.run_builders import a_round
from tests.server.scripted_sites import ScriptedRun, ScriptedSite, refuse

PLAN = signed(a_plan(rounds=2, evaluation={"compare_local": True, "initial": True}))


def sites(*names: str) -> list[ScriptedSite]:
    return [ScriptedSite(name, 20 + len(name), skill={1: 0.8, 2: 0.3}) for name in names]


def completed(folder: Path, run: ScriptedRun | None = None) -> tuple[ScriptedRun, RunOutcome]:
    run = run or ScriptedRun(folder, PLAN, sites("north", "south"))
    outcome = run.execute()
    run.store.set_result("run-1", result_document(outcome))
    run.store.finish("run-1", "completed", "", outcome.selected_round)
    return run, outcome


def test_the_report_of_a_completed_run_holds_what_the_run_found(tmp_path: Path) -> None:
    run, outcome = completed(tmp_path)
    report = build_report(run.store, "run-1", data_note="phantoms", federation="Test federation")
    assert (report.verdict, report.reason, report.absent) == ("completed", "", ())
    assert report.sites == ("north", "south")
    assert report.plan_digest == PLAN.digest
    assert [one.round_index for one in report.rounds] == [0, 1, 2]
    assert report.selected_round == 1
    assert report.test == outcome.test.total
    assert report.test_sites == outcome.test.sites
    assert report.local_sites == outcome.local
    assert report.provenance.federation == "Test federation"
    assert report.provenance.signer == "anna"
    assert report.provenance.data == "phantoms"
    assert report.provenance.initial_weights_digest == outcome.initial_digest
    assert report.provenance.model_sha256 == run.store.rounds("run-1")[0].checkpoint_sha256
    assert report.provenance.versions["fedward"]
    assert report.seconds > 0
    assert every_site_in_every_round(report)


def test_a_rounds_part_is_what_was_committed(tmp_path: Path) -> None:
    run, _ = completed(tmp_path)
    report = build_report(run.store, "run-1")
    record = run.store.rounds("run-1")[0]
    shown = report.rounds[1]
    assert shown.weights_digest == record.weights_digest
    assert [(site.site, site.num_cases, site.bytes_up) for site in shown.sites] == [
        ("north", 25, 32),
        ("south", 25, 32),
    ]
    assert shown.validation is not None
    assert shown.validation.num_cases == 40
    assert sorted(shown.validation_sites) == ["north", "south"]


def test_the_result_survives_json(tmp_path: Path) -> None:
    _, outcome = completed(tmp_path)
    document = result_document(outcome)
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_a_site_that_missed_a_round_is_a_gap(tmp_path: Path) -> None:
    absent = sites("north", "south", "west")
    absent[2].scripts = {
        "train": lambda site, instruction, down: (
            site.honest(instruction, down)
            if instruction.round_index == 1
            else an_answer(instruction, site.sign, site=site.name, code=int(RefusalCode.OUT_OF_MEMORY))
        )
    }
    run, _ = completed(tmp_path, ScriptedRun(tmp_path, PLAN, absent))
    report = build_report(run.store, "run-1")
    assert report.verdict == "completed"
    assert not every_site_in_every_round(report)
    (missed,) = [site for site in report.rounds[2].sites if site.status != "contributed"]
    assert (missed.site, missed.status, missed.reason) == ("west", "refused", "the site ran out of memory")


def test_a_site_that_never_came_is_absent_with_its_reason_though_the_run_completed(tmp_path: Path) -> None:
    late = sites("north", "south", "west")
    late[2].scripts = {
        "prepare": refuse(RefusalCode.PLAN_NOT_APPROVED),
        "train": refuse(RefusalCode.PLAN_NOT_APPROVED),
    }
    plan = signed(a_plan(rounds=1, participation={"gather_s": 0.1}))
    run, _ = completed(tmp_path, ScriptedRun(tmp_path, plan, late))
    report = build_report(run.store, "run-1")
    assert [(site.site, site.code) for site in report.absent] == [("west", 14)]
    assert "approve" in report.absent[0].reason
    assert not every_site_in_every_round(report)


def test_a_site_that_was_approved_late_is_not_absent(tmp_path: Path) -> None:
    late = sites("north", "south", "west")
    late[2].scripts = {"prepare": refuse(RefusalCode.PLAN_NOT_APPROVED)}
    plan = signed(a_plan(rounds=1, participation={"gather_s": 0.1}))
    run, _ = completed(tmp_path, ScriptedRun(tmp_path, plan, late))
    assert build_report(run.store, "run-1").absent == ()


def test_a_run_in_progress_has_a_report_without_a_result(tmp_path: Path) -> None:
    run = ScriptedRun(tmp_path, PLAN, sites("north", "south"))
    run.store.set_status("run-1", "running")
    run.store.commit_round("run-1", a_round(1))
    report = build_report(run.store, "run-1")
    assert report.verdict == "running"
    assert report.test is None
    assert report.finished_at is None
    assert [one.round_index for one in report.rounds] == [1]
    assert report.rounds[0].sites[1].reason == RefusalCode.SITE_OFFLINE.meaning
    assert not every_site_in_every_round(report)


def test_a_run_that_never_began_has_a_report(tmp_path: Path) -> None:
    run = ScriptedRun(tmp_path, PLAN, [])
    report = build_report(run.store, "run-1")
    assert report.verdict == "waiting"
    assert report.sites == ()
    assert report.rounds == ()
    assert not every_site_in_every_round(report)


def test_a_round_that_failed_twice_is_shown_once_as_it_was_the_second_time(tmp_path: Path) -> None:
    for code in (RefusalCode.OUT_OF_MEMORY, RefusalCode.TRAINING_FAILED):
        broken = sites("north", "south")
        broken[0].scripts = {"train": refuse(code)}
        run = ScriptedRun(tmp_path, PLAN, broken)
        with pytest.raises(RunFailedError):
            run.execute(resume=True)
    report = build_report(run.store, "run-1")
    (failed,) = [one for one in report.rounds if one.round_index == 1]
    assert not failed.committed
    assert {site.site: site.code for site in failed.sites} == {"north": 40, "south": 0}


def test_report_files_are_written_for_people_and_for_programs(tmp_path: Path) -> None:
    run, _ = completed(tmp_path)
    report = write_report(run.store, "run-1", tmp_path, data_note="phantoms <mark>")
    assert RunReport.model_validate_json((tmp_path / "report.json").read_text()) == report
    page = (tmp_path / "report.html").read_text()
    assert page.lower().startswith("<!doctype html>")
    assert "phantoms &lt;mark&gt;" in page
    assert "<mark>" not in page


def test_there_is_no_report_of_a_run_that_does_not_exist(tmp_path: Path) -> None:
    run = ScriptedRun(tmp_path, PLAN, [])
    with pytest.raises(UsageError, match="no run"):
        build_report(run.store, "run-2")
