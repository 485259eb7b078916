"""Segmentations that are damaged, contradictory or unusual in form: read exactly, or refused by name."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, JPEGLSLossless, RLELossless

from fedward_client.dicom import nested, segmentation_pixels
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.segmentation import read_segmentation
from fedward_client.dicom.segmentation_masks import align
from tests.label_builders import a_segmentation, a_volume, grid_of, written

Change = Callable[[Dataset], None]


def labels(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(3).integers(0, 2, shape).astype(np.uint8)


def made(kind: str = "BINARY", transfer_syntax: str = "1.2.840.10008.1.2.1") -> Dataset:
    """Segmentation of two frames as it is read back from its file."""
    truth: NDArray[Any] = labels(2, 12, 10)
    values = truth.astype(float) if kind == "FRACTIONAL" else truth
    return dcmread(
        io.BytesIO(written(a_segmentation(a_volume(2), values, kind=kind, transfer_syntax=transfer_syntax)))
    )


def coded(transfer_syntax: str) -> Dataset:
    """Label map of two compressed frames as it is read back from its file."""
    truth = labels(2, 40, 40)
    made = a_segmentation(a_volume(2, 40, 40), truth, kind="LABELMAP", transfer_syntax=transfer_syntax)
    return dcmread(io.BytesIO(written(made)))


def refused(dataset: Dataset | bytes) -> Reason:
    """Why it cannot be read, or cannot be laid on its own images."""
    data = dataset if isinstance(dataset, bytes) else written(dataset)
    with pytest.raises(UnusableImageError) as caught:
        align(read_segmentation(data), grid_of(a_volume(2)))
    assert caught.value.__cause__ is None
    return caught.value.reason


def setting(keyword: str, value: Any) -> Change:
    return lambda dataset: setattr(dataset, keyword, value)


def deleting(keyword: str) -> Change:
    return lambda dataset: delattr(dataset, keyword)


def in_frame(sequence: str, keyword: str, value: Any) -> Change:
    def change(dataset: Dataset) -> None:
        groups = [*dataset.PerFrameFunctionalGroupsSequence, *dataset.SharedFunctionalGroupsSequence]
        (item,) = next(each for each in groups if sequence in each)[sequence].value
        setattr(item, keyword, value)

    return change


def without_group(sequence: str) -> Change:
    def change(dataset: Dataset) -> None:
        for each in (*dataset.PerFrameFunctionalGroupsSequence, *dataset.SharedFunctionalGroupsSequence):
            if sequence in each:
                del each[sequence]

    return change


def _of_no_known_type(dataset: Dataset) -> None:
    dataset.SegmentationType = "PAINTED"


def _two_of_one_number(dataset: Dataset) -> None:
    dataset.SegmentSequence = [*dataset.SegmentSequence, *dataset.SegmentSequence]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_of_no_known_type, Reason.MALFORMED),
        (_two_of_one_number, Reason.SEGMENTATION_FRAMES),
        (setting("SegmentSequence", []), Reason.SEGMENTATION_FRAMES),
        (setting("PerFrameFunctionalGroupsSequence", []), Reason.SEGMENTATION_FRAMES),
        (setting("NumberOfFrames", 3), Reason.SEGMENTATION_FRAMES),
        (in_frame("SegmentIdentificationSequence", "ReferencedSegmentNumber", 7), Reason.SEGMENTATION_FRAMES),
        (without_group("SegmentIdentificationSequence"), Reason.SEGMENTATION_FRAMES),
        (setting("BitsAllocated", 8), Reason.PIXEL_FORMAT),
        (setting("SamplesPerPixel", 3), Reason.PIXEL_FORMAT),
        (setting("Rows", 0), Reason.DIMENSIONS),
        (setting("Columns", 65535), Reason.TRUNCATED),
        (deleting("PixelData"), Reason.NO_PIXELS),
        (setting("PixelData", b"\1\2"), Reason.TRUNCATED),
        (without_group("PlanePositionSequence"), Reason.LABEL_GEOMETRY),
        (without_group("PixelMeasuresSequence"), Reason.LABEL_GEOMETRY),
        (in_frame("PixelMeasuresSequence", "PixelSpacing", [0, 1]), Reason.LABEL_GEOMETRY),
        (in_frame("PixelMeasuresSequence", "PixelSpacing", [1, 1, 1]), Reason.LABEL_GEOMETRY),
        (
            in_frame("PlaneOrientationSequence", "ImageOrientationPatient", [1, 0, 0, 1, 0, 0]),
            Reason.LABEL_GEOMETRY,
        ),
        (in_frame("PlanePositionSequence", "ImagePositionPatient", [1e30, 0, 0]), Reason.LABEL_GRID),
        (in_frame("PlanePositionSequence", "ImagePositionPatient", [0, 0, 0]), Reason.LABEL_GRID),
    ],
)
def test_binary_object_that_contradicts_itself_is_refused(change: Change, reason: Reason) -> None:
    dataset = made()
    change(dataset)

    assert refused(dataset) is reason


@pytest.mark.parametrize("most", [0, 256, None])
def test_fraction_without_a_sound_maximum_is_refused(most: int | None) -> None:
    dataset = made("FRACTIONAL")
    if most is None:
        del dataset.MaximumFractionalValue
    else:
        dataset.MaximumFractionalValue = most

    assert refused(dataset) is Reason.MALFORMED


def test_numbers_that_are_none_are_refused() -> None:
    data = written(made())
    broken = data.replace(b"0.7\\0.9 ", b"0.7\\nine").replace(b"0.7\\0.9", b"0.7\\nin")

    assert broken != data
    assert refused(broken) is Reason.LABEL_GEOMETRY


def as_16_bit(dataset: Dataset) -> NDArray[np.uint16]:
    """Give a label map pixels of 16 bits, some beyond a byte; return them."""
    values = dataset.pixel_array.astype(np.uint16) * 0x0101
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.PixelData = values.astype("<u2").tobytes()
    dataset["PixelData"].VR = "OW"
    dataset.SegmentSequence[-1].SegmentNumber = 0x0101
    return values


def test_label_map_of_16_bits_plain_and_run_length_coded() -> None:
    dataset = made("LABELMAP")
    truth = as_16_bit(dataset)
    plain = read_segmentation(written(dataset))
    dataset.compress(RLELossless)
    coded = read_segmentation(written(dataset))

    for found in (plain, coded):
        assert np.array_equal([found.pixels.frames(index) for index in range(2)], truth)
        masks = align(found, grid_of(a_volume(2)))
        assert masks.segments == ("257",)
        assert np.array_equal(masks.values[0], labels(2, 12, 10) > 0)  # whatever order frames have


@pytest.mark.data
def test_bits_written_as_big_endian_words(shared_data: Path) -> None:
    """The same object with its pixel bytes as OB and as OW, in which the bytes of a word change places."""
    path = shared_data / "dicom-varied" / "pydicom-data" / "liver_expb.dcm"
    truth = dcmread(path).pixel_array
    data = path.read_bytes()
    start = data.index(b"\x7f\xe0\x00\x10") + 12
    stored_as = data[start - 8 : start - 6]
    swapped = np.frombuffer(data[start:], ">u2").byteswap().tobytes()
    other = {b"OB": b"OW", b"OW": b"OB"}[stored_as]

    for content in (data, data[: start - 8] + other + data[start - 6 : start] + swapped):
        found = read_segmentation(content)
        assert np.array_equal([found.pixels.frames(index) for index in range(len(truth))], truth)


def test_lossy_syntax_is_refused_by_its_name() -> None:
    dataset = made("FRACTIONAL", RLELossless)
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit

    with pytest.raises(UnusableImageError) as caught:
        read_segmentation(written(dataset))

    assert caught.value.reason is Reason.TRANSFER_SYNTAX
    assert caught.value.kind == "JPEG Baseline (Process 1)"


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([b"\0" * 64], Reason.TRUNCATED),
        ([b"\0" * 64] * 2, Reason.CODESTREAM),
        ([b"\1" + b"\0" * 3 + b"\x40" + b"\0" * 59 + b"\xff\0"] * 2, Reason.TRUNCATED),
        ([b"\1"] * 2, Reason.DECODE_FAILED),
    ],
)
def test_run_length_codes_that_do_not_fill_a_frame_are_refused(frames: list[bytes], reason: Reason) -> None:
    dataset = made("FRACTIONAL", RLELossless)
    dataset.PixelData = encapsulate(frames)

    assert refused(dataset) is reason


@pytest.mark.parametrize("transfer_syntax", [JPEG2000Lossless, JPEGLSLossless])
def test_codestream_of_another_size_than_declared_is_refused_before_it_is_decoded(
    transfer_syntax: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = coded(transfer_syntax)
    dataset.Rows = 12
    for decoder in ("_decode_jpeg_2000", "_decode_jpeg_ls"):
        monkeypatch.setattr(segmentation_pixels, decoder, None)

    found = read_segmentation(written(dataset))

    with pytest.raises(UnusableImageError) as caught:
        found.pixels.frames(0)
    assert caught.value.reason is Reason.CODESTREAM


def test_size_and_items_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = written(made())
    with monkeypatch.context() as patch:
        patch.setattr(nested, "MAX_ITEMS", 10)
        assert refused(data) is Reason.OVER_LIMIT
    monkeypatch.setattr("fedward_client.dicom.segmentation.MAX_SEGMENTATION_BYTES", 1000)
    assert refused(data) is Reason.OVER_LIMIT


def test_every_cut_is_refused_by_name() -> None:
    for dataset in (made(), coded(JPEG2000Lossless)):
        data = written(dataset)
        for length in range(0, len(data) - 40, 53):
            assert refused(data[:length]) in Reason
