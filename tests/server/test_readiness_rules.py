"""From released counts to go or no-go: rules, the document, the page, and states that are not admitted."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from playwright.sync_api import Browser
from scipy.spatial.distance import jensenshannon

from fedward_client.readiness import weighted
from fedward_common.envelope import Numbers
from fedward_common.errors import NotReadyError, PayloadError, RefusalCode, RunFailedError
from fedward_common.evaluation.report import Provenance
from fedward_common.identity import new_signer
from fedward_common.plan import ReadinessPlan
from fedward_common.readiness_state import State, empty_survey
from fedward_common.state_payload import pack_state
from fedward_server import console
from fedward_server.admission import Answer, admit
from fedward_server.fleet import Question
from fedward_server.progress import Progress, apply
from fedward_server.readiness_page import _comparison, _overview, render_readiness
from fedward_server.readiness_report import ReadinessReport
from fedward_server.readiness_reporting import judged, readiness_report, terminal_notes, terminal_rows
from fedward_server.readiness_rules import jensen_shannon, overlap, quantiles_of, remedy_of
from fedward_server.reports import expect_go, page_of, parse_report
from fedward_server.run_records import EventKind, RunInfo
from fedward_server.survey import SurveyOutcome, run_survey
from tests.messages import an_answer, an_instruction
from tests.readiness_builders import a_readiness_plan, a_survey, signed_survey, some_cases, surveyed
from tests.server.run_builders import NOON, an_event

PLAN = a_readiness_plan()
FINER = a_readiness_plan(survey={"intensity": {"bins": 8}})
SIGNED = signed_survey(PLAN)
ASK = an_instruction(SIGNED, "survey", round_index=0)
SIGN, KEY = new_signer()
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"


def rules_broken(state: State | None, plan: ReadinessPlan = PLAN, level: str = "stop") -> set[str]:
    """Rules that the site `north` does not meet beside two sites like any other."""
    states = {"north": state, "south": a_survey(plan, seed=1), "west": a_survey(plan, seed=2)}
    (north, *_) = judged(states, plan)
    return {reason.rule for reason in north.reasons if reason.level == level}


def a_report(**states: State | None) -> ReadinessReport:
    sites: dict[str, State | None] = {
        "north": a_survey(PLAN),
        "south": a_survey(PLAN, seed=1),
        "west": a_survey(PLAN, seed=2),
    }
    outcome = SurveyOutcome({**sites, **states}, {"east": int(RefusalCode.SITE_OFFLINE)})
    info = RunInfo(
        run_id="survey-1",
        name="survey",
        plan_digest=SIGNED.digest,
        status="completed",
        reason="",
        created_at=NOON,
        finished_at=datetime(2026, 1, 31, 12, 1, tzinfo=UTC),
        rounds_done=0,
        rounds_total=0,
        selected_round=None,
    )
    return readiness_report(info, SIGNED, PLAN, outcome.document(), Provenance(federation=HOSTILE))


def test_alike_sites_with_enough_of_everything_are_ready() -> None:
    report = a_report()
    assert report.decision == "go"
    assert all(site.reasons == () for site in report.sites)
    assert report.counts["num_cases"] == (360,)
    expect_go(report)


@pytest.mark.parametrize(
    ("facts", "rule"),
    [
        ({"label": 0}, "min_cases_per_label"),
        ({"label": 0}, "min_label_share"),
        ({"label": 0}, "max_label_distance"),
        ({"age_years": 99}, "max_age_distance"),
        ({"sex": "F"}, "max_sex_distance"),
    ],
)
def test_a_site_whose_cases_are_all_alike_is_not_ready(facts: dict[str, Any], rule: str) -> None:
    assert rule in rules_broken(a_survey(PLAN, some_cases(60, PLAN, **facts)))


def test_what_is_permitted_to_differ_may_differ() -> None:
    other = some_cases(60, PLAN, scanner="GE X", spacing_mm=(0.4, 0.4))
    assert rules_broken(a_survey(PLAN, other)) == set()
    strict = a_readiness_plan(rules={"max_scanner_distance": 0.2, "max_spacing_distance": 0.2})
    assert rules_broken(a_survey(strict, other), strict) == {"max_scanner_distance", "max_spacing_distance"}


def test_a_small_site_is_not_ready_for_each_thing_it_lacks() -> None:
    few = rules_broken(a_survey(PLAN, some_cases(15, PLAN)))
    assert {"min_cases", "min_patients"} <= few


def test_a_label_that_is_held_back_is_not_taken_to_be_enough() -> None:
    cases = some_cases(60, PLAN, label=0) + [surveyed(9, 100 + number, PLAN, label=1) for number in range(3)]
    state = a_survey(PLAN, cases)
    assert not state["label"].any()
    assert "min_cases_per_label" in rules_broken(state)
    assert "max_label_distance" in rules_broken(state)
    lenient = a_readiness_plan(
        rules={"min_cases_per_label": 0, "min_patients_per_label": 0, "max_label_distance": 1.0}
    )
    assert "min_cases_per_label" not in rules_broken(state, lenient)


def test_a_site_that_holds_everything_back_is_not_ready() -> None:
    assert rules_broken(None) == {"min_patients"}


@pytest.mark.parametrize(("num_torn", "broken"), [(0, False), (1, True), (4, True), (9, True)])
def test_patients_on_two_sides_stop_training_even_where_their_number_is_held_back(
    num_torn: int, broken: bool
) -> None:
    cases = [
        surveyed(number, patient, PLAN, split="test" if number and patient < num_torn else "train")
        for patient in range(60)
        for number in range(2)
    ]
    assert ("max_torn_patients" in rules_broken(a_survey(PLAN, cases))) is broken


@pytest.mark.parametrize(("num_same", "broken"), [(0, False), (2, True), (20, True)])
def test_repeated_images_stop_training(num_same: int, broken: bool) -> None:
    cases = some_cases(60, PLAN)
    same = [replace(each, pixels=b"same") for each in cases[:num_same]]
    assert ("max_repeated_share" in rules_broken(a_survey(PLAN, [*same, *cases[num_same:]]))) is broken


def test_a_number_that_is_held_back_may_be_the_large_one_of_two() -> None:
    """Three of sixty patients are not torn: that holds both numbers back, as three that are torn would."""
    lenient = a_readiness_plan(rules={"max_torn_patients": 4, "max_repeated_share": 0.05})
    torn = [
        surveyed(number, patient, PLAN, split="test" if number and patient < 57 else "train")
        for patient in range(60)
        for number in range(2)
    ]
    assert "max_torn_patients" in rules_broken(a_survey(lenient, torn), lenient)
    cases = some_cases(60, PLAN)
    same = [replace(each, pixels=b"same") for each in cases[:-4]]
    assert "max_repeated_share" in rules_broken(a_survey(lenient, [*same, *cases[-4:]]), lenient)
    anything = a_readiness_plan(rules={"max_torn_patients": 60, "max_repeated_share": 1.0})
    for found in (torn, [*same, *cases[-4:]]):
        broken = rules_broken(a_survey(anything, found), anything)
        assert not broken & {"max_torn_patients", "max_repeated_share"}


def test_balance_is_not_taken_to_hold_where_labels_are_held_back() -> None:
    plan = a_readiness_plan(rules={"min_cases_per_label": 0, "min_patients_per_label": 0})
    cases = [*some_cases(60, plan, label=0), surveyed(9, 100, plan, label=1)]
    assert "min_label_share" in rules_broken(a_survey(plan, cases), plan)


def test_a_distance_that_nobody_knows_is_not_shown_as_too_large() -> None:
    north = a_survey(PLAN)
    north["age"][:] = 0
    table = _comparison(a_report(north=north))
    assert table is not None
    age = next(row[2] for row in table.rows if row[0].text == "north")
    assert (age.text, age.style, age.note) == ("–", "", "too much is held back")
    assert "every rule of the plan is met" not in render_readiness(a_report(north=north)).lower()


def test_patients_that_are_held_back_are_not_said_to_be_none() -> None:
    labels = ("a", "b", "c")
    plan = a_readiness_plan(task={"labels": labels}, rules={"min_patients_per_label": 6})
    state = a_survey(plan, [surveyed(0, patient, plan, label=patient % 3) for patient in range(90)])
    state["label_patients"][:] = (0, 30, 30, 0)
    (site,) = judged({"north": state}, plan)
    assert [reason.text for reason in site.reasons] == [
        "5 patients of a for certain (others are held back), 6 required"
    ]


def test_a_large_quarantine_stops_training() -> None:
    """There are 120 studies in use."""
    assert "max_refused_share" in rules_broken(a_survey(PLAN, num_refused=40))
    assert "max_refused_share" not in rules_broken(a_survey(PLAN, num_refused=20))


@pytest.mark.parametrize(
    ("num_refused", "permitted", "level"),
    [(0, 0.0, ""), (3, 0.2, "note"), (3, 0.03, "stop"), (3, 1.0, "note")],
)
def test_a_quarantine_that_is_held_back_is_judged_by_what_it_may_be(
    num_refused: int, permitted: float, level: str
) -> None:
    plan = a_readiness_plan(rules={"max_refused_share": permitted})
    state = a_survey(plan, num_refused=num_refused)
    (site, *_) = judged({"north": state, "south": a_survey(plan, seed=1)}, plan)
    found = [each for each in site.reasons if each.rule == "max_refused_share"]
    assert [each.level for each in found] == [level] * bool(level)
    assert all("fewer than 5 studies" in each.text and "3.2% of all" in each.text for each in found)
    assert site.decision == ("no-go" if level == "stop" else "go")


def test_a_site_of_which_many_images_are_in_few_studies_is_not_said_to_have_none() -> None:
    report = a_report(north=a_survey(PLAN, num_refused=4), south=a_survey(PLAN, seed=1, num_refused=9))
    rows = _overview(report)
    assert [row[4].text for row in rows.rows] == ["fewer than 5", "9", "0"]
    assert rows.total[4].text == "9 to 13"


@pytest.mark.parametrize(
    ("table", "bound"), [("age", {"max_age_distance": 0.5}), ("intensity", {"min_intensity_overlap": 0.5})]
)
def test_what_cannot_be_compared_is_not_taken_to_be_alike(table: str, bound: dict[str, float]) -> None:
    (rule,) = bound
    plan = a_readiness_plan(rules=bound)
    states = {"north": a_survey(plan), "south": a_survey(plan, seed=1)}
    states["south"][table][:] = 0
    north, south = judged(states, plan)
    for site, where in ((north, "at the other sites"), (south, "here")):
        (reason,) = site.reasons
        assert (reason.level, reason.rule) == ("stop", rule)
        assert reason.text.endswith(f"cannot be compared: too much is held back {where}")
        assert f"rules.{rule} = " in reason.remedy
    lax = a_readiness_plan(rules={rule: 1.0 if rule.startswith("max_") else 0.0})
    assert all(site.reasons == () for site in judged(states, lax))


def test_dark_images_beside_bright_ones_stop_training() -> None:
    dark = [replace(each, intensity=weighted(np.array([0, 99, 1, 0, 0, 0]))) for each in some_cases(60, PLAN)]
    assert "min_intensity_overlap" in rules_broken(a_survey(PLAN, dark))


def test_with_more_than_two_labels_patients_of_several_count_for_none() -> None:
    plan = a_readiness_plan(task={"labels": ("a", "b", "c")})
    cases = [surveyed(label, patient, plan, label=label) for patient in range(60) for label in range(3)]
    assert rules_broken(a_survey(plan, cases), plan) >= {"min_patients_per_label"}


def test_every_reason_to_stop_names_number_bound_and_remedy() -> None:
    old = some_cases(60, PLAN, age_years=99, label=0)
    same = [replace(each, pixels=b"same", intensity=weighted(np.array([0, 99, 1, 0, 0, 0]))) for each in old]
    report = a_report(north=a_survey(PLAN, [*same, *some_cases(60, PLAN)[:20]], num_refused=99))
    north = report.sites[0]
    assert north.site == "north"
    stops = {reason.rule: reason for reason in north.reasons if reason.level == "stop"}
    assert {"max_age_distance", "max_repeated_share", "max_refused_share", "min_intensity_overlap"} <= set(
        stops
    )
    assert "permitted: 80 and more" in stops["max_age_distance"].text
    assert "required: median" in stops["min_intensity_overlap"].text
    shown = "\n".join(terminal_notes(report))
    for reason in stops.values():
        assert len(re.findall(r"\d+", reason.text)) > 1 or "held back" in reason.text
        assert reason.rule in reason.remedy
        assert reason.remedy in shown
        assert reason.remedy in html.unescape(render_readiness(report))
    # No rule of the plan makes training accept what it refuses.
    assert "rules." not in remedy_of("max_torn_patients")


def test_a_site_alone_is_compared_with_nobody() -> None:
    (alone,) = judged({"north": a_survey(PLAN)}, PLAN)
    assert alone.comparison is None
    assert alone.decision == "go"


SHARES = arrays(np.int64, 6, elements=st.integers(0, 2**44)).filter(lambda cells: bool(cells.any()))


@given(SHARES, SHARES)
def test_distances_are_those_of_scipy(first: Any, second: Any) -> None:
    first, second = first / first.sum(), second / second.sum()
    expected = jensenshannon(first, second, base=2)
    assert jensen_shannon(first, second) == pytest.approx(0 if math.isnan(expected) else expected, abs=1e-7)
    assert overlap(first, second) == pytest.approx(1 - np.abs(first - second).sum() / 2)


@given(st.lists(st.integers(0, 1000), min_size=6, max_size=6).filter(any))
def test_quantiles_lie_in_the_cells_that_hold_them(cells: list[int]) -> None:
    part = PLAN.survey.intensity  # four cells from 0 to 1, and one beyond either end
    found = quantiles_of(cells, part)
    assert found is not None
    edges = [0, 0, 0.25, 0.5, 0.75, 1, 1]
    for share, value in zip((0.05, 0.25, 0.5, 0.75, 0.95), found, strict=True):
        cell = int(np.searchsorted(np.cumsum(cells), share * sum(cells)))
        assert edges[cell] - 1e-6 <= value <= edges[cell + 1] + 1e-6
    assert quantiles_of([0] * 6, part) is None


def answered(state: State | bytes, num_cases: int | None = 120, **changes: Any) -> Answer:
    payload = state if isinstance(state, bytes) else pack_state(state, PLAN)
    up = an_answer(ASK, SIGN, payload=payload, numbers=Numbers(num_cases=num_cases), **changes)
    return admit(up, ASK, SIGNED, "north", KEY)


def test_an_honest_survey_is_admitted_and_one_that_says_nothing_too() -> None:
    honest = answered(a_survey(PLAN))
    assert honest.ok
    assert honest.state is not None
    assert (honest.state["label"] == a_survey(PLAN)["label"]).all()
    silent = answered(empty_survey(PLAN), None)
    assert silent.ok
    assert silent.state is None


def test_hostile_surveys_are_refused() -> None:
    leaky = a_survey(PLAN)
    leaky["label"][:] = (3, 117)
    huge = a_survey(PLAN)
    huge["intensity"][:] = 2**62
    crowded, negative = a_survey(PLAN), a_survey(PLAN)
    crowded["num_cases"][0] = crowded["num_patients"][0] = 10**18
    negative["age"][0] *= -1
    whole = pack_state(a_survey(PLAN), PLAN)
    other_edges = pack_state(a_survey(FINER, some_cases(60, FINER)), FINER)
    for state in (
        leaky,
        huge,
        crowded,
        negative,
        b"",
        b"DOE^JANE",
        whole[:-1],
        whole + bytes(8),
        other_edges,
    ):
        assert answered(state).code is RefusalCode.UPDATE_MALFORMED
    assert answered(a_survey(PLAN), 119).code is RefusalCode.UPDATE_MALFORMED
    assert answered(a_survey(PLAN), None).code is RefusalCode.UPDATE_MALFORMED
    assert answered(empty_survey(PLAN), 0).code is RefusalCode.UPDATE_MALFORMED
    assert answered(a_survey(PLAN), run_id="run-2").code is RefusalCode.UPDATE_STALE
    assert answered(a_survey(PLAN), action="evaluate").code is RefusalCode.UPDATE_STALE
    up = an_answer(ASK, new_signer()[0], payload=pack_state(a_survey(PLAN), PLAN))
    assert admit(up, ASK, SIGNED, "north", KEY).code is RefusalCode.UPDATE_UNSIGNED


@given(st.binary(max_size=600))
def test_no_bytes_raise_an_exception(payload: bytes) -> None:
    assert not answered(payload).ok


class ScriptedFleet:
    """Sites that answer as they are told."""

    roster = ("east", "north", "south")

    def __init__(self, **answers: Answer) -> None:
        self._answers = answers

    def ask(self, sites: Any, question: Question, online: Any = None) -> Iterator[Answer]:
        for site in sites:
            if question.action == "prepare":
                yield Answer(site, RefusalCode.OK)
            else:
                yield self._answers.get(site, Answer(site, RefusalCode.SITE_LATE))

    def stopping(self, seconds: float) -> bool:
        return False


def test_a_survey_with_a_quorum_is_judged_and_one_without_fails() -> None:
    told: list[tuple[str, dict[str, Any]]] = []
    answers = {
        site: Answer(site, RefusalCode.OK, Numbers(num_cases=120), state=a_survey(PLAN, seed=seed))
        for seed, site in enumerate(("north", "south"))
    }
    outcome = run_survey(ScriptedFleet(**answers), PLAN, lambda *event: told.append(event))  # type: ignore[arg-type]
    assert sorted(outcome.states) == ["north", "south"]
    assert outcome.absent == {"east": int(RefusalCode.SITE_LATE)}
    assert [kind for kind, _ in told] == ["sites", "site_refused", "site_surveyed", "site_surveyed", "judged"]
    assert told[-1][1] == {"decision": "go", "reasons": []}
    with pytest.raises(RunFailedError, match="the survey: 1 of at least 2 sites"):
        run_survey(ScriptedFleet(north=answers["north"]), PLAN, lambda *_: None)  # type: ignore[arg-type]


def test_events_of_a_survey_add_up_to_a_decision() -> None:
    progress = Progress(rounds_total=0)
    events: list[tuple[EventKind, dict[str, Any]]] = [
        ("site_surveyed", {"site": "north", "num_cases": 120, "seconds": 1.0}),
        ("site_surveyed", {"site": "south", "num_cases": None, "seconds": 1.0}),
        ("judged", {"decision": "no-go", "reasons": []}),
    ]
    for kind, fields in events:
        progress = apply(progress, an_event(kind, **fields))
    assert progress.decision == "no-go"
    assert progress.sites["north"].num_cases == 120
    assert progress.sites["south"].state == "contributed"


def test_no_go_is_an_error_with_an_exit_code_of_its_own() -> None:
    report = a_report(north=None)
    assert report.decision == "no-go"
    with pytest.raises(NotReadyError, match="1 rule is not met at 1 site") as refused:
        expect_go(report)
    assert refused.value.exit_code == 16


def test_the_document_is_read_back_and_anything_else_is_refused() -> None:
    report = a_report()
    assert parse_report(report.model_dump_json().encode()) == report
    with pytest.raises(PayloadError):
        parse_report(b'{"kind": "readiness"}')


def test_the_terminal_shows_decision_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    report = a_report(north=None)
    assert terminal_rows(report)[1] == ("north", "no-go", "–", "–", "–", "–")
    assert any(line.startswith("x north: everything is held back") for line in terminal_notes(report))
    console.show_result(report)
    shown = capsys.readouterr().out
    assert "no-go" in shown
    assert "east: the site was not connected" in shown


def _pages() -> dict[str, ReadinessReport]:
    alike = some_cases(60, PLAN, label=0, sex="F")
    many = {f"site-{number:02}": a_survey(PLAN, seed=number) for number in range(12)}
    return {
        "go": a_report(),
        "no-go": a_report(north=None, south=a_survey(PLAN, alike, num_refused=99)),
        "many": a_report(**many),
        "hostile": a_report(**{HOSTILE: a_survey(PLAN)}),
        "running": a_report().model_copy(update={"verdict": "running", "sites": ()}),
        "failed": a_report().model_copy(update={"verdict": "failed", "reason": HOSTILE, "sites": ()}),
    }


PAGES = _pages()


@pytest.mark.integration
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", PAGES)
def test_the_page_fits_asks_for_nothing_and_says_its_decision_first(
    name: str, width: int, browser: Browser, tmp_path: Path
) -> None:
    complaints: list[str] = []
    file = tmp_path / "readiness.html"
    file.write_text(page_of(PAGES[name]), encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 844})
    page.on("console", lambda message: complaints.append(message.text))
    page.on("request", lambda asked: complaints.append(asked.url) if asked.url != file.as_uri() else None)
    page.goto(file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    box = page.locator(".verdict .title").bounding_box()
    assert box is not None
    assert box["y"] < 200
    assert complaints == []
    assert page.title() != "taken"
    page.close()


def test_the_page_says_that_patients_of_two_sites_are_never_compared() -> None:
    assert "Patients of two sites are never compared." in render_readiness(a_report())


def test_the_page_adds_nothing_up_to_none_where_a_site_holds_its_number_back() -> None:
    cases = some_cases(60, PLAN)
    same = [replace(each, pixels=b"same") for each in cases[:2]]
    for report, shown in (
        (a_report(north=a_survey(PLAN, [*same, *cases[2:]])), "held back"),
        (a_report(), "0"),
    ):
        total = _overview(report).total
        assert total[5].text == shown
    silent = {name: None for name in ("north", "south", "west")}
    page = render_readiness(a_report(**silent))
    assert 'id="reasons"' in page
    assert 'id="tables"' not in page
    assert 'id="intensity"' not in page
