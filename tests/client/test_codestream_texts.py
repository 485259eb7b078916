"""A safe copy of a compressed picture holds the picture and nothing else that somebody wrote into it."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import ExplicitVRLittleEndian

from fedward_client.dicom.codestream_texts import blank_texts
from fedward_client.dicom.deidentify import ExportOptions, SafeCopy, make_copy
from fedward_client.dicom.gate import Acceptance, GatePolicy
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.stored_pixels import decode_stored

FINDINGS = frozenset({"text_class", "screen_capture", "secondary_image"})
CLASSES = ("SecondaryCaptureImageStorage", "MRImageStorage", "CTImageStorage")
POLICY = GatePolicy(accept=tuple(Acceptance(sop_class=name, findings=FINDINGS) for name in CLASSES))
NOTE = b"Seen by Dr Kim"  # of nobody whom the header knows

JPEG, JPEG_LS = "SC_rgb_jpeg_dcmtk.dcm", "MR_small_jpeg_ls_lossless.dcm"
JPEG_2000, RLE = "MR_small_jp2klossless.dcm", "MR_small_RLE.dcm"


def segment(marker: int, value: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(value) + 2) + value


def behind_start(frame: bytes, marker: int, value: bytes) -> bytes:
    return frame[:2] + segment(marker, value) + frame[2:]


def in_main_header(frame: bytes, value: bytes) -> bytes:
    """Of JPEG 2000, in front of the first part of a tile."""
    place = frame.index(b"\xff\x90")
    return frame[:place] + segment(0x64, b"\x00\x01" + value) + frame[place:]


def in_tile_header(frame: bytes, value: bytes) -> bytes:
    place = frame.index(b"\xff\x93")
    comment = segment(0x64, b"\x00\x01" + value)
    tile = frame.index(b"\xff\x90")
    (size,) = struct.unpack_from(">L", frame, tile + 6)
    grown = frame[: tile + 6] + struct.pack(">L", size + len(comment) if size else 0) + frame[tile + 10 :]
    return grown[:place] + comment + grown[place:]


def boxed(frame: bytes, value: bytes) -> bytes:
    box = struct.pack(">L4s", 8 + len(value), b"xml ") + value
    signature = b"\x00\x00\x00\x0cjP  \r\n\x87\n"
    return signature + box + struct.pack(">L4s", 8 + len(frame), b"jp2c") + frame


def trailing(frame: bytes, value: bytes) -> bytes:
    return frame.rstrip(b"\0") + value


def spare_places(frame: bytes, value: bytes) -> bytes:
    """Of a run-length frame's header."""
    return frame[: 64 - len(value)] + value + frame[64:]


HIDDEN: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "JPEG comment": (JPEG, lambda frame: behind_start(frame, 0xFE, NOTE), "blanked"),
    "EXIF": (JPEG, lambda frame: behind_start(frame, 0xE1, b"Exif\0\0" + NOTE), "blanked"),
    "JFIF thumbnail": (JPEG, lambda frame: behind_start(frame, 0xE0, b"JFIF\0" + NOTE), "blanked"),
    "behind JPEG": (JPEG, lambda frame: trailing(frame, NOTE), "decoded"),
    "JPEG-LS application": (JPEG_LS, lambda frame: behind_start(frame, 0xE9, NOTE), "blanked"),
    "behind JPEG-LS": (JPEG_LS, lambda frame: trailing(frame, NOTE), "decoded"),
    "JPEG 2000 comment": (JPEG_2000, lambda frame: in_main_header(frame, NOTE), "blanked"),
    "JPEG 2000 tile": (JPEG_2000, lambda frame: in_tile_header(frame, NOTE), "blanked"),
    "behind JPEG 2000": (JPEG_2000, lambda frame: trailing(frame, NOTE), "decoded"),
}
UNDECODABLE: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "JP2 box": (JPEG_2000, lambda frame: boxed(frame, NOTE)),
    "spare places of RLE": (RLE, lambda frame: spare_places(frame, NOTE)),
}


def with_frame(name: str, change: Callable[[bytes], bytes], table: bytes = b"") -> tuple[bytes, bytes]:
    """A real file with its one frame changed; the file as it was, and as it is."""
    path = Path(str(get_testdata_file(name)))
    dataset = dcmread(path)
    dataset.BurnedInAnnotation = "NO"
    before = io.BytesIO()
    dataset.save_as(before)
    (frame,) = generate_frames(dataset.PixelData, number_of_frames=1)
    changed = encapsulate([change(frame)], has_bot=False)
    if table:
        changed = b"\xfe\xff\x00\xe0" + struct.pack("<L", len(table)) + table + changed[8:]
    dataset.PixelData = changed
    after = io.BytesIO()
    dataset.save_as(after)
    return before.getvalue(), after.getvalue()


def copy_of(data: bytes) -> SafeCopy:
    return make_copy(data, bytes(32), ExportOptions(gate=POLICY))


@pytest.mark.parametrize("what", HIDDEN)
def test_text_beside_a_compressed_picture_is_not_in_its_copy(what: str) -> None:
    name, change, outcome = HIDDEN[what]
    before, after = with_frame(name, change)
    assert NOTE in after
    copy = copy_of(after)
    assert copy.pixels == outcome
    assert NOTE not in copy.data
    assert b"Kim" not in copy.data
    assert np.array_equal(decode_stored(copy.data), decode_stored(before))
    expected = ExplicitVRLittleEndian if outcome == "decoded" else dcmread(io.BytesIO(before))
    written = dcmread(io.BytesIO(copy.data)).file_meta.TransferSyntaxUID
    assert written == getattr(getattr(expected, "file_meta", None), "TransferSyntaxUID", expected)


@pytest.mark.parametrize("what", UNDECODABLE)
def test_text_that_keeps_a_picture_from_being_decoded_costs_the_copy(what: str) -> None:
    _, after = with_frame(*UNDECODABLE[what])
    with pytest.raises(UnusableImageError) as caught:
        copy_of(after)
    assert caught.value.reason is Reason.DECODE_FAILED


def test_picture_in_boxes_is_copied_without_them() -> None:
    data = Path(str(get_testdata_file("GDCMJ2K_TextGBR.dcm"))).read_bytes()
    assert b"jp2h" in data
    copy = copy_of(data)
    assert copy.pixels == "decoded"
    assert b"jp2h" not in copy.data
    assert np.array_equal(decode_stored(copy.data), decode_stored(data))


@pytest.mark.parametrize(
    "table", [NOTE.ljust(16), struct.pack("<L", 0) + NOTE.ljust(16), struct.pack("<L", 8)]
)
def test_offset_table_that_names_no_fragment_is_not_copied(table: bytes) -> None:
    before, after = with_frame(JPEG_2000, bytes, table)
    copy = copy_of(after)
    assert copy.pixels == "decoded"
    assert b"Kim" not in copy.data
    assert np.array_equal(decode_stored(copy.data), decode_stored(before))


def test_extended_offsets_that_name_no_fragment_are_not_copied() -> None:
    dataset = dcmread(str(get_testdata_file(RLE)))
    dataset.BurnedInAnnotation = "NO"
    dataset.ExtendedOffsetTable = NOTE.ljust(16)
    dataset.ExtendedOffsetTableLengths = NOTE.ljust(16)
    data = io.BytesIO()
    dataset.save_as(data)
    copy = copy_of(data.getvalue())
    assert b"Kim" not in copy.data
    assert "ExtendedOffsetTable" not in dcmread(io.BytesIO(copy.data))


@pytest.mark.parametrize("name", [JPEG, JPEG_LS, JPEG_2000])
def test_codestream_that_is_cut_or_garbled_is_never_taken_for_a_clean_one(name: str) -> None:
    dataset = dcmread(str(get_testdata_file(name)))
    (frame,) = generate_frames(dataset.PixelData, number_of_frames=1)
    assert blank_texts(frame) is not None
    for length in range(0, len(frame) - 8, 7):
        assert blank_texts(frame[:length]) is None
    random = np.random.default_rng(7)
    for _ in range(300):
        garbled = bytearray(frame)
        garbled[int(random.integers(len(frame)))] = int(random.integers(256))
        found = blank_texts(bytes(garbled))
        assert found is None or len(found) == len(garbled)
    assert blank_texts(b"") is None
    assert blank_texts(NOTE) is None


def test_tile_that_ends_inside_its_own_header_is_refused_in_finite_time() -> None:
    tile = struct.pack(">HHHLBB", 0xFF90, 10, 0, 12, 0, 1)
    assert blank_texts(b"\xff\x4f" + tile + b"\xff\x93\xff\xd9") is None


@pytest.mark.parametrize("marker", [0xC8, 0xDE, 0xDF])
def test_jpeg_segment_of_unknown_content_is_not_let_through(marker: int) -> None:
    dataset = dcmread(str(get_testdata_file(JPEG)))
    (frame,) = generate_frames(dataset.PixelData, number_of_frames=1)
    assert blank_texts(behind_start(frame, 0xDB, frame[6:][:65] or NOTE)) is not None
    assert blank_texts(behind_start(frame, marker, NOTE)) is None
