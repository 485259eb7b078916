"""Decoding against pydicom's own pixel functions, hand calculations, and hostile input."""

from __future__ import annotations

import contextlib
import io
import logging
import struct
import traceback
import tracemalloc
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom import config, dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels.processing import apply_modality_lut, apply_voi, apply_windowing
from pydicom.uid import (
    MPEG2MPML,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForProcessing,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from fedward_client.dicom.codestream import FrameSize, frame_size
from fedward_client.dicom.decode import decode_image
from fedward_client.dicom.header import PLUGIN_OF_SYNTAX, can_decode, read_header, refusal_of
from fedward_client.dicom.refusal import Reason, UnusableImageError
from tests.builders import a_dataset, a_dicom, canary_elements, encode

RAMP8 = np.arange(256, dtype=np.uint8).reshape(16, 16)
RAMP12 = (np.arange(256, dtype=np.uint16) * 16).reshape(16, 16)
SIGNED = (np.arange(256, dtype=np.int16) * 16 - 2048).reshape(16, 16)
LARGE8 = np.tile(RAMP8, (4, 4))  # OpenJPEG wants more than 32 pixels a side
LARGE12 = np.tile(RAMP12, (4, 4))
BITS12: dict[str, Any] = {"BitsStored": 12, "HighBit": 11}


def a_lut(entries: list[int], first_mapped: int, bits: int) -> list[Dataset]:
    item = Dataset()
    item.LUTDescriptor = [len(entries), first_mapped, bits]
    item["LUTDescriptor"].VR = "US"
    item.LUTData = entries
    item["LUTData"].VR = "US"
    return [item]


def as_pydicom_shows(data: bytes) -> NDArray[np.float64]:
    """Modality LUT and first window or VOI LUT by pydicom, brought to [0, 1], inverted last."""
    dataset = dcmread(io.BytesIO(data))
    values = apply_modality_lut(dataset.pixel_array, dataset)
    if "VOILUTSequence" in dataset:
        shown = apply_voi(values.astype(np.int64), dataset) / (
            2 ** dataset.VOILUTSequence[0].LUTDescriptor[2] - 1
        )
    else:
        bits = dataset.BitsStored
        lowest = -(2 ** (bits - 1)) if dataset.PixelRepresentation else 0
        ends = np.array([lowest, lowest + 2**bits - 1], dtype=np.int64)
        if "ModalityLUTSequence" in dataset:
            low, high = 0, 2 ** dataset.ModalityLUTSequence[0].LUTDescriptor[2] - 1
        else:
            low, high = apply_modality_lut(ends, dataset)
        shown = (apply_windowing(values, dataset) - low) / (high - low)
    inverted: NDArray[np.float64] = 1 - shown
    return inverted if dataset.PhotometricInterpretation == "MONOCHROME1" else np.asarray(shown)


@pytest.mark.parametrize(
    ("pixels", "elements"),
    [
        (RAMP8, {"WindowCenter": "128", "WindowWidth": "256"}),
        (RAMP8, {"WindowCenter": "100", "WindowWidth": "50"}),
        (RAMP8, {"WindowCenter": ["60", "128"], "WindowWidth": ["40", "256"]}),
        (RAMP12, {"WindowCenter": "1800.5", "WindowWidth": "2999", **BITS12}),
        (RAMP12, {"WindowCenter": "1800", "WindowWidth": "900", "VOILUTFunction": "LINEAR_EXACT", **BITS12}),
        (RAMP12, {"WindowCenter": "1800", "WindowWidth": "900", "VOILUTFunction": "SIGMOID", **BITS12}),
        (
            RAMP12,
            {
                "WindowCenter": "0",
                "WindowWidth": "700",
                "RescaleSlope": "0.5",
                "RescaleIntercept": "-900",
                **BITS12,
            },
        ),
        (SIGNED, {"WindowCenter": "40", "WindowWidth": "400", **BITS12}),
        (
            SIGNED,
            {
                "WindowCenter": "40",
                "WindowWidth": "400",
                "PhotometricInterpretation": "MONOCHROME1",
                **BITS12,
            },
        ),
        (
            RAMP8,
            {
                "ModalityLUTSequence": a_lut([index**2 for index in range(200)], 20, 16),
                "WindowCenter": "15000",
                "WindowWidth": "20000",
            },
        ),
        (
            RAMP12,
            {"VOILUTSequence": a_lut([index * index // 1024 for index in range(2048)], 500, 12), **BITS12},
        ),
    ],
)
@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_decoded_image_equals_pydicoms_own_pipeline(
    pixels: Any, elements: dict[str, Any], photometric: str
) -> None:
    data = a_dicom(pixels, **({"PhotometricInterpretation": photometric} | elements))

    image = decode_image(data)

    assert image.dtype == np.float32
    np.testing.assert_allclose(image, as_pydicom_shows(data), atol=1e-6)
    assert image.min() < image.max()


def test_window_then_inversion_by_hand() -> None:
    # Stored 100 * 2 - 50 = 150. Window 128/101, linear: (150 - 127.5) / 100 + 0.5 = 0.725. Inverted: 0.275.
    pixels = np.full((8, 8), 100, dtype=np.uint8)
    elements = {"RescaleSlope": "2", "RescaleIntercept": "-50", "WindowCenter": "128", "WindowWidth": "101"}

    assert decode_image(a_dicom(pixels, **elements))[0, 0] == pytest.approx(0.725)
    inverted = decode_image(a_dicom(pixels, PhotometricInterpretation="MONOCHROME1", **elements))
    assert inverted[0, 0] == pytest.approx(0.275)


def test_inverse_presentation_lut_shape_inverts_once_however_it_is_said() -> None:
    plain = decode_image(a_dicom(RAMP8))
    for elements in (
        {"PresentationLUTShape": "INVERSE"},
        {"PhotometricInterpretation": "MONOCHROME1"},
        {"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE"},
    ):
        np.testing.assert_allclose(decode_image(a_dicom(RAMP8, **elements)), 1 - plain, atol=1e-7)


def test_without_window_the_range_of_the_stored_bits_counts_not_that_of_the_image() -> None:
    half = np.full((8, 8), 2048, dtype=np.uint16)

    assert decode_image(a_dicom(half, **BITS12))[0, 0] == pytest.approx(2048 / 4095)
    np.testing.assert_allclose(decode_image(a_dicom(RAMP8)), RAMP8 / 255, atol=1e-7)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("lut", ["US", "OW"])
def test_byte_order_and_implicit_vr_make_no_difference(syntax: str, lut: str) -> None:
    def dataset(order: str) -> Dataset:
        pixels = RAMP12.astype(f"{order}u2")
        item = a_lut([index * 3 for index in range(1000)], 100, 12)
        if lut == "OW":
            entries = np.array([index * 3 for index in range(1000)], dtype=f"{order}u2")
            del item[0].LUTData
            item[0].add_new("LUTData", "OW", entries.tobytes())
        return a_dataset(pixels, VOILUTSequence=item, SOPInstanceUID="1.2.3", **BITS12)

    expected = decode_image(encode(dataset("<")))
    order = ">" if syntax == ExplicitVRBigEndian else "<"

    np.testing.assert_array_equal(decode_image(encode(dataset(order), syntax)), expected)
    np.testing.assert_allclose(expected, as_pydicom_shows(encode(dataset("<"))), atol=1e-6)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless])
@pytest.mark.parametrize(("pixels", "elements"), [(LARGE8, {}), (LARGE12, BITS12)])
def test_lossless_compression_changes_nothing(syntax: str, pixels: Any, elements: dict[str, Any]) -> None:
    dataset = a_dataset(pixels, SOPInstanceUID="1.2.3", **elements)
    plain = decode_image(encode(dataset))

    dataset.compress(syntax, generate_instance_uid=False)

    np.testing.assert_array_equal(decode_image(encode(dataset, syntax)), plain)


def test_jpeg_baseline_equals_pillow() -> None:
    data = io.BytesIO()
    Image.fromarray(RAMP8).save(data, "JPEG", quality=90)
    dataset = a_dataset(RAMP8, PixelData=encapsulate([data.getvalue()]))

    image = decode_image(encode(dataset, JPEGBaseline8Bit))

    np.testing.assert_allclose(image, np.asarray(Image.open(data)) / 255, atol=1e-7)


def test_deflated_files_are_read_only_when_small() -> None:
    small = encode(a_dataset(RAMP8), DeflatedExplicitVRLittleEndian)
    bomb = encode(a_dataset(RAMP8, EncapsulatedDocument=b"\0" * 80_000_000), DeflatedExplicitVRLittleEndian)

    np.testing.assert_allclose(decode_image(small), RAMP8 / 255, atol=1e-7)
    assert 64_000 < len(bomb) < 100_000
    for read in (read_header, decode_image):
        with pytest.raises(UnusableImageError) as caught:
            read(bomb)
        assert caught.value.reason == Reason.DEFLATED


def reason_of(data: bytes) -> Reason | None:
    """Why indexing refuses a file, or None."""
    try:
        refusal = refusal_of(read_header(data))
    except UnusableImageError as error:
        return error.reason
    return refusal.reason if refusal else None


GOOD = a_dicom(RAMP8)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.EMPTY),
        (b"hello, this is no image", Reason.NOT_DICOM),
        (GOOD[128:], Reason.NOT_DICOM),
        (GOOD[:200], Reason.NO_UID),
        (GOOD[:-10], Reason.TRUNCATED),
        (GOOD[: GOOD.index(b"\xe0\x7f\x10\x00")], Reason.NO_PIXELS),
        (GOOD[: GOOD.index(b"\x28\x00\x02\x00")], Reason.NO_PIXELS),  # before what describes the pixels
        (a_dicom(RAMP8, Rows=60000, Columns=60000), Reason.DIMENSIONS),
        (a_dicom(RAMP12, Rows=16384, Columns=16384), Reason.DIMENSIONS),
        (a_dicom(RAMP8, Rows=0), Reason.DIMENSIONS),
        (a_dicom(RAMP8, Rows=17), Reason.TRUNCATED),
        (a_dicom(RAMP8, PatientID=""), Reason.NO_PATIENT),
        (a_dicom(RAMP8, PatientID=None), Reason.NO_PATIENT),
        (a_dicom(RAMP8, Modality="DX", SOPClassUID="1.2.840.10008.5.1.4.1.1.1"), Reason.MISLABELLED),
        (a_dicom(RAMP8, NumberOfFrames=2), Reason.MULTI_FRAME),
        (a_dicom(RAMP8, SamplesPerPixel=3, PhotometricInterpretation="RGB"), Reason.COLOUR),
        (a_dicom(RAMP8, PhotometricInterpretation="PALETTE COLOR"), Reason.COLOUR),
        (a_dicom(RAMP8, BitsAllocated=32), Reason.PIXEL_FORMAT),
        (a_dicom(RAMP8, HighBit=15), Reason.PIXEL_FORMAT),
        (a_dicom(RAMP8, BurnedInAnnotation="YES"), Reason.BURNED_IN),
        (a_dicom(RAMP8, SOPInstanceUID="not-a-uid"), Reason.NO_UID),
        (a_dicom(RAMP8, SeriesInstanceUID=None), Reason.NO_UID),
    ],
)
def test_unusable_files_are_refused_with_their_reason(data: bytes, reason: Reason) -> None:
    assert reason_of(data) == reason
    with pytest.raises(UnusableImageError) as caught:
        decode_image(data)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("sop_class", "name"),
    [
        (CTImageStorage, "CT Image Storage"),
        (SecondaryCaptureImageStorage, "Secondary Capture Image Storage"),
        (DigitalXRayImageStorageForProcessing, "Digital X-Ray Image Storage - For Processing"),
        ("1.2.3.4", "not in the DICOM dictionary"),
    ],
)
def test_other_objects_are_refused_by_their_dictionary_name(sop_class: str, name: str) -> None:
    refusal = refusal_of(read_header(a_dicom(RAMP8, SOPClassUID=sop_class)))

    assert refusal is not None
    assert (refusal.reason, refusal.kind) == (Reason.SOP_CLASS, name)
    assert name in refusal.message


def test_syntaxes_outside_the_list_and_missing_decoders_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refusal(syntax: str) -> UnusableImageError:
        found = refusal_of(read_header(encode(a_dataset(RAMP8, PixelData=encapsulate([b"x"])), syntax)))
        assert found is not None
        return found

    video = refusal(MPEG2MPML)
    assert (video.reason, video.kind) == (Reason.TRANSFER_SYNTAX, MPEG2MPML.name)
    monkeypatch.setattr("fedward_client.dicom.header.can_decode", lambda syntax: False)
    lossless = refusal(JPEGLosslessSV1)
    assert (lossless.reason, lossless.kind) == (Reason.DECODER_MISSING, JPEGLosslessSV1.name)


def test_every_pinned_decoder_is_installed() -> None:
    assert not [syntax for syntax in PLUGIN_OF_SYNTAX if not can_decode(syntax)]


@pytest.mark.parametrize(
    "elements",
    [
        {"WindowCenter": "10", "WindowWidth": "0"},
        {"WindowCenter": "10", "WindowWidth": "-3"},
        {"WindowCenter": "10", "WindowWidth": "100", "VOILUTFunction": "CUBIC"},
        {"RescaleSlope": "0", "RescaleIntercept": "1"},
        {"VOILUTSequence": a_lut([1, 2, 3], 0, 40)},
    ],
)
def test_display_values_that_make_no_sense_are_refused(elements: dict[str, Any]) -> None:
    with pytest.raises(UnusableImageError) as caught:
        decode_image(a_dicom(RAMP8, **elements))
    assert caught.value.reason == Reason.DISPLAY_VALUES


def patched_jpeg2000(rows: int, columns: int) -> bytes:
    dataset = a_dataset(LARGE8)
    dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
    data = bytearray(encode(dataset, JPEG2000Lossless))
    start = data.index(b"\xff\x4f\xff\x51")
    struct.pack_into(">II", data, start + 8, columns, rows)
    return bytes(data)


def patched_jpeg(rows: int, columns: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(RAMP8).save(stream, "JPEG")
    jpeg = bytearray(stream.getvalue())
    struct.pack_into(">HH", jpeg, jpeg.index(b"\xff\xc0") + 5, rows, columns)
    return encode(a_dataset(RAMP8, PixelData=encapsulate([bytes(jpeg)])), JPEGBaseline8Bit)


@pytest.mark.parametrize("data", [patched_jpeg2000(30000, 30000), patched_jpeg(60000, 60000)])
def test_a_codestream_larger_than_its_header_says_is_never_decoded(
    data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[object] = []
    monkeypatch.setattr("fedward_client.dicom.pixels._decode", lambda *args: decoded.append(args))

    with pytest.raises(UnusableImageError) as caught:
        decode_image(data)

    assert caught.value.reason == Reason.CODESTREAM
    assert not decoded


def test_a_progressive_jpeg_is_not_taken_for_a_baseline_one() -> None:
    stream = io.BytesIO()
    Image.fromarray(RAMP8).save(stream, "JPEG", progressive=True)

    with pytest.raises(UnusableImageError) as caught:
        decode_image(encode(a_dataset(RAMP8, PixelData=encapsulate([stream.getvalue()])), JPEGBaseline8Bit))

    assert caught.value.reason == Reason.CODESTREAM


def test_an_rle_segment_that_expands_without_end_takes_no_memory() -> None:
    frame = struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\x00" * 1_000_000  # 128 MB of zeros
    data = encode(a_dataset(np.zeros((64, 64), dtype=np.uint8), PixelData=encapsulate([frame])), RLELossless)

    tracemalloc.start()
    with contextlib.suppress(UnusableImageError):
        decode_image(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 30_000_000


def test_frame_size_reads_what_the_encoder_was_given() -> None:
    stream = io.BytesIO()
    Image.new("RGB", (31, 17)).save(stream, "JPEG")
    assert frame_size(stream.getvalue()) == FrameSize(17, 31, components=3, marker=0xC0)
    for syntax, marker in ((JPEG2000Lossless, 0x51), (JPEGLSLossless, 0xF7)):
        dataset = a_dataset(np.zeros((37, 51), dtype=np.uint8))
        dataset.compress(syntax, generate_instance_uid=False)
        start = dataset.PixelData.index(b"\xff\x4f" if syntax == JPEG2000Lossless else b"\xff\xd8")
        assert frame_size(dataset.PixelData[start:]) == FrameSize(37, 51, components=1, marker=marker)


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 6, 11, 30, 41])
def test_a_codestream_cut_short_is_refused(cut: int) -> None:
    for start in (b"\xff\xd8\xff\xe0\x00\x10" + b"\0" * 12, b"\xff\x4f\xff\x51" + b"\0" * 37):
        with pytest.raises(UnusableImageError):
            frame_size(start[:cut])


@pytest.mark.parametrize("seed", range(30))
def test_damaged_bytes_never_escape_as_another_error(seed: int) -> None:
    random = np.random.default_rng(seed)
    dataset = a_dataset(LARGE8, **canary_elements())
    dataset.compress((RLELossless, JPEGLSLossless, JPEG2000Lossless)[seed % 3], generate_instance_uid=False)
    data = bytearray(encode(dataset, dataset.file_meta.TransferSyntaxUID))
    for position in random.integers(132, len(data), 12):
        data[position] = random.integers(256)

    for read in (read_header, decode_image):
        error: UnusableImageError | None = None
        try:
            read(bytes(data))
        except UnusableImageError as raised:
            error = raised
        assert "CNRY" not in f"{error} {error and error.remedy}"
        assert error is None or error.__cause__ is None


def test_a_traceback_of_a_refusal_quotes_nothing() -> None:
    damaged = encode(a_dataset(RAMP8, NumberOfFrames="12345678")).replace(b"12345678", b"CNRYNAME")

    for read in (read_header, decode_image):
        with pytest.raises(UnusableImageError) as caught:
            read(damaged)
        assert caught.value.reason in (Reason.MALFORMED, Reason.DECODE_FAILED)
        assert "CNRY" not in "".join(traceback.format_exception(caught.value))


def test_parser_messages_reach_no_log_no_stream_and_no_warning(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    dataset = a_dataset(RAMP8, PatientAge="003Y", StudyDate="20200101")
    data = encode(dataset).replace(b"20200101", b"CNRYDATE").replace(b"003Y", b"CNRY")
    mode = config.settings.reading_validation_mode

    header = read_header(data)
    decode_image(data)
    for hostile in (data[:300], data[:-5], patched_jpeg2000(16, 16)[:-40]):
        with pytest.raises(UnusableImageError):
            decode_image(hostile)

    assert (header.study_year, header.age_years) == (None, None)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")
    assert config.settings.reading_validation_mode == mode
    assert "P1" not in repr(header)


def test_header_facts() -> None:
    header = read_header(a_dicom(RAMP8, StudyDate="20190203", PatientSex="F", PatientAge="030M"))

    assert (header.study_year, header.sex, header.age_years) == (2019, "F", 2)
    assert refusal_of(header) is None


def test_one_window_in_files_of_other_bits_signs_and_directions_is_not_mixed_up() -> None:
    """A table that was worked out for one file serves the next only if all that it depends on is equal."""
    stored = np.arange(256).reshape(16, 16)
    window = {"WindowCenter": "100", "WindowWidth": "201"}
    kinds: list[tuple[np.dtype[Any], dict[str, Any]]] = [
        (np.dtype(np.uint16), window),
        (np.dtype(np.uint8), window),
        (np.dtype(np.int16), window),
        (np.dtype(np.uint16), window | {"PhotometricInterpretation": "MONOCHROME1"}),
        (np.dtype(np.uint16), window | {"RescaleSlope": "2", "RescaleIntercept": "0"}),
        (np.dtype(np.uint16), window | {"WindowCenter": "120"}),
    ]
    files = [a_dicom(stored.astype(dtype), **given) for dtype, given in kinds]

    first = [decode_image(data) for data in files]
    again = [decode_image(data) for data in reversed(files)]

    ramp = np.clip((stored - 99.5) / 200 + 0.5, 0, 1)
    doubled = np.clip((2 * stored - 99.5) / 200 + 0.5, 0, 1)
    moved = np.clip((stored - 119.5) / 200 + 0.5, 0, 1)
    for found, expected in zip(first, [ramp, ramp, ramp, 1 - ramp, doubled, moved], strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-7)
    np.testing.assert_array_equal(first, again[::-1])


def test_a_header_that_says_two_things_is_refused() -> None:
    data = a_dicom(BurnedInAnnotation="YES")
    said = b"\x28\x00\x01\x03CS\x04\x00YES "
    denied = b"\x28\x00\x01\x03CS\x02\x00NO"
    assert data.count(said) == 1
    assert read_header(data.replace(said, denied)).sop_instance
    with pytest.raises(UnusableImageError) as caught:
        read_header(data.replace(said, said + denied))
    assert caught.value.reason is Reason.MALFORMED
