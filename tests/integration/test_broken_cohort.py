"""One site has 2.5 % broken studies: the run goes through; the site names them, others learn how many."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.uid import JPEG2000Lossless, SecondaryCaptureImageStorage

from fedward_client.dicom.synthetic import write_phantom_sites
from fedward_common.errors import CohortError
from tests.integration.deployment import NAMES, SITE, Deployment, a_deployment, a_plan_file, call

pytestmark = pytest.mark.integration
SICK = "site-2"
MIN_CASES = 5
PLAN = {"privacy": {"min_cases": MIN_CASES}, "evaluation": {"compare_local": False}}


def _rewritten(change: Callable[[Dataset], None]) -> Callable[[bytes], bytes]:
    def broken(data: bytes) -> bytes:
        dataset = dcmread(BytesIO(data))
        change(dataset)
        buffer = BytesIO()
        dataset.save_as(buffer)
        return buffer.getvalue()

    return broken


def _burn_in(dataset: Dataset) -> None:
    dataset.BurnedInAnnotation = "YES"


def _capture(dataset: Dataset) -> None:
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage


def _corrupt(dataset: Dataset) -> None:
    """A JPEG 2000 stream whose headers are whole and whose coded data are noise."""
    dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
    stream = dataset.PixelData
    noise = np.random.default_rng(0).integers(0, 255, len(stream) - 200, dtype=np.uint8)
    dataset.PixelData = stream[:140] + noise.tobytes() + stream[-60:]


BREAK: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[:-300],
    "no_pixels": lambda data: data[: data.index(b"\x28\x00\x02\x00")],  # ends where pixels are described
    "burned_in": _rewritten(_burn_in),
    "sop_class": _rewritten(_capture),
    "decode_failed": _rewritten(_corrupt),
}


@dataclass
class Broken:
    """What was broken, and what came of it.

    Args:
        place: the federation; its run has ended.
        files: reason -> names of the files of one study.
        identifiers: of the broken studies.
        index: what the site's operator was told when the files were read.
        events: what the coordinator saw, as text.
        report: the run's.
    """

    place: Deployment
    files: dict[str, list[str]]
    identifiers: set[str]
    index: dict[str, Any]
    events: str
    report: dict[str, Any]


def _break_studies(dicom: Path) -> tuple[dict[str, list[str]], set[str], int]:
    """Break one study in each way, and all of its images; files, identifiers, number of studies."""
    studies: dict[str, list[Path]] = {}
    identifiers = {}
    for path in sorted(dicom.iterdir()):
        header = dcmread(path, stop_before_pixels=True)
        studies.setdefault(header.StudyInstanceUID, []).append(path)
        identifiers[header.StudyInstanceUID] = {header.StudyInstanceUID, header.PatientID}
    chosen = list(studies)[:: len(studies) // len(BREAK)][: len(BREAK)]
    files = {}
    for study, (reason, broken) in zip(chosen, BREAK.items(), strict=True):
        for path in studies[study]:
            path.write_bytes(broken(path.read_bytes()))
        files[reason] = [path.name for path in studies[study]]
    return files, set().union(*(identifiers[study] for study in chosen)), len(studies)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broken]:
    root = tmp_path_factory.mktemp("broken-cohort")
    with a_deployment(root, cases_per_site=40, size=64) as place:
        images = place.images(SICK)
        for path in (images / "dicom").iterdir():
            path.unlink()
        write_phantom_sites(root / "many", [SICK], cases_per_site=500, size=64, seed=4)
        (root / "many" / SICK / "dicom").rename(images / "dicom.new")
        (images / "dicom").rmdir()
        (images / "dicom.new").rename(images / "dicom")
        (root / "many" / SICK / "labels.csv").rename(images / "labels.csv")
        files, identifiers, num_studies = _break_studies(images / "dicom")
        assert num_studies == pytest.approx(len(BREAK) / 0.025, rel=0.1)
        with (images / "labels.csv").open("a", newline="") as file:
            csv.writer(file).writerows([["1.2.3.4", 0, "train"], ["1.2.3.5", 1, "test"]])
        (place.home(SICK) / "cohort.toml").write_text("[labels.limits]\nrows_without_image = 0.01\n")
        index = json.loads(call(*SITE, "cohort", "index", "--home", str(place.home(SICK)), "--json").stdout)

        place.start_server()
        for name in NAMES:
            place.start_site(name)
        place.await_sites(*NAMES)
        signed = place.sign(a_plan_file(root / "plan.toml", **PLAN))
        place.approve(signed)
        run_id = place.launch(signed)
        report = place.finish(run_id)
        with place.client() as client:
            events = "\n".join(event.model_dump_json() for event in client.watch(run_id))
        yield Broken(place, files, identifiers, index, events, report)


def test_every_site_contributes_to_every_round(run: Broken) -> None:
    assert run.report["verdict"] == "completed"
    for each in run.report["rounds"]:
        assert each["committed"]
        assert {site["site"]: site["status"] for site in each["sites"]} == dict.fromkeys(NAMES, "contributed")


def test_the_site_names_exactly_the_broken_ones(run: Broken) -> None:
    home = ("--home", str(run.place.home(SICK)), "--json")
    listed = json.loads(call(*SITE, "cohort", "quarantine", "--names", *home).stdout)
    shown = json.loads(call(*SITE, "cohort", "show", *home).stdout)

    assert {row["reason"]: sorted(row["names"]) for row in listed} == run.files
    assert all(row["meaning"] and row["remedy"] and not row["used"] for row in listed)
    # A codestream shows what is the matter with it when it is decoded; everything else did so before.
    decoded = "decode_failed"
    assert run.index["quarantined"] == {
        reason: len(names) for reason, names in run.files.items() if reason != decoded
    }
    assert shown["left_over"]["studies in quarantine"] == str(len(BREAK))
    assert shown["left_over"]["label rows that find no image"] == "<5"
    (warning,) = shown["warnings"]
    assert warning.startswith("2 rows are not used: row 502: SOPInstanceUID matches no image; row 503")


def test_the_coordinator_learns_how_many_and_nothing_else(run: Broken) -> None:
    assert len(BREAK) >= MIN_CASES  # fewer would be held back
    for each in run.report["rounds"]:
        assert {site["site"]: site["num_quarantined"] for site in each["sites"]} == {
            name: len(BREAK) if name == SICK else 0 for name in NAMES
        }
    seen = run.events + json.dumps(run.report)
    assert f'"num_quarantined":{len(BREAK)}' in run.events
    names = {name for files in run.files.values() for name in files}
    assert not [text for text in names | run.identifiers | set(BREAK) if text in seen]


def test_no_row_without_an_image_is_accepted_unasked(run: Broken) -> None:
    settings = run.place.home(SICK) / "cohort.toml"
    kept = settings.read_text()
    settings.write_text("")
    done = call(*(*SITE, "cohort", "index", "--home", str(run.place.home(SICK))), code=CohortError.exit_code)
    settings.write_text(kept)

    assert "row 502: SOPInstanceUID matches no image" in done.stderr
    assert " in quarantine; reasons and remedies" in done.stdout
