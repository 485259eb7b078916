"""What stands behind the pixels is seen or refused, and nothing is said twice, at any depth."""

from __future__ import annotations

import io
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
    UltrasoundImageStorage,
)

from fedward_client.dicom.decode import decode_image
from fedward_client.dicom.deidentify import ExportOptions, make_copy
from fedward_client.dicom.frames import decode_frames
from fedward_client.dicom.gate import GatePolicy, judge, read_gate_facts
from fedward_client.dicom.header import read_header, refusal_of
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.index_reading import examine
from tests.builders import a_dataset, a_dicom, encode

NATIVE = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)


def element(tag: int, vr: str, value: bytes, syntax: str = ExplicitVRLittleEndian) -> bytes:
    """One element as a file holds it."""
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    head = struct.pack(f"{order}HH", tag >> 16, tag & 0xFFFF)
    if syntax == ImplicitVRLittleEndian:
        return head + struct.pack("<L", len(value)) + value
    if vr in ("OB", "OW", "OF", "OD", "SQ", "UN", "UT"):
        return head + vr.encode() + struct.pack(f"{order}HL", 0, len(value)) + value
    return head + vr.encode() + struct.pack(f"{order}H", len(value)) + value


def compressed() -> bytes:
    dataset = a_dataset()
    frame = bytes(Path(str(get_testdata_file("MR_small_RLE.dcm"))).read_bytes()[-64:])
    dataset.PixelData = encapsulate([frame])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    return encode(dataset, RLELossless)


def deflated(dataset: Dataset, behind: bytes) -> bytes:
    """A deflated file with more elements inside the stream."""
    dataset["PixelData"].VR = "OB"  # pydicom writes the rest from here on
    plain = encode(dataset, DeflatedExplicitVRLittleEndian)
    start = plain.index(b"UL", 132) + 8
    meta = 132 + 12 + struct.unpack_from("<L", plain, 140)[0]
    assert start <= meta
    body = zlib.decompress(plain[meta:], -15)
    deflater = zlib.compressobj(wbits=-15)
    return plain[:meta] + deflater.compress(body + behind) + deflater.flush()


FORBIDDEN: dict[str, tuple[int, str, bytes]] = {
    "denial of the denial": (0x00280301, "CS", b"YES "),
    "overlay": (0x60003000, "OW", b"\xff" * 32),
    "second picture": (0x7FE00010, "OW", b"\x01" * 256),
    "float picture": (0x7FE00008, "OF", b"\x01" * 64),
    "identity": (0x00100010, "PN", b"Kowalczyk^B "),
}


def reason_of(data: bytes) -> Reason:
    """The same for every way in."""
    reasons = []
    options = ExportOptions()
    for read in (read_gate_facts, read_header, decode_image, decode_frames):
        with pytest.raises(UnusableImageError) as caught:
            read(data)
        reasons.append(caught.value.reason)
    with pytest.raises(UnusableImageError) as caught:
        make_copy(data, bytes(32), options)
    reasons += [caught.value.reason, Reason(examine(data, "0" * 64).record.reason or "")]
    assert len(set(reasons)) == 1
    return reasons[0]


@pytest.mark.parametrize("syntax", NATIVE)
@pytest.mark.parametrize("what", FORBIDDEN)
def test_element_behind_the_pixels_that_others_would_read_is_refused(what: str, syntax: str) -> None:
    data = encode(a_dataset(BurnedInAnnotation="NO"), syntax) + element(*FORBIDDEN[what], syntax)
    if what == "denial of the denial":
        assert dcmread(io.BytesIO(data)).BurnedInAnnotation == "YES"
    assert reason_of(data) is Reason.BEHIND_PIXELS


@pytest.mark.parametrize("what", FORBIDDEN)
def test_element_behind_compressed_or_deflated_pixels_is_refused(what: str) -> None:
    behind = element(*FORBIDDEN[what])
    assert reason_of(compressed() + behind) is Reason.BEHIND_PIXELS
    assert reason_of(deflated(a_dataset(BurnedInAnnotation="NO"), behind)) is Reason.BEHIND_PIXELS
    stray = encode(a_dataset(), DeflatedExplicitVRLittleEndian) + behind
    assert reason_of(stray) is Reason.BEHIND_PIXELS


@pytest.mark.parametrize(
    "behind",
    [b"Kowalczyk Bronislawa 1953", b"\0" * 511 + b"\x01", b"\xff" * 3, element(0x7FE10011, "LO", b"x")[:-1]],
    ids=["text", "a byte after zeros", "three bytes", "cut off"],
)
def test_bytes_behind_the_pixels_that_are_no_element_are_refused(behind: bytes) -> None:
    assert reason_of(a_dicom(BurnedInAnnotation="NO") + behind) is Reason.BEHIND_PIXELS


@pytest.mark.parametrize("syntax", NATIVE)
def test_private_elements_signatures_and_padding_behind_the_pixels_are_seen(syntax: str) -> None:
    behind = element(0x7FE10010, "LO", b"SOMEONE ", syntax) + element(0x7FE11001, "OB", b"\x01" * 70, syntax)
    behind += element(0xFFFAFFFA, "SQ", b"", syntax) + element(0xFFFCFFFC, "OB", b"\0" * 32, syntax)
    plain = encode(a_dataset(BurnedInAnnotation="NO"), syntax)
    for end in (behind, behind + b"\0" * 700, behind + b"\0"):
        facts = read_gate_facts(plain + end)
        assert facts.num_private == 2
        assert judge(facts, GatePolicy(max_private=1)).reason is Reason.PRIVATE_ELEMENTS
        assert np.array_equal(decode_image(plain + end), decode_image(plain))
        copy = make_copy(plain + end, bytes(32), ExportOptions()).data
        assert b"SOMEONE" not in copy
        assert [each.tag.group for each in dcmread(io.BytesIO(copy))][-1] == 0x7FE0


def test_private_elements_of_a_deflated_file_are_counted_or_refused() -> None:
    private = element(0x7FE10010, "LO", b"SOMEONE ")
    assert read_gate_facts(deflated(a_dataset(), private)).num_private == 1
    # Too large to be inflated as far as its end when it is indexed, so nobody could count them.
    pixels = np.random.default_rng(1).integers(0, 65535, (2100, 2100), dtype=np.uint16)
    large = a_dataset(pixels)
    assert decode_image(deflated(large, element(0xFFFCFFFC, "OB", b"\0" * 32))).shape == (2100, 2100)
    with pytest.raises(UnusableImageError) as caught:
        decode_image(deflated(large, private))
    assert caught.value.reason is Reason.BEHIND_PIXELS
    with pytest.raises(UnusableImageError) as caught:
        decode_image(deflated(large, element(0xFFFCFFFC, "OB", b"\0" * 2**21)))
    assert caught.value.reason is Reason.DEFLATED


def test_pixels_end_where_their_element_does() -> None:
    """A picture announced larger than it is must not take in what follows."""
    dataset = a_dataset(BurnedInAnnotation="NO")
    dataset.PixelData = bytes(128)
    behind = element(0x7FE10010, "LO", b"KOWALCZYK^BRONISLAWA".ljust(240))
    for data in (encode(dataset) + behind, deflated(dataset, behind)):
        with pytest.raises(UnusableImageError) as caught:
            decode_image(data)
        assert caught.value.reason is Reason.TRUNCATED
    refusal = refusal_of(read_header(encode(dataset) + behind))
    assert refusal is not None
    assert refusal.reason is Reason.TRUNCATED


@pytest.mark.needs("dcmconv")
def test_what_dcmtk_writes_with_padding_behind_is_read(tmp_path: Path) -> None:
    source, padded = tmp_path / "a.dcm", tmp_path / "b.dcm"
    source.write_bytes(a_dicom())
    subprocess.run(["dcmconv", "+p", "512", "64", str(source), str(padded)], check=True)
    assert dcmread(padded).get(0xFFFCFFFC) is not None
    assert np.array_equal(decode_image(padded.read_bytes()), decode_image(source.read_bytes()))


# Nothing is said twice inside a sequence either.


def a_region(**values: Any) -> Dataset:
    region = Dataset()
    region.RegionSpatialFormat = 1
    for keyword in ("X0", "Y0"):
        setattr(region, f"RegionLocationMin{keyword}", 0)
    for keyword in ("X1", "Y1"):
        setattr(region, f"RegionLocationMax{keyword}", 8)
    for keyword, value in values.items():
        setattr(region, keyword, value)
    return region


def an_ultrasound(*, delimited_item: bool, repeated: bool, out_of_order: bool) -> bytes:
    """Regions in a sequence of undefined length; pydicom reads it when anything in it is unusual."""
    dataset = a_dataset(SOPClassUID=UltrasoundImageStorage, Modality="US", BurnedInAnnotation="NO")
    dataset.SequenceOfUltrasoundRegions = Sequence([a_region()])
    dataset["SequenceOfUltrasoundRegions"].is_undefined_length = True
    dataset.SequenceOfUltrasoundRegions[0].is_undefined_length_sequence_item = delimited_item
    data = encode(dataset)
    right = element(0x0018601C, "UL", struct.pack("<L", 8))
    assert data.count(right) == 1
    if repeated:
        twice = element(0x0018601C, "UL", struct.pack("<L", 16)) + right
        data = data.replace(right, twice)
        if not delimited_item:
            item = struct.pack("<HHL", 0xFFFE, 0xE000, 0)[:4]
            place = data.index(item) + 4
            (length,) = struct.unpack_from("<L", data, place)
            data = data[:place] + struct.pack("<L", length + len(right)) + data[place + 4 :]
    if out_of_order:  # out of order, which only pydicom understands
        rows, columns = (element(tag, "US", struct.pack("<H", 16)) for tag in (0x00280010, 0x00280011))
        data = data.replace(rows + columns, columns + rows)
    return data


@pytest.mark.parametrize("delimited_item", [False, True])
@pytest.mark.parametrize("top", [False, True])
def test_sequence_item_that_says_something_twice_is_refused(delimited_item: bool, top: bool) -> None:
    honest = an_ultrasound(delimited_item=delimited_item, repeated=False, out_of_order=top)
    facts = read_gate_facts(honest)
    assert [(box.bottom, box.right) for box in facts.regions] == [(9, 9)]
    twice = an_ultrasound(delimited_item=delimited_item, repeated=True, out_of_order=top)
    assert dcmread(io.BytesIO(twice)).SequenceOfUltrasoundRegions[0].RegionLocationMaxX1 == 8
    if not delimited_item and not top:  # walked only when somebody asks for it, and refused then
        assert judge(read_gate_facts(twice), GatePolicy()).reason is Reason.REGIONS
        return
    with pytest.raises(UnusableImageError) as caught:
        read_gate_facts(twice)
    assert caught.value.reason is Reason.MALFORMED


def test_nested_sequences_and_private_values_that_only_pydicom_reads_are_no_repetition() -> None:
    dataset = a_dataset()
    inner, outer = Dataset(), Dataset()
    inner.CodeValue, inner.CodeMeaning = "1", "one"
    inner.add_new(0x00091001, "UN", b"1234")
    outer.ConceptNameCodeSequence = Sequence([inner, inner])
    outer["ConceptNameCodeSequence"].is_undefined_length = True
    outer.TextValue = "x" * 10
    for item in (inner, outer):
        item.is_undefined_length_sequence_item = True
    dataset.ContentSequence = Sequence([outer, outer, Dataset()])
    dataset["ContentSequence"].is_undefined_length = True
    data = encode(dataset)
    rows, columns = (element(tag, "US", struct.pack("<H", 16)) for tag in (0x00280010, 0x00280011))
    odd = data.replace(rows + columns, columns + rows)
    assert odd != data
    assert read_header(odd) == read_header(data)
