"""Frames in their modality's units: each way of storing pixels against a calculation made here."""

from __future__ import annotations

import io
import struct
from typing import Any

import highdicom
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    RLELossless,
    RTDoseStorage,
    SegmentationStorage,
    UltrasoundImageStorage,
)

from fedward_client.dicom.frames import Frames, decode_frames
from fedward_client.dicom.intensity import (
    FILE,
    Intensity,
    frames_in_unit_interval,
    in_unit_interval,
)
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.rle import decode_single_bits
from tests.builders import a_dataset, a_dicom, encode

NOISE = np.random.default_rng(3).integers(0, 4096, (24, 20), dtype=np.uint16)
BYTES = np.random.default_rng(4).integers(0, 256, (3, 24, 20, 3), dtype=np.uint8)
CT: dict[str, Any] = {"SOPClassUID": CTImageStorage, "Modality": "CT", "BitsStored": 12, "HighBit": 11}


def reason_of(data: bytes, **given: Any) -> Reason:
    with pytest.raises(UnusableImageError) as caught:
        decode_frames(data, **given)
    return caught.value.reason


def test_rescale_gives_hounsfield_units() -> None:
    frames = decode_frames(a_dicom(NOISE, RescaleSlope="1", RescaleIntercept="-1024", **CT))

    assert frames.units == "HU"
    np.testing.assert_array_equal(frames.values[0], NOISE.astype(np.float64) - 1024)
    assert frames.stored_range == ((-1024.0, 3071.0),)
    assert frames.values.dtype == np.float32


def test_fractional_slope_is_as_exact_as_float32() -> None:
    frames = decode_frames(a_dicom(NOISE, RescaleSlope="0.0123456789", RescaleIntercept="0.1", **CT))

    expected = (NOISE.astype(np.float64) * 0.0123456789 + 0.1).astype(np.float32)
    np.testing.assert_array_equal(frames.values[0], expected)


@pytest.mark.parametrize(
    ("elements", "units"),
    [
        ({"Modality": "CT", "SOPClassUID": CTImageStorage}, "US"),
        ({"RescaleSlope": "1", "RescaleIntercept": "0", "RescaleType": "HU_MOD"}, "HU_MOD"),
        ({"RescaleSlope": "1", "RescaleIntercept": "0", "RescaleType": "DOE^JOHN"}, "US"),
        ({"Modality": "PT", "SOPClassUID": PositronEmissionTomographyImageStorage, "Units": "BQML"}, "BQML"),
        ({"Modality": "PT", "SOPClassUID": PositronEmissionTomographyImageStorage, "Units": "JOHN"}, "US"),
        ({"Modality": "MR", "SOPClassUID": MRImageStorage}, "US"),
    ],
)
def test_units_are_the_standards_terms_and_nothing_else(elements: dict[str, str], units: str) -> None:
    assert decode_frames(a_dicom(NOISE, **elements)).units == units


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_signed_values_in_part_of_their_bits(syntax: str) -> None:
    signed = NOISE.astype(np.int16) - 2048
    order = ">i2" if syntax == ExplicitVRBigEndian else "<i2"
    dirty = (signed & 0x0FFF) | (0x5000 if syntax != ImplicitVRLittleEndian else 0)  # an old overlay above
    dataset = a_dataset(signed, **CT)
    dataset.PixelData = dirty.astype(order).tobytes()

    np.testing.assert_array_equal(decode_frames(encode(dataset, syntax)).values[0], signed)


def test_inversion_is_told_and_not_applied() -> None:
    for elements in (
        {"PhotometricInterpretation": "MONOCHROME1"},
        {"PhotometricInterpretation": "MONOCHROME2", "PresentationLUTShape": "INVERSE"},
    ):
        frames = decode_frames(a_dicom(NOISE, RescaleSlope="1", RescaleIntercept="-1024", **CT, **elements))
        assert frames.inverted
        np.testing.assert_array_equal(frames.values[0], NOISE.astype(np.float64) - 1024)


def test_modality_table_goes_before_rescale() -> None:
    item = Dataset()
    item.LUTDescriptor = [4096, 0, 16]
    item["LUTDescriptor"].VR = "US"
    table = np.arange(4096, dtype=np.uint16)[::-1] * 2
    item.LUTData = table.tolist()
    item["LUTData"].VR = "US"

    frames = decode_frames(a_dicom(NOISE, ModalityLUTSequence=[item], **CT))

    np.testing.assert_array_equal(frames.values[0], table[NOISE])
    assert frames.stored_range == ((0.0, 8190.0),)


@pytest.mark.parametrize(("bits", "keyword"), [(32, "FloatPixelData"), (64, "DoubleFloatPixelData")])
def test_floating_point_pixels(bits: int, keyword: str) -> None:
    values = np.random.default_rng(5).normal(size=(24, 20)).astype(f"<f{bits // 8}")
    values[0, 0] = np.nan
    dataset = a_dataset(NOISE, **CT, PixelData=None)
    dataset.BitsAllocated = bits
    for absent in ("BitsStored", "HighBit", "PixelRepresentation"):
        del dataset[absent]
    setattr(dataset, keyword, values.tobytes())

    frames = decode_frames(encode(dataset))

    np.testing.assert_array_equal(frames.values[0], values.astype(np.float32))
    assert frames.stored_range[0] == pytest.approx((np.nanmin(values), np.nanmax(values)), rel=1e-6)
    assert np.isfinite(frames_in_unit_interval(frames, Intensity("percentiles", 1, 99))).all()


def single_bits(syntax: str) -> tuple[bytes, NDArray[np.uint8]]:
    bits = np.random.default_rng(6).integers(0, 2, (3, 7, 9), dtype=np.uint8)
    dataset = a_dataset(np.zeros((8, 8), np.uint8), SOPClassUID=SegmentationStorage, Modality="SEG")
    dataset.Rows, dataset.Columns, dataset.NumberOfFrames = 7, 9, 3
    dataset.BitsAllocated = dataset.BitsStored = 1
    dataset.HighBit = 0
    packed = np.packbits(bits.ravel(), bitorder="little").tobytes()
    dataset.PixelData = packed + b"\0" * (len(packed) % 2)
    if syntax == RLELossless:
        dataset.PixelData = encapsulate([an_rle_frame(frame) for frame in bits])
    return encode(dataset, syntax), bits


def an_rle_frame(bits: NDArray[np.uint8]) -> bytes:
    packed = np.packbits(bits.ravel(), bitorder="little").tobytes()
    segment = bytes([len(packed) - 1]) + packed
    frame = struct.pack("<16I", 1, 64, *[0] * 14) + segment
    return frame + b"\x80" * (len(frame) % 2)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless])
def test_single_bits_are_unpacked_across_bytes(syntax: str) -> None:
    data, bits = single_bits(syntax)

    np.testing.assert_array_equal(decode_frames(data).values, bits)


def test_run_lengths_of_bits_expand_no_further_than_the_frame() -> None:
    header = struct.pack("<16I", 1, 64, *[0] * 14)

    np.testing.assert_array_equal(decode_single_bits(header + b"\x81\xff", 8, 8), np.ones((8, 8)))
    np.testing.assert_array_equal(decode_single_bits(header + b"\x80\x80\xf9\xff", 8, 8), np.ones((8, 8)))
    for frame in (
        b"",
        header[:-1],
        struct.pack("<16I", 2, 64, *[0] * 14) + b"\x81\xff",
        header + b"\xff\x01",
    ):
        with pytest.raises(UnusableImageError):
            decode_single_bits(frame, 8, 8)


def a_colour(photometric: str, pixels: NDArray[np.uint8], **elements: Any) -> Dataset:
    own = {"SOPClassUID": UltrasoundImageStorage, "Modality": "US", "PlanarConfiguration": 0}
    dataset = a_dataset(pixels[..., 0], SamplesPerPixel=3, PhotometricInterpretation=photometric, **own)
    dataset.PixelData = pixels.tobytes()
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    return dataset


def ybr_to_rgb(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """ITU-T T.871, by hand."""
    luma, blue, red = (pixels[..., number].astype(np.float64) for number in range(3))
    blue, red = blue - 128, red - 128
    rgb = [luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue]
    return np.clip(np.stack(rgb, axis=-1), 0, 255)


def test_colour_comes_out_as_rgb() -> None:
    image = BYTES[0]
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))

    rgb = decode_frames(encode(a_colour("RGB", image)))
    by_plane = decode_frames(
        encode(a_colour("RGB", image, PlanarConfiguration=1, PixelData=planes.tobytes()))
    )
    ybr = decode_frames(encode(a_colour("YBR_FULL", image)))

    assert (rgb.units, rgb.values.dtype.name, rgb.is_colour) == ("RGB", "uint8", True)
    np.testing.assert_array_equal(rgb.values[0], image)
    np.testing.assert_array_equal(by_plane.values[0], image)
    assert np.abs(ybr.values[0] - ybr_to_rgb(image)).max() <= 1


def test_subsampled_colour_is_brought_to_full_size() -> None:
    luma = BYTES[0, ..., 0]
    chroma = np.repeat(BYTES[0, :, ::2, 1:], 2, axis=1)
    full = np.concatenate([luma[..., None], chroma], axis=-1)
    stored = np.stack([luma[:, ::2], luma[:, 1::2], chroma[:, ::2, 0], chroma[:, ::2, 1]], axis=-1)

    frames = decode_frames(encode(a_colour("YBR_FULL_422", full, PixelData=stored.tobytes())))

    assert np.abs(frames.values[0] - ybr_to_rgb(full)).max() <= 1


def test_frames_of_an_odd_number_of_bytes_follow_each_other() -> None:
    image = BYTES[:, :5, :3]  # 45 bytes a frame
    dataset = a_colour("RGB", image[0])
    dataset.NumberOfFrames = 3
    dataset.PixelData = image.tobytes() + b"\0"

    np.testing.assert_array_equal(decode_frames(encode(dataset)).values, image)


def test_deep_colour_keeps_its_upper_bits() -> None:
    deep = np.random.default_rng(7).integers(0, 2**16, (24, 20, 3), dtype=np.uint16)
    dataset = a_colour("RGB", BYTES[0], BitsAllocated=16, BitsStored=16, HighBit=15, PixelData=deep.tobytes())
    dataset["PixelData"].VR = "OW"

    np.testing.assert_array_equal(decode_frames(encode(dataset)).values[0], deep >> 8)


def test_baseline_jpeg_in_colour_agrees_with_pillow() -> None:
    smooth = np.asarray(Image.fromarray(BYTES[0]).resize((64, 48), Image.Resampling.BICUBIC))
    stream = io.BytesIO()
    Image.fromarray(smooth).save(stream, "JPEG", quality=95)
    dataset = a_colour("YBR_FULL_422", smooth, PixelData=encapsulate([stream.getvalue()]))

    values = decode_frames(encode(dataset, JPEGBaseline8Bit)).values[0]

    assert np.abs(values.astype(int) - np.asarray(Image.open(stream).convert("RGB"))).max() <= 2


def a_palette(bits: int, *, segmented: bool = False) -> dict[str, Any]:
    ramp = np.arange(256)
    colours = {"Red": ramp, "Green": 255 - ramp, "Blue": ramp // 2}
    found: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour, entries in colours.items():
        found[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, bits]
        words = entries.astype("<u2") << (bits - 8)
        if segmented:
            program = np.array([0, 1, words[0], 1, 255, words[-1]], "<u2")
            found[f"Segmented{colour}PaletteColorLookupTableData"] = program.tobytes()
        else:
            found[f"{colour}PaletteColorLookupTableData"] = words.astype("<u2").tobytes()
    return found


def a_palette_file(elements: dict[str, Any]) -> bytes:
    dataset = a_dataset(BYTES[0, ..., 0], SOPClassUID=UltrasoundImageStorage, Modality="US")
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
        if keyword.endswith("Descriptor"):
            dataset[keyword].VR = "US"
    return encode(dataset)


@pytest.mark.parametrize(("bits", "segmented"), [(16, False), (8, False), (16, True)])
def test_palette_is_expanded(bits: int, segmented: bool) -> None:
    indices = BYTES[0, ..., 0].astype(int)

    values = decode_frames(a_palette_file(a_palette(bits, segmented=segmented))).values[0].astype(int)

    expected = np.stack([indices, 255 - indices, indices // 2], axis=-1)
    assert np.abs(values - expected).max() <= (1 if segmented else 0)


def test_palette_that_contradicts_itself_is_refused() -> None:
    other = a_palette(16) | {"GreenPaletteColorLookupTableDescriptor": [128, 0, 16]}
    unknown = a_palette(16, segmented=True)
    unknown["SegmentedRedPaletteColorLookupTableData"] = np.array([5, 1, 0], "<u2").tobytes()
    short = a_palette(16, segmented=True)
    short["SegmentedRedPaletteColorLookupTableData"] = np.array([0, 1, 0], "<u2").tobytes()
    absent = a_palette(16)
    del absent["BluePaletteColorLookupTableDescriptor"]

    assert reason_of(a_palette_file(other)) == Reason.PHOTOMETRIC
    assert reason_of(a_palette_file(unknown)) == Reason.PHOTOMETRIC
    assert reason_of(a_palette_file(short)) == Reason.PHOTOMETRIC
    assert reason_of(a_palette_file(absent)) == Reason.DISPLAY_VALUES


def item(**elements: Any) -> Dataset:
    made = Dataset()
    for keyword, value in elements.items():
        setattr(made, keyword, value)
    return made


def an_enhanced_ct(num_frames: int = 3) -> Dataset:
    """Slope, position and window of each frame; orientation, spacing and the first slope shared."""
    stored = np.stack([NOISE + np.uint16(number) for number in range(num_frames)])
    dataset = a_dataset(NOISE, SOPClassUID=EnhancedCTImageStorage, Modality="CT")
    dataset.NumberOfFrames = num_frames
    dataset.PixelData = stored.tobytes()
    dataset.SharedFunctionalGroupsSequence = Sequence(
        [
            item(
                PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
                PixelMeasuresSequence=[item(PixelSpacing=[0.5, 0.25], SliceThickness=2)],
                CTImageFrameTypeSequence=[item(FrameType=["ORIGINAL", "PRIMARY"])],
            )
        ]
    )
    dataset.DimensionIndexSequence = Sequence([item(DimensionIndexPointer=0x00209057)])
    dataset.PerFrameFunctionalGroupsSequence = Sequence(
        [
            item(
                FrameContentSequence=[
                    item(StackID="1", InStackPositionNumber=number + 1, DimensionIndexValues=[number + 1])
                ],
                PlanePositionSequence=[item(ImagePositionPatient=[0, 0, 2.0 * number])],
                PixelValueTransformationSequence=[
                    item(RescaleSlope=1 + number, RescaleIntercept=-1000 * number, RescaleType="HU")
                ],
                FrameVOILUTSequence=[item(WindowCenter=40 + number, WindowWidth=400)],
            )
            for number in range(num_frames)
        ]
    )
    return dataset


def test_every_frame_of_an_enhanced_object_has_its_own_rescale_place_and_window(tmp_path: Any) -> None:
    dataset = an_enhanced_ct()

    frames = decode_frames(encode(dataset))

    for number in range(3):
        expected = (NOISE.astype(np.float64) + number) * (1 + number) - 1000 * number
        np.testing.assert_array_equal(frames.values[number], expected)
    assert frames.units == "HU"
    assert frames.windows == ((40.0, 400.0), (41.0, 400.0), (42.0, 400.0))
    np.testing.assert_array_equal(frames.positions, [[0, 0, 0], [0, 0, 2], [0, 0, 4]])
    np.testing.assert_array_equal(frames.orientations, [[1, 0, 0, 0, 1, 0]] * 3)
    assert frames.spacing == (0.5, 0.25)
    assert frames.facts.stack_ids == ("1", "1", "1")
    np.testing.assert_array_equal(frames.facts.in_stack, [1, 2, 3])
    np.testing.assert_array_equal(frames.facts.dimension_indices, [[1], [2], [3]])
    assert frames.facts.dimension_pointers == (0x00209057,)
    assert frames.facts.frame_types == (("ORIGINAL", "PRIMARY"),) * 3
    assert [span[0] for span in frames.stored_range] == [0.0, -1000.0, -2000.0]


@pytest.mark.data
def test_enhanced_frames_agree_with_highdicom(shared_data: Any) -> None:
    paths = [
        *sorted((shared_data / "dicom-vendors" / "mr_siemens_vida_via_siemens").glob("*.dcm"))[:2],
        shared_data / "dicom-varied" / "pydicom-data" / "eCT_Supplemental.dcm",
    ]
    for path in paths:
        reference = highdicom.imread(path).get_frames(
            apply_modality_transform=True, apply_voi_transform=False, apply_presentation_lut=False
        )
        values = decode_frames(path.read_bytes()).values
        np.testing.assert_allclose(values, reference, rtol=1e-6)


def test_functional_groups_that_do_not_cover_every_frame_are_refused() -> None:
    few, partly = an_enhanced_ct(), an_enhanced_ct()
    few.PerFrameFunctionalGroupsSequence.pop()
    del partly.PerFrameFunctionalGroupsSequence[1].PixelValueTransformationSequence

    assert reason_of(encode(few)) == Reason.FRAME_FACTS
    assert reason_of(encode(partly)) == Reason.FRAME_FACTS
    empty = an_enhanced_ct()
    del empty.PerFrameFunctionalGroupsSequence[1].PixelValueTransformationSequence[0].RescaleSlope
    assert reason_of(encode(empty)) == Reason.DISPLAY_VALUES


def test_position_that_one_frame_lacks_is_unknown_for_all() -> None:
    dataset = an_enhanced_ct()
    del dataset.PerFrameFunctionalGroupsSequence[2].PlanePositionSequence

    frames = decode_frames(encode(dataset))

    assert frames.positions is None
    assert frames.orientations is not None


def test_dose_planes_lie_at_their_offsets() -> None:
    dataset = a_dataset(NOISE, SOPClassUID=RTDoseStorage, Modality="RTDOSE")
    dataset.NumberOfFrames, dataset.PixelData = 2, NOISE.tobytes() * 2
    dataset.GridFrameOffsetVector = [0, 2.5]
    dataset.ImagePositionPatient, dataset.ImageOrientationPatient = [1, 2, 3], [1, 0, 0, 0, 1, 0]

    np.testing.assert_array_equal(decode_frames(encode(dataset)).positions, [[1, 2, 3], [1, 2, 5.5]])


def test_many_frames_that_say_where_one_lies_lie_nowhere() -> None:
    dataset = a_dataset(NOISE, **CT)
    dataset.NumberOfFrames, dataset.PixelData = 2, NOISE.tobytes() * 2
    dataset.ImagePositionPatient = [1, 2, 3]

    assert decode_frames(encode(dataset)).positions is None


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        ({"RescaleSlope": ["1", "2"], "RescaleIntercept": "0"}, Reason.DISPLAY_VALUES),
        ({"RescaleSlope": "1e300", "RescaleIntercept": "0"}, Reason.DISPLAY_VALUES),
        ({"WindowCenter": ["1"] * 65, "WindowWidth": ["1"] * 65}, Reason.DISPLAY_VALUES),
        ({"NumberOfFrames": 2}, Reason.TRUNCATED),
        ({"NumberOfFrames": 70000}, Reason.DIMENSIONS),
        ({"PhotometricInterpretation": "HSV"}, Reason.PHOTOMETRIC),
        ({"SamplesPerPixel": 4}, Reason.PHOTOMETRIC),
        ({"BitsStored": 17, "HighBit": 16}, Reason.PIXEL_FORMAT),
        ({"PixelData": None}, Reason.NO_PIXELS),
    ],
)
def test_files_that_cannot_be_decoded_with_certainty_are_refused(
    elements: dict[str, Any], reason: Reason
) -> None:
    assert reason_of(a_dicom(NOISE, **(CT | elements))) == reason


def test_more_pixels_than_permitted_are_refused() -> None:
    assert reason_of(a_dicom(NOISE, **CT), max_pixel_bytes=NOISE.nbytes - 1) == Reason.OVER_LIMIT
    data, _ = single_bits(ExplicitVRLittleEndian)
    assert reason_of(data, max_pixel_bytes=100) == Reason.OVER_LIMIT


def test_frames_that_are_missing_or_cut_are_refused() -> None:
    dataset = a_dataset(np.tile(NOISE, (2, 2)), **CT)
    dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
    whole = encode(dataset, JPEG2000Lossless)
    dataset.NumberOfFrames = 2

    assert reason_of(encode(dataset, JPEG2000Lossless)) in (Reason.TRUNCATED, Reason.CODESTREAM)
    assert reason_of(whole[:-40]) == Reason.TRUNCATED
    assert reason_of(whole.replace(b"\xfe\xff\x00\xe0", b"\xfe\xff\x01\xe0")) == Reason.CODESTREAM


# One convention for intensities.


def the_frames(**elements: Any) -> Frames:
    return decode_frames(a_dicom(NOISE, RescaleSlope="1", RescaleIntercept="-1024", **CT, **elements))


def test_window_in_units_is_linear_clipped_and_inverted_last() -> None:
    units = NOISE.astype(np.float64) - 1024
    expected = np.clip((units + 100) / 400, 0, 1)

    shown = frames_in_unit_interval(the_frames(), Intensity("units", -100, 300))
    inverted = frames_in_unit_interval(
        the_frames(PhotometricInterpretation="MONOCHROME1"), Intensity("units", -100, 300)
    )

    np.testing.assert_allclose(shown[0], expected, atol=1e-6)
    np.testing.assert_allclose(inverted[0], 1 - expected, atol=1e-6)


def test_percentiles_are_those_of_all_frames() -> None:
    frames = decode_frames(encode(an_enhanced_ct()))
    low, high = np.percentile(frames.values, [2, 98])

    shown = frames_in_unit_interval(frames, Intensity("percentiles", 2, 98))

    np.testing.assert_allclose(shown, np.clip((frames.values - low) / (high - low), 0, 1), atol=1e-5)


def test_the_files_window_is_that_of_each_frame() -> None:
    frames = decode_frames(encode(an_enhanced_ct()))

    shown = frames_in_unit_interval(frames, FILE)

    for number in range(3):
        expected = (frames.values[number] - (40 + number - 0.5)) / 399 + 0.5  # PS3.3 C.11.2.1.2
        np.testing.assert_allclose(shown[number], np.clip(expected, 0, 1), atol=1e-5)


def test_without_a_window_the_stored_range_is_shown() -> None:
    np.testing.assert_allclose(frames_in_unit_interval(the_frames(), FILE)[0], NOISE / 4095, atol=1e-6)


def test_colour_is_divided_by_255() -> None:
    frames = decode_frames(encode(a_colour("RGB", BYTES[0])))

    np.testing.assert_allclose(frames_in_unit_interval(frames, FILE)[0], BYTES[0] / 255, atol=1e-7)


def test_volume_takes_the_window_that_its_files_agree_on() -> None:
    values = the_frames().values

    shown = in_unit_interval(values, FILE, inverted=True, window=(40.0, 400.0))

    expected = np.clip((values - 39.5) / 399 + 0.5, 0, 1)
    np.testing.assert_allclose(shown, 1 - expected, atol=1e-5)
    with pytest.raises(UnusableImageError):
        in_unit_interval(values, FILE, inverted=False)


def test_images_without_contrast_have_no_percentiles() -> None:
    for values in (np.zeros((1, 4, 4), np.float32), np.full((1, 4, 4), np.nan, np.float32)):
        with pytest.raises(UnusableImageError):
            in_unit_interval(values, Intensity("percentiles", 1, 99), inverted=False)


@pytest.mark.parametrize(
    "given", [("units", 3, 3), ("units", 0, np.inf), ("percentiles", -1, 50), ("percentiles", 1, 101)]
)
def test_windows_that_make_no_sense_are_refused(given: tuple[Any, float, float]) -> None:
    with pytest.raises(ValueError, match="lie"):
        Intensity(*given)
