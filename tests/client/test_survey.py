"""A site's survey: equal to counting by hand, safe to release, and the same answer when asked twice."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from pydicom.uid import JPEG2000Lossless

from fedward_client.cohort import open_cohort
from fedward_client.dicom.frames import decode_frames
from fedward_client.dicom.gate import Box
from fedward_client.dicom.refusal import Reason
from fedward_client.index_records import QuarantinedContent
from fedward_client.index_store import CaseIndex
from fedward_client.outbound import OutboundDoor
from fedward_client.plan_summary import readable_summary
from fedward_client.policy import SitePolicy
from fedward_client.questions import is_implied
from fedward_client.readiness import (
    SurveyedCase,
    as_kept,
    pixel_counts,
    released,
    survey,
    values_of,
    weighted,
)
from fedward_client.readiness_refused import refused_studies
from fedward_client.readiness_told import counted
from fedward_client.session import SiteSession, SiteSettings
from fedward_client.site_data import SiteData
from fedward_client.worker import Worker
from fedward_common.envelope import parse_envelope
from fedward_common.errors import CohortError, OutboundError, PayloadError, RefusalCode
from fedward_common.evaluation.state import merge
from fedward_common.identity import new_signer
from fedward_common.plan import ReadinessPlan, SignedPlan, canonical_bytes, parse_signed_plan
from fedward_common.protocol import Down
from fedward_common.readiness_plan import IntensityPart
from fedward_common.readiness_state import CASE_WEIGHT, State, check_survey, empty_survey, survey_tables
from fedward_common.state_payload import pack_state, unpack_state
from tests.builders import a_dataset, a_dicom, a_site, a_uid, encode, write_labels
from tests.client.series_builder import Truth, a_truth, slices_of
from tests.messages import an_instruction, signed
from tests.readiness_builders import a_readiness_plan, a_survey, signed_survey, some_cases, surveyed

PLAN = a_readiness_plan()
SIGN, KEY = new_signer()


def all_train(patient: int) -> str:
    return "train"


def by_hand(cases: Sequence[SurveyedCase]) -> dict[str, Counter[Any]]:
    """Cases counted without any of the tested code."""
    names = PLAN.task.labels
    ages = ("below 18", "18 to 40", "40 to 60", "60 to 80", "80 and more")
    return {
        "label": Counter(names[each.case.label] for each in cases),
        "split": Counter(each.case.split for each in cases),
        "age": Counter(
            ages[sum(age >= edge for edge in (18, 40, 60, 80))]
            for age in (each.case.age_years for each in cases)
            if age is not None
        ),
        "sex": Counter(
            each.case.sex if each.case.sex in ("F", "M") else "other or unknown" for each in cases
        ),
        "scanner": Counter(
            next(
                (name for name in ("GE", "SIEMENS") if each.case.scanner.startswith(name)), "other or unknown"
            )
            for each in cases
        ),
    }


def told_of(cases: Sequence[SurveyedCase], floor: int) -> list[SurveyedCase]:
    """Those that a release is about."""
    kept = {case.case_id for case in counted([each.case for each in cases], floor)}
    return [each for each in cases if each.case.case_id in kept]


def told(state: State, table: str) -> dict[str, int]:
    cells = survey_tables(PLAN)[table]
    return {cell: int(count) for cell, count in zip(cells, state[table], strict=True) if count}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(0, 2**16))
def test_without_a_floor_added_states_are_the_count_of_pooled_cases(sizes: list[int], seed: int) -> None:
    sites = [some_cases(size, PLAN, seed=seed + number) for number, size in enumerate(sizes)]
    # Patients of two sites are never compared, so pooling gives them names of their own.
    pooled = [
        SurveyedCase(_renamed(each, number), each.intensity, each.pixels)
        for number, cases in enumerate(sites)
        for each in cases
    ]
    states = [released(PLAN, cases, num_refused=number, floor=1) for number, cases in enumerate(sites)]
    together = released(PLAN, pooled, num_refused=sum(range(len(sites))), floor=1)
    total = merge([empty_survey(PLAN), *states])
    assert {name: array.tolist() for name, array in total.items()} == {
        name: array.tolist() for name, array in together.items()
    }
    for table, counts in by_hand(pooled).items():
        assert told(total, table) == dict(counts)


def _renamed(each: SurveyedCase, site: int) -> Any:
    return replace(each.case, patient=f"{site}-{each.case.patient}")


@settings(max_examples=150, deadline=None)
@given(
    num_patients=st.integers(1, 60),
    cases_a_patient=st.integers(1, 3),
    floor=st.integers(3, 9),
    seed=st.integers(0, 2**16),
)
def test_whatever_a_site_has_its_release_passes_the_door_and_shows_no_small_cell(
    num_patients: int, cases_a_patient: int, floor: int, seed: int
) -> None:
    cases = some_cases(num_patients, PLAN, seed=seed, cases_a_patient=cases_a_patient)
    plan = a_readiness_plan(privacy={"min_cases": floor})
    state = released(plan, cases, num_refused=seed % 12, floor=floor)
    check_survey(state, plan)
    if not state["num_cases"][0]:
        return
    patients_of: dict[str, set[str]] = defaultdict(set)
    cases = told_of(cases, floor)
    for each in cases:
        patients_of[PLAN.task.labels[each.case.label]].add(each.case.patient)
    for label, count in told(state, "label").items():
        assert count == by_hand(cases)["label"][label]
        assert len(patients_of[label]) >= floor


def test_cases_of_too_few_patients_are_held_back_altogether() -> None:
    state = a_survey(PLAN, some_cases(4, PLAN, cases_a_patient=30), num_refused=50)
    assert not any(array.any() for array in state.values())


def test_a_rare_label_takes_its_table_with_it_but_nothing_else() -> None:
    cases = some_cases(60, PLAN, label=0) + [surveyed(9, patient, PLAN, label=1) for patient in (70, 71)]
    state = a_survey(PLAN, cases)
    assert state["label"].tolist() == [0, 0]
    assert state["label_patients"].tolist() == [0, 0, 0]
    assert int(state["num_cases"][0]) == 122
    assert state["split"].sum() == 122


def test_patients_on_two_sides_and_equal_pixels_are_counted() -> None:
    cases = [
        surveyed(number, patient, PLAN, split=("train", "test")[number] if patient < 7 else "train")
        for patient in range(30)
        for number in range(2)
    ]
    same = [SurveyedCase(each.case, each.intensity, b"same" + each.pixels[:1]) for each in cases[-16:]]
    state = a_survey(PLAN, [*cases[:-16], *same])
    assert state["torn"].tolist() == [7, 23]
    repeated = sum(count for count in Counter(each.pixels for each in same).values() if count > 1)
    assert state["repeated"].tolist() == [repeated, 60 - repeated]


def test_intensities_fall_into_declared_cells_whatever_the_values() -> None:
    part = IntensityPart(units="modality", low=-1000, high=1000, bins=4)
    values = np.array([[-1024.0, -1000, -500.1, 0], [999.9, 1000, 3071, np.nan]])
    assert pixel_counts(values, part).tolist() == [2, 2, 0, 1, 2, 1]
    counts = np.histogram(np.linspace(-1000, 1000, 999), bins=4)[0]
    assert pixel_counts(np.linspace(-1000, 1000, 999), part)[1:-1].tolist() == counts.tolist()
    assert int(weighted(np.array([1, 1, 1, 0])).sum()) == CASE_WEIGHT


def test_a_folder_is_surveyed_as_it_lies_there(tmp_path: Path) -> None:
    facts: dict[str, Any] = {
        "PatientSex": "F",
        "PatientAge": "065Y",
        "Manufacturer": "GE MEDICAL",
        "PixelSpacing": [0.14, 0.14],
    }
    site = a_site(tmp_path, num_patients=12, split=all_train, **facts)
    (site.dicom / "broken.dcm").write_bytes((site.dicom / "0-0.dcm").read_bytes()[:400])
    state = survey(PLAN, site, min_cases=1)
    check_survey(state, PLAN)
    assert state["num_cases"].tolist() == [24]
    assert state["num_patients"].tolist() == [12]
    assert state["label"].tolist() == [12, 12]
    assert state["label_patients"].tolist() == [6, 6, 0]
    assert told(state, "sex") == {"F": 24}
    assert told(state, "age") == {"60 to 80": 24}
    assert told(state, "scanner") == {"GE": 24}
    assert told(state, "spacing") == {"0.12 to 0.16": 24}
    assert state["refused"].tolist() == [
        0,
        4,
        10,
    ]  # one image: below the floor, as 4 studies at most would be
    # 0 to 255 are spread evenly over four cells of 16 x 16 pixels, seen through no window.
    shares = state["intensity"] / (24 * CASE_WEIGHT)
    np.testing.assert_allclose(shares, [0, 0.25, 0.25, 0.25, 0.25, 0], atol=0.02)


def test_a_patient_on_two_sides_is_counted_where_training_would_refuse(tmp_path: Path) -> None:
    site = a_site(tmp_path, num_patients=20, images_per_patient=2)
    rows = [
        [a_uid(f"{patient}-{image}"), patient % 2, "test" if image and patient < 6 else "train"]
        for patient in range(20)
        for image in range(2)
    ]
    write_labels(site.labels, rows, ["SOPInstanceUID", "label", "split"])
    state = survey(PLAN, site, min_cases=1)
    assert state["torn"].tolist() == [6, 14]
    with pytest.raises(CohortError, match="two sides"):
        open_cohort(site, PLAN.data, PLAN.task.labels)


def test_an_image_that_cannot_be_decoded_joins_the_quarantine(tmp_path: Path) -> None:
    site = a_site(tmp_path, num_patients=12, images_per_patient=1, split=all_train)
    dataset = a_dataset(np.tile(np.arange(64, dtype=np.uint8), (64, 1)), PatientID="P0")
    dataset.SOPInstanceUID = a_uid("0-0")
    dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
    data = bytearray(encode(dataset, JPEG2000Lossless))
    start = data.index(b"\xff\x4f\xff\x51") + 60
    data[start:-8] = b"\x55" * (len(data) - 8 - start)
    (site.dicom / "0-0.dcm").write_bytes(data)
    seen: list[tuple[int, int]] = []

    state = survey(PLAN, site, min_cases=1, progress=lambda done, total: seen.append((done, total)))

    assert state["num_cases"].tolist() == [11]
    assert seen[-1] == (12, 12)
    with CaseIndex(site.home) as index:
        assert len(index.quarantined()) == 1


def test_volumes_are_counted_once_each_in_units_of_their_modality(tmp_path: Path) -> None:
    site, truths = series_of(tmp_path, num_patients=9)
    plan = a_readiness_plan(
        data={"modalities": ("CT",)},
        survey={
            "spacing_edges_mm": [0.5, 1.0],
            "slice_edges_mm": [2.0, 3.0],
            "intensity": {"units": "modality", "low": -1000.0, "high": 1000.0, "bins": 8},
        },
    )
    state = survey(plan, site, min_cases=1)
    check_survey(state, plan)
    assert state["num_cases"].tolist() == [9]
    assert state["spacing"].tolist() == [0, 9, 0, 0]
    assert state["slice"].tolist() == [0, 9, 0, 0]
    edges = [-np.inf, *np.linspace(-1000, 1000, 9), np.inf]
    expected = sum(np.histogram(truth.values, edges)[0] / truth.values.size for truth in truths)
    np.testing.assert_allclose(state["intensity"] / CASE_WEIGHT, expected, atol=1e-4)


def series_of(folder: Path, num_patients: int) -> tuple[SiteData, list[Truth]]:
    """One CT series of six slices for each patient, with labels by series."""
    site = SiteData(folder / "home", folder / "dicom", folder / "labels.csv")
    site.home.mkdir(parents=True)
    site.dicom.mkdir()
    (site.home / "cohort.toml").write_text('unit = "volume"\n')
    truths = [a_truth(seed=patient, num_slices=6, size=(12, 10)) for patient in range(num_patients)]
    for patient, truth in enumerate(truths):
        own: dict[str, Any] = {
            "SeriesInstanceUID": a_uid(f"series {patient}"),
            "StudyInstanceUID": a_uid(f"study {patient}"),
            "PatientID": f"P{patient}",
        }
        for place, each in enumerate(slices_of(truth, name=f"{patient}", **own)):
            (site.dicom / f"{patient}-{place}").write_bytes(encode(each))
    rows = [[a_uid(f"series {patient}"), 0, "train"] for patient in range(num_patients)]
    write_labels(site.labels, rows, ("SeriesInstanceUID", "label", "split"))
    return site, truths


def test_what_the_gate_blackens_and_colour_are_counted_as_they_are_used() -> None:
    grey = decode_frames(a_dicom(np.full((16, 16), 200, np.uint8)))
    (whole,) = some_cases(1, PLAN, cases_a_patient=1)
    half = replace(whole.case, regions=(Box(0, 0, 8, 16),))
    part = IntensityPart(units="modality", low=0, high=255, bins=2)
    assert pixel_counts(values_of(grey, part), part).tolist() == [0, 0, 256, 0]
    assert as_kept(grey, whole.case) is grey
    ramp = replace(grey, values=np.tile(np.arange(16.0, dtype=np.float32), (1, 16, 1)))
    kept = values_of(as_kept(ramp, half), part)
    assert (kept[0, 8:] == kept[0, 0, 0]).all()
    colour = replace(grey, values=np.full((1, 4, 4, 3), (255, 0, 0), np.uint8))
    display = IntensityPart(bins=3)
    shown = values_of(colour, display)
    assert shown.shape == (1, 4, 4)
    np.testing.assert_allclose(shown, 1 / 3)


def test_no_usable_case_is_an_error(tmp_path: Path) -> None:
    site = a_site(tmp_path, num_patients=2, images_per_patient=1, Modality="MG")
    with pytest.raises(CohortError):
        survey(PLAN, site, min_cases=1)


class OpenGate:
    """Lets every plan and question through."""

    def decide(self, document: bytes, run_id: str) -> SignedPlan:
        return parse_signed_plan(document)

    def admit(self, signed: SignedPlan, instruction: Any) -> None:
        assert is_implied(signed.content, instruction)


class InProcess(Worker):
    """The worker without a process of its own."""

    pid = 1
    calls = 0

    def start(self) -> bool:
        return False

    def call(
        self, request: dict[str, Any], payload: bytes | memoryview = b""
    ) -> tuple[dict[str, Any], bytes]:
        self.calls += 1
        header, reply = self.answer(request, bytearray(payload))
        assert header["ok"], header
        return header, reply

    def kill(self) -> None:
        raise AssertionError

    stop = kill


def a_session(site: SiteData, worker: InProcess, min_cases: int = 1) -> SiteSession:
    door = OutboundDoor("north", SIGN, lambda *_, **__: None, min_cases)
    return SiteSession(SiteSettings("north", site, 1, "cpu"), OpenGate(), door, worker, lambda *_, **__: None)


def test_a_site_answers_once_and_repeats_its_answer_whatever_has_come_since(tmp_path: Path) -> None:
    site, worker, plan = a_site(tmp_path, num_patients=12, split=all_train), InProcess(), signed_survey()
    document = plan.to_bytes()
    ready = a_session(site, worker).handle(Down(_ask(plan, "prepare"), document, None))
    assert ready is not None
    assert ready.payload is None
    assert parse_envelope(ready.envelope).numbers.model_dump(exclude_none=True) == {}
    first = a_session(site, worker).handle(Down(_ask(plan, "survey"), document, None))
    newest = a_dicom(PatientID="newest", SOPInstanceUID=a_uid("newest"))
    (site.dicom / "newest.dcm").write_bytes(newest)
    with site.labels.open("a") as file:
        file.write(f"{a_uid('newest')},1,train\n")
    again = a_session(site, worker).handle(Down(_ask(plan, "survey"), document, None))
    assert first is not None
    assert again is not None
    assert first == again
    assert worker.calls == 1
    state = unpack_state(first.payload or b"", PLAN)
    assert state["num_cases"].tolist() == [24]
    assert parse_envelope(first.envelope).numbers.model_dump(exclude_none=True) == {"num_cases": 24}


def test_a_higher_floor_of_the_site_holds_everything_back(tmp_path: Path) -> None:
    site, plan = a_site(tmp_path, num_patients=12), signed_survey()
    up = a_session(site, InProcess(), min_cases=13).handle(Down(_ask(plan, "survey"), plan.to_bytes(), None))
    assert up is not None
    assert parse_envelope(up.envelope).numbers.num_cases is None
    assert not any(up.payload or b"\1")


@pytest.mark.parametrize("action", ["train", "evaluate", "baseline"])
def test_a_survey_s_plan_permits_no_other_question(action: Any) -> None:
    assert not is_implied(PLAN, an_instruction(signed_survey(), action, base=b"model", round_index=0))
    assert not is_implied(PLAN, an_instruction(signed_survey(), "survey", round_index=1))
    assert not is_implied(signed().plan, an_instruction(signed(), "survey", round_index=0))


def _ask(plan: SignedPlan, action: Any) -> bytes:
    return canonical_bytes(an_instruction(plan, action, round_index=0))


def test_the_door_lets_no_small_cell_out() -> None:
    plan, lines = signed_survey(), list[str]()
    door = OutboundDoor("north", SIGN, lambda event, **_: lines.append(event))
    leaky = a_survey(PLAN)
    leaky["label"][:] = (1, 119)
    instruction = an_instruction(plan, "survey", round_index=0)
    with pytest.raises(OutboundError, match="below the floor"):
        door.survey(instruction, plan, pack_state(leaky, PLAN))
    with pytest.raises(OutboundError, match="bytes"):
        door.survey(instruction, plan, b"PATIENT^NAME")
    assert lines == []


def test_the_operator_reads_what_is_counted_and_what_is_kept_back() -> None:
    rows = dict(readable_summary(signed_survey()))
    assert rows["Learns"].startswith("nothing")
    assert "normal, pneumonia" in rows["Counted"]
    assert "GE, SIEMENS" in rows["Counted"]
    assert "fewer than 5 patients" in rows["Kept back"]
    assert "never compared" in rows["Not told by this"]
    assert "another min_cases is not answered" in rows["Several plans"]
    assert "for a survey or for training" in rows["Several plans"]
    assert "studies in quarantine" in rows["Numbers that leave"]


def test_the_policy_limits_surveys_and_never_approves_one() -> None:
    rule = {
        "coordinators": ["anna"],
        "models": ["cnn2d"],
        "tasks": ["classification"],
        "strategies": ["fedavg"],
        "max_rounds": 5,
    }
    plan = signed_survey()
    assert not SitePolicy.model_validate({"approve": [rule]}).approves(plan)
    # Two surveys with slightly different cells can be subtracted: somebody has to compare them.
    with pytest.raises(ValidationError, match="kinds"):
        SitePolicy.model_validate({"approve": [rule | {"kinds": ["readiness"]}]})
    refusing = SitePolicy.model_validate({"limits": {"kinds": ["training"]}})
    assert refusing.objections(plan) == ["kind readiness is not permitted"]
    strict = SitePolicy.model_validate({"limits": {"min_cases": 10}})
    assert strict.objections(plan) == ["numbers about 5 cases, 10 required"]


def test_a_worker_refuses_to_survey_for_a_training_plan(tmp_path: Path) -> None:
    request = {"op": "survey", "plan": signed().plan.model_dump(mode="json"), "min_cases": 1}
    site = {"home": str(tmp_path), "dicom": str(tmp_path), "labels": str(tmp_path)}
    header, _ = Worker().answer(request | site, bytearray())
    assert header["code"] == RefusalCode.PLAN_UNSUPPORTED
    assert isinstance(PLAN, ReadinessPlan)


@pytest.mark.parametrize("num_labels", [2, 3])
def test_cases_and_patients_of_labels_together_give_no_label_away(num_labels: int) -> None:
    """The worst case again: one case a patient, so that both tables say the same and the reader knows it."""
    labels, floor = ("a", "b", "c")[:num_labels], 3
    plan = a_readiness_plan(task={"labels": labels}, privacy={"min_cases": floor})
    alike: dict[str, Any] = {
        "split": "train",
        "sex": "F",
        "age_years": 50,
        "scanner": "GE",
        "spacing_mm": None,
    }
    stock = {
        label: [surveyed(label, 100 * label + n, plan, label=label, **alike) for n in range(11)]
        for label in range(num_labels)
    }
    same = weighted(np.array([0, 1, 1, 1, 1, 0]))
    origins: dict[tuple[int, ...], list[tuple[int, ...]]] = defaultdict(list)
    for counts in product(range(8), repeat=num_labels):
        chosen = [each for label in stock for each in stock[label][: counts[label]]]
        cases = [replace(each, intensity=same) for each in chosen]
        state = released(plan, cases, num_refused=0, floor=floor)
        told = tuple(np.concatenate([state[name] for name in sorted(state)]).tolist())
        origins[told].append(counts)
    for sources in origins.values():
        for label in range(num_labels):
            values = {source[label] for source in sources}
            assert len(values) > 1 or min(values) >= floor or values == {0}, sources


def test_cases_less_patients_does_not_tell_of_one_patient() -> None:
    """With 51 cases and 50 patients of one label alone, the one patient with both labels stood there."""
    once = [surveyed(0, patient, PLAN, label=patient % 2, split="train") for patient in range(100)]
    again = surveyed(1, 0, PLAN, label=1, split="test")
    state = a_survey(PLAN, [*once, again])
    assert (state["num_cases"].tolist(), state["num_patients"].tolist()) == ([100], [100])
    assert state["label"].tolist() == [50, 50]
    assert state["label_patients"].tolist() == [50, 50, 0]
    assert not state["torn"].any()  # and yet the patient on two sides is not overlooked
    many = [surveyed(1, patient, PLAN, label=patient % 2, split="train") for patient in range(12)]
    assert a_survey(PLAN, [*once, *many])["num_cases"].tolist() == [112]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), min_size=1, max_size=25),
    st.integers(2, 6),
)
def test_wherever_patients_have_several_cases_enough_of_them_have(
    labels: list[list[int]], floor: int
) -> None:
    plan = a_readiness_plan(task={"labels": ("a", "b", "c")})
    cases = [
        surveyed(number, patient, plan, label=label, split="train")
        for patient, found in enumerate(labels)
        for number, label in enumerate(found)
    ]
    if len(labels) < floor:
        assert told_of(cases, floor) == []
        return
    found: dict[str, list[int]] = defaultdict(list)
    for each in told_of(cases, floor):
        found[each.case.patient].append(each.case.label)
    assert {patient: each[0] for patient, each in found.items()} == {
        f"p{patient}": each[0] for patient, each in enumerate(labels)
    }
    for label in range(3):
        with_several = [each for each in found.values() if len(each) > 1 and label in each]
        with_others = [each for each in with_several if len(set(each)) > 1]
        for those in (with_several, with_others):
            assert len(those) == 0 or len(those) >= floor


def test_few_patients_with_two_labels_are_not_told_by_those_who_have_two_cases() -> None:
    """With two cases of every patient, 48 patients of one label and 97 cases of it were one with both."""
    cases = [
        surveyed(number, patient, PLAN, label=number if patient == 0 else patient % 2)
        for patient in range(100)
        for number in range(2)
    ]
    state = a_survey(PLAN, cases)
    assert state["label"].tolist() == [99, 100]
    assert state["label_patients"].tolist() == [50, 50, 0]


@pytest.mark.parametrize(
    ("num_studies", "told_refused"), [(0, [0, 0, 60]), (1, [0, 4, 60]), (4, [0, 4, 60]), (5, [5, 5, 60])]
)
def test_studies_in_quarantine_are_told_when_they_are_enough_and_else_by_a_bound(
    tmp_path: Path, num_studies: int, told_refused: list[int]
) -> None:
    site = a_site(tmp_path, num_patients=64, images_per_patient=1, split=all_train)
    refuse_images(site, [f"99-{number % num_studies}" for number in range(40 if num_studies else 0)])
    state = survey(PLAN, site, min_cases=1)
    check_survey(state, PLAN)
    assert state["refused"].tolist() == told_refused


def refuse_images(site: SiteData, studies: Sequence[str]) -> None:
    """Add labelled images that the gate refuses, one of each of these studies."""
    for number, study in enumerate(studies):
        dataset = a_dataset(PatientID="P99", StudyInstanceUID=a_uid(study), BurnedInAnnotation="YES")
        dataset.SOPInstanceUID = a_uid(f"99-{number}-0")
        (site.dicom / f"99-{number}.dcm").write_bytes(encode(dataset))
    with site.labels.open("a") as labels:
        labels.writelines(f"{a_uid(f'99-{number}-0')},normal,train\n" for number in range(len(studies)))


def test_a_volume_that_is_refused_counts_once_and_not_slice_by_slice(tmp_path: Path) -> None:
    site, _ = series_of(tmp_path, num_patients=40)
    (site.home / "cohort.toml").write_text('unit = "volume"\n[arrival]\nsettle_s = 0\n')
    for patient in range(35, 40):
        (site.dicom / f"{patient}-3").unlink()
    part = {"intensity": {"units": "modality", "low": -1000.0, "high": 1000.0, "bins": 4}}
    state = survey(a_readiness_plan(data={"modalities": ("CT",)}, survey=part), site, min_cases=1)
    assert state["num_cases"].tolist() == [35]
    assert state["refused"].tolist() == [5, 5, 35]


def test_a_study_that_is_used_in_part_counts_as_its_share() -> None:
    refused = [
        QuarantinedContent(f"{number}", Reason.BURNED_IN, "", 1, study=study)
        for number, study in enumerate(["views", "scout", "lost", "lost", "spoilt", ""])
    ]
    used = {"views": 2, "scout": 500, "spoilt": 9}
    assert refused_studies(refused[:2], used) == 1
    assert refused_studies(refused[2:4], used) == 1
    assert refused_studies(refused, used, {"spoilt"}) == 4  # 0.5 + 0.002 + 1 + 1 + 1, rounded up
    assert refused_studies([refused[0]] * 5, used) == 1
    assert refused_studies([], used) == 0


@pytest.mark.parametrize("told_refused", [(1, 1, 60), (0, 3, 60), (9, 4, 60), (5, 9, 60), (0, 0, 0)])
def test_the_door_holds_back_an_impossible_quarantine(told_refused: tuple[int, ...]) -> None:
    state = a_survey(PLAN)
    state["refused"][:] = told_refused
    with pytest.raises(PayloadError, match="refused"):
        check_survey(state, PLAN)


TWO_CASES_EACH = [
    # 57 of b alone, told, would have left 40 with both, and 3 of a alone.
    (("a", "b"), {(0, 0): 3, (0, 1): 40, (1, 1): 57}, [46, 154]),
    (("a", "b", "made up"), {(0, 0): 3, (0, 1): 40, (1, 1): 57}, [46, 154, 0]),
    (("a", "b", "rare"), {(0, 0): 3, (0, 1): 40, (1, 1): 57, (2, 2): 1}, [0, 154, 0]),
    # 90 with several, told, would have left 3 of a alone, as 20 of c alone are all that have c.
    (("a", "b", "c"), {(0, 0): 3, (0, 1): 90, (1, 1): 3, (2, 2): 20}, [96, 96, 40]),
]


@pytest.mark.parametrize(("labels", "kinds", "told_cases"), TWO_CASES_EACH)
def test_patients_by_label_are_told_all_or_none(
    labels: tuple[str, ...], kinds: dict[tuple[int, int], int], told_cases: list[int]
) -> None:
    plan = a_readiness_plan(task={"labels": labels})
    patients = [pair for pair, count in kinds.items() for _ in range(count)]
    cases = [
        surveyed(number, patient, plan, label=label, split="train")
        for patient, pair in enumerate(patients)
        for number, label in enumerate(pair)
    ]
    state = a_survey(plan, cases)
    assert state["label"].tolist() == told_cases
    assert not state["label_patients"].any()
    check_survey(state, plan)
