"""Safe copies: a canary in every element and none in any copy, pixels proven, relations kept."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom.data
import pytest
from pydicom import config, dcmread
from pydicom._dicom_dict import DicomDictionary
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.pixels.utils import pixel_array
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from pydicom.uid import UID

from fedward_client.dicom import deidentify
from fedward_client.dicom.deidentify import (
    ExportOptions,
    IdentifierLeftError,
    SafeCopy,
    make_copy,
)
from fedward_client.dicom.deidentify_rules import TEXT_KEPT, Action, action_of, keyword_of, profile
from fedward_client.dicom.gate import Acceptance, GatePolicy
from fedward_client.dicom.parser import contained
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.safe_copy import clean
from tests.builders import a_dataset, a_dicom, a_uid, encode

KEY = bytes(range(32))
OPTIONS = ExportOptions()
MARK = "CNRYQX"


def copied(data: bytes, options: ExportOptions = OPTIONS, key: bytes = KEY) -> Dataset:
    return dcmread(io.BytesIO(make_copy(data, key, options).data))


def refused(data: bytes, options: ExportOptions = OPTIONS) -> Reason:
    with pytest.raises(UnusableImageError) as caught:
        make_copy(data, KEY, options)
    return caught.value.reason


# Nothing that identifies is in any copy.


def planted_value(tag: int, vr: str) -> Any:
    """A value found nowhere else, that says where it was; None where the VR holds nothing to plant."""
    name = f"{MARK}{tag:08X}"
    number = tag % 10_000
    values: dict[str, Any] = {
        **dict.fromkeys(("LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT", "AE"), name),
        **dict.fromkeys(("OB", "OW", "UN", "OD", "OF", "OL", "OV"), name.encode().ljust(24, b"Z")),
        "CS": f"{name} <>",  # no code that the standard knows
        "UI": f"1.2.826.0.1.{tag}.77777777",
        "DA": f"19{number % 100:02}0{number % 9 + 1}17",
        "DT": f"19{number % 100:02}0{number % 9 + 1}17123456",
        "AS": f"{number % 1000:03}Y",
        "TM": f"{number % 24:02}{number % 60:02}37.123456",
    }
    return values.get(vr)


PICTURE_GROUPS = (0x0028, 0x7FE0)
STRUCTURE = ("SOPClassUID", "Modality", "ImageType", "ConversionType", "SpecificCharacterSet")


def every_element() -> Iterator[tuple[int, str, Any]]:
    for tag, (vr, *_) in sorted(DicomDictionary.items()):
        if tag >> 16 in (0, 2, 4, *PICTURE_GROUPS) or tag >> 16 > 0xFFF0 or keyword_of(tag) in STRUCTURE:
            continue
        if keyword_of(tag).startswith("SecondaryCapture") or 0x00181010 <= tag <= 0x0018101B:
            continue
        if keyword_of(tag) in ("BurnedInAnnotation", "RecognizableVisualFeatures"):
            continue
        value = planted_value(tag, vr.split(" or ")[0])
        if value is not None and keyword_of(tag) not in TEXT_KEPT:
            yield tag, vr.split(" or ")[0], value


def planted() -> tuple[bytes, list[str]]:
    """A radiograph with a canary in every element of the dictionary, at two depths, and around it."""
    dataset = a_dataset(BurnedInAnnotation="NO")
    item, marks = Dataset(), []
    with config.disable_value_validation():
        for tag, vr, value in every_element():
            dataset.add(DataElement(tag, vr, value))
            inside = value.replace(MARK, "NSTDQX") if isinstance(value, str) else value[::-1]
            item.add(DataElement(tag, vr, inside))
            marks.append(value if isinstance(value, str) else value.decode())
        deep = Dataset()
        deep.RequestAttributesSequence = Sequence([item])
        dataset.ProcedureCodeSequence = Sequence([deep])
        dataset.add_new(0x00091001, "UN", f"{MARK}UNKNOWN private without creator".encode())
        block = dataset.private_block(0x0029, f"{MARK}CREATOR", create=True)
        block.add_new(0x01, "LO", f"{MARK}PRIVATE")
        block.add_new(0x02, "SQ", Sequence([item]))
        block.add_new(0x03, "FD", [1.5, 2.5])
        dataset.add_new(0x60000022, "LO", f"{MARK}OVERLAY")
        dataset.add_new(0x60003000, "OW", f"{MARK}OVERLAYDATA".encode().ljust(32, b"x"))
        dataset.add_new(0x50003000, "OB", f"{MARK}CURVES".encode())
        behind = dataset.private_block(0x7FE1, f"{MARK}BEHIND", create=True)
        behind.add_new(0x10, "OB", f"{MARK}BEHINDTHEPIXELS".encode())
        dataset.add_new(0xFFFAFFFA, "SQ", Sequence([item]))
        dataset.add_new(0xFFFCFFFC, "OB", f"{MARK}PADDING!".encode())
        dataset.file_meta.SourceApplicationEntityTitle = f"{MARK}AE"
        dataset.file_meta.PrivateInformationCreatorUID = UID("1.2.3.444444.5")
        dataset.file_meta.PrivateInformation = f"{MARK}META".encode()
        data = encode(dataset, preamble=f"{MARK}PREAMBLE".encode())
    return data, marks


@pytest.mark.parametrize(
    "options",
    [OPTIONS, ExportOptions(keep_times=True, keep_characteristics=True)],
    ids=["least", "most"],
)
def test_no_canary_of_any_element_is_in_the_copy(options: ExportOptions) -> None:
    data, marks = planted()
    assert len(marks) > 1700
    try:
        copy = make_copy(data, KEY, options)
    except IdentifierLeftError as error:
        pytest.fail(str(error.leaks[:20]))
    for mark in (MARK, "NSTDQX"):
        for text in (mark.encode(), mark.lower().encode(), mark.encode("utf-16-le"), mark[::-1].encode()):
            assert text not in copy.data, text
    kept = ("TM", *(("AS",) if options.keep_characteristics else ())) if options.keep_times else ()
    dataset = dcmread(io.BytesIO(copy.data))
    for element in dataset.iterall():  # one date shifted may well be another's original
        if element.VR not in ("OB", "OW", *kept):
            assert str(element.value) != planted_value(int(element.tag), element.VR), element.tag
    assert copy.num_searched > 1500


def test_names_in_every_character_set_are_gone() -> None:
    folder = Path(pydicom.data.__file__).parent / "charset_files"
    policy = GatePolicy(accept=(Acceptance(sop_class="SecondaryCaptureImageStorage", findings=FINDINGS),))
    copies, refusals = copy_all(real_files(folder), ExportOptions(gate=policy))
    assert len(copies) > 5
    assert Reason.MALFORMED not in refusals.values()
    for path, copy in copies.items():
        name = dcmread(path).PatientName.original_string
        assert len(name) > 3
        assert name not in copy.data


FINDINGS = frozenset({"text_class", "screen_capture", "secondary_image", "regions"})
LEAKY: dict[str, Any] = {
    "PatientName": "Kowalczyk^Bronislawa",
    "PatientID": "MRN8837261",
    "PatientBirthDate": "19531122",
    "AccessionNumber": "ACC55512987",
    "StudyInstanceUID": "1.2.826.0.1.3680043.2.1125.9876543210",
}


@pytest.mark.parametrize("keyword", sorted(LEAKY))
def test_copy_in_which_a_rule_failed_is_not_handed_out(keyword: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: break the rule of one element, and the scan of the bytes must notice."""
    data = a_dicom(**LEAKY, BurnedInAnnotation="NO")
    assert make_copy(data, KEY, OPTIONS).data
    honest = clean

    def forgetful(source: Dataset, *rest: Any) -> Dataset:
        copy = honest(source, *rest)
        copy[keyword] = source[keyword]
        return copy

    monkeypatch.setattr(deidentify, "clean", forgetful)
    with pytest.raises(IdentifierLeftError) as caught:
        make_copy(data, KEY, OPTIONS)
    assert {leak.keyword for leak in caught.value.leaks} >= {keyword}
    assert LEAKY[keyword] not in f"{caught.value} {caught.value.leaks} {caught.value.remedy}"


@pytest.mark.parametrize(
    "hidden",
    [
        "Kowalczyk".encode("utf-16-le"),
        b"bronislawa",
        b"S293YWxjenlr",  # base64
        b"4b6f77616c637a796b",
        b"kyzclawoK",
        b"1953-11-22",
        b"22.11.1953",
        b"8837261",
        b"KOWALCZYK BRONISLAWA",
    ],
)
@pytest.mark.parametrize("place", ["header", "PixelData", "behind"])
def test_identifier_in_disguise_is_found_wherever_it_hides(
    hidden: bytes, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an element that stays, among the pixels (from 8 bytes on), or behind the last element."""
    if place != "header" and len(hidden) < 8:
        return
    honest = deidentify._encode

    def spoiled(copy: Dataset, syntax: str) -> bytes:
        if place == "header":
            copy.ManufacturerModelName = hidden.decode("latin-1")
        written = honest(copy, syntax)
        if place == "PixelData":
            return written[:-40] + hidden.ljust(40, b"\x07")[:40]
        return written + hidden if place == "behind" else written

    monkeypatch.setattr(deidentify, "_encode", spoiled)
    monkeypatch.setattr(deidentify, "prove_pixels", lambda *_: None)  # only the scan is asked here
    data = a_dicom(**LEAKY, BurnedInAnnotation="NO")
    if place == "header":  # may be empty, and so is emptied; what repeats the fault is then refused
        monkeypatch.setattr(deidentify, "_NEVER_EMPTIED", frozenset({"ManufacturerModelName"}))
    with pytest.raises(IdentifierLeftError):
        make_copy(data, KEY, OPTIONS)


def test_copy_whose_pixels_differ_is_not_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = deidentify._encode
    monkeypatch.setattr(deidentify, "_encode", lambda *args: honest(*args)[:-1] + b"\x55")
    assert refused(a_dicom(BurnedInAnnotation="NO")) is Reason.PIXELS_CHANGED


def test_element_that_stays_but_repeats_an_identifier_is_emptied() -> None:
    repeating: dict[str, Any] = {
        "PatientID": "48151623",
        "PatientName": "Kowalczyk^Bronislawa",
        "SeriesNumber": 48151623,
        "ManufacturerModelName": "Scanner of Dr Kowalczyk",
        "BodyPartExamined": "KOWALCZYK",
        "Manufacturer": "ACME",
    }
    copy = copied(a_dicom(BurnedInAnnotation="NO", **repeating))
    assert (copy.SeriesNumber, copy.ManufacturerModelName, copy.BodyPartExamined) == (None, "", "")
    assert copy.Manufacturer == "ACME"


def test_identifier_in_an_element_that_cannot_be_empty_costs_the_copy() -> None:
    data = a_dicom(
        BurnedInAnnotation="NO",
        PatientName="Axialer^Bronislawa",
        ImageType=["ORIGINAL", "PRIMARY", "AXIALER"],
    )
    with pytest.raises(IdentifierLeftError) as caught:
        make_copy(data, KEY, OPTIONS)
    assert {leak.keyword for leak in caught.value.leaks} == {"PatientName"}


# What the copy says about itself, and how copies relate.


def a_study(patient: str, day: str, **more: Any) -> bytes:
    return a_dicom(
        **{
            "PatientID": patient,
            "StudyInstanceUID": a_uid(f"{patient}{day}"),
            "SeriesInstanceUID": a_uid(f"{patient}{day}s"),
            "StudyDate": day,
            "FrameOfReferenceUID": a_uid(f"{patient} frame"),
            "BurnedInAnnotation": "NO",
        }
        | more
    )


def days_between(first: Dataset, second: Dataset) -> int:
    return int((np.datetime64(iso(second.StudyDate)) - np.datetime64(iso(first.StudyDate))).astype(int))


def iso(day: str) -> str:
    return f"{day[:4]}-{day[4:6]}-{day[6:]}"


def test_copies_of_a_patient_keep_references_and_intervals_under_one_key_only() -> None:
    early, late = a_study("P1", "20200101"), a_study("P1", "20200301")
    first, second, again = copied(early), copied(late), copied(early)
    assert first == again
    assert days_between(first, second) == 60
    assert first.PatientID == second.PatientID != "P1"
    assert first.FrameOfReferenceUID == second.FrameOfReferenceUID
    assert first.StudyInstanceUID != second.StudyInstanceUID
    assert first.StudyDate != "20200101"
    other = copied(early, key=bytes(32))
    assert (other.PatientID, other.StudyInstanceUID) != (first.PatientID, first.StudyInstanceUID)
    stranger = copied(a_study("P2", "20200101"))
    assert stranger.PatientID != first.PatientID
    unknown = copied(a_study("", "20200101", PatientName="P1"))
    assert unknown.PatientID != first.PatientID  # a name is no ID


def test_copy_says_what_was_done_and_holds_nothing_in_front() -> None:
    data = encode(a_dataset(BurnedInAnnotation="NO", StudyTime="101112"), preamble=b"SECRET IN FRONT")
    copy = make_copy(data, KEY, ExportOptions(keep_characteristics=True))
    assert copy.data[:132] == bytes(128) + b"DICM"
    dataset = dcmread(io.BytesIO(copy.data))
    assert dataset.PatientIdentityRemoved == "YES"
    assert dataset.LongitudinalTemporalInformationModified == "MODIFIED"
    assert dataset.StudyTime == ""
    # PS3.16 CID 7050
    assert [item.CodeValue for item in dataset.DeidentificationMethodCodeSequence] == [
        *("113100", "113107", "113108"),
    ]
    assert set(dataset.file_meta.keys()) == {
        *(Tag(2, number) for number in (0, 1, 2, 3, 0x10, 0x12, 0x13)),
    }
    assert dataset.file_meta.MediaStorageSOPInstanceUID == dataset.SOPInstanceUID
    assert copy.name.startswith(f"{dataset.PatientID}/")


def test_characteristics_and_times_stay_only_when_asked_for() -> None:
    data = a_dicom(
        BurnedInAnnotation="NO",
        PatientSex="F",
        PatientAge="094Y",
        PatientWeight=61.5,
        StudyTime="101112.5",
        AcquisitionDateTime="20200101101112",
        StudyDate="20200101",
    )
    least, most = copied(data), copied(data, ExportOptions(keep_times=True, keep_characteristics=True))
    assert (least.PatientSex, least.StudyTime, len(least.AcquisitionDateTime)) == ("", "", 8)
    assert "PatientAge" not in least
    assert (most.PatientSex, most.PatientAge, most.PatientWeight) == ("F", "090Y", 61.5)
    assert (most.StudyTime, most.AcquisitionDateTime[8:]) == ("101112.5", "101112")
    assert most.AcquisitionDateTime[:8] == most.StudyDate != "20200101"


def test_named_private_numbers_stay_and_no_other() -> None:
    dataset = a_dataset(BurnedInAnnotation="NO")
    block = dataset.private_block(0x0019, "SIEMENS MR HEADER", create=True)
    block.add_new(0x0C, "IS", 1000)
    block.add_new(0x0D, "CS", "DIRECTIONAL")
    block.add_new(0x0E, "FD", [0.1, 0.2, 0.3])
    kept = ExportOptions(safe_private=frozenset({"0019|SIEMENS MR HEADER|0C", "0019|SIEMENS MR HEADER|0D"}))
    copy = copied(encode(dataset), kept)
    assert {
        element.tag.element & 0xFF
        for element in copy
        if element.tag.is_private_creator is False and element.tag.is_private
    } == {0x0C}
    assert copy[0x0019100C].value == 1000
    assert "113111" in [item.CodeValue for item in copy.DeidentificationMethodCodeSequence]
    assert not any(element.tag.is_private for element in copied(encode(dataset)))


@pytest.mark.parametrize("text", ["0018|X|01", "0019||01", "0019|X", "0019|X|1", "0019|X|01|"])
def test_private_elements_are_named_in_full(text: str) -> None:
    with pytest.raises(ValueError, match="safe_private"):
        ExportOptions(safe_private=frozenset({text}))


def a_code(value: str, scheme: str, meaning: str) -> Dataset:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, scheme, meaning
    return code


def test_codes_of_the_hospitals_own_lists_lose_their_text_and_public_ones_stay() -> None:
    copy = copied(
        a_dicom(
            BurnedInAnnotation="NO",
            RequestedProcedureDescription="CT for Dr Zimmer",
            RequestedProcedureCodeSequence=[a_code("CTZ", "Zimmer's list", "CT for Dr Zimmer")],
            ProcedureCodeSequence=[a_code("RPID16", "RADLEX", "CT CHEST")],
            AnatomicRegionSequence=[a_code("X1", "99MAKER", "upper left field")],
        )
    )
    (local,), (public,), (region,) = (
        copy.RequestedProcedureCodeSequence,
        copy.ProcedureCodeSequence,
        copy.AnatomicRegionSequence,
    )
    assert (local.CodeValue, local.CodeMeaning, local.CodingSchemeDesignator) == (
        *("REMOVED", "REMOVED", "REMOVED"),
    )
    assert (public.CodeValue, public.CodeMeaning) == ("RPID16", "CT CHEST")
    assert region.CodeMeaning == "upper left field"


# Rules against the table.


def test_every_element_of_the_profile_has_an_action_no_weaker() -> None:
    """Whatever PS3.15 removes, empties or replaces is never kept here, whatever its VR."""
    weak = {
        keyword_of(tag)
        for tag in profile()
        if keyword_of(tag) and tag >> 16 != 2
        for vr in {str(DicomDictionary.get(tag, ("UN",))[0]).split(" or ")[0]}
        if action_of(tag, vr) is Action.KEEP
    }
    assert weak == set()
    assert len(profile()) > 400


def test_element_with_a_wrong_vr_or_unknown_tag_is_removed() -> None:
    assert action_of(0x00280010, "US") is Action.KEEP
    assert action_of(0x00280010, "LO") is Action.REMOVE
    assert action_of(0x00280003, "LO") is Action.REMOVE
    assert action_of(0x00990010, "LO") is Action.REMOVE


# Real files.


def real_files(*folders: Path) -> Iterator[Path]:
    for folder in folders:
        yield from (path for path in sorted(folder.rglob("*")) if path.is_file())


def permissive() -> ExportOptions:
    """Let captures and photographs through the gate, so that as many files as can be are copied."""
    return ExportOptions(
        gate=GatePolicy(
            accept=tuple(
                Acceptance(sop_class=keyword, findings=FINDINGS | {"burned_in_unknown", "recognizable"})
                for keyword in ("SecondaryCaptureImageStorage", "CTImageStorage", "MRImageStorage")
            )
        )
    )


def check_copy(data: bytes, copy: SafeCopy, name: str) -> None:
    with contained(Reason.MALFORMED):
        source = dcmread(io.BytesIO(data), force=True)
        patient = [str(source.get(key) or "") for key in ("PatientName", "PatientID")]
        number = str(source.get("SOPInstanceUID"))
        original = pixel_array(source) if copy.pixels in ("identical", "trimmed") else None
    with config.disable_value_validation():
        dataset = dcmread(io.BytesIO(copy.data))
    assert number.encode() not in copy.data, name
    for text in patient:
        if len(text) > 5 and text.lower() not in ("anonymous", "patient", "phantom"):
            assert text.encode() not in copy.data.replace(b"REMOVED", b""), name
    assert not any(element.tag.is_private for element in dataset.iterall()), name
    if original is not None:
        assert np.array_equal(pixel_array(dataset), original), name


def copy_all(paths: Iterator[Path], options: ExportOptions) -> tuple[dict[Path, SafeCopy], dict[str, Reason]]:
    """Copies, each checked, and reasons why there is none."""
    copies, refusals = {}, {}
    for path in paths:
        data = path.read_bytes()
        try:
            copies[path] = make_copy(data, KEY, options)
        except UnusableImageError as error:
            refusals[path.name] = error.reason
        else:
            with contextlib.suppress(UnusableImageError, RuntimeError, AttributeError, ValueError):
                check_copy(data, copies[path], path.name)  # unless pydicom cannot decode it
    assert not {Reason.IDENTIFIER_LEFT, Reason.PIXELS_CHANGED} & set(refusals.values()), refusals
    return copies, refusals


def test_bundled_files_are_copied_without_an_identifier_or_refused_by_name() -> None:
    root = Path(pydicom.data.__file__).parent
    copies, refusals = copy_all(real_files(root / "test_files"), permissive())
    assert len(copies) > 130
    assert refusals["MR_truncated.dcm"] is Reason.TRUNCATED
    assert refusals["examples_rgb_color.dcm"] is Reason.REGIONS
    assert refusals["DICOMDIR"] is Reason.NOT_EXPORTABLE


@pytest.mark.data
def test_varied_and_vendor_files_are_copied_without_an_identifier(shared_data: Path) -> None:
    copies, refusals = copy_all(real_files(shared_data / "dicom-varied"), permissive())
    assert len(copies) > 75
    assert set(refusals.values()) == {
        *(Reason.NOT_DICOM, Reason.NO_PATIENT, Reason.SCREEN_CAPTURE, Reason.TRANSFER_SYNTAX),
        Reason.REGIONS,
    }
    vendors = sorted((shared_data / "dicom-vendors").rglob("*.dcm"))[::40]
    copies, refusals = copy_all(iter(vendors), OPTIONS)
    assert (len(copies), refusals) == (len(vendors), {})
