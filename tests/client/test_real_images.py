"""Every real image file at hand: the values that an independent decoder finds, or a refusal named here.

The references are pydicom with another plugin than ours wherever there is one, CharLS, OpenJPH, and
libjpeg through imagecodecs, dcmtk's programs, and the same picture stored without compression.
"""

from __future__ import annotations

import csv
import io
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom import dcmread, uid
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.pixels.processing import apply_color_lut
from pydicom.pixels.utils import pixel_array

from fedward_client.dicom.frames import Frames, decode_frames
from fedward_client.dicom.header import image_refusal_of, read_header
from fedward_client.dicom.refusal import Reason, UnusableImageError

pytestmark = pytest.mark.data

Pixels = NDArray[Any]

REFUSED = {
    # no preamble, and no file meta information in its place: which files they are is a guess
    **dict.fromkeys(
        (
            "OT-PAL-8-face.dcm",
            "ExplVR_BigEndNoMeta.dcm",
            "ExplVR_LitEndNoMeta.dcm",
            "no_meta.dcm",
            "rtstruct.dcm",
        ),
        Reason.NOT_DICOM,
    ),
    "meta_missing_tsyntax.dcm": Reason.TRANSFER_SYNTAX,
    "nested_priv_SQ.dcm": Reason.PIXEL_FORMAT,  # pixel data of 0 rows
    # damaged on purpose
    "emri_small_jpeg_2k_lossless_too_short.dcm": Reason.TRUNCATED,
    "MR_truncated.dcm": Reason.TRUNCATED,
    "JPEG2000-embedded-sequence-delimiter.dcm": Reason.CODESTREAM,
    "badVR.dcm": Reason.MALFORMED,
    # one frame, but functional groups of three
    "liver_1frame.dcm": Reason.FRAME_FACTS,
    "liver_expb_1frame.dcm": Reason.FRAME_FACTS,
}
"""By file name. A file that has no pixel data at all is refused as such and not listed."""

OTHER_PLUGIN = {
    uid.RLELossless: "pydicom",
    uid.JPEGBaseline8Bit: "gdcm",
    uid.JPEG2000Lossless: "gdcm",
    uid.JPEG2000: "pillow",
}


def image_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in (".dcm", ".seg") and "dicomdirtests" not in path.parts:
            yield path


def read(path: Path) -> Dataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dcmread(path, force=True)


def reference_pixels(dataset: Dataset) -> Pixels:
    """Stored values as `(frames, rows, columns[, 3])`, decoded by something that fedward does not use."""
    syntax = dataset.file_meta.TransferSyntaxUID
    if dataset.get("PhotometricInterpretation") == "PALETTE COLOR" and syntax == uid.ExplicitVRBigEndian:
        return reference_pixels(uncompressed_twin(dataset))  # pydicom mixes up the bytes of the palette
    num_frames = int(dataset.get("NumberOfFrames", 1) or 1)
    sides = (dataset.Rows, dataset.Columns)
    bits = dataset.get("BitsAllocated")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if syntax == "1.2.840.10008.1.2.8.1" or (syntax == uid.RLELossless and bits == 1):
            twin: Pixels = uncompressed_twin(dataset).pixel_array
            return twin
        if syntax in (uid.JPEGLossless, uid.JPEGLosslessSV1, uid.JPEGExtended12Bit):
            return with_sign(by_frame(dataset, imagecodecs.jpeg_decode), dataset)
        if syntax in (uid.HTJ2KLossless, uid.HTJ2K):
            return by_frame(dataset, imagecodecs.jpeg2k_decode)
        if syntax in (uid.JPEGLSLossless, uid.JPEGLSNearLossless):
            return with_sign(by_frame(dataset, imagecodecs.jpegls_decode), dataset)
        plugin = OTHER_PLUGIN.get(syntax, "")
        if dataset.SamplesPerPixel == 3 and syntax == uid.JPEG2000:
            plugin = "gdcm"
        pixels = pixel_array(dataset, decoding_plugin=plugin)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        shown = apply_color_lut(pixels, dataset)
        pixels = (shown >> 8).astype(np.uint8) if shown.dtype.itemsize == 2 else shown
    if pixels.ndim == len(sides) + (pixels.shape[-1] == 3 and pixels.shape[-2] == dataset.Columns):
        pixels = pixels[None]
    assert len(pixels) == num_frames
    return pixels


def by_frame(dataset: Dataset, decode: Callable[[bytes], Pixels]) -> Pixels:
    num_frames = int(dataset.get("NumberOfFrames", 1) or 1)
    return np.stack(
        [decode(each) for each in generate_frames(dataset.PixelData, number_of_frames=num_frames)]
    )


def with_sign(pixels: Pixels, dataset: Dataset) -> Pixels:
    if not dataset.PixelRepresentation:
        return pixels
    values = pixels.astype(np.int64)
    return np.where(values >= 2 ** (dataset.BitsStored - 1), values - 2**dataset.BitsStored, values)


def uncompressed_twin(dataset: Dataset) -> Dataset:
    """The same object, written plainly."""
    path = Path(dataset.filename)
    name = path.name.replace("_deflate", "").replace("_rle", "").replace("_expb", "").replace("_big", "")
    return dcmread(path.with_name(name))


def in_units(pixels: Pixels, dataset: Dataset, frames: Frames) -> Pixels:
    """Rescale by the standard's formula, with slope and intercept as pydicom finds them."""
    values = pixels.astype(np.float64)
    for number in range(len(values)):
        item: Dataset | None = dataset
        if "RescaleSlope" not in dataset:
            item = first_rescale(dataset, number)
        if item is not None and "RescaleSlope" in item:
            values[number] = values[number] * float(item.RescaleSlope) + float(item.RescaleIntercept)
    return values.astype(np.float32)


def first_rescale(dataset: Dataset, number: int) -> Dataset | None:
    for groups in (
        dataset.get("PerFrameFunctionalGroupsSequence"),
        dataset.get("SharedFunctionalGroupsSequence"),
    ):
        if groups:
            found = groups[number if len(groups) > 1 else 0].get("PixelValueTransformationSequence")
            if found:
                return found[0]  # type: ignore[no-any-return]
    return None


def outcome(path: Path) -> tuple[Frames | None, Reason | None]:
    try:
        return decode_frames(path.read_bytes()), None
    except UnusableImageError as error:
        return None, error.reason


def check(path: Path) -> str:
    """Compare one file with its reference; say what it was."""
    frames, reason = outcome(path)
    if frames is None:
        if reason != REFUSED.get(path.name):
            elements = set(read(path).dir("PixelData"))
            assert (reason, elements) == (Reason.NO_PIXELS, set()), path.name
        return "refused"
    assert path.name not in REFUSED
    dataset = read(path)
    if "ModalityLUTSequence" in dataset:
        return "by hand"  # test_frames.py
    pixels = reference_pixels(dataset)
    if frames.from_mosaic:
        pixels = tiles(pixels[0], len(frames.values))
    if frames.is_colour:
        pixels = pixels >> 8 * (pixels.dtype.itemsize - 1)
        lossy = dataset.file_meta.TransferSyntaxUID in (uid.JPEGBaseline8Bit,)
        difference = np.abs(pixels.astype(int) - frames.values)
        assert difference.max() <= (3 if lossy else 0), (path.name, difference.max())
        return "colour"
    expected = in_units(pixels, dataset, frames)
    if dataset.file_meta.TransferSyntaxUID == uid.JPEGBaseline8Bit:
        assert np.abs(expected - frames.values).max() <= 2, path.name
        return "grey"
    assert np.array_equal(expected, frames.values, equal_nan=True), path.name
    return "grey"


def tiles(image: Pixels, num_tiles: int) -> Pixels:
    across = int(np.ceil(np.sqrt(num_tiles)))
    rows, columns = image.shape[0] // across, image.shape[1] // across
    places = [divmod(number, across) for number in range(num_tiles)]
    return np.stack(
        [image[row * rows : (row + 1) * rows, col * columns : (col + 1) * columns] for row, col in places]
    )


@pytest.mark.parametrize("part", ["dicom-varied", "dicom-vendors"])
def test_shared_files_decode_to_the_values_of_independent_decoders(shared_data: Path, part: str) -> None:
    seen = [check(path) for path in image_files(shared_data / part)]

    assert seen.count("grey") + seen.count("colour") >= {"dicom-varied": 89, "dicom-vendors": 212}[part]


def test_pydicoms_files_decode_to_the_values_of_independent_decoders() -> None:
    folder = Path(pydicom.__file__).parent / "data" / "test_files"

    seen = [check(path) for path in image_files(folder)]

    assert seen.count("grey") + seen.count("colour") >= 52


def test_recorded_extremes_of_all_files_are_found_again(shared_data: Path) -> None:
    """The index beside the files was written by others than us."""
    num_compared = 0
    for part in ("dicom-varied", "dicom-vendors"):
        with (shared_data / part / "index.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get("decode") == "ok"]
        for row in rows:
            path = shared_data / part / row["file"]
            frames, _ = outcome(path)
            told = row["photometric"] == "PALETTE COLOR" or "mlut" in path.name  # of the indices
            if frames is None or told or frames.is_colour or frames.from_mosaic or any(frames.facts.rescales):
                continue
            ends = float(frames.values.min()), float(frames.values.max())
            assert ends == pytest.approx((float(row["min"]), float(row["max"]))), path.name
            num_compared += 1
    assert num_compared > 100


def test_one_mosaic_in_nine_encodings_is_one_volume(shared_data: Path) -> None:
    nine = [
        decode_frames((shared_data / "dicom-varied" / "dcm_qa_ts" / f"{number}.dcm").read_bytes())
        for number in range(1, 10)
    ]

    assert all(np.array_equal(each.values, nine[0].values) for each in nine)
    assert all(np.array_equal(each.positions, nine[0].positions) for each in nine)  # type: ignore[arg-type]
    assert nine[0].values.shape == (35, 64, 64)


def test_one_palette_image_in_six_encodings_is_one_picture(shared_data: Path) -> None:
    folder = shared_data / "dicom-varied" / "pydicom-data"
    one, two = ([f"OBXXXX1A{how}{frames}.dcm" for how in ("", "_expb", "_rle")] for frames in ("", "_2frame"))

    for names in (one, two):
        values = [decode_frames((folder / name).read_bytes()).values for name in names]
        assert all(np.array_equal(each, values[0]) for each in values)


def test_lossless_jpeg_2000_gives_the_uncompressed_picture_and_lossy_nearly(shared_data: Path) -> None:
    folder = shared_data / "dicom-varied" / "pydicom-data"

    def values(name: str) -> NDArray[np.int64]:
        return decode_frames((folder / name).read_bytes()).values.astype(np.int64)

    assert np.array_equal(values("US1_J2KR.dcm"), values("US1_UNCR.dcm"))
    assert np.abs(values("US1_J2KI.dcm") - values("US1_UNCI.dcm")).max() <= 1
    assert np.abs(values("RG3_J2KR.dcm") - values("RG3_J2KI.dcm")).mean() < 2


def test_high_throughput_jpeg_2000_agrees_with_openjph(shared_data: Path) -> None:
    folder = shared_data / "dicom-varied" / "pydicom-data"
    lossless, lossy = (
        decode_frames((folder / f"{name}_08_RGB.dcm").read_bytes()).values[0]
        for name in ("HTJ2KLossless", "HTJ2K")
    )
    (codestream,) = generate_frames(
        dcmread(folder / "HTJ2KLossless_08_RGB.dcm").PixelData, number_of_frames=1
    )

    assert np.array_equal(lossless, imagecodecs.htj2k_decode(codestream))
    assert np.abs(lossless.astype(int) - lossy).max() <= 4


@pytest.mark.needs("dcmdjpeg")
@pytest.mark.parametrize("name", ["JPGExtended.dcm", "JPEG-lossy.dcm"])
def test_twelve_bit_jpeg_agrees_with_dcmtk(name: str, tmp_path: Path) -> None:
    path = Path(str(get_testdata_file(name)))
    subprocess.run(["dcmdjpeg", path, tmp_path / "raw.dcm"], check=True, capture_output=True, timeout=60)

    values = decode_frames(path.read_bytes()).values

    assert values.shape == (1, 1024, 256)
    assert np.abs(values[0] - dcmread(tmp_path / "raw.dcm").pixel_array).max() <= 1
    assert values.max() > 255


@pytest.mark.needs("dcmdjpls")
@pytest.mark.parametrize("name", ["JPEGLSNearLossless_16.dcm", "MR_small_jpeg_ls_lossless.dcm"])
def test_jpeg_ls_agrees_with_dcmtk(name: str, tmp_path: Path) -> None:
    path = Path(str(get_testdata_file(name)))
    subprocess.run(["dcmdjpls", path, tmp_path / "raw.dcm"], check=True, capture_output=True, timeout=60)

    values = decode_frames(path.read_bytes()).values

    assert np.array_equal(values[0], dcmread(tmp_path / "raw.dcm").pixel_array)


def test_deflated_file_decodes_as_pydicom_reads_it() -> None:
    data = Path(str(get_testdata_file("image_dfl.dcm"))).read_bytes()

    assert np.array_equal(decode_frames(data).values[0], dcmread(io.BytesIO(data)).pixel_array)


def test_enhanced_files_of_one_scanner_agree_after_another_vendors_archive_rewrote_them(
    shared_data: Path,
) -> None:
    def all_frames(folder: str) -> list[Frames]:
        paths = image_files(shared_data / "dicom-vendors" / folder)
        return sorted(
            (decode_frames(path.read_bytes()) for path in paths), key=lambda each: each.values.sum()
        )

    straight, rewritten = all_frames("mr_siemens_vida_via_siemens"), all_frames("mr_siemens_vida_via_agfa")

    assert len(straight) == len(rewritten) == 4
    for one, other in zip(straight, rewritten, strict=True):
        assert np.array_equal(one.values, other.values)
        np.testing.assert_allclose(one.positions, other.positions, atol=1e-6)  # type: ignore[arg-type]
        np.testing.assert_allclose(one.orientations, other.orientations, atol=1e-6)  # type: ignore[arg-type]
        assert one.spacing == pytest.approx(other.spacing)


def test_the_index_would_admit_every_ordinary_file(shared_data: Path) -> None:
    refusals = {
        path: image_refusal_of(read_header(path.read_bytes()))
        for path in image_files(shared_data / "dicom-vendors")
    }

    assert [path.name for path, refusal in refusals.items() if refusal is not None] == []
