"""Build series whose every voxel has a known place in the patient, and compare what comes out with it.

The truth is worked out here, from rotation, origin and distances, in LPS millimetres as the standard
defines them (PS3.3 C.7.6.2.1.1); the product's code has no part in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian

from fedward_client.dicom.frames import Frames, decode_frames
from fedward_client.dicom.series import SeriesVerdict, group_series
from fedward_client.dicom.slice_facts import SliceFacts, read_slice_facts
from fedward_client.dicom.volume import Volume, assemble
from tests.builders import a_uid, encode

Floats = NDArray[np.float64]

SLOPE, INTERCEPT = 0.01, 20.0
NUM_SAMPLES = 400


@dataclass(frozen=True, eq=False)
class Truth:
    """Slices in space.

    Attributes:
        axes: rows are the unit vectors along a row, along a column, and the normal, LPS.
        origins: `(slices, 3)` first pixel of each slice, LPS mm.
        spacing: between rows, between columns, mm.
        values: `(slices, rows, columns)` true values in modality units.
    """

    axes: Floats
    origins: Floats
    spacing: tuple[float, float]
    values: Floats

    @property
    def points(self) -> Floats:
        """`(slices, rows, columns, 3)` LPS mm of every voxel."""
        _, rows, columns = self.values.shape
        down = np.arange(rows)[:, None, None] * self.spacing[0] * self.axes[1]
        right = np.arange(columns)[None, :, None] * self.spacing[1] * self.axes[0]
        grid: Floats = self.origins[:, None, None, :] + down + right
        return grid

    def part(self, numbers: Sequence[int]) -> Truth:
        """Only these slices."""
        index = list(numbers)
        return replace(self, origins=self.origins[index], values=self.values[index])


def a_truth(
    *,
    num_slices: int = 7,
    size: tuple[int, int] = (13, 11),
    spacing: tuple[float, float] = (0.8, 0.8),
    distances: float | Sequence[float] = 2.5,
    axes: Floats | None = None,
    origin: Sequence[float] = (-40.0, 12.5, 300.0),
    tilt_degrees: float = 0.0,
    ramp: Sequence[float] | None = None,
    seed: int = 0,
) -> Truth:
    """Slices stacked along the normal, or `tilt_degrees` away from it towards the rows.

    Args:
        num_slices: ignored when `distances` are given one by one.
        distances: along the normal, mm.
        axes: orthonormal; by default axial.
        ramp: the value is `ramp @ point`; by default values are random, so that no two places agree.
    """
    axes = np.eye(3) if axes is None else axes
    gaps = np.full(num_slices - 1, distances) if isinstance(distances, int | float) else np.array(distances)
    along = np.concatenate(([0.0], np.cumsum(gaps)))
    stacking = axes[2] + np.tan(np.radians(tilt_degrees)) * axes[1]
    origins = np.array(origin) + along[:, None] * stacking
    shape = (len(along), *size)
    stored = np.random.default_rng(seed).integers(-30_000, 30_000, shape).astype(np.float64)
    truth = Truth(axes, origins, spacing, stored * SLOPE + INTERCEPT)
    if ramp is None:
        return truth
    stored = np.round((truth.points @ np.array(ramp) - INTERCEPT) / SLOPE)
    return replace(truth, values=stored * SLOPE + INTERCEPT)


def rotation(seed: int) -> Floats:
    """Random right-handed axes."""
    matrix, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    axes: Floats = matrix * np.array([[1.0], [1.0], [np.linalg.det(matrix)]])
    return axes


def stored_values(values: Floats, slope: float = SLOPE, intercept: float = INTERCEPT) -> NDArray[np.int16]:
    """What a file stores for true values."""
    return np.round((values - intercept) / slope).astype(np.int16)


def a_ct(**elements: Any) -> Dataset:
    """Header of a CT slice without place or pixels; `elements` replaces values, None removes."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = CTImageStorage
    dataset.Modality = "CT"
    dataset.PatientID = "P1"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = a_uid("study"), a_uid("series")
    dataset.FrameOfReferenceUID = a_uid("frame of reference")
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation = 1
    dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = SLOPE, INTERCEPT, "HU"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.SliceThickness = 2.5
    set_elements(dataset, elements)
    return dataset


def set_elements(dataset: Dataset, elements: Mapping[str, Any]) -> None:
    """Replace values by keyword; None removes the element."""
    for keyword, value in elements.items():
        if value is not None:
            setattr(dataset, keyword, value)
        elif keyword in dataset:
            del dataset[keyword]


def decimals(values: Sequence[float] | Floats, digits: int = 6) -> list[str]:
    """Decimal strings as scanners write them."""
    return [f"{value:.{digits}f}" for value in values]


def slices_of(truth: Truth, *, name: str = "slice", digits: int = 6, **elements: Any) -> list[Dataset]:
    """One file a slice, in order along the normal; InstanceNumber counts them from 1."""
    found = []
    for number, (origin, values) in enumerate(zip(truth.origins, truth.values, strict=True), start=1):
        dataset = a_ct(InstanceNumber=number)
        dataset.SOPInstanceUID = a_uid(f"{name} {number}")
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.ImagePositionPatient = decimals(origin, digits)
        dataset.ImageOrientationPatient = decimals(truth.axes[:2].ravel(), 9)
        dataset.PixelSpacing = decimals(truth.spacing)
        dataset.Rows, dataset.Columns = values.shape
        set_elements(dataset, elements)
        dataset.PixelData = stored_values(
            values, float(dataset.RescaleSlope), float(dataset.RescaleIntercept)
        ).tobytes()
        found.append(dataset)
    return found


def a_multiframe(truths: Sequence[Truth], *, reverse: bool = False, **elements: Any) -> Dataset:
    """All slices as frames of one enhanced CT; each truth is a time point; slopes differ by frame."""
    dataset = a_ct()
    set_elements(
        dataset, dict.fromkeys(("RescaleSlope", "RescaleIntercept", "RescaleType", "SliceThickness"))
    )
    dataset.SOPClassUID = EnhancedCTImageStorage
    dataset.SOPInstanceUID = a_uid("multi-frame")
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.InstanceNumber = 1
    dataset.Rows, dataset.Columns = truths[0].values.shape[1:]
    dataset.SharedFunctionalGroupsSequence = Items([_shared(truths[0])])
    frames, pixels = [], []
    for time, truth in enumerate(truths, start=1):
        for number, (origin, values) in enumerate(zip(truth.origins, truth.values, strict=True), start=1):
            slope = SLOPE * (1 + number % 3)
            frames.append(_frame(origin, slope, time, number, with_times=len(truths) > 1))
            pixels.append(stored_values(values, slope))
    if reverse:
        frames, pixels = frames[::-1], pixels[::-1]
    dataset.NumberOfFrames = len(frames)
    dataset.PerFrameFunctionalGroupsSequence = Items(frames)
    dataset.PixelData = np.stack(pixels).tobytes()
    set_elements(dataset, elements)
    return dataset


def quantised(truth: Truth) -> Truth:
    """Values that survive the slopes of `a_multiframe`."""
    steps = [SLOPE * (1 + number % 3) for number in range(1, len(truth.values) + 1)]
    values = [
        np.round((value - INTERCEPT) / step) * step + INTERCEPT
        for value, step in zip(truth.values, steps, strict=True)
    ]
    return replace(truth, values=np.stack(values))


def _item(**elements: Any) -> Items:
    item = Dataset()
    set_elements(item, elements)
    return Items([item])


def _shared(truth: Truth) -> Dataset:
    group = Dataset()
    group.PlaneOrientationSequence = _item(ImageOrientationPatient=decimals(truth.axes[:2].ravel(), 9))
    group.PixelMeasuresSequence = _item(PixelSpacing=decimals(truth.spacing), SliceThickness="2.5")
    return group


def _frame(origin: Floats, slope: float, time: int, number: int, *, with_times: bool) -> Dataset:
    group = Dataset()
    group.PlanePositionSequence = _item(ImagePositionPatient=decimals(origin))
    group.PixelValueTransformationSequence = _item(
        RescaleSlope=slope, RescaleIntercept=INTERCEPT, RescaleType="HU"
    )
    group.FrameContentSequence = _item(
        StackID="1",
        InStackPositionNumber=number,
        TemporalPositionIndex=time if with_times else None,
        DimensionIndexValues=[1, number, time],
    )
    return group


def files_of(datasets: Sequence[Dataset]) -> list[bytes]:
    """Files as a PACS sends them."""
    return [encode(dataset) for dataset in datasets]


def read_series(files: Sequence[bytes]) -> tuple[list[SliceFacts], dict[str, Frames]]:
    """Facts and decoded frames of files by the product's own readers."""
    slices: list[SliceFacts] = []
    frames: dict[str, Frames] = {}
    for data in files:
        content = hashlib.sha256(data).hexdigest()
        slices += read_slice_facts(data, content)
        frames[content] = decode_frames(data)
    return slices, frames


def volumes_of(files: Sequence[bytes]) -> tuple[SeriesVerdict, list[Volume]]:
    """Verdict on a series and its assembled volumes."""
    slices, frames = read_series(files)
    verdict = group_series(slices)
    return verdict, [assemble(geometry, frames) for geometry in verdict.volumes]


def part_in_place(
    values: NDArray[np.float32], affine: Floats, truth: Truth, *, exact: bool = True, seed: int = 0
) -> float:
    """Share of sampled true voxels that a volume has, with its value, at its place in the world.

    Args:
        values: `(slices, rows, columns)`.
        affine: (slice, row, column, 1) to RAS mm.
        truth: what was scanned.
        exact: the place must be the centre of a voxel, to 0.02 of a voxel; else values between voxels
            are interpolated linearly, for ramps.
    """
    from scipy import ndimage

    random = np.random.default_rng(seed)
    index = [random.integers(0, size, NUM_SAMPLES) for size in truth.values.shape]
    world = truth.points[tuple(index)] * (-1.0, -1.0, 1.0)
    found = np.linalg.solve(affine[:3, :3], (world - affine[:3, 3]).T)
    whole = np.round(found)
    found = np.where(np.abs(found - whole) < 1e-4, whole, found)  # positions have six decimals
    expected = truth.values[tuple(index)]
    if not exact:
        read = ndimage.map_coordinates(
            values.astype(np.float64), found, order=1, mode="constant", cval=np.nan
        )
        return float(np.mean(np.abs(read - expected) <= 2 * SLOPE))
    nearest = np.round(found).astype(int)
    inside = np.all((nearest >= 0) & (nearest < np.array(values.shape)[:, None]), axis=0)
    near = np.abs(found - nearest).max(axis=0) <= 0.02
    read = values[tuple(np.where(inside, nearest, 0))]
    return float(np.mean(inside & near & (np.abs(read - expected) <= 0.5 * SLOPE)))
