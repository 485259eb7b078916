"""Whole runs of scripted sites: quorum, deadline, bad sites, order, selection, strategy, resume, stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict
from numpy.typing import NDArray

from fedward_common import weights
from fedward_common.envelope import Instruction
from fedward_common.errors import RefusalCode, RunFailedError
from fedward_common.identity import new_signer
from fedward_common.plan import SignedPlan
from fedward_common.protocol import Down, Up
from fedward_server.fleet import RunStoppedError
from fedward_server.reporting import build_report, every_site_in_every_round, result_document
from tests.messages import LAYOUT, a_plan, a_state, an_answer, signed
from tests.server.scripted_sites import (
    PATIENCE_S,
    Script,
    ScriptedRun,
    ScriptedSite,
    delta_of,
    first_model,
    refuse,
)

PLAN = signed()  # three rounds, quorum of two
ADAM = signed(a_plan(rounds=4, strategy={"name": "fedadam"}))


def three_sites(**changes: Any) -> list[ScriptedSite]:
    cases = {"north": 10, "south": 20, "west": 37}
    return [ScriptedSite(name, num_cases, **changes) for name, num_cases in cases.items()]


def flat(model: bytes) -> NDArray[np.float64]:
    return np.frombuffer(model, dtype="<f4").astype(np.float64)


def final_model(run: ScriptedRun, round_index: int) -> bytes:
    return weights.pack(run.checkpoints.read(round_index).weights, LAYOUT)


def averaged(cases: dict[str, int], model: bytes) -> NDArray[np.float64]:
    """FedAvg by hand: a model plus the mean of the sites' changes to it, weighted by cases."""
    changes = sum(num * flat(delta_of(site, model)) for site, num in cases.items())
    return flat(model) + changes / sum(cases.values())


def test_a_run_trains_every_round_with_every_site_and_ends_with_the_mean_by_hand(tmp_path: Path) -> None:
    run = ScriptedRun(tmp_path, PLAN, three_sites())
    outcome = run.execute()
    model = weights.pack(first_model(), LAYOUT)
    for round_index in (1, 2, 3):  # each from the model before it: a change depends on all of its bits
        by_hand = averaged({"north": 10, "south": 20, "west": 37}, model)
        model = final_model(run, round_index)
        np.testing.assert_allclose(flat(model), by_hand, atol=1e-7)
    assert [record.round_index for record in run.store.rounds("run-1")] == [1, 2, 3]
    assert run.codes(2) == {"north": 0, "south": 0, "west": 0}
    assert run.digests[-1] == weights.digest(final_model(run, 3))
    assert outcome.initial_digest == weights.digest(weights.pack(first_model(), LAYOUT))
    assert outcome.test.total is not None
    assert outcome.test.total.num_cases == 60


def test_each_round_starts_from_the_model_that_the_round_before_ended_with(tmp_path: Path) -> None:
    run = ScriptedRun(tmp_path, PLAN, three_sites())
    run.execute()
    records = run.store.rounds("run-1")
    assert records[0].base_digest == weights.digest(weights.pack(first_model(), LAYOUT))
    assert [one.base_digest for one in records[1:]] == [one.weights_digest for one in records[:-1]]
    trained = [one.base_digest for one in run.sites[0].asked if one.action == "train"]
    assert trained == [one.base_digest for one in records]


def test_events_tell_the_run_in_order(tmp_path: Path) -> None:
    run = ScriptedRun(tmp_path, signed(a_plan(rounds=1)), three_sites())
    run.execute()
    kinds = [event.kind for event in run.store.events("run-1")]
    assert kinds[:3] == ["status", "sites", "round_started"]
    assert sorted(kinds[3:6]) == ["site_update"] * 3
    assert kinds[6:] == ["aggregated", "evaluated", "round_committed", "evaluated"]
    assert run.events("aggregated") == [{"round": 1, "num_sites": 3, "num_cases": 67}]


# --- one bad site -----------------------------------------------------------------------------------------


def forged(site: ScriptedSite, instruction: Instruction, down: Down) -> Up:
    up = site.honest(instruction, down)
    return Up(up.envelope, new_signer()[0](up.envelope), up.payload)


def replayed(site: ScriptedSite, instruction: Instruction, down: Down) -> Up:
    """In every round after the first, the answer of the round before."""
    if site.last is not None and b'"action":"train"' in site.last.envelope:
        return site.last
    kept = [one for one in site.asked if one.action == "train"]
    return site.honest(kept[0], down)


def raising(site: ScriptedSite, instruction: Instruction, down: Down) -> Up:
    raise RuntimeError("DOE^JOHN")


BAD: dict[str, tuple[Script, int]] = {
    "garbage": (lambda site, instruction, _: site.update(instruction, b"DOE^JOHN"), 61),
    "empty": (lambda site, instruction, down: RecordDict(), 61),
    "nan": (lambda site, instruction, _: site.update(instruction, b"\xff" * 32), 63),
    "too large": (
        lambda site, instruction, _: site.update(instruction, np.full(8, 5, "<f4").tobytes()),
        64,
    ),
    "wrong signature": (forged, 60),
    "fails": (raising, 72),
    "refuses": (refuse(RefusalCode.OUT_OF_MEMORY), 42),
}


@pytest.mark.parametrize("case", BAD)
def test_one_bad_site_changes_neither_the_end_of_the_run_nor_a_bit_of_its_model(
    tmp_path: Path, case: str
) -> None:
    script, code = BAD[case]
    with_it = three_sites()
    with_it[2].scripts = {"train": script}
    run = ScriptedRun(tmp_path / "with", PLAN, with_it)
    run.execute()
    without_it = ScriptedRun(tmp_path / "without", PLAN, three_sites()[:2])
    without_it.execute()
    assert run.digests == without_it.digests
    assert [run.codes(index)["west"] for index in (1, 2, 3)] == [code] * 3
    assert "DOE" not in run.store.path.read_bytes().decode(errors="replace")


@pytest.mark.parametrize("case", BAD)
def test_a_site_that_is_bad_in_everything_it_is_asked_ends_no_run(tmp_path: Path, case: str) -> None:
    script, _ = BAD[case]
    sites = three_sites()
    sites[1].scripts = {"prepare": script, "train": script, "evaluate": script, "baseline": script}
    plan = signed(a_plan(rounds=2, participation={"gather_s": 0.2}, evaluation={"compare_local": True}))
    run = ScriptedRun(tmp_path, plan, sites)
    outcome = run.execute()
    assert outcome.test.sites["south"] is None
    assert outcome.test.total is not None
    assert outcome.test.total.num_cases == 40
    assert outcome.local["south"] is None
    assert outcome.local["north"] is not None


def test_an_answer_of_an_earlier_round_does_not_count_again(tmp_path: Path) -> None:
    sites = three_sites()
    sites[2].scripts = {"train": replayed}
    run = ScriptedRun(tmp_path, PLAN, sites)
    run.execute()
    assert [run.codes(index)["west"] for index in (1, 2, 3)] == [0, 62, 62]


def test_a_site_that_hangs_is_late_and_the_round_goes_on_without_it(tmp_path: Path) -> None:
    go_on = threading.Event()

    def hang(site: ScriptedSite, instruction: Instruction, down: Down) -> Up:
        assert go_on.wait(PATIENCE_S)
        return site.honest(instruction, down)

    sites = three_sites()
    sites[0].scripts = {"train": hang}
    plan = signed(a_plan(rounds=1, participation={"deadline_s": 0.5}))
    run = ScriptedRun(tmp_path, plan, sites)
    run.execute(unblock=go_on.set)
    assert run.codes(1) == {"north": int(RefusalCode.SITE_LATE), "south": 0, "west": 0}
    (record,) = run.store.rounds("run-1")
    assert [site.status for site in record.sites] == ["missing", "contributed", "contributed"]


def test_a_site_that_is_offline_is_recorded_as_such(tmp_path: Path) -> None:
    plan = signed(a_plan(rounds=1, participation={"gather_s": 0.2}))
    run = ScriptedRun(tmp_path, plan, three_sites(), roster=("east",))
    run.execute()
    assert run.codes(1)["east"] == int(RefusalCode.SITE_OFFLINE)
    (record,) = run.store.rounds("run-1")
    assert [site.bytes_down for site in record.sites] == [0, 32, 32, 32]


# --- quorum -----------------------------------------------------------------------------------------------


def test_a_round_below_the_quorum_ends_the_run_and_names_who_is_missing_and_why(tmp_path: Path) -> None:
    sites = three_sites()
    sites[0].scripts = {"train": refuse(RefusalCode.OUT_OF_MEMORY)}
    sites[2].scripts = {"train": forged}
    run = ScriptedRun(tmp_path, PLAN, sites)
    with pytest.raises(RunFailedError) as caught:
        run.execute()
    assert caught.value.message == (
        "round 1: 1 of at least 2 sites (north: the site ran out of memory; "
        "west: the update does not carry the site's signature)"
    )
    assert "run resume" in caught.value.remedy
    assert run.digests == []


def test_the_report_of_a_run_below_the_quorum_names_who_is_missing_and_why(tmp_path: Path) -> None:
    sites = three_sites()
    sites[0].scripts = {"train": refuse(RefusalCode.OUT_OF_MEMORY)}
    sites[2].scripts = {"train": forged}
    run = ScriptedRun(tmp_path, PLAN, sites)
    with pytest.raises(RunFailedError) as caught:
        run.execute()
    run.store.finish("run-1", "failed", caught.value.message)
    report = build_report(run.store, "run-1")
    assert report.verdict == "failed"
    assert {(site.site, site.code) for site in report.absent} == {("north", 42), ("west", 60)}
    (round_1,) = report.rounds
    assert not round_1.committed
    assert {site.site: site.status for site in round_1.sites} == {
        "north": "refused",
        "south": "contributed",
        "west": "refused",
    }


def test_a_run_whose_sites_do_not_gather_fails_and_names_their_reasons(tmp_path: Path) -> None:
    sites = three_sites(scripts={"prepare": refuse(RefusalCode.PLAN_NOT_APPROVED)})
    plan = signed(a_plan(participation={"gather_s": 0.2}))
    run = ScriptedRun(tmp_path, plan, sites[:1], roster=("east",))
    with pytest.raises(RunFailedError) as caught:
        run.execute()
    assert caught.value.message == (
        "the run could not start: 0 of at least 2 sites (east: the site was not connected when the round "
        "began; north: waiting for the site's operator to approve the plan)"
    )
    report = build_report(run.store, "run-1")
    assert {(site.site, site.code) for site in report.absent} == {("east", 70), ("north", 14)}


def test_a_run_waits_for_approval_and_tells_once_what_it_waits_for(tmp_path: Path) -> None:
    refusals = iter([RefusalCode.PLAN_NOT_APPROVED, RefusalCode.PLAN_NOT_APPROVED])

    def approve_at_the_third_time(site: ScriptedSite, instruction: Instruction, down: Down) -> Up:
        code = next(refusals, None)
        if code is None:
            return site.honest(instruction, down)
        return an_answer(instruction, site.sign, site=site.name, code=int(code))

    sites = three_sites()
    sites[1].scripts = {"prepare": approve_at_the_third_time}
    run = ScriptedRun(tmp_path, signed(a_plan(rounds=1)), sites)
    run.execute()
    assert run.events("sites") == [
        {"ready": ["north", "west"], "waiting": {"south": 14}},
        {"ready": ["north", "south", "west"], "waiting": {}},
    ]
    asked = [sum(one.action == "prepare" for one in site.asked) for site in sites]
    assert asked == [1, 3, 1]


def test_a_run_starts_with_a_quorum_when_the_others_do_not_come(tmp_path: Path) -> None:
    plan = signed(a_plan(rounds=1, participation={"gather_s": 0.2}))
    run = ScriptedRun(tmp_path, plan, three_sites()[:2], roster=("west",))
    run.execute()
    assert run.codes(1) == {"north": 0, "south": 0, "west": 70}


# --- order, strategy, selection ---------------------------------------------------------------------------


def in_this_order(names: tuple[str, ...]) -> Iterator[ScriptedSite]:
    """Sites each of which answers a round's `train` only after the one before it has."""
    spoke = {(name, index): threading.Event() for name in names for index in range(1, 4)}

    def script_of(place: int) -> Script:
        def speak(site: ScriptedSite, instruction: Instruction, down: Down) -> Up:
            if place:
                assert spoke[names[place - 1], instruction.round_index].wait(PATIENCE_S)
            spoke[site.name, instruction.round_index].set()
            return site.honest(instruction, down)

        return speak

    cases = {"north": 10, "south": 20, "west": 37}
    for place, name in enumerate(names):
        yield ScriptedSite(name, cases[name], scripts={"train": script_of(place)})


def test_the_order_in_which_sites_answer_does_not_change_a_bit(tmp_path: Path) -> None:
    found = set()
    for number, names in enumerate((("north", "south", "west"), ("west", "south", "north"))):
        run = ScriptedRun(tmp_path / str(number), PLAN, list(in_this_order(names)))
        run.execute()
        found.add(tuple(run.digests))
    assert len(found) == 1


def test_the_strategys_state_is_carried_from_round_to_round(tmp_path: Path) -> None:
    run = ScriptedRun(tmp_path, ADAM, three_sites())
    run.execute()
    assert [int(run.checkpoints.read(index).strategy_state["step"][0]) for index in (1, 2, 3, 4)] == [
        1,
        2,
        3,
        4,
    ]


def selected(tmp_path: Path, skill: dict[int, float], **evaluation: Any) -> int:
    sites = [ScriptedSite("north", skill=skill), ScriptedSite("south", skill=skill)]
    plan = signed(a_plan(rounds=4, evaluation=evaluation))
    return ScriptedRun(tmp_path, plan, sites).execute().selected_round


@pytest.mark.parametrize(
    ("skill", "evaluation", "expected"),
    [
        ({1: 0.1, 2: 0.9, 3: 0.3, 4: 0.2}, {}, 2),
        ({1: 0.9, 2: 0.9, 3: 0.9, 4: 0.9}, {}, 1),  # a tie: the earlier one
        ({1: 0.9, 2: 0.1, 3: 0.1, 4: 0.1}, {"select": "last"}, 4),
        ({1: 0.9, 2: 0.2, 3: 0.9, 4: 0.1}, {"every": 2}, 2),  # rounds 1 and 3 were not measured
        ({1: 0.1, 2: 0.1, 3: 0.1, 4: 0.9}, {"every": 3}, 4),  # the last one always is
    ],
)
def test_the_result_is_the_round_with_the_best_validation_auroc(
    tmp_path: Path, skill: dict[int, float], evaluation: dict[str, Any], expected: int
) -> None:
    assert selected(tmp_path, skill, **evaluation) == expected


def test_the_selected_model_and_no_other_is_measured_on_the_test_cases(tmp_path: Path) -> None:
    skill = {1: 0.1, 2: 0.9, 3: 0.3}
    run = ScriptedRun(tmp_path, PLAN, [ScriptedSite(name, skill=skill) for name in ("north", "south")])
    run.execute()
    (asked,) = [one for one in run.sites[0].asked if one.split == "test"]
    assert asked.action == "evaluate"
    assert asked.round_index == 2
    assert asked.base_digest == run.digests[1]


def test_the_comparison_starts_at_every_site_from_the_untrained_model(tmp_path: Path) -> None:
    plan = signed(a_plan(rounds=1, evaluation={"compare_local": True}))
    run = ScriptedRun(tmp_path, plan, three_sites())
    outcome = run.execute()
    (asked,) = [one for one in run.sites[0].asked if one.action == "baseline"]
    assert asked.base_digest == outcome.initial_digest
    assert sorted(outcome.local) == ["north", "south", "west"]


def test_counts_that_a_site_holds_back_are_missing_from_the_sum_and_not_zero(tmp_path: Path) -> None:
    def held_back(site: ScriptedSite, instruction: Instruction, down: Down) -> Up:
        zeros = bytes(len(a_state(PLAN.plan)))
        return an_answer(instruction, site.sign, site=site.name, payload=zeros)

    sites = three_sites()
    sites[0].scripts = {"evaluate": held_back}
    run = ScriptedRun(tmp_path, PLAN, sites)
    outcome = run.execute()
    assert outcome.test.sites["north"] is None
    assert outcome.test.total is not None
    assert outcome.test.total.num_cases == 40


def test_a_run_in_which_nobody_can_be_measured_completes_without_figures(tmp_path: Path) -> None:
    run = ScriptedRun(tmp_path, PLAN, three_sites(scripts={"evaluate": refuse(RefusalCode.CANCELLED)}))
    outcome = run.execute()
    assert outcome.selected_round == 3
    assert outcome.test.total is None
    run.store.set_result("run-1", result_document(outcome))
    run.store.finish("run-1", "completed", "", outcome.selected_round)
    report = build_report(run.store, "run-1")
    assert report.test is None
    assert every_site_in_every_round(report)


# --- stop and resume --------------------------------------------------------------------------------------


def stopping_in(round_index: int, stop: threading.Event) -> Script:
    """Stop the run in the middle of a round, then answer as if nothing had happened."""

    def script(site: ScriptedSite, instruction: Instruction, down: Down) -> Up:
        if instruction.round_index == round_index:
            stop.set()
        return site.honest(instruction, down)

    return script


def stopped_after_two_rounds(folder: Path, plan: SignedPlan) -> ScriptedRun:
    run = ScriptedRun(folder, plan, three_sites())
    run.sites[1].scripts = {"train": stopping_in(3, run.stop)}
    with pytest.raises(RunStoppedError):
        run.execute()
    assert len(run.digests) == 2
    return ScriptedRun(folder, plan, three_sites())


@pytest.mark.parametrize("plan", [PLAN, ADAM], ids=["fedavg", "fedadam"])
def test_a_resumed_run_gives_the_same_bits_as_one_that_was_not_disturbed(
    tmp_path: Path, plan: SignedPlan
) -> None:
    resumed = stopped_after_two_rounds(tmp_path / "resumed", plan)
    outcome = resumed.execute(resume=True)
    undisturbed = ScriptedRun(tmp_path / "undisturbed", plan, three_sites())
    assert outcome.selected_round == undisturbed.execute().selected_round
    assert resumed.digests == undisturbed.digests
    assert next(one.round_index for one in resumed.sites[0].asked if one.action == "train") == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\xff"),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
    ],
    ids=["changed", "emptied", "deleted"],
)
def test_a_run_whose_last_checkpoint_is_damaged_goes_on_from_the_one_before(
    tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    run = stopped_after_two_rounds(tmp_path / "damaged", ADAM)
    damage(tmp_path / "damaged" / "checkpoints" / run.store.rounds("run-1")[1].checkpoint_file)
    run.execute(resume=True)
    undisturbed = ScriptedRun(tmp_path / "undisturbed", ADAM, three_sites())
    undisturbed.execute()
    assert run.digests == undisturbed.digests
    assert [one.round_index for one in run.sites[0].asked if one.action == "train"] == [2, 3, 4]
    report = build_report(run.store, "run-1")
    assert [one.round_index for one in report.rounds] == [1, 2, 3, 4]


def test_a_lost_checkpoint_of_the_best_round_does_not_end_a_resumed_run(tmp_path: Path) -> None:
    skill = {1: 0.9, 2: 0.3, 3: 0.2}
    run = ScriptedRun(tmp_path, PLAN, three_sites(skill=skill))
    run.sites[1].scripts = {"train": stopping_in(3, run.stop)}
    with pytest.raises(RunStoppedError):
        run.execute()
    (tmp_path / "checkpoints" / "round-00001.json").unlink()
    resumed = ScriptedRun(tmp_path, PLAN, three_sites(skill=skill))
    assert resumed.execute(resume=True).selected_round == 2


def test_a_run_stopped_before_its_first_round_begins_anew_when_resumed(tmp_path: Path) -> None:
    plan = signed(a_plan(rounds=2, evaluation={"initial": True}))
    run = ScriptedRun(tmp_path, plan, three_sites())
    run.sites[1].scripts = {"train": stopping_in(1, run.stop)}
    with pytest.raises(RunStoppedError):
        run.execute()
    resumed = ScriptedRun(tmp_path, plan, three_sites())
    resumed.execute(resume=True)
    assert len(resumed.digests) == 2
    report = build_report(resumed.store, "run-1")
    assert [one.round_index for one in report.rounds] == [0, 1, 2]


def test_a_run_without_a_quorum_can_be_resumed_when_the_sites_are_back(tmp_path: Path) -> None:
    sites = three_sites()
    for site in sites[:2]:
        site.scripts = {
            "train": lambda site, instruction, down: (
                site.honest(instruction, down) if instruction.round_index == 1 else RecordDict()
            )
        }
    run = ScriptedRun(tmp_path / "resumed", PLAN, sites)
    with pytest.raises(RunFailedError, match="round 2"):
        run.execute()
    resumed = ScriptedRun(tmp_path / "resumed", PLAN, three_sites())
    resumed.execute(resume=True)
    undisturbed = ScriptedRun(tmp_path / "undisturbed", PLAN, three_sites())
    undisturbed.execute()
    assert resumed.digests == undisturbed.digests


def test_a_completed_run_whose_end_was_lost_is_measured_again_without_training(tmp_path: Path) -> None:
    ScriptedRun(tmp_path, PLAN, three_sites()).execute()
    again = ScriptedRun(tmp_path, PLAN, three_sites())
    outcome = again.execute(resume=True)
    assert [one for one in again.sites[0].asked if one.action == "train"] == []
    assert outcome.test.total is not None


@pytest.mark.parametrize("action", ["prepare", "train", "evaluate"])
def test_stopping_ends_a_run_within_seconds_whatever_its_sites_are_doing(tmp_path: Path, action: Any) -> None:
    go_on = threading.Event()

    def hang(site: ScriptedSite, instruction: Instruction, down: Down) -> Up:
        run.stop.set()
        assert go_on.wait(PATIENCE_S)
        return site.honest(instruction, down)

    slow = {"deadline_s": 3600, "gather_s": 3600}
    sites = three_sites()
    sites[0].scripts = {action: hang}
    run = ScriptedRun(tmp_path, signed(a_plan(participation=slow)), sites)
    started = time.monotonic()
    with pytest.raises(RunStoppedError):
        run.execute(unblock=go_on.set)
    assert time.monotonic() - started < 10


def test_stopping_ends_a_run_that_waits_for_sites_to_come_back(tmp_path: Path) -> None:
    run = ScriptedRun(tmp_path, signed(a_plan(participation={"gather_s": 3600})), [], roster=("a", "b"))
    threading.Timer(0.2, run.stop.set).start()
    with pytest.raises(RunStoppedError):
        run.execute()


def test_a_run_whose_quorum_can_never_be_reached_does_not_wait_for_it(tmp_path: Path) -> None:
    sites = three_sites()
    for site in sites[:2]:
        site.scripts = {"prepare": refuse(RefusalCode.COHORT_UNUSABLE)}
    patient = {"quorum": 2, "gather_s": 3600}
    started = time.monotonic()
    with pytest.raises(RunFailedError) as caught:
        ScriptedRun(tmp_path / "unusable", signed(a_plan(participation=patient)), sites).execute()
    assert "north: the site's images or labels cannot be used for this plan" in caught.value.message
    large = signed(a_plan(participation=patient | {"quorum": 9}))
    with pytest.raises(RunFailedError, match="asks for 9 sites, and 3 are there") as few:
        ScriptedRun(tmp_path / "few", large, three_sites()).execute()
    assert "participation.quorum" in few.value.remedy
    assert time.monotonic() - started < 30
