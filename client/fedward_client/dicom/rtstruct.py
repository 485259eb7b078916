"""Read RT structure sets and draw their contours on the grid of an image (hop 3).

A structure is a stack of closed polygons, each in the plane of one image slice. A pixel belongs to the
structure when its centre lies inside; the rule at the edge (upper and left belong, lower and right do
not) is exact and gives neighbours without gap or overlap. Inside is what an odd number of edges surrounds,
which fills keyholes and nested rings as planning systems do. Refused: contours that are open, not flat,
oblique to the slices or between them, and two that cross one another, for these have no agreed meaning.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from pydicom import uid

from fedward_client.dicom.elements import Elements
from fedward_client.dicom.label_grid import (
    TOLERANCE_PIXELS,
    Grid,
    MaskLabel,
    check_same_space,
    empty_masks,
)
from fedward_client.dicom.nested import items, open_object, tag_of, text, whole
from fedward_client.dicom.parser import contained
from fedward_client.dicom.refusal import Reason, UnusableImageError

MAX_STRUCTURE_SET_BYTES = 256 * 2**20

_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
_MAX_CONTOUR_BYTES = 4 * 2**20
_MAX_STRUCTURE_BYTES = 64 * 2**20
_MAX_CROSSINGS = 2**22
_MAX_FILLED_PIXELS = 2**29
"""Of all contours together, each counted as its bounding box and its crossings of rows."""


@dataclass(frozen=True)
class Contour:
    """One contour as stored.

    Args:
        geometric_type: ContourGeometricType.
        stored: decimal text of x, y, z, x, y, z ... in LPS millimetres.
        instances: SOPInstanceUIDs of the images it was drawn on.
    """

    geometric_type: str
    stored: bytes = field(repr=False)
    instances: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True)
class Structure:
    """One region of interest.

    Args:
        number: ROINumber.
        name: free text, for the site's own configuration only.
        frame_of_reference: FrameOfReferenceUID, "" when there is none.
        contours: in the order of the object.
    """

    number: int
    name: str = field(repr=False)
    frame_of_reference: str = field(repr=False)
    contours: tuple[Contour, ...] = field(repr=False)


@dataclass(frozen=True)
class StructureSet:
    """One RTSTRUCT object; contours are not yet converted."""

    structures: tuple[Structure, ...]
    sop_instance: str = field(repr=False)
    study: str = field(repr=False)
    patient: str = field(repr=False)


def read_structures(data: bytes) -> StructureSet:
    """Read one structure set held in memory.

    Raises:
        UnusableImageError: no structure set, damaged, or beyond the limits.
    """
    with contained(Reason.MALFORMED):
        parsed = open_object(data, (uid.RTStructureSetStorage,), max_bytes=MAX_STRUCTURE_SET_BYTES)
        header = parsed.elements
        contours: dict[int, list[Contour]] = defaultdict(list)
        for each in items(header, "ROIContourSequence"):
            contours[whole(each, "ReferencedROINumber")] += map(_contour, items(each, "ContourSequence"))
        structures = tuple(
            Structure(
                number=whole(each, "ROINumber"),
                name=text(each, "ROIName"),
                frame_of_reference=text(each, "ReferencedFrameOfReferenceUID"),
                contours=tuple(contours.get(whole(each, "ROINumber"), ())),
            )
            for each in items(header, "StructureSetROISequence")
        )
        if len({structure.number for structure in structures}) < len(structures):
            raise UnusableImageError(Reason.MALFORMED)
        return StructureSet(
            structures,
            sop_instance=text(header, "SOPInstanceUID"),
            study=text(header, "StudyInstanceUID"),
            patient=text(header, "PatientID"),
        )


def align_structures(
    structures: StructureSet, grid: Grid, wanted: Mapping[str, str], *, absent_is_empty: bool = False
) -> MaskLabel:
    """Draw the wanted structures on the grid of an image volume.

    Args:
        structures: of that image.
        grid: of the image.
        wanted: name in the plan -> ROIName.
        absent_is_empty: a structure that is missing, or has no contour, is an empty mask; without this it
            is a refusal.

    Returns:
        Masks `(structures, slices, rows, columns)`.

    Raises:
        UnusableImageError: another frame of reference, a structure missing or named twice, or contours
            that are not closed polygons in the planes of the slices.
    """
    masks = empty_masks(len(wanted), grid.shape)
    budget = _MAX_FILLED_PIXELS
    with contained(Reason.CONTOURS):
        for mask, name in zip(masks, wanted.values(), strict=True):
            found = [each for each in structures.structures if each.name == name]
            if len(found) > 1 or not (absent_is_empty or (found and found[0].contours)):
                raise UnusableImageError(Reason.NO_SEGMENT)
            for structure in found:
                instances = frozenset(each for contour in structure.contours for each in contour.instances)
                check_same_space(grid, structure.frame_of_reference, instances)
                budget = _draw(mask, structure.contours, grid, budget)
    return MaskLabel(masks, tuple(wanted))


def fill_polygon(points: NDArray[np.float64], rows: int, columns: int) -> NDArray[np.bool_]:
    """Fill a closed polygon: pixels whose centre an odd number of edges surrounds.

    Args:
        points: `(n, 2)`, row and column of each corner; pixel centres are whole numbers. The last corner
            is joined to the first.
        rows: of the result.
        columns: of the result.

    Raises:
        UnusableImageError: more crossings of rows than any contour has.

    >>> fill_polygon(np.array([[0.5, 0.5], [0.5, 2.5], [2.5, 2.5], [2.5, 0.5]]), 4, 4).astype(int)
    array([[0, 0, 0, 0],
           [0, 1, 1, 0],
           [0, 1, 1, 0],
           [0, 0, 0, 0]])
    """
    start, end = points, np.roll(points, -1, axis=0)
    upper, lower = np.minimum(start[:, 0], end[:, 0]), np.maximum(start[:, 0], end[:, 0])
    # Rows r with upper <= r < lower: of two edges that meet in a corner on a row, one counts.
    first = np.clip(np.ceil(upper), 0, rows).astype(np.int64)
    counts = np.clip(np.ceil(lower), 0, rows).astype(np.int64) - first
    if counts.sum() > _MAX_CROSSINGS:
        raise UnusableImageError(Reason.OVER_LIMIT)
    edge = np.repeat(np.arange(len(points)), counts)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts) + first[edge]
    along = (row - start[edge, 0]) / (end[edge, 0] - start[edge, 0])
    crossing = start[edge, 1] + along * (end[edge, 1] - start[edge, 1])
    column = np.clip(np.ceil(crossing), 0, columns).astype(np.int64)
    crossings = np.zeros((rows, columns + 1), dtype=np.int32)
    np.add.at(crossings, (row, column), 1)
    return np.asarray(np.cumsum(crossings[:, :columns], axis=1) % 2 == 1)


def _contour(item: Elements) -> Contour:
    return Contour(
        geometric_type=text(item, "ContourGeometricType"),
        stored=item.value(tag_of("ContourData")) or b"",
        instances=tuple(
            text(each, "ReferencedSOPInstanceUID") for each in items(item, "ContourImageSequence")
        ),
    )


def _draw(mask: NDArray[np.bool_], contours: Sequence[Contour], grid: Grid, budget: int) -> int:
    """Draw a structure's contours into its mask; return what is left of the budget."""
    to_grid = np.linalg.inv(grid.affine).astype(np.float64)
    if sum(len(contour.stored) for contour in contours) > _MAX_STRUCTURE_BYTES:
        raise UnusableImageError(Reason.OVER_LIMIT)
    if len({contour.stored for contour in contours}) < len(contours):  # twice the same would cancel out
        raise UnusableImageError(Reason.CONTOURS)
    polygons = [_polygon(contour, to_grid, grid.shape[0]) for contour in contours]
    # The larger first, so that whatever is drawn later lies inside or outside what is there.
    for contour, (index, corners) in sorted(
        zip(contours, polygons, strict=True), key=lambda each: -_area(each[1][1])
    ):
        top, left = (max(0, int(np.floor(side))) for side in corners.min(axis=0))
        bottom, right = (int(np.ceil(side)) + 1 for side in corners.max(axis=0))
        region = mask[index, top : max(0, bottom), left : max(0, right)]
        num_crossings = np.abs(np.diff(np.clip(corners[:, 0], 0, mask.shape[1]))).sum()
        budget -= region.size + int(num_crossings)
        if budget < 0:
            raise UnusableImageError(Reason.OVER_LIMIT)
        filled = fill_polygon(corners - (top, left), *region.shape)
        common = filled & region
        nested = not common.any() or bool((common == filled).all())
        if not nested and contour.geometric_type == "CLOSED_PLANAR":
            raise UnusableImageError(Reason.CONTOURS)
        region ^= filled
    return budget


def _polygon(
    contour: Contour, to_grid: NDArray[np.float64], num_slices: int
) -> tuple[int, NDArray[np.float64]]:
    """Slice of a contour, and its corners `(n, 2)` as row and column."""
    if len(contour.stored) > _MAX_CONTOUR_BYTES:
        raise UnusableImageError(Reason.OVER_LIMIT)
    if contour.geometric_type not in _CLOSED or b"_" in contour.stored:  # NumPy reads 1_0 as ten
        raise UnusableImageError(Reason.CONTOURS)
    numbers = np.array(contour.stored.strip(b" \0").split(b"\\"), dtype=np.float64)
    if len(numbers) % 3 or len(numbers) < 9 or not (np.abs(numbers) <= 1e6).all():  # NaN fails as well
        raise UnusableImageError(Reason.CONTOURS)
    points = numbers.reshape(-1, 3) * (-1.0, -1.0, 1.0)  # LPS to RAS
    places = points @ to_grid[:3, :3].T + to_grid[:3, 3]
    index = int(np.rint(places[0, 0]))
    if np.abs(places[:, 0] - index).max() > TOLERANCE_PIXELS or not 0 <= index < num_slices:
        raise UnusableImageError(Reason.LABEL_GRID)
    return index, np.ascontiguousarray(places[:, 1:], dtype=np.float64)


def _area(corners: NDArray[np.float64]) -> float:
    """Area of a polygon, by the shoelace formula."""
    row, column = corners.T
    return abs(float(row @ np.roll(column, -1) - column @ np.roll(row, -1))) / 2
