"""Read DICOM SEG objects (hop 3): segments, frames and where each lies; pixels stay as stored.

The tree is checked against itself: as many frames described as announced and stored, each with a declared
segment and a place that is finite. Supported are binary, fractional and label map objects. What the
frames mean for an image is decided in `segmentation_masks.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydicom import uid

from fedward_client.dicom.elements import Elements
from fedward_client.dicom.label_grid import frame_affine
from fedward_client.dicom.nested import (
    concept,
    decimals,
    first_item,
    items,
    open_object,
    same_concept,
    text,
    whole,
)
from fedward_client.dicom.parser import contained
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.segmentation_pixels import SegmentationPixels, open_pixels
from fedward_client.labels import Concept

LABEL_MAP_SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.7"
"""Label Map Segmentation Storage; pydicom 3.0 has no name for it."""

SEGMENTATION_SOP_CLASSES = (uid.SegmentationStorage, LABEL_MAP_SEGMENTATION)
MAX_SEGMENTATION_BYTES = 256 * 2**20

SegmentationType = Literal["BINARY", "FRACTIONAL", "LABELMAP"]
_SEGMENTATION_TYPES: tuple[SegmentationType, ...] = get_args(SegmentationType)


@dataclass(frozen=True)
class Segment:
    """One segment of the object.

    Args:
        number: by which frames refer to it.
        category: SegmentedPropertyCategory, such as SCT 123037004 (anatomical structure).
        property_type: SegmentedPropertyType, such as SCT 10200004 (liver): what the segment is.
        label: free text of whoever drew it, for the site's own configuration only.
    """

    number: int
    category: Concept | None = field(repr=False)
    property_type: Concept | None = field(repr=False)
    label: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class SegmentationFrame:
    """One frame.

    Args:
        segment: number of its segment; 0 in a label map, whose pixels are the numbers.
        affine: float64 `(4, 3)` from (row, column, 1) to RAS millimetres; None without a position.
        sources: images it was drawn on: (SOPInstanceUID, number of the frame from 1, or 0 for all).
    """

    segment: int
    affine: NDArray[np.float64] | None = field(repr=False)
    sources: tuple[tuple[str, int], ...] = field(repr=False)


@dataclass(frozen=True, eq=False)
class Segmentation:
    """One SEG object, its frames not yet decoded.

    Args:
        kind: SegmentationType.
        segments: in the order of the object.
        frames: in the order of the pixel data.
        pixels: the frames as stored.
        max_fraction: stored value that means 1 in a fractional object.
        frame_of_reference: FrameOfReferenceUID, "" when there is none.
        source_series: SeriesInstanceUIDs that it says it was drawn on.
        source_instances: SOPInstanceUIDs that it refers to, in the header or in a frame.
    """

    kind: SegmentationType
    segments: tuple[Segment, ...]
    frames: tuple[SegmentationFrame, ...] = field(repr=False)
    pixels: SegmentationPixels
    max_fraction: int
    sop_instance: str = field(repr=False)
    study: str = field(repr=False)
    patient: str = field(repr=False)
    frame_of_reference: str = field(repr=False)
    source_series: tuple[str, ...] = field(repr=False)
    source_instances: frozenset[str] = field(repr=False)

    def numbers_of(self, wanted: Concept) -> tuple[int, ...]:
        """Numbers of the segments of this property type; two tumours are two segments of one type."""
        return tuple(each.number for each in self.segments if same_concept(each.property_type, wanted))


def read_segmentation(data: bytes) -> Segmentation:
    """Read one SEG object held in memory.

    Raises:
        UnusableImageError: not a segmentation, damaged, contradictory, or beyond the limits.
    """
    with contained(Reason.MALFORMED):
        parsed = open_object(data, SEGMENTATION_SOP_CLASSES, max_bytes=MAX_SEGMENTATION_BYTES)
        header = parsed.elements
        kind = _kind(header)
        segments = _segments(header)
        num_frames = whole(header, "NumberOfFrames", 1)
        groups = items(header, "PerFrameFunctionalGroupsSequence")
        if num_frames != len(groups) or not groups:
            raise UnusableImageError(Reason.SEGMENTATION_FRAMES)
        shared = first_item(header, "SharedFunctionalGroupsSequence")
        known = {segment.number for segment in segments}
        frames = tuple(_frame(group, shared, kind, known) for group in groups)
        bits = whole(header, "BitsAllocated")
        if (kind == "BINARY") != (bits == 1) or whole(header, "SamplesPerPixel", 1) != 1:
            raise UnusableImageError(Reason.PIXEL_FORMAT)
        pixels = open_pixels(parsed, whole(header, "Rows"), whole(header, "Columns"), bits, num_frames)
        series = items(header, "ReferencedSeriesSequence")
        return Segmentation(
            kind=kind,
            segments=segments,
            frames=frames,
            pixels=pixels,
            max_fraction=_max_fraction(header, kind),
            sop_instance=text(header, "SOPInstanceUID"),
            study=text(header, "StudyInstanceUID"),
            patient=text(header, "PatientID"),
            frame_of_reference=text(header, "FrameOfReferenceUID"),
            source_series=tuple(text(each, "SeriesInstanceUID") for each in series),
            source_instances=_source_instances(series, frames),
        )


def _kind(header: Elements) -> SegmentationType:
    if text(header, "SOPClassUID") == LABEL_MAP_SEGMENTATION:
        return "LABELMAP"
    declared = text(header, "SegmentationType")
    for kind in _SEGMENTATION_TYPES:
        if kind == declared:
            return kind
    raise UnusableImageError(Reason.MALFORMED)


def _segments(header: Elements) -> tuple[Segment, ...]:
    segments = tuple(
        Segment(
            number=whole(each, "SegmentNumber"),
            category=concept(each, "SegmentedPropertyCategoryCodeSequence"),
            property_type=concept(each, "SegmentedPropertyTypeCodeSequence"),
            label=text(each, "SegmentLabel"),
        )
        for each in items(header, "SegmentSequence")
    )
    numbers = [segment.number for segment in segments]
    if not segments or min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise UnusableImageError(Reason.SEGMENTATION_FRAMES)
    return segments


def _max_fraction(header: Elements, kind: SegmentationType) -> int:
    if kind != "FRACTIONAL":
        return 1
    most = whole(header, "MaximumFractionalValue")
    if not 1 <= most <= 255:
        raise UnusableImageError(Reason.MALFORMED)
    return most


def _frame(
    group: Elements, shared: Elements | None, kind: SegmentationType, known: set[int]
) -> SegmentationFrame:
    number = 0
    if kind != "LABELMAP":
        identification = _functional_group(group, shared, "SegmentIdentificationSequence")
        number = -1 if identification is None else whole(identification, "ReferencedSegmentNumber")
        if number not in known:
            raise UnusableImageError(Reason.SEGMENTATION_FRAMES)
    return SegmentationFrame(number, _affine(group, shared), tuple(_sources(group, shared)))


def _functional_group(group: Elements, shared: Elements | None, keyword: str) -> Elements | None:
    own = first_item(group, keyword)
    return own if own is not None or shared is None else first_item(shared, keyword)


def _affine(group: Elements, shared: Elements | None) -> NDArray[np.float64] | None:
    plane = _functional_group(group, shared, "PlanePositionSequence")
    direction = _functional_group(group, shared, "PlaneOrientationSequence")
    measures = _functional_group(group, shared, "PixelMeasuresSequence")
    if plane is None or direction is None or measures is None:
        return None
    try:
        numbers = (
            decimals(plane, "ImagePositionPatient"),
            decimals(direction, "ImageOrientationPatient"),
            decimals(measures, "PixelSpacing"),
        )
    except ValueError:  # not finite, or no numbers
        raise UnusableImageError(Reason.LABEL_GEOMETRY) from None
    return frame_affine(*numbers)


def _sources(group: Elements, shared: Elements | None) -> Iterator[tuple[str, int]]:
    derivation = _functional_group(group, shared, "DerivationImageSequence")
    if derivation is None:
        return
    for source in items(derivation, "SourceImageSequence"):
        instance = text(source, "ReferencedSOPInstanceUID")
        if instance:  # an empty reference is none
            for number in decimals(source, "ReferencedFrameNumber") or (0,):
                yield instance, int(number)


def _source_instances(series: Sequence[Elements], frames: Sequence[SegmentationFrame]) -> frozenset[str]:
    declared = {
        text(instance, "ReferencedSOPInstanceUID")
        for each in series
        for instance in items(each, "ReferencedInstanceSequence")
    }
    drawn_on = {instance for frame in frames for instance, _ in frame.sources}
    return frozenset((declared | drawn_on) - {""})
