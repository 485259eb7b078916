"""`cohort deidentify` and `cohort ocr`: whole studies copied, faults named, nobody ever."""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.pixels.utils import pixel_array
from pydicom.uid import SegmentationStorage, UltrasoundImageStorage

from fedward_client import cli, export_copies, safe_export
from fedward_client.dicom import deidentify
from fedward_client.dicom.deidentify import ExportOptions, make_copy
from fedward_client.dicom.gate import Box
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.safe_copy import clean
from fedward_client.dicom.sandbox import DecodeSandbox, SiteFile, What
from fedward_client.exclusions import exclude_case, include_case
from fedward_client.export_copies import ExportFile
from fedward_client.export_folder import ExportFolder
from fedward_client.index import index_folder
from fedward_client.pseudonyms import case_id_of, load_pseudonym_key
from fedward_client.safe_export import ExportReport, export, export_cohort, settings_digest
from fedward_client.site_data import SiteData
from fedward_client.text_sampling import sample_text
from fedward_common.errors import CohortError, StorageError
from tests.builders import a_dataset, a_dicom, a_disk_of, a_site, a_uid, encode
from tests.federations import a_federation
from tests.integration.deployment import free_ports

KEY = bytes(32)
OPTIONS = ExportOptions()


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Said]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setenv("COLUMNS", "300")

    def typed(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["fedward-site", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Said(ended.value.code, out, err)

    return typed


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (port,) = free_ports(1)
    return a_federation(tmp_path_factory.mktemp("export") / "federation", server_port=port)


def joined(run: Run, federation: Path, site: SiteData, folder: Path) -> Path:
    kit = federation / "sites" / "north"
    where = ("--dicom", site.dicom, "--labels", site.labels, "--device", "cpu")
    assert run("join", kit, "--home", folder, *where).code == 0
    assert run("cohort", "index", "--home", folder).code == 0
    return folder


def copies_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.dcm"))


NAMED: dict[str, Any] = {
    "PatientName": "Kowalczyk^Bronislawa",
    "StudyDate": "20200229",
    "BurnedInAnnotation": "NO",
}


def test_command_copies_the_cohort_and_counts_what_it_proved(
    run: Run, federation: Path, tmp_path: Path
) -> None:
    site = a_site(tmp_path / "data", **NAMED)
    home, out = joined(run, federation, site, tmp_path / "home"), tmp_path / "out"
    said = run("cohort", "deidentify", out, "--home", home)
    assert said.code == 0, said.err
    assert "16 of 16 files have a safe copy" in said.out
    assert "16: pixels unchanged, byte by byte" in said.out
    originals = {dcmread(path).SOPInstanceUID: dcmread(path) for path in site.dicom.iterdir()}
    everything = b"".join(path.read_bytes() for path in copies_in(out))
    names = "".join(str(path) for path in out.rglob("*"))
    for original in originals.values():
        assert original.SOPInstanceUID.encode() not in everything
        assert original.SOPInstanceUID not in names
    assert b"owalczyk" not in everything
    assert b"20200229" not in everything
    pictures = {each.PixelData for each in originals.values()}
    assert {dcmread(path).PixelData for path in copies_in(out)} == pictures
    assert len({dcmread(path).PatientID for path in copies_in(out)}) == 8
    for path in (out, *out.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


def test_copies_say_the_same_on_every_day_and_are_a_cohort_again(tmp_path: Path) -> None:
    site = a_site(tmp_path / "data", **NAMED)
    index_folder(site)
    first = export_cohort(site, tmp_path / "one", OPTIONS)
    second = export_cohort(site, tmp_path / "two", OPTIONS)
    assert first == second
    read = [[path.read_bytes() for path in copies_in(tmp_path / name)] for name in ("one", "two")]
    assert read[0] == read[1]
    again = SiteData(tmp_path / "again", tmp_path / "one", site.labels)
    again.home.mkdir()
    summary = index_folder(again)
    assert (summary.num_images, summary.num_quarantined) == (16, 0)


def test_json_names_each_file_by_digest_and_refusals_by_reason(
    run: Run, federation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = a_site(tmp_path / "data", num_patients=2, images_per_patient=1, **NAMED)
    home = joined(run, federation, site, tmp_path / "home")
    spoil(monkeypatch, "P1")
    said = run("cohort", "deidentify", tmp_path / "out", "--home", home, "--json")
    assert said.code == 1
    document = said.json
    assert document["written"] == len(document["copies"]) == len(copies_in(tmp_path / "out")) == 1
    assert (document["pixels"], document["identifiers_searched"] > 3) == ({"identical": 1}, True)
    (refused,) = document["refused"]
    assert refused["reason"] == "identifier_left"
    assert refused["found"] == [
        {"element": "PatientName", "notation": notation, "where": "header"}
        for notation in [each["notation"] for each in refused["found"]]
    ]
    assert "name" not in refused
    assert "owalczyk" not in said.out + said.err


def test_few_files_are_copied_in_a_confined_process_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = a_site(tmp_path / "data", num_patients=2, images_per_patient=1, **NAMED)
    index_folder(site)
    monkeypatch.setattr(export_copies, "make_copy", None)

    assert len(exported(site, tmp_path / "out").written) == 2


def test_a_file_of_a_million_items_is_refused_before_it_is_read_into_objects() -> None:
    items = bytes.fromhex("feff00e000000000") * 10**6
    sequence = bytes.fromhex("29001010") + b"SQ\0\0" + len(items).to_bytes(4, "little") + items
    data = a_dicom(**NAMED)
    place = data.index(bytes.fromhex("e07f1000"))

    with pytest.raises(UnusableImageError) as caught:
        make_copy(data[:place] + sequence + data[place:], b"k" * 32, ExportOptions())

    assert caught.value.reason == Reason.OVER_LIMIT


def test_stopped_command_says_what_is_done_and_goes_on(
    run: Run, federation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = a_site(tmp_path / "data", num_patients=4, images_per_patient=1, **NAMED)
    home, out = joined(run, federation, site, tmp_path / "home"), tmp_path / "out"

    def stopped_at_the_third(data: bytes, *rest: Any) -> Any:
        if len(copies_in(out)) == 2:
            raise KeyboardInterrupt
        return make_copy(data, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(safe_export, "export", partial(export, num_processes=0))
        patch.setattr(export_copies, "make_copy", stopped_at_the_third)
        said = run("cohort", "deidentify", out, "--home", home)
        assert said.code == 130
        assert "2 of 4 files have a safe copy" in said.out
        assert "Stopped: 2 files are left; the same command goes on with them." in said.out
        document = run("cohort", "deidentify", out, "--home", home, "--json")
        assert (document.code, document.json["stopped"], document.json["from_before"]) == (130, True, 2)
    said = run("cohort", "deidentify", out, "--home", home)
    assert said.code == 0
    assert "4 of 4 files have a safe copy" in said.out
    assert "2: from an earlier run, unchanged" in said.out
    assert len(copies_in(out)) == 4
    assert not (out / ".unfinished").exists()


def spoil(monkeypatch: pytest.MonkeyPatch, patient: str) -> None:
    """Break the rule for names in files of one patient; copies are then made in this process."""
    honest = clean
    monkeypatch.setattr(safe_export, "export", partial(export, num_processes=0))

    def forgetful(source: Any, *rest: Any) -> Any:
        copy = honest(source, *rest)
        if source.PatientID == patient:
            copy.PatientName = source.PatientName
        return copy

    monkeypatch.setattr(deidentify, "clean", forgetful)


def test_leaky_copy_is_not_kept_and_its_file_is_named_on_demand(
    run: Run, federation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = a_site(tmp_path / "data", num_patients=3, images_per_patient=1, **NAMED)
    home, out = joined(run, federation, site, tmp_path / "home"), tmp_path / "out"
    spoil(monkeypatch, "P2")
    said = run("cohort", "deidentify", out, "--home", home)
    assert said.code == 1
    assert "2 of 3 files have a safe copy" in said.out
    assert "still held an identifier" in said.out
    assert "PatientName as text in the header" in said.out
    assert "2-0.dcm" not in said.out
    assert len(copies_in(out)) == 2
    named = run("cohort", "deidentify", tmp_path / "more", "--home", home, "--names")
    assert "2-0.dcm" in named.out
    assert "0-0.dcm" not in named.out
    assert "owalczyk" not in said.out + named.out


def test_options_of_the_command_reach_the_copies(run: Run, federation: Path, tmp_path: Path) -> None:
    site = a_site(
        tmp_path / "data",
        num_patients=2,
        images_per_patient=1,
        PatientAge="044Y",
        StudyTime="101112",
        **NAMED,
    )
    home, out = joined(run, federation, site, tmp_path / "home"), tmp_path / "out"
    kept = ("--keep-times", "--keep-characteristics", "--keep-private", "0019|SIEMENS MR HEADER|0C")
    assert run("cohort", "deidentify", out, "--home", home, *kept).code == 0
    copy = dcmread(copies_in(out)[0])
    assert (copy.PatientAge, copy.StudyTime) == ("044Y", "101112")
    said = run("cohort", "deidentify", tmp_path / "no", "--home", home, "--keep-private", "0019")
    assert said.code != 0
    assert "0019|SIEMENS MR HEADER|0C" in said.err


@pytest.mark.parametrize("fault", ["not empty", "in the image folder", "not writable", "a file"])
def test_wrong_folder_is_refused_with_a_remedy(tmp_path: Path, fault: str) -> None:
    site = a_site(tmp_path / "data", num_patients=2)
    index_folder(site)
    out = {"in the image folder": site.dicom / "out", "not writable": Path("/proc/out")}.get(
        fault, tmp_path / "out"
    )
    if fault == "not empty":
        out.mkdir()
        (out / "old").touch()
    if fault == "a file":
        out.touch()
    with pytest.raises(StorageError) as caught:
        export_cohort(site, out, OPTIONS)
    assert caught.value.remedy


def test_full_disk_ends_the_export_and_leaves_no_half_copy(tmp_path: Path) -> None:
    site = a_site(tmp_path / "data", num_patients=1, columns=2000)
    index_folder(site)
    with pytest.raises(StorageError, match="cannot be written"), a_disk_of(20_000):
        exported(site, tmp_path / "out")
    assert copies_in(tmp_path / "out") == []
    assert exported(site, tmp_path / "out").num_kept == 0
    assert len(copies_in(tmp_path / "out")) == 2


def exported(site: SiteData, out: Path, files: list[ExportFile] | None = None, **how: Any) -> ExportReport:
    with ExportFolder(site.home, out, settings_digest(KEY, OPTIONS)) as folder:
        return export(files or files_of(site), site.dicom, folder, KEY, OPTIONS, **how)


def files_of(site: SiteData) -> list[ExportFile]:
    return safe_export.files_of_cohort(site)


def test_file_that_changed_or_vanished_since_it_was_indexed_is_named(tmp_path: Path) -> None:
    site = a_site(tmp_path / "data", num_patients=3, images_per_patient=1)
    index_folder(site)
    (site.dicom / "0-0.dcm").unlink()
    (site.dicom / "1-0.dcm").write_bytes(a_dicom(PatientID="other"))
    seen: list[tuple[int, int]] = []
    report = export_cohort(site, tmp_path / "out", OPTIONS, lambda done, total: seen.append((done, total)))
    assert [each.reason for each in report.refused] == [Reason.CHANGED] * 2
    assert len(report.written) == 1
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_excluded_case_and_empty_cohort_are_not_exported(run: Run, federation: Path, tmp_path: Path) -> None:
    site = a_site(tmp_path / "data", num_patients=2, images_per_patient=1)
    home = joined(run, federation, site, tmp_path / "home")
    from fedward_client.cohort import unit_ids

    there = SiteData(home, site.dicom, site.labels)
    case, _ = sorted(unit_ids(there))
    assert run("cohort", "exclude", case, "--home", home).code == 0
    assert run("cohort", "deidentify", tmp_path / "out", "--home", home, "--json").json["written"] == 1
    (home / "cohort.toml").write_text('modalities = ["MG"]\n')
    said = run("cohort", "deidentify", tmp_path / "none", "--home", home)
    assert said.code != 0
    assert "fedward-site cohort quarantine" in said.err


def a_study_with_objects(folder: Path) -> SiteData:
    """Two pictures of one study, a segmentation of the first, and an object that is another patient's."""
    study = {"StudyInstanceUID": a_uid("s"), **NAMED}
    site = a_site(folder, num_patients=1, images_per_patient=2, **study)
    for name, patient in (("own", "P0"), ("alien", "P7")):
        dataset = a_dataset(PatientID=patient, Modality="SEG", SOPInstanceUID=a_uid(name), **study)
        dataset.SOPClassUID = SegmentationStorage
        (site.dicom / f"{name}.dcm").write_bytes(encode(dataset))
    index_folder(site)
    return site


def names_of(site: SiteData) -> set[str]:
    return {file.name.decode() for file in files_of(site)}


def case_of(site: SiteData, sop_instance: str) -> str:
    return case_id_of(load_pseudonym_key(site.home), sop_instance)


def test_objects_of_a_study_leave_with_it_but_not_those_of_another_patient(tmp_path: Path) -> None:
    site = a_study_with_objects(tmp_path)
    assert names_of(site) == {"0-0.dcm", "0-1.dcm", "own.dcm"}


def test_no_object_of_a_study_leaves_in_which_a_case_is_excluded(tmp_path: Path) -> None:
    site = a_study_with_objects(tmp_path)
    case = case_of(site, a_uid("0-0"))
    exclude_case(site, case)
    assert names_of(site) == {"0-1.dcm"}

    burned: dict[str, Any] = {"StudyInstanceUID": a_uid("s"), **NAMED, "BurnedInAnnotation": "YES"}
    (site.dicom / "0-0.dcm").write_bytes(a_dicom(PatientID="P0", SOPInstanceUID=a_uid("0-0"), **burned))
    index_folder(site)
    assert names_of(site) == {"0-1.dcm"}  # no case at the moment, for the gate keeps it out; excluded still

    include_case(site, case)
    assert names_of(site) == {"0-1.dcm", "own.dcm"}


def test_an_exclusion_leaves_the_objects_of_other_studies_alone(tmp_path: Path) -> None:
    site = a_study_with_objects(tmp_path)
    other = a_dicom(PatientID="P1", StudyInstanceUID=a_uid("t"), SOPInstanceUID=a_uid("1-0"), **NAMED)
    (site.dicom / "1-0.dcm").write_bytes(other)
    index_folder(site)
    exclude_case(site, case_of(site, a_uid("1-0")))
    assert names_of(site) == {"0-0.dcm", "0-1.dcm", "own.dcm"}


def test_two_files_of_one_uid_give_one_copy(tmp_path: Path) -> None:
    site = a_site(tmp_path / "data", num_patients=1, images_per_patient=1)
    index_folder(site)
    (file,) = files_of(site)
    other = a_dicom(PatientID="P0", SOPInstanceUID=a_uid("0-0"))
    (site.dicom / "other.dcm").write_bytes(other)
    twin = ExportFile(hashlib.sha256(other).hexdigest(), b"other.dcm", file.study)
    report = exported(site, tmp_path / "out", [file, twin])
    assert [each.reason for each in report.files] == [None, Reason.SAME_UID]
    again = exported(site, tmp_path / "out", [file, twin])
    assert [each.reason for each in again.files] == [None, Reason.SAME_UID]
    assert again.num_kept == 1


# Real studies.


def a_cohort_of(files: list[Path], folder: Path, declaration: str) -> SiteData:
    """A site with these files, indexed."""
    site = SiteData(folder / "home", folder / "dicom", folder / "labels.csv")
    site.home.mkdir(parents=True)
    site.dicom.mkdir()
    for number, path in enumerate(files):
        shutil.copy(path, site.dicom / f"{number}.dcm")
    (site.home / "cohort.toml").write_text(declaration)
    index_folder(site)
    return site


@pytest.mark.data
def test_segmentation_and_report_leave_with_their_images_and_still_refer_to_them(
    shared_data: Path, tmp_path: Path
) -> None:
    folder = shared_data / "dicom-varied" / "dcmqi" / "segmentations"
    images = sorted((folder / "ct-3slice").glob("*.dcm"))
    masks = [folder / "liver.dcm", folder / "partial_overlaps.dcm"]
    site = a_cohort_of([*images, *masks], tmp_path, 'modalities = ["CT"]\n')
    report = export_cohort(site, tmp_path / "out", OPTIONS)
    assert report.refused == ()
    copies = [dcmread(path) for path in copies_in(tmp_path / "out")]
    slices = {copy.SOPInstanceUID: copy for copy in copies if copy.Modality == "CT"}
    segmentations = [copy for copy in copies if copy.Modality == "SEG"]
    assert (len(slices), len(segmentations)) == (3, 2)
    (referring,) = (highdicom.seg.segread(path) for path in copies_in(tmp_path / "out") if is_liver(path))
    referred = {item[2] for item in referring.get_source_image_uids()}
    assert referred
    assert referred <= set(slices)
    original = highdicom.seg.segread(masks[0])
    assert np.array_equal(referring.pixel_array, original.pixel_array)
    assert {copy.FrameOfReferenceUID for copy in slices.values()} == {referring.FrameOfReferenceUID}
    positions = sorted(copy.ImagePositionPatient[2] for copy in slices.values())
    assert positions == sorted(dcmread(path).ImagePositionPatient[2] for path in images)


def is_liver(path: Path) -> bool:
    dataset = dcmread(path)
    return dataset.Modality == "SEG" and len(dataset.SegmentSequence) == 1


def nothing_is_opened_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: object, **__: object) -> None:
        pytest.fail("a foreign file was opened up in the operator's own process")

    for name in ("make_copy", "read_content"):
        monkeypatch.setattr(export_copies, name, opened)
    for name in ("decode_stored", "parse_file"):
        monkeypatch.setattr(f"fedward_client.dicom.copy_pixels.{name}", opened)


def a_cohort_with_an_overlay_in_compressed_pixels(folder: Path) -> SiteData:
    path = Path(str(get_testdata_file("MR_small_RLE.dcm")))
    compressed = dcmread(path)
    compressed.BitsStored, compressed.HighBit, compressed.BurnedInAnnotation = 12, 11, "NO"
    compressed.add_new(0x60000010, "US", 64)
    compressed.add_new(0x60000100, "US", 16)
    compressed.add_new(0x60000102, "US", 12)
    folder.mkdir()
    compressed.save_as(folder / "overlay.dcm")
    return a_cohort_of([folder / "overlay.dcm"], folder, 'modalities = ["MR"]\n')


def test_compressed_pixels_are_changed_without_opening_the_file_in_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = a_cohort_with_an_overlay_in_compressed_pixels(tmp_path / "data")
    here = exported(site, tmp_path / "here", num_processes=0)
    nothing_is_opened_here(monkeypatch)
    report = exported(site, tmp_path / "out")
    assert [each.pixels for each in report.files] == ["cleared"]
    assert report == here
    assert [path.read_bytes() for path in copies_in(tmp_path / "out")] == [
        path.read_bytes() for path in copies_in(tmp_path / "here")
    ]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (np.zeros((1, 64, 64), np.float32), Reason.DECODE_FAILED),
        (np.zeros((1, 64, 32), np.int16), Reason.TRUNCATED),
        (np.zeros((2, 64, 64), np.int16), Reason.PIXELS_CHANGED),
        (np.zeros((1, 32, 128), np.int16), Reason.PIXELS_CHANGED),
        (UnusableImageError(Reason.OVER_LIMIT), Reason.OVER_LIMIT),
        (CohortError("it changed", remedy="Wait."), Reason.CHANGED),
    ],
)
def test_a_decoder_that_says_something_else_than_the_picture_costs_that_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Any, reason: Reason
) -> None:
    site = a_cohort_with_an_overlay_in_compressed_pixels(tmp_path / "data")
    honest = DecodeSandbox.map

    def lying(sandbox: DecodeSandbox, files: Any, what: What, **how: Any) -> Iterator[Any]:
        return iter([said]) if what == "stored" else honest(sandbox, files, what, **how)

    monkeypatch.setattr(DecodeSandbox, "map", lying)
    report = exported(site, tmp_path / "out")
    assert [each.reason for each in report.files] == [reason]
    assert copies_in(tmp_path / "out") == []


@pytest.mark.data
def test_compressed_ultrasound_is_decoded_in_the_sandbox_and_blackened(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shared_data / "dicom-varied" / "pydicom-data" / "OBXXXX1A_rle.dcm"
    site = a_cohort_of([path], tmp_path, 'modalities = ["US"]\n')
    nothing_is_opened_here(monkeypatch)
    report = export_cohort(site, tmp_path / "out", OPTIONS)
    assert [each.pixels for each in report.files] == ["masked"]
    (copied,) = copies_in(tmp_path / "out")
    source, copy = pixel_array(dcmread(path)), pixel_array(dcmread(copied))
    stays = np.zeros(source.shape, dtype=bool)
    stays[60:519, 120:800] = True  # hospital and date above, settings to the left; looked at
    assert np.array_equal(copy[stays], source[stays])
    assert len(np.unique(copy[~stays])) == 1
    assert "113101" in [item.CodeValue for item in dcmread(copied).DeidentificationMethodCodeSequence]


@pytest.mark.data
def test_sandbox_gives_stored_values_and_refuses_what_it_cannot_decode(
    shared_data: Path, tmp_path: Path
) -> None:
    varied = shared_data / "dicom-varied" / "pydicom-data"
    names = [b"RG3_J2KR.dcm", b"SC_rgb_16bit_2frame.dcm", b"MR2_J2KR.dcm", b"parametric_map_float.dcm"]
    with DecodeSandbox(1) as sandbox:
        *arrays, refusal = sandbox.map([SiteFile(varied, name) for name in names], "stored")
    for name, array in zip(names, arrays, strict=False):
        assert isinstance(array, np.ndarray)
        expected = pixel_array(dcmread(varied / name.decode()))
        assert np.array_equal(array.squeeze(), expected.squeeze())
    assert isinstance(refusal, UnusableImageError)
    assert refusal.reason is Reason.PIXEL_FORMAT


@pytest.mark.data
@pytest.mark.needs("dciodvfy", "dcmdump")
def test_copies_are_no_worse_dicom_than_their_originals(shared_data: Path, tmp_path: Path) -> None:
    """Judged by dciodvfy and dcmtk, independent of each other and of pydicom."""
    vendors = shared_data / "dicom-vendors"
    folders = [folder for folder in sorted(vendors.rglob("*")) if list(folder.glob("*.dcm"))]
    files = [sorted(folder.glob("*.dcm"))[0] for folder in folders]
    assert len(files) >= 6
    for path in files:
        copy = tmp_path / "copy.dcm"
        copy.write_bytes(make_copy(path.read_bytes(), KEY, OPTIONS).data)
        subprocess.run(["dcmdump", "-q", "+E", str(copy)], check=True, capture_output=True)
        assert num_errors(copy) <= num_errors(path), path.name


def num_errors(path: Path) -> int:
    said = subprocess.run(["dciodvfy", str(path)], capture_output=True, check=False).stderr
    return sum(line.startswith(b"Error") for line in said.splitlines())


# Text in pictures.


def a_picture(text: str, height: int = 24) -> np.ndarray[Any, np.dtype[np.uint8]]:
    image = Image.fromarray(np.full((256, 512), 90, dtype=np.uint8))
    ImageDraw.Draw(image).text((20, 30), text, fill=255, font=ImageFont.load_default(size=height))
    return np.asarray(image)


def a_region(box: Box) -> Any:
    from tests.client.test_gate import a_region as region_of

    return region_of((box.left, box.top, box.right - 1, box.bottom - 1))


@pytest.mark.needs("tesseract")
def test_ocr_finds_the_case_with_text_and_not_what_the_gate_blackens(
    run: Run, federation: Path, tmp_path: Path
) -> None:
    site = a_site(tmp_path / "data", num_patients=2, images_per_patient=1)
    for path in site.dicom.iterdir():
        path.unlink()
    below = a_region(Box(100, 0, 256, 512))
    shared: dict[str, Any] = {"BurnedInAnnotation": "NO", "StudyInstanceUID": a_uid("u")}
    ultrasound: dict[str, Any] = {"SOPClassUID": UltrasoundImageStorage, "Modality": "US"} | shared
    pictures = {
        "0-0": a_dicom(
            a_picture("KOWALCZYK BRONISLAWA"), PatientID="P0", SOPInstanceUID=a_uid("0-0"), **shared
        ),
        "1-0": a_dicom(
            a_picture("KOWALCZYK ABOVE"),
            PatientID="P1",
            SOPInstanceUID=a_uid("1-0"),
            SequenceOfUltrasoundRegions=[below],
            **ultrasound,
        ),
    }
    for name, data in pictures.items():
        (site.dicom / f"{name}.dcm").write_bytes(data)
    home = tmp_path / "home"
    there = ("--dicom", site.dicom, "--labels", site.labels, "--device", "cpu")
    assert run("join", federation / "sites" / "north", "--home", home, *there).code == 0
    (home / "cohort.toml").write_text('modalities = ["CR", "US"]\n')
    assert run("cohort", "index", "--home", home).code == 0
    document = run("cohort", "ocr", "--home", home, "--json").json
    assert document["pictures"] == 2
    (found,) = document["with_text"]
    assert found["words"] == 2
    assert "text" not in found
    said = run("cohort", "ocr", "--home", home, "--words")
    assert "1 of 2 pictures seem to have text" in said.out
    assert "KOWALCZYK BRONISLAWA" in said.out
    assert "ABOVE" not in said.out
    assert found["case"] in said.out
    assert run("cohort", "exclude", found["case"], "--home", home).code == 0


def test_ocr_without_tesseract_says_how_to_get_it(
    run: Run, federation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = a_site(tmp_path / "data", num_patients=2, images_per_patient=1)
    home = joined(run, federation, site, tmp_path / "home")
    monkeypatch.setenv("PATH", str(tmp_path))
    said = run("cohort", "ocr", "--home", home)
    assert said.code != 0
    assert "apt-get install tesseract-ocr" in said.err


@pytest.mark.data
@pytest.mark.needs("tesseract")
def test_sample_of_real_pictures_passes_over_what_cannot_be_decoded(
    shared_data: Path, tmp_path: Path
) -> None:
    colour = shared_data / "dicom-varied" / "pydicom-data" / "gdcm-US-ALOKA-16.dcm"
    grey = Path(str(get_testdata_file("MR_small_jp2klossless.dcm")))
    accepted = 'sop_class = "MRImageStorage"\nfindings = ["secondary_image"]\n'
    declared = f'modalities = ["US", "MR"]\n[[gate.accept]]\n{accepted}'
    site = a_cohort_of([colour, grey], tmp_path, declared)
    no_image = grey.read_bytes().replace(b"\xff\x4f\xff\x51", b"\xff\x4f\xff\x00")
    (site.dicom / "1.dcm").write_bytes(no_image)
    index_folder(site)
    seen: list[tuple[int, int]] = []
    assert len(sample_text(site, 10, lambda done, total: seen.append((done, total)))) == 1
    assert seen[-1] == (2, 2)


@pytest.mark.needs("tesseract")
def test_sample_of_an_empty_cohort_says_where_to_look(tmp_path: Path) -> None:
    site = a_site(tmp_path / "data", num_patients=2)
    (site.home / "cohort.toml").write_text('modalities = ["MG"]\n')
    index_folder(site)
    with pytest.raises(CohortError) as caught:
        sample_text(site, 10)
    assert "cohort quarantine" in caught.value.remedy
