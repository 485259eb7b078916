"""The gate: a truth table over every rule, every real file, malformed headers, and what a mask leaves."""

from __future__ import annotations

import contextlib
import io
import sqlite3
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pydicom.data
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from pydicom import dcmread, uid
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from fedward_client.cohort import open_cohort
from fedward_client.dicom.decode import decode_image
from fedward_client.dicom.gate import (
    Acceptance,
    Box,
    GateFacts,
    GatePolicy,
    GateVerdict,
    Liftable,
    gate_facts,
    judge,
    mask,
    read_gate_facts,
)
from fedward_client.dicom.header import read_header
from fedward_client.dicom.parser import contained, parse_file
from fedward_client.dicom.pixels import reach_pixels, stored_frames
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.sop_classes import ANY_MODALITY, IMAGE_SOP_CLASSES
from fedward_client.dicom.synthetic import write_phantom_sites
from fedward_client.index import index_folder
from fedward_client.index_reading import facts_from, signs_of
from fedward_client.quarantine import quarantine_rows
from fedward_common.errors import CohortError
from tests.builders import a_dataset, a_dicom, a_site, encode

STRICT = GatePolicy()
US = uid.UltrasoundImageStorage
CLEAN = GateFacts(
    sop_class=uid.CTImageStorage,
    modality="CT",
    burned_in="no",
    recognizable="absent",
    conversion_type="",
    image_type=("ORIGINAL", "PRIMARY", "AXIAL"),
    says_capture=False,
    capture_device=False,
    rows=100,
    columns=80,
    overlay_planes=0,
    overlay_in_pixels=False,
    num_private=0,
    regions=(),
    regions_unusable=False,
    head=False,
    identity_removed="absent",
)
PICTURE = (Box(20, 10, 90, 70),)
ULTRASOUND: dict[str, Any] = {"sop_class": US, "modality": "US", "regions": PICTURE}


def facts(**changes: Any) -> GateFacts:
    return replace(CLEAN, **changes)


def a_region(corners: tuple[int, int, int, int], spatial_format: int = 1) -> Dataset:
    """Corners as DICOM writes them: x0, y0, x1, y1, both ends inside."""
    item = Dataset()
    item.RegionSpatialFormat = spatial_format
    item.RegionDataType = 1
    item.RegionLocationMinX0, item.RegionLocationMinY0 = corners[:2]
    item.RegionLocationMaxX1, item.RegionLocationMaxY1 = corners[2:]
    return item


TRUTH: list[tuple[dict[str, Any], str, Reason | None]] = [
    ({}, "train", None),
    ({"burned_in": "absent"}, "train", None),
    ({"image_type": ()}, "train", None),
    ({"image_type": ("DERIVED", "PRIMARY")}, "train", None),
    ({"num_private": 400, "overlay_planes": 2}, "train", None),
    ({"overlay_in_pixels": True, "overlay_planes": 1}, "train", None),
    ({"head": True}, "train", None),
    ({"identity_removed": "no"}, "train", None),
    ({"burned_in": "yes"}, "quarantine", Reason.BURNED_IN),
    ({"recognizable": "yes"}, "quarantine", Reason.RECOGNIZABLE),
    ({"recognizable": "no"}, "train", None),
    ({"malformed": frozenset({"BurnedInAnnotation"})}, "quarantine", Reason.UNREADABLE_SIGNS),
    ({"says_capture": True}, "quarantine", Reason.SCREEN_CAPTURE),
    ({"capture_device": True}, "quarantine", Reason.SCREEN_CAPTURE),
    *[
        ({"conversion_type": kind}, "quarantine", Reason.SCREEN_CAPTURE)
        for kind in ("DV", "DI", "DF", "WSD", "SD", "SI", "DRW", "SYN", "NONSENSE")
    ],
    ({"image_type": ("DERIVED", "SECONDARY"), "burned_in": "no"}, "train", None),
    ({"image_type": ("DERIVED", "SECONDARY"), "burned_in": "absent"}, "quarantine", Reason.SECONDARY_IMAGE),
    ({"colour": True, "burned_in": "absent"}, "quarantine", Reason.BURNED_IN_UNKNOWN),
    ({"colour": True, "burned_in": "no"}, "train", None),
    ({"placeless": True, "burned_in": "absent"}, "quarantine", Reason.BURNED_IN_UNKNOWN),
    ({"placeless": True, "burned_in": "no"}, "train", None),
    ({"sop_class": ""}, "quarantine", Reason.SOP_CLASS),
    ({"sop_class": "1.3.12.2.1107.5.9.1"}, "quarantine", Reason.SOP_CLASS),
    ({"sop_class": uid.SegmentationStorage}, "quarantine", Reason.SOP_CLASS),
    ({"sop_class": uid.RawDataStorage}, "quarantine", Reason.SOP_CLASS),
    *[
        ({"sop_class": document}, "quarantine", Reason.TEXT_DOCUMENT)
        for document in (
            uid.BasicTextSRStorage,
            uid.ComprehensiveSRStorage,
            uid.EncapsulatedPDFStorage,
            uid.EncapsulatedCDAStorage,
            uid.KeyObjectSelectionDocumentStorage,
            uid.GrayscaleSoftcopyPresentationStateStorage,
            uid.TwelveLeadECGWaveformStorage,
            uid.RTPlanStorage,
            uid.SpectaclePrescriptionReportStorage,
        )
    ],
    *[
        ({"sop_class": text, "burned_in": "no"}, "quarantine", Reason.TEXT_CLASS)
        for text in (
            *ANY_MODALITY,
            uid.VLEndoscopicImageStorage,
            uid.VLPhotographicImageStorage,
            uid.VLMicroscopicImageStorage,
            uid.DermoscopicPhotographyImageStorage,
        )
    ],
    *[
        ({"sop_class": kind, "modality": name, "burned_in": said}, decision, reason)
        for kind, name in (
            (uid.XRayAngiographicImageStorage, "XA"),
            (uid.XRayRadiofluoroscopicImageStorage, "RF"),
            (uid.EnhancedXAImageStorage, "XA"),
            (uid.RTImageStorage, "RTIMAGE"),
            (uid.OphthalmicPhotography8BitImageStorage, "OP"),
            (uid.OphthalmicTomographyImageStorage, "OPT"),
        )
        for said, decision, reason in (
            ("no", "train", None),
            ("absent", "quarantine", Reason.BURNED_IN_UNKNOWN),
        )
    ],
    ({"modality": "OT", "burned_in": "absent"}, "quarantine", Reason.BURNED_IN_UNKNOWN),
    ({"modality": "", "burned_in": "absent"}, "quarantine", Reason.BURNED_IN_UNKNOWN),
    ({"modality": "OT", "burned_in": "no"}, "train", None),
    (ULTRASOUND, "mask", Reason.MASKED),
    (ULTRASOUND | {"burned_in": "absent"}, "mask", Reason.MASKED),
    (ULTRASOUND | {"burned_in": "yes"}, "mask", Reason.MASKED),
    (ULTRASOUND | {"regions": ()}, "quarantine", Reason.REGIONS),
    (ULTRASOUND | {"regions_unusable": True}, "quarantine", Reason.REGIONS),
    (ULTRASOUND | {"regions": (Box(0, 0, 100, 80),)}, "train", None),
    (ULTRASOUND | {"regions": (Box(0, 0, 100, 80),), "burned_in": "absent"}, "quarantine", Reason.REGIONS),
    (ULTRASOUND | {"regions": (Box(0, 0, 100, 80),), "burned_in": "yes"}, "quarantine", Reason.BURNED_IN),
    (ULTRASOUND | {"says_capture": True}, "quarantine", Reason.SCREEN_CAPTURE),
    (ULTRASOUND | {"recognizable": "yes"}, "quarantine", Reason.RECOGNIZABLE),
    ({"regions": PICTURE, "burned_in": "yes"}, "quarantine", Reason.BURNED_IN),  # a CT has no regions
]


@pytest.mark.parametrize(("changes", "decision", "reason"), TRUTH)
def test_default_policy_decides_as_the_truth_table_says(
    changes: dict[str, Any], decision: str, reason: Reason | None
) -> None:
    verdict = judge(facts(**changes), STRICT)
    assert (verdict.decision, verdict.reason) == (decision, reason)
    assert bool(verdict.remedy) == (reason is not None)
    assert (verdict.regions == PICTURE) == (decision == "mask")
    refusal = verdict.refusal()
    assert (refusal is not None) == (decision == "quarantine")
    if refusal is not None:
        assert refusal.reason is reason


@pytest.mark.parametrize(
    ("policy", "changes", "reason"),
    [
        ({"burned_in_no": {"CT"}}, {"burned_in": "absent"}, Reason.BURNED_IN_UNKNOWN),
        ({"burned_in_no": {"CT"}}, {}, None),
        ({"ultrasound": "quarantine"}, ULTRASOUND, Reason.REGIONS),
        ({"overlays": "quarantine"}, {"overlay_planes": 1}, Reason.OVERLAYS),
        ({"overlays": "quarantine"}, {}, None),
        ({"derived": "quarantine"}, {"image_type": ("DERIVED", "PRIMARY")}, Reason.DERIVED_IMAGE),
        ({"derived": "quarantine"}, {}, None),
        ({"faces": "quarantine"}, {"head": True}, Reason.FACE),
        (
            {"faces": "quarantine"},
            {"head": True, "sop_class": uid.ComputedRadiographyImageStorage, "modality": "CR"},
            None,
        ),
        ({"max_private": 3}, {"num_private": 4}, Reason.PRIVATE_ELEMENTS),
        ({"max_private": 3}, {"num_private": 3}, None),
        ({"identity_removed": True}, {"identity_removed": "absent"}, Reason.IDENTITY_KEPT),
        ({"identity_removed": True}, {"identity_removed": "yes"}, None),
    ],
)
def test_site_policy_tightens(policy: dict[str, Any], changes: dict[str, Any], reason: Reason | None) -> None:
    assert judge(facts(**changes), GatePolicy(**policy)).reason == reason


def test_accepted_class_lets_only_the_named_finding_through() -> None:
    screens = {"sop_class": uid.SecondaryCaptureImageStorage, "burned_in": "absent"}
    policy = GatePolicy(
        accept=(Acceptance(sop_class="SecondaryCaptureImageStorage", findings=frozenset({"text_class"})),)
    )
    assert judge(facts(**screens), policy).decision == "train"
    assert judge(facts(**screens, conversion_type="WSD"), policy).decision == "train"
    assert judge(facts(**screens, conversion_type="SD"), policy).reason is Reason.SCREEN_CAPTURE
    assert judge(facts(**screens, recognizable="yes"), policy).reason is Reason.RECOGNIZABLE
    assert judge(facts(**screens | {"burned_in": "yes"}), policy).reason is Reason.BURNED_IN
    assert judge(facts(sop_class=uid.VLPhotographicImageStorage), policy).reason is Reason.TEXT_CLASS


def test_accepted_text_is_blackened_and_only_in_images_of_the_named_size() -> None:
    accepted = Acceptance(
        sop_class="CTImageStorage",
        findings=frozenset({"burned_in"}),
        keep=((10, 0, 100, 80),),
        rows=100,
        columns=80,
    )
    policy = GatePolicy(accept=(accepted,))
    verdict = judge(facts(burned_in="yes"), policy)
    assert (verdict.decision, verdict.regions) == ("mask", (Box(10, 0, 100, 80),))
    assert judge(facts(burned_in="yes", rows=101), policy).reason is Reason.BURNED_IN


def test_part_to_keep_does_not_excuse_text_that_was_not_named() -> None:
    accepted = Acceptance(
        sop_class="UltrasoundImageStorage",
        findings=frozenset({"regions"}),
        keep=((10, 0, 100, 80),),
        rows=100,
        columns=80,
    )
    policy = GatePolicy(accept=(accepted,))
    bare = ULTRASOUND | {"regions": ()}
    assert judge(facts(**bare), policy).regions == (Box(10, 0, 100, 80),)
    assert judge(facts(**bare | {"burned_in": "yes"}), policy).reason is Reason.BURNED_IN


@pytest.mark.parametrize(
    "wrong",
    [
        {"sop_class": "CTImageStorage", "findings": {"burned_in"}},
        {"sop_class": "CTImageStorage", "findings": set()},
        {"sop_class": "CTImageStorage", "findings": {"text_document"}},
        {"sop_class": "CTImageStorage", "findings": {"unreadable_signs"}},
        {"sop_class": "BasicTextSRStorage", "findings": {"text_class"}},
        {"sop_class": "", "findings": {"text_class"}},
        {"sop_class": "*", "findings": {"text_class"}},
        {"sop_class": "CTImageStorage", "findings": {"regions"}, "keep": [[0, 0, 5, 5]]},
        {
            "sop_class": "CTImageStorage",
            "findings": {"regions"},
            "keep": [[0, 0, 6, 5]],
            "rows": 5,
            "columns": 5,
        },
        {
            "sop_class": "CTImageStorage",
            "findings": {"regions"},
            "keep": [[3, 0, 3, 5]],
            "rows": 5,
            "columns": 5,
        },
        {"sop_class": "CTImageStorage", "findings": {"regions"}, "unknown": 1},
    ],
)
def test_acceptance_that_names_no_class_or_too_much_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GatePolicy.model_validate({"accept": [wrong]})


def test_policy_does_not_take_unknown_settings() -> None:
    with pytest.raises(ValidationError):
        GatePolicy.model_validate({"burned_in": "train"})


some_answers = st.sampled_from(["yes", "no", "absent"])
some_facts = st.builds(
    GateFacts,
    sop_class=st.sampled_from([*IMAGE_SOP_CLASSES, *ANY_MODALITY, uid.BasicTextSRStorage, "", "1.2.3"]),
    modality=st.sampled_from(["CT", "MR", "US", "CR", "OT", "XA", ""]),
    burned_in=some_answers,
    recognizable=some_answers,
    conversion_type=st.sampled_from(["", "WSD", "SD"]),
    image_type=st.sampled_from([(), ("ORIGINAL", "PRIMARY"), ("DERIVED", "SECONDARY"), ("DERIVED",)]),
    says_capture=st.booleans(),
    capture_device=st.booleans(),
    rows=st.just(100),
    columns=st.just(80),
    overlay_planes=st.integers(0, 2),
    overlay_in_pixels=st.booleans(),
    num_private=st.integers(0, 9),
    regions=st.sampled_from([(), PICTURE, (Box(0, 0, 100, 80),)]),
    regions_unusable=st.booleans(),
    head=st.booleans(),
    identity_removed=some_answers,
    malformed=st.sampled_from([frozenset(), frozenset({"Rows"})]),
)
some_policies = st.builds(
    GatePolicy,
    burned_in_no=st.frozensets(st.sampled_from(["CT", "MR", "CR"])),
    ultrasound=st.sampled_from(["mask", "quarantine"]),
    overlays=st.sampled_from(["ignore", "quarantine"]),
    derived=st.sampled_from(["train", "quarantine"]),
    faces=st.sampled_from(["train", "quarantine"]),
    max_private=st.none() | st.integers(0, 5),
    identity_removed=st.booleans(),
)
SEVERITY = {"train": 0, "mask": 1, "quarantine": 2}


@given(some_facts, some_policies)
def test_no_setting_but_an_acceptance_ever_relaxes_the_default(seen: GateFacts, policy: GatePolicy) -> None:
    default, site = judge(seen, STRICT), judge(seen, policy)
    assert SEVERITY[site.decision] >= SEVERITY[default.decision]


@given(
    some_facts,
    st.sampled_from(get_args(Liftable)),
    st.sampled_from(["CTImageStorage", "UltrasoundImageStorage"]),
)
def test_acceptance_never_touches_another_class(seen: GateFacts, finding: str, keyword: str) -> None:
    accepted = Acceptance.model_validate(
        {"sop_class": keyword, "findings": [finding], "keep": [[0, 0, 9, 9]], "rows": 100, "columns": 80}
    )
    if seen.sop_class and uid.UID(seen.sop_class).keyword == keyword:
        return
    assert judge(seen, GatePolicy(accept=(accepted,))) == judge(seen, STRICT)


# What is read out of headers.


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        ({}, {"burned_in": "absent", "recognizable": "absent", "conversion_type": "", "image_type": ()}),
        ({"BurnedInAnnotation": "NO"}, {"burned_in": "no"}),
        ({"BurnedInAnnotation": "no "}, {"burned_in": "no"}),
        ({"BurnedInAnnotation": "YES"}, {"burned_in": "yes"}),
        ({"BurnedInAnnotation": "Y"}, {"burned_in": "yes"}),
        ({"BurnedInAnnotation": ["NO", "NO"]}, {"burned_in": "yes"}),
        ({"BurnedInAnnotation": ""}, {"burned_in": "absent"}),
        ({"RecognizableVisualFeatures": "YES"}, {"recognizable": "yes"}),
        ({"ConversionType": "wsd"}, {"conversion_type": "WSD"}),
        ({"ImageType": ["DERIVED ", "SECONDARY", "SCREEN SAVE"]}, {"says_capture": True}),
        ({"SeriesDescription": "Dose Report"}, {"says_capture": True}),
        ({"SeriesDescription": "Patient Protocol"}, {"says_capture": True}),
        ({"SeriesDescription": "screenshots"}, {"says_capture": True}),
        ({"SeriesDescription": "LUNG CANCER SCREENING LOW DOSE"}, {"says_capture": False}),
        ({"SeriesDescription": "SnapShot Pulse 75%"}, {"says_capture": False}),
        ({"SecondaryCaptureDeviceManufacturer": "ACME"}, {"capture_device": True}),
        ({"BodyPartExamined": "Brain"}, {"head": True}),
        ({"BodyPartExamined": "HEADNECK"}, {"head": True}),
        ({"BodyPartExamined": "HEART"}, {"head": False}),
        ({"PatientIdentityRemoved": "YES"}, {"identity_removed": "yes"}),
    ],
)
def test_facts_are_read_alike_from_bytes_and_from_a_dataset(
    elements: dict[str, Any], expected: dict[str, Any]
) -> None:
    data = a_dicom(**elements)
    found = read_gate_facts(data)
    assert {name: getattr(found, name) for name in expected} == expected
    assert gate_facts(dcmread(io.BytesIO(data), stop_before_pixels=True)) == found


def test_private_elements_and_overlays_are_counted() -> None:
    dataset = a_dataset()
    dataset.private_block(0x0029, "ACME", create=True).add_new(0x01, "LO", "x")
    dataset.add_new(0x60000010, "US", 16)
    dataset.add_new(0x60000100, "US", 1)
    dataset.add_new(0x60000102, "US", 0)
    dataset.add_new(0x60003000, "OW", bytes(32))
    found = read_gate_facts(encode(dataset))
    assert (found.num_private, found.overlay_planes, found.overlay_in_pixels) == (2, 1, False)
    assert not judge(found, STRICT).clear_unused_bits


@pytest.mark.parametrize("changed", [{0x60000102: 12}, {0x60000100: 16}, {0x60003000: None}])
def test_overlay_that_may_lie_in_the_pixels_is_noticed(changed: dict[int, int | None]) -> None:
    dataset = a_dataset()
    elements: dict[int, Any] = {0x60000010: 16, 0x60000100: 1, 0x60000102: 0, 0x60003000: bytes(32)} | changed
    for tag, value in elements.items():
        if value is not None:
            dataset.add_new(tag, "OW" if tag == 0x60003000 else "US", value)
    verdict = judge(read_gate_facts(encode(dataset)), STRICT)
    assert verdict.clear_unused_bits


@pytest.mark.parametrize("signed", [False, True])
def test_overlay_in_unused_bits_never_reaches_the_pixels_that_train(signed: bool) -> None:
    """The gate lets such an image through because the decoder clears what is above BitsStored."""
    picture = np.arange(256, dtype=np.uint16).reshape(16, 16)
    stored = picture | np.uint16(0x1000) * (picture % 2 == 0)
    pixels = stored.view(np.int16) if signed else stored
    planted = a_dicom(pixels, BitsStored=12, HighBit=11)
    clean = a_dicom(picture.view(pixels.dtype), BitsStored=12, HighBit=11)
    with contained(Reason.DECODE_FAILED):
        parsed, header = parse_file(planted), read_header(planted)
        (found,) = stored_frames(reach_pixels(parsed, header, planted), header)
    assert np.array_equal(found, picture)
    assert np.array_equal(decode_image(planted), decode_image(clean))


@pytest.mark.parametrize(
    ("corners", "expected"),
    [
        ((2, 4, 10, 12), (Box(4, 2, 13, 11),)),
        ((0, 0, 16, 16), (Box(0, 0, 16, 16),)),  # one beyond the last pixel, as some scanners write
        ((0, 0, 17, 10), None),
        ((0, 0, 10, 17), None),
        ((5, 0, 4, 10), None),
    ],
)
def test_regions_are_half_open_boxes_or_unusable(
    corners: tuple[int, int, int, int], expected: tuple[Box, ...] | None
) -> None:
    data = a_dicom(SOPClassUID=US, Modality="US", SequenceOfUltrasoundRegions=[a_region(corners)])
    found = read_gate_facts(data)
    assert (found.regions if not found.regions_unusable else None) == expected


def test_regions_of_graphics_and_colour_bars_hold_no_picture() -> None:
    regions = [a_region((1, 1, 8, 8)), a_region((9, 9, 12, 12), 0), a_region((9, 9, 12, 12), 5)]
    found = read_gate_facts(a_dicom(SOPClassUID=US, Modality="US", SequenceOfUltrasoundRegions=regions))
    assert found.regions == (Box(1, 1, 9, 9),)


@pytest.mark.parametrize("corners", [(0x7FFFFFFF,) * 4, (0, 0, 0xFFFFFFFF, 1)])
def test_regions_far_outside_are_unusable(corners: tuple[int, int, int, int]) -> None:
    found = read_gate_facts(
        a_dicom(SOPClassUID=US, Modality="US", SequenceOfUltrasoundRegions=[a_region(corners)])
    )
    assert found.regions_unusable


MALFORMED_VALUES = {
    "Rows": (0x00280010, "US", b"\1\0\2\0"),
    "Columns": (0x00280011, "US", b"\1"),
    "ImageType": (0x00080008, "CS", b"A" * 5000),
    "BurnedInAnnotation": (0x00280301, "CS", b"N" * 5000),
    "OverlayBitPosition": (0x60000102, "US", b"\1"),
}


@pytest.mark.parametrize("keyword", sorted(MALFORMED_VALUES))
def test_malformed_sign_counts_as_the_worst(keyword: str) -> None:
    tag, vr, value = MALFORMED_VALUES[keyword]
    dataset = Dataset()
    dataset.SOPClassUID, dataset.Modality = uid.CTImageStorage, "CT"
    dataset.Rows = dataset.Columns = 16
    dataset[tag] = RawDataElement(Tag(tag), vr, len(value), value, 0, False, True)
    with contained(Reason.MALFORMED):
        found = gate_facts(dataset)
    if keyword in ("ImageType", "BurnedInAnnotation"):  # only long: pydicom reads it, and it is no NO
        assert judge(found, STRICT).decision == "quarantine" or keyword == "ImageType"
    else:
        assert found.malformed == {keyword}
        assert judge(found, STRICT).reason is Reason.UNREADABLE_SIGNS


def test_a_sequence_in_the_place_of_an_answer_is_no_silence() -> None:
    data = a_dicom(BurnedInAnnotation="YES")
    place = data.index(struct.pack("<HH", 0x0028, 0x0301))
    empty = struct.pack("<HH2sHLHHL", 0x0028, 0x0301, b"UN", 0, 0xFFFFFFFF, 0xFFFE, 0xE0DD, 0)

    found = read_gate_facts(data[:place] + empty + data[place + 12 :])

    assert (found.burned_in, found.malformed) == ("yes", frozenset({"BurnedInAnnotation"}))


@given(st.binary(max_size=300), st.integers(0, 40))
def test_no_header_makes_the_gate_raise_anything_else(noise: bytes, place: int) -> None:
    whole = a_dicom(
        BurnedInAnnotation="NO", SOPClassUID=US, SequenceOfUltrasoundRegions=[a_region((1, 1, 8, 8))]
    )
    at = 140 + place * 12
    with contextlib.suppress(UnusableImageError):
        verdict = judge(read_gate_facts(whole[:at] + noise + whole[at + len(noise) :]), STRICT)
        assert isinstance(verdict, GateVerdict)


# What a mask leaves.


def test_mask_keeps_the_regions_and_blackens_the_rest() -> None:
    values = np.arange(48, dtype=np.float32).reshape(6, 8) + 100
    masked = mask(values, (Box(1, 2, 3, 5), Box(4, 0, 6, 1)))
    expected = np.full((6, 8), 110.0)
    expected[1:3, 2:5] = values[1:3, 2:5]
    expected[4:6, 0:1] = values[4:6, 0:1]
    assert np.array_equal(masked, expected)
    assert values[0, 0] == 100
    assert mask(values, (Box(1, 2, 3, 5),), inverted=True)[0, 0] == values[2, 4]


def test_mask_covers_every_frame_and_every_colour() -> None:
    frames = np.full((4, 6, 8, 3), 200, dtype=np.uint8)
    masked = mask(frames, (Box(2, 2, 4, 4),))
    assert masked.shape == frames.shape
    assert masked.sum() == 4 * 2 * 2 * 3 * 200
    assert mask(frames[0], (Box(2, 2, 4, 4),), colour=True).sum() == 2 * 2 * 3 * 200
    assert mask(frames[..., 0].astype(np.float32), (Box(2, 2, 4, 4),)).shape == (4, 6, 8)


@pytest.mark.parametrize("regions", [(), (Box(0, 0, 7, 1),), (Box(3, 3, 3, 5),), (Box(-1, 0, 2, 2),)])
def test_mask_refuses_regions_that_do_not_fit(regions: tuple[Box, ...]) -> None:
    with pytest.raises(UnusableImageError) as caught:
        mask(np.zeros((6, 8)), regions)
    assert caught.value.reason is Reason.REGIONS


# Real files.


def bundled() -> Iterator[Path]:
    root = Path(pydicom.data.__file__).parent
    for folder in ("test_files", "charset_files"):
        yield from (path for path in sorted((root / folder).rglob("*")) if path.is_file())


def judged(paths: Iterator[Path]) -> dict[str, GateVerdict]:
    """Verdict on every readable file, after checking that both readers see the same."""
    verdicts = {}
    for path in paths:
        data = path.read_bytes()
        try:
            found = read_gate_facts(data)
        except UnusableImageError:
            continue
        with contained(Reason.MALFORMED):
            dataset = dcmread(io.BytesIO(data), stop_before_pixels=True, force=True)
            assert gate_facts(dataset) == found, path.name
        verdicts[path.name if path.name not in verdicts else str(path)] = judge(found, STRICT)
        assert "^" not in repr(found)
    return verdicts


def test_bundled_files_with_text_or_screens_stay_out() -> None:
    verdicts = judged(bundled())
    assert len(verdicts) > 150
    for name in (
        "examples_rgb_color.dcm",
        "examples_jpeg2k.dcm",
        "examples_palette.dcm",
        "examples_ybr_color.dcm",
    ):
        assert verdicts[name].reason is Reason.REGIONS, name  # names and dates on the picture; looked at
    assert verdicts["chrGerm.dcm"].reason is Reason.TEXT_CLASS
    assert verdicts["test-SR.dcm"].reason is Reason.TEXT_DOCUMENT
    assert verdicts["examples_overlay.dcm"].reason is Reason.SECONDARY_IMAGE
    assert verdicts["CT_small.dcm"].decision == "train"
    assert all(verdict.remedy for verdict in verdicts.values() if verdict.decision != "train")


@pytest.mark.data
def test_varied_files_with_burned_in_text_never_train_unmasked(shared_data: Path) -> None:
    verdicts = judged(path for path in sorted((shared_data / "dicom-varied").rglob("*")) if path.is_file())
    for name, verdict in verdicts.items():
        if name.startswith("US1_"):
            assert verdict.reason is Reason.REGIONS, name
        if name.startswith("OBXXXX1A"):  # hospital and date above row 60, settings left of column 120
            assert verdict.regions == (Box(60, 120, 519, 800),), name
        if name.startswith("gdcm-US-ALOKA"):  # hospital and date above row 24
            assert verdict.regions == (Box(24, 32, 416, 336), Box(24, 336, 416, 640)), name
    ultrasound = {name for name in verdicts if name.startswith(("US1_", "OBXXXX1A", "gdcm-US", "color-p"))}
    assert len(ultrasound) >= 13
    assert not {name for name in ultrasound if verdicts[name].decision == "train"}
    assert verdicts["explicit_VR-UN.dcm"].reason is Reason.SCREEN_CAPTURE
    assert verdicts["eCT_Supplemental.dcm"].decision == "train"


@pytest.mark.data
def test_volumes_from_all_vendors_may_train(shared_data: Path) -> None:
    verdicts = judged(iter(sorted((shared_data / "dicom-vendors").rglob("*.dcm"))))
    assert len(verdicts) == 212
    assert {verdict.decision for verdict in verdicts.values()} == {"train"}


@pytest.mark.parametrize(
    ("sop_class", "modality", "image_type"),
    [
        (uid.ComputedRadiographyImageStorage, "CR", ("DERIVED", "PRIMARY", "POST_PROCESSED")),
        (uid.DigitalXRayImageStorageForPresentation, "DX", ("DERIVED", "PRIMARY", "", "RAD")),
        (uid.CTImageStorage, "CT", ("ORIGINAL", "PRIMARY", "LOCALIZER")),
        (uid.CTImageStorage, "CT", ("ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM5 SPI")),
        (uid.MRImageStorage, "MR", ("ORIGINAL", "PRIMARY", "M", "ND", "NORM")),
        (uid.EnhancedMRImageStorage, "MR", ("ORIGINAL", "PRIMARY", "PERFUSION", "NONE")),
        (uid.DigitalMammographyXRayImageStorageForPresentation, "MG", ("ORIGINAL", "PRIMARY")),
    ],
)
def test_ordinary_originals_train_whether_or_not_they_speak_of_text(
    sop_class: str, modality: str, image_type: tuple[str, ...]
) -> None:
    ordinary = facts(sop_class=sop_class, modality=modality, image_type=image_type)
    for said in ("no", "absent"):
        assert judge(replace(ordinary, burned_in=said), STRICT).decision == "train"


def test_files_of_the_demonstration_train(tmp_path: Path) -> None:
    write_phantom_sites(tmp_path / "sites", ("north",), cases_per_site=40, size=32)
    verdicts = judged(path for path in (tmp_path / "sites").rglob("*.dcm"))
    assert len(verdicts) == 40
    assert {verdict.decision for verdict in verdicts.values()} == {"train"}


def test_policy_decides_over_an_index_that_stays_as_it_is(tmp_path: Path) -> None:
    """Signs are kept when indexing; a change of cohort.toml needs no file to be read again."""
    site = a_site(tmp_path, num_patients=4)
    index_folder(site)
    assert len(open_cohort(site).cases) == 8
    (site.home / "cohort.toml").write_text('[gate]\nburned_in_no = ["CR"]\n')
    with pytest.raises(CohortError):
        open_cohort(site)
    reasons = {row.reason for row in quarantine_rows(site)}
    assert reasons == {Reason.BURNED_IN_UNKNOWN}
    assert index_folder(site).num_read == 0
    (site.home / "cohort.toml").unlink()
    assert len(open_cohort(site).cases) == 8


def test_image_without_signs_or_with_foreign_ones_stays_out(tmp_path: Path) -> None:
    site = a_site(tmp_path, num_patients=4)
    index_folder(site)
    with contextlib.closing(sqlite3.connect(site.home / "index.sqlite", isolation_level=None)) as database:
        database.execute("UPDATE signs SET facts = replace(facts, '\"absent\"', '\"maybe\"')")
    with pytest.raises(CohortError):
        open_cohort(site)
    assert {row.reason for row in quarantine_rows(site)} == {Reason.UNREADABLE_SIGNS}
    with contextlib.closing(sqlite3.connect(site.home / "index.sqlite", isolation_level=None)) as database:
        database.execute("UPDATE contents SET signs_id = NULL")
    assert {row.reason for row in quarantine_rows(site)} == {Reason.UNREADABLE_SIGNS}


@given(some_facts)
def test_facts_survive_the_index(seen: GateFacts) -> None:
    written = signs_of(seen)
    assert facts_from(written) == seen
    assert len(written) < 1000


# Screens and reports under a scanner's name.


def a_scan(**elements: Any) -> Dataset:
    plane = {"ImagePositionPatient": [0, 0, 0], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
    kind = {"SOPClassUID": uid.MRImageStorage, "Modality": "MR", "ImageType": ["DERIVED", "PRIMARY", "OTHER"]}
    said = {name: value for name, value in (kind | plane | elements).items() if value is not None}
    return a_dataset(**said)


@pytest.mark.parametrize(
    "elements",
    [
        {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0},
        {"PhotometricInterpretation": "PALETTE COLOR"},
        {"PhotometricInterpretation": ["MONOCHROME2", "RGB"]},
        {"ImagePositionPatient": None, "ImageOrientationPatient": None},
    ],
    ids=["colour", "palette", "two photometries", "no place"],
)
def test_screen_under_a_scanners_name_has_to_deny_text(elements: dict[str, Any]) -> None:
    for denied, reason in ((None, Reason.BURNED_IN_UNKNOWN), ("NO", None)):
        said = {"BurnedInAnnotation": denied} if denied else {}
        dataset = a_scan(**elements, **said)
        facts_of_file = read_gate_facts(encode(dataset))
        assert judge(facts_of_file, GatePolicy()).reason is reason
        with contained(Reason.MALFORMED):
            assert gate_facts(dataset) == facts_of_file
    assert judge(read_gate_facts(encode(a_scan())), GatePolicy()).decision == "train"


@pytest.mark.parametrize(
    "description",
    [
        *("Patientenprotokoll", "PATIENT PROTOCOL", "Dosisbericht", "Capture d'écran", "Copie ecran 3"),
        *(
            "Captura de pantalla",
            "Informe de dosis",
            "Schermata",
            "Referto",
            "Bildschirmfoto",
            "Rapport de dose",
        ),
    ],
)
def test_description_that_speaks_of_a_screen_in_another_language_is_heard(description: str) -> None:
    dataset = a_scan(SeriesDescription=description, SpecificCharacterSet="ISO_IR 100")
    assert judge(read_gate_facts(encode(dataset)), GatePolicy()).reason is Reason.SCREEN_CAPTURE
