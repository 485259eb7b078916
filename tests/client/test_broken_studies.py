"""A cohort with broken studies trains; the site names exactly those, the coordinator learns how many."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pydicom.uid import JPEG2000Lossless

from fedward_client.outbound import OutboundDoor
from fedward_client.pseudonyms import load_pseudonym_key, study_code_of
from fedward_client.quarantine import quarantine_rows
from fedward_client.site_data import SiteData
from fedward_client.worker import Worker
from tests.builders import a_dataset, a_plan, a_uid, encode, write_labels
from tests.client.site_workers import open_request
from tests.messages import an_instruction, signed

NUM_STUDIES = 200
PLAN = a_plan(privacy={"min_cases": 5})


def a_study(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (64, 64), dtype=np.uint8)
    dataset = a_dataset(
        pixels,
        PatientID=f"P{number}",
        StudyInstanceUID=a_uid(f"study {number}"),
        SOPInstanceUID=a_uid(f"image {number}"),
    )
    if number % 40:
        return encode(dataset)
    dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
    return encode(dataset, JPEG2000Lossless)


def broken(number: int, data: bytes) -> bytes:
    """Broken in one of five ways; the codestream only shows it when it is decoded."""
    start = data.index(b"\xff\x4f\xff\x51") + 60 if number == 0 else 0
    return (
        data[:start] + b"\x55" * (len(data) - start - 8) + data[-8:],
        data[:-100],
        data[:200],
        b"",
        data.replace(b"MONOCHROME2 ", b"MONOCHROME9 "),
    )[number // 40]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> SiteData:
    folder = tmp_path_factory.mktemp("broken")
    site = SiteData(folder / "home", folder / "dicom", folder / "labels.csv")
    site.home.mkdir()
    site.dicom.mkdir()
    for number in range(NUM_STUDIES):
        data = a_study(number)
        data = data if number % 40 else broken(number, data)
        (site.dicom / f"{number:03d}.dcm").write_bytes(data)
    write_labels(site.labels, [[a_uid(f"image {number}"), number % 2] for number in range(NUM_STUDIES)])
    return site


@pytest.fixture(scope="module")
def counts(site: SiteData) -> dict[str, int]:
    """What the worker tells the daemon when it has opened the cohort."""
    header, _ = Worker().answer(open_request(site, PLAN), bytearray())
    assert header["ok"], header
    found: dict[str, int] = header["counts"]
    return found


def test_the_cohort_opens_with_what_is_sound(counts: dict[str, int]) -> None:
    assert counts["train"] + counts["validation"] + counts["test"] == 195
    assert counts["quarantined"] == 5


@pytest.mark.usefixtures("counts")
def test_the_site_names_exactly_the_broken_ones(site: SiteData) -> None:
    rows = quarantine_rows(site, names=True)

    names = {row.names: row for row in rows}
    key = load_pseudonym_key(site.home)
    assert set(names) == {(f"{number:03d}.dcm",) for number in (0, 40, 80, 120, 160)}
    assert names["040.dcm",].study == study_code_of(key, a_uid("study 40"))
    assert {row.reason.value for row in rows} >= {"colour", "empty", "no_uid"}
    assert all(row.remedy for row in rows)
    assert a_uid("study 40") not in repr(rows)
    assert ".dcm" not in repr(rows)


@pytest.mark.parametrize(("floor", "said"), [(5, 5), (6, None)])
def test_the_coordinator_learns_how_many_if_they_are_not_few(
    counts: dict[str, int], floor: int, said: int | None
) -> None:
    lines: list[object] = []
    door = OutboundDoor("north", lambda data: "00" * 64, lambda *_, **fields: lines.append(fields), floor)

    plan = signed(PLAN)
    up = door.counts(an_instruction(plan, "prepare"), plan, counts)

    assert json.loads(up.envelope)["numbers"]["num_quarantined"] == said
