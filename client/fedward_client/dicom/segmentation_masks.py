"""Lay a segmentation on the grid of an image (hop 3).

`align` decodes only the frames of the segments that are wanted and places each by its coordinates, never
by its order; `align_image` does so for one image that has no place in space (a radiograph), by the
segmentation's reference to it. Segments are chosen by code; overlapping ones are kept apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from fedward_client.dicom.label_grid import (
    MAX_MASK_BYTES,
    Grid,
    MaskLabel,
    check_same_space,
    empty_masks,
    mark,
    place_frame,
)
from fedward_client.dicom.parser import contained
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.segmentation import Segmentation, SegmentationFrame
from fedward_client.labels import Concept


def align(
    segmentation: Segmentation,
    grid: Grid,
    wanted: Mapping[str, Concept | int] | None = None,
    *,
    threshold: float = 0.5,
    absent_is_empty: bool = False,
) -> MaskLabel:
    """Lay the wanted segments on the grid of an image volume.

    Args:
        segmentation: of that image.
        grid: of the image.
        wanted: name in the plan -> property type, or the number of one segment; None takes every segment
            by its number. Segments of one type are united.
        threshold: from which fraction on a pixel of a fractional object belongs to the segment.
        absent_is_empty: a wanted segment that the object lacks was looked for and not found; without
            this it is a refusal, for it may as well never have been looked for.

    Returns:
        Masks `(segments, slices, rows, columns)`.

    Raises:
        UnusableImageError: another frame of reference, a frame that does not meet the grid pixel by pixel,
            marked pixels outside the image, a segment missing, or pixels that cannot be decoded.
    """
    check_same_space(grid, segmentation.frame_of_reference, segmentation.source_instances)
    chosen = _chosen(segmentation, wanted, absent_is_empty)
    masks = empty_masks(len(chosen), grid.shape)
    rows, columns = segmentation.pixels.rows, segmentation.pixels.columns
    with contained(Reason.LABEL_GRID):
        for index, frame in _frames_of(segmentation, chosen):
            if frame.affine is None:
                raise UnusableImageError(Reason.LABEL_GEOMETRY)
            placement = place_frame(grid, frame.affine, rows, columns)
            for mask, marked in _marked(segmentation, index, chosen, masks, threshold):
                mark(mask, placement.indices(*np.nonzero(marked)), 1)
    return MaskLabel(masks, tuple(chosen))


def align_image(
    segmentation: Segmentation,
    sop_instance: str,
    rows: int,
    columns: int,
    wanted: Mapping[str, Concept | int] | None = None,
    *,
    frame_number: int = 1,
    threshold: float = 0.5,
    absent_is_empty: bool = False,
) -> MaskLabel:
    """Lay the wanted segments on one image, or one frame of it, that the segmentation refers to.

    Args:
        segmentation: of that image.
        sop_instance: SOPInstanceUID of the image.
        rows: of the image.
        columns: of the image.
        wanted: as for `align`.
        frame_number: of the image, from 1.
        threshold: as for `align`.
        absent_is_empty: as for `align`.

    Returns:
        Masks `(segments, rows, columns)`.

    Raises:
        UnusableImageError: the object does not refer to this image, has other rows or columns, or as
            for `align`.
    """
    if sop_instance not in segmentation.source_instances:
        raise UnusableImageError(Reason.LABEL_SOURCE)
    if (rows, columns) != (segmentation.pixels.rows, segmentation.pixels.columns):
        raise UnusableImageError(Reason.LABEL_GRID)
    chosen = _chosen(segmentation, wanted, absent_is_empty)
    masks = empty_masks(len(chosen), (rows, columns))
    only_source = segmentation.source_instances == {sop_instance}
    with contained(Reason.LABEL_GRID):
        for index, frame in _frames_of(segmentation, chosen):
            if not frame.sources and not only_source:  # which image it was drawn on cannot be known
                raise UnusableImageError(Reason.LABEL_SOURCE)
            its_own = any(
                source == sop_instance and number in (0, frame_number) for source, number in frame.sources
            )
            if its_own or not frame.sources:
                for mask, marked in _marked(segmentation, index, chosen, masks, threshold):
                    mask |= marked
    return MaskLabel(masks, tuple(chosen))


def count_marked(
    segmentation: Segmentation,
    wanted: Concept | int,
    *,
    threshold: float = 0.5,
    absent_is_empty: bool = False,
) -> dict[str, int]:
    """Count the marked pixels of one segment in every image that the segmentation refers to.

    Args:
        segmentation: any.
        wanted: as for `align`.
        threshold: as for `align`.
        absent_is_empty: as for `align`.

    Returns:
        SOPInstanceUID -> pixels; several frames of one image are united before they are counted, those
        drawn on different frames of one multi-frame image are added.

    Raises:
        UnusableImageError: a frame does not say which image it was drawn on, or as for `align`.
    """
    chosen = _chosen(segmentation, {"": wanted}, absent_is_empty)
    shape = (segmentation.pixels.rows, segmentation.pixels.columns)
    only = next(iter(segmentation.source_instances)) if len(segmentation.source_instances) == 1 else ""
    united: dict[tuple[str, int], NDArray[np.uint8]] = {}  # eight pixels a byte
    with contained(Reason.LABEL_SOURCE):
        for index, frame in _frames_of(segmentation, chosen):
            sources = frame.sources or (((only, 0),) if only else ())
            if not sources:
                raise UnusableImageError(Reason.LABEL_SOURCE)
            drawn = empty_masks(1, shape)
            for mask, marked in _marked(segmentation, index, chosen, drawn, threshold):
                mask |= marked
            if drawn.any():
                packed = np.packbits(drawn)
                for source in sources:
                    if (len(united) + 1) * packed.size > MAX_MASK_BYTES:
                        raise UnusableImageError(Reason.OVER_LIMIT)
                    united[source] = united[source] | packed if source in united else packed
    counts = dict.fromkeys(sorted(segmentation.source_instances), 0)
    for (instance, _), packed in united.items():
        counts[instance] += int(np.bitwise_count(packed).sum(dtype=np.int64))
    return counts


def _chosen(
    segmentation: Segmentation, wanted: Mapping[str, Concept | int] | None, absent_is_empty: bool
) -> dict[str, tuple[int, ...]]:
    """Name -> numbers of its segments."""
    known = [segment.number for segment in segmentation.segments]
    if wanted is None:
        background = segmentation.kind == "LABELMAP"  # there segment 0 is what is in no segment
        return {str(number): (number,) for number in known if number or not background}
    chosen = {
        name: segmentation.numbers_of(each)
        if isinstance(each, Concept)
        else tuple(number for number in known if number == each)
        for name, each in wanted.items()
    }
    if not absent_is_empty and not all(chosen.values()):
        raise UnusableImageError(Reason.NO_SEGMENT)
    return chosen


def _frames_of(
    segmentation: Segmentation, chosen: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[int, SegmentationFrame]]:
    """Frames that may hold one of the chosen segments, with their place in the pixel data."""
    numbers = {number for members in chosen.values() for number in members}
    for index, frame in enumerate(segmentation.frames):
        if segmentation.kind == "LABELMAP" or frame.segment in numbers:
            yield index, frame


def _marked(
    segmentation: Segmentation,
    index: int,
    chosen: Mapping[str, tuple[int, ...]],
    masks: NDArray[np.bool_],
    threshold: float,
) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """Pairs of a mask and the pixels `(rows, columns)` of this frame that belong to it."""
    with contained(Reason.DECODE_FAILED):
        stored = segmentation.pixels.frames(index)
    number = segmentation.frames[index].segment
    for mask, members in zip(masks, chosen.values(), strict=True):
        if segmentation.kind == "LABELMAP":
            yield mask, np.isin(stored, members)
        elif number in members:
            # A stored 0 is outside at any threshold.
            yield mask, (stored > 0) & (stored >= threshold * segmentation.max_fraction)
