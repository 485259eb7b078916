"""Pixels as archives and workstations leave them: the values must be those that were stored, or a refusal."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import highdicom as hd
import imagecodecs
import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.encaps import encapsulate, encapsulate_extended
from pydicom.sr.codedict import codes
from pydicom.uid import (
    JPEG2000,
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    MRImageStorage,
    UltrasoundImageStorage,
)

from fedward_client.dicom.decode import decode_image
from fedward_client.dicom.frames import decode_frames
from fedward_client.dicom.gate import GatePolicy, judge, read_gate_facts
from fedward_client.dicom.header import image_refusal_of, read_header
from fedward_client.dicom.intensity import FILE, frames_in_unit_interval
from fedward_client.dicom.palette import expand_segments
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.slice_facts import read_slice_facts
from fedward_client.dicom.syntaxes import DEFLATED_IMAGE_FRAME, ENCAPSULATED_UNCOMPRESSED
from tests.builders import a_dataset, a_uid, encode
from tests.client.series_builder import a_truth, files_of, slices_of, volumes_of

CT: dict[str, Any] = {"SOPClassUID": CTImageStorage, "Modality": "CT"}
US: dict[str, Any] = {"SOPClassUID": UltrasoundImageStorage, "Modality": "US"}
NOISE = np.random.default_rng(2).integers(0, 4096, (3, 40, 48), dtype=np.uint16)
COLOUR = np.random.default_rng(3).integers(0, 256, (40, 48, 3), dtype=np.uint8)


def even(coded: bytes | bytearray) -> bytes:
    return bytes(coded) + b"\0" * (len(coded) % 2)


FRAMES = [even(imagecodecs.jpegls_encode(frame)) for frame in NOISE]


def values_of(dataset: Dataset, syntax: str = ExplicitVRLittleEndian) -> NDArray[Any]:
    return decode_frames(encode(dataset, syntax)).values


def a_colour(**elements: Any) -> Dataset:
    dataset = a_dataset(COLOUR[..., 0], SamplesPerPixel=3, PlanarConfiguration=0, **US)
    dataset.PhotometricInterpretation, dataset.PixelData = "RGB", COLOUR.tobytes()
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    return dataset


def a_jpeg_2000(pixels: NDArray[Any], *, mct: bool = False, psnr: int = 0) -> bytes:
    """Reversible without a `psnr`."""
    coded = imagecodecs.jpeg2k_encode(pixels, codecformat="j2k", level=psnr, reversible=not psnr, mct=mct)
    return even(coded)


CODERS: dict[str, Callable[[NDArray[Any]], bytes]] = {
    JPEGLSLossless: lambda pixels: even(imagecodecs.jpegls_encode(pixels)),
    JPEG2000Lossless: a_jpeg_2000,
    HTJ2KLossless: lambda pixels: even(imagecodecs.htj2k_encode(pixels)),
}


@pytest.mark.parametrize("syntax", CODERS)
@pytest.mark.parametrize("signed", [False, True])
def test_bits_above_the_stored_ones_mean_nothing_after_lossless_compression(
    syntax: str, signed: bool
) -> None:
    """Signs that are not extended, and overlays of old devices, survive in a codestream of 16 bits."""
    true = NOISE[0].astype(np.int16) - 2048 if signed else NOISE[0]
    overlay = (np.indices(true.shape).sum(axis=0) % 16 << 12).astype(np.uint16)
    stored = ((true.view(np.uint16) & 0x0FFF) | overlay).view(true.dtype)
    dataset = a_dataset(stored, BitsStored=12, HighBit=11, **CT)
    dataset.PixelData = encapsulate([CODERS[syntax](stored.view(np.uint16))])

    np.testing.assert_array_equal(values_of(dataset, syntax)[0], true)


def test_lossy_compression_that_overshoots_the_stored_bits_does_not_turn_white_into_black() -> None:
    edges = np.zeros((64, 64), np.uint16)
    edges[:, ::7] = edges[20:40, 20:40] = 4095
    coded = a_jpeg_2000(edges, psnr=40)
    decoded = imagecodecs.jpeg2k_decode(coded)
    assert decoded.max() > 4095
    dataset = a_dataset(edges, BitsStored=12, HighBit=11, **CT)
    dataset.PixelData = encapsulate([coded])

    np.testing.assert_array_equal(values_of(dataset, JPEG2000)[0], decoded)


@pytest.mark.parametrize("photometric", ["RGB", "YBR_RCT", "YBR_FULL", "YBR_FULL_422"])
def test_transformed_jpeg_2000_is_rgb_whatever_its_former_label(photometric: str) -> None:
    coded = a_jpeg_2000(COLOUR, mct=True)
    dataset = a_colour(PhotometricInterpretation=photometric, PixelData=encapsulate([coded]))

    np.testing.assert_array_equal(values_of(dataset, JPEG2000Lossless)[0], COLOUR)


def test_jpeg_2000_that_is_not_transformed_is_what_its_label_says() -> None:
    coded = a_jpeg_2000(COLOUR, mct=False)
    plain = a_colour(PhotometricInterpretation="RGB", PixelData=encapsulate([coded]))
    ybr = a_colour(PhotometricInterpretation="YBR_FULL", PixelData=encapsulate([coded]))
    expected = values_of(a_colour(PhotometricInterpretation="YBR_FULL"))

    np.testing.assert_array_equal(values_of(plain, JPEG2000Lossless)[0], COLOUR)
    np.testing.assert_array_equal(values_of(ybr, JPEG2000Lossless), expected)


def in_fragments(table: Sequence[int], pieces: Sequence[bytes]) -> bytes:
    def item(value: bytes) -> bytes:
        return b"\xfe\xff\x00\xe0" + struct.pack("<L", len(value)) + value

    return item(struct.pack(f"<{len(table)}L", *table)) + b"".join(map(item, pieces))


def multi_frame(pixels: bytes, num_frames: int = 3, **elements: Any) -> Dataset:
    dataset = a_dataset(NOISE[0], BitsStored=12, HighBit=11, NumberOfFrames=num_frames, **CT, **elements)
    dataset.PixelData = pixels
    return dataset


OFFSETS = np.cumsum([0, *(len(frame) + 8 for frame in FRAMES[:-1])]).tolist()
TABLES: dict[str, list[int]] = {
    "true": OFFSETS,
    "empty": [],
    "of another encoding": [offset + 1234 for offset in OFFSETS],
    "zeros": [0, 0, 0],
    "of two frames": OFFSETS[:2],
    "reversed": OFFSETS[::-1],
}


@pytest.mark.parametrize("table", TABLES)
def test_a_wrong_offset_table_harms_nothing_where_each_frame_is_a_fragment(table: str) -> None:
    dataset = multi_frame(in_fragments(TABLES[table], FRAMES))
    np.testing.assert_array_equal(values_of(dataset, JPEGLSLossless), NOISE)


@pytest.mark.parametrize("table", ["true", "empty", "of another encoding", "zeros"])
def test_frames_in_several_fragments_begin_where_codestreams_do(table: str) -> None:
    pieces = [frame[start : start + 1000] for frame in FRAMES for start in range(0, len(frame), 1000)]
    sizes = [sum(len(frame[at : at + 1000]) + 8 for at in range(0, len(frame), 1000)) for frame in FRAMES]
    true = np.cumsum([0, *sizes[:-1]]).tolist()
    offsets = {"true": true, "of another encoding": [each + 1234 for each in true]}.get(table, TABLES[table])
    dataset = multi_frame(in_fragments(offsets, [*pieces, b""]))
    np.testing.assert_array_equal(values_of(dataset, JPEGLSLossless), NOISE)

    with pytest.raises(UnusableImageError) as refused:
        values_of(multi_frame(in_fragments([], pieces), num_frames=4), JPEGLSLossless)
    assert refused.value.reason is Reason.TRUNCATED


def test_an_extended_offset_table_is_read_and_a_wrong_one_is_not_believed() -> None:
    pixels, offsets, lengths = encapsulate_extended(FRAMES)
    for table in (offsets, struct.pack("<3Q", 8, 16, 24)):
        dataset = multi_frame(pixels, ExtendedOffsetTable=table, ExtendedOffsetTableLengths=lengths)
        np.testing.assert_array_equal(values_of(dataset, JPEGLSLossless), NOISE)


def test_uncompressed_frames_in_fragments_are_read() -> None:
    grey = multi_frame(encapsulate([frame.tobytes() for frame in NOISE]))
    np.testing.assert_array_equal(values_of(grey, ENCAPSULATED_UNCOMPRESSED), NOISE)
    colour = a_colour(PixelData=encapsulate([COLOUR.tobytes()]))
    np.testing.assert_array_equal(values_of(colour, ENCAPSULATED_UNCOMPRESSED)[0], COLOUR)
    with pytest.raises(UnusableImageError) as refused:
        values_of(
            multi_frame(encapsulate([frame.tobytes()[:-2] for frame in NOISE])), ENCAPSULATED_UNCOMPRESSED
        )
    assert refused.value.reason is Reason.TRUNCATED


def test_deflated_colour_frames_are_read() -> None:
    coder = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    deflated = coder.compress(COLOUR.tobytes()) + coder.flush()
    dataset = a_colour(PixelData=encapsulate([even(deflated)]))
    data = encode(dataset, ENCAPSULATED_UNCOMPRESSED)  # pydicom does not write the other
    data = data.replace(ENCAPSULATED_UNCOMPRESSED.encode(), DEFLATED_IMAGE_FRAME.encode() + b"\0")
    np.testing.assert_array_equal(decode_frames(data).values[0], COLOUR)


def test_a_single_frame_that_is_counted_as_none_is_one() -> None:
    dataset = a_dataset(NOISE[0], BitsStored=12, HighBit=11, NumberOfFrames=0, **CT)
    np.testing.assert_array_equal(values_of(dataset)[0], NOISE[0])


def test_single_bits_in_words_of_the_other_byte_order() -> None:
    bits = np.random.default_rng(6).integers(0, 2, (3, 9, 13), dtype=np.uint8)
    packed = np.packbits(bits.ravel(), bitorder="little")
    words = np.append(packed, np.zeros(len(packed) % 2, np.uint8)).view(np.uint16).byteswap()
    dataset = a_dataset(bits[0], NumberOfFrames=3, BitsAllocated=1, BitsStored=1, HighBit=0, **US)
    dataset.PixelData = words.tobytes()
    dataset["PixelData"].VR = "OW"
    np.testing.assert_array_equal(values_of(dataset, ExplicitVRBigEndian), bits)


def test_colour_of_32_bits_keeps_its_upper_bits() -> None:
    deep = np.random.default_rng(7).integers(0, 2**32, (40, 48, 3), dtype=np.uint32)
    dataset = a_colour(BitsAllocated=32, BitsStored=32, HighBit=31, PixelData=deep.tobytes())
    dataset["PixelData"].VR = "OW"
    np.testing.assert_array_equal(values_of(dataset)[0], deep >> 24)


def a_palette(bits: int, entries: bytes, *, segmented: bool) -> Dataset:
    dataset = a_dataset(COLOUR[..., 0], **US)
    dataset.PhotometricInterpretation = "PALETTE COLOR"
    for colour in ("Red", "Green", "Blue"):
        descriptor = f"{colour}PaletteColorLookupTableDescriptor"
        data = ("Segmented" if segmented else "") + f"{colour}PaletteColorLookupTableData"
        setattr(dataset, descriptor, [256, 0, bits])
        setattr(dataset, data, entries)
        dataset[descriptor].VR, dataset[data].VR = "US", "OW"
    return dataset


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}H", *values)


PALETTES = {
    "8 bits, segmented": (8, bytes([0, 1, 0, 1, 255, 255]), True),
    "8 bits, segmented, a byte of padding": (8, bytes([0, 2, 0, 1, 1, 254, 255, 0]), True),
    "words of 16 bits though it says 8": (8, words(*(number << 8 for number in range(256))), False),
}


@pytest.mark.parametrize("name", PALETTES)
def test_palettes_in_less_usual_forms(name: str) -> None:
    bits, entries, segmented = PALETTES[name]
    shown = values_of(a_palette(bits, entries, segmented=segmented))[0].astype(int)
    assert np.abs(shown - COLOUR[..., :1]).max() <= 1


def test_indirect_segments_repeat_what_was_carried_out_and_nothing_else() -> None:
    discrete, ramp = [0, 1, 5], [1, 2, 9]
    assert expand_segments([*discrete, *ramp, 2, 2, 0, 0, 0, 1, 8], 7) == [5, 7, 9, 5, 7, 9, 8]
    assert expand_segments([*discrete, *ramp, 2, 2, 0, 0, 0, 0], 6, words=False) == [5, 7, 9, 5, 7, 9]
    for program in (
        [*discrete, 2, 1, 1, 0],  # not a whole number of words
        [*discrete, 2, 1, 6, 0],  # itself
        [*discrete, 2, 1, 60, 0],  # beyond the end
        [*discrete, 2, 1, 0],  # cut off
        [*discrete, 2, 1, 0, 0, 2, 2, 6, 0],  # one that is indirect itself
    ):
        with pytest.raises(UnusableImageError):
            expand_segments(program, 200)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
@pytest.mark.parametrize("vr", ["SS", "US"])
def test_a_voi_table_begins_at_a_negative_value_in_every_encoding(syntax: str, vr: str) -> None:
    """-1024 is written as 64512 where the VR cannot say that it is signed, or says the contrary."""
    table = Dataset()
    table.LUTDescriptor = [4096, -1024 if vr == "SS" else 2**16 - 1024, 16]
    table.LUTData = (np.arange(4096) * 16).astype("<u2").tobytes()
    table["LUTDescriptor"].VR, table["LUTData"].VR = vr, "OW"
    rescale = {"RescaleSlope": "1", "RescaleIntercept": "-1024", "VOILUTSequence": [table]}
    dataset = a_dataset(NOISE[0], BitsStored=12, HighBit=11, **CT, **rescale)

    shown = frames_in_unit_interval(decode_frames(encode(dataset, syntax)), FILE)[0]

    np.testing.assert_allclose(shown, NOISE[0] * 16 / 65535, atol=1e-6)


def test_a_window_of_width_one_is_a_threshold() -> None:
    window = {"WindowCenter": "100", "WindowWidth": "1"}
    image = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(decode_image(encode(a_dataset(image, **window))), image >= 100)


@pytest.mark.parametrize("kind", [np.uint16, np.float32, np.float64])
def test_parametric_maps_are_images_in_the_units_of_their_mapping(kind: type) -> None:
    slices = [dcmread(io.BytesIO(data)) for data in files_of(slices_of(a_truth(num_slices=4)))]
    for each in slices:
        each.StudyDate = each.StudyTime = each.PatientName = each.PatientBirthDate = each.PatientSex = ""
        each.StudyID = each.AccessionNumber = each.ReferringPhysicianName = ""
    stored: NDArray[Any] = np.random.default_rng(1).integers(0, 900, (4, 13, 11)).astype(kind)
    written = hd.pm.ParametricMap(
        source_images=slices,
        pixel_array=stored,
        series_instance_uid=a_uid("map"),
        series_number=2,
        sop_instance_uid=a_uid("map instance"),
        instance_number=1,
        manufacturer="M",
        manufacturer_model_name="N",
        software_versions="1",
        device_serial_number="1",
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[
            hd.pm.RealWorldValueMapping(
                lut_label="1",
                lut_explanation="apparent diffusion",
                unit=codes.UCUM.NoUnits,
                value_range=(0, 4095) if kind is np.uint16 else (0.0, 4095.0),
                slope=0.5,
                intercept=-3,
            )
        ],
        voi_lut_transformations=[hd.VOILUTTransformation(window_center=100, window_width=200)],
    )
    data = encode(written)

    assert image_refusal_of(read_header(data)) is None
    (volume,) = volumes_of([data])[1]
    np.testing.assert_array_equal(volume.values, stored * 0.5 - 3)
    expected = a_truth(num_slices=4).origins[0] * (-1, -1, 1)
    np.testing.assert_allclose(volume.affine[:3, 3], expected, atol=1e-6)

    (groups,) = written.SharedFunctionalGroupsSequence
    groups.RealWorldValueMappingSequence = [*groups.RealWorldValueMappingSequence] * 2
    with pytest.raises(UnusableImageError) as refused:
        decode_frames(encode(written))
    assert refused.value.reason is Reason.FRAME_FACTS


@pytest.mark.parametrize(
    ("sop_class", "modality"),
    [("1.2.840.10008.5.1.4.1.1.6", "US"), ("1.2.840.10008.5.1.4.1.1.3", "US")],
)
def test_retired_ultrasound_is_ultrasound_and_so_never_trains_unmasked(sop_class: str, modality: str) -> None:
    data = encode(a_dataset(SOPClassUID=sop_class, Modality=modality))
    assert image_refusal_of(read_header(data)) is None
    assert judge(read_gate_facts(data), GatePolicy()).decision == "quarantine"


@pytest.mark.parametrize(("number", "is_grid"), [("36", True), ("1", False), (None, False)])
def test_slices_side_by_side_that_only_a_private_element_tells_of_are_refused(
    number: str | None, is_grid: bool
) -> None:
    (dataset,) = slices_of(a_truth(num_slices=1), SOPClassUID=MRImageStorage, Modality="MR")
    block = dataset.private_block(0x0065, "Image Private Header", create=True)
    if number is not None:
        block.add_new(0x50, "DS", number)
    data = encode(dataset)
    for read in (decode_frames, lambda each: read_slice_facts(each, "content")):
        if not is_grid:
            read(data)
            continue
        with pytest.raises(UnusableImageError) as refused:
            read(data)
        assert refused.value.reason is Reason.MOSAIC


@pytest.mark.parametrize(
    ("rescale", "reason"),
    [
        ({"RescaleSlope": "1", "RescaleIntercept": ""}, None),
        ({"RescaleSlope": "", "RescaleIntercept": "0"}, None),
        ({"RescaleSlope": "", "RescaleIntercept": "-1024"}, Reason.DISPLAY_VALUES),
        ({"RescaleSlope": "2"}, Reason.DISPLAY_VALUES),
        ({"RescaleSlope": "1_0", "RescaleIntercept": "0"}, Reason.DISPLAY_VALUES),
    ],
)
def test_half_a_rescale_is_refused_where_it_would_change_the_values(
    rescale: dict[str, str], reason: Reason | None
) -> None:
    dataset = a_dataset(NOISE[0], BitsStored=12, HighBit=11, **CT)
    for keyword, text in rescale.items():
        dataset.add_new(keyword, "LO", text)
    data = encode(dataset)
    if reason is None:
        np.testing.assert_array_equal(decode_frames(data).values[0], NOISE[0])
        return
    with pytest.raises(UnusableImageError) as refused:
        decode_frames(data)
    assert refused.value.reason is reason
