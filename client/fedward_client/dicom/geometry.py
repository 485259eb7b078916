"""Where a stack of parallel slices lies in the patient, and the regular grid that it becomes (hop 2).

Convention, for every volume in here: array axes are (slice, row, column); slices ascend along the
normal, which is row cosines x column cosines, so an axial stack runs from feet to head; the affine maps
`(slice, row, column, 1)` to RAS millimetres (x right, y anterior, z superior; as MONAI and NIfTI).
DICOM's own coordinates are LPS: x and y change sign, once, in `ras_affine`.

Positions decide, as the standard says: neither SliceThickness nor SpacingBetweenSlices nor the nominal
GantryDetectorTilt places anything. What the positions do not settle is refused by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedward_client.dicom.refusal import Reason, UnusableImageError

Points = NDArray[np.float64]

SAME_POSITION_MM = 0.01
"""Two slices nearer than this are at one position. Repeated positions differ in the last printed digit
only (micrometres), and no scanner for patients has slices this close."""

MAX_DEVIATION_MM = 0.1
"""How far a slice may lie from the regular grid. Positions are often printed with one or two decimals,
which alone makes 0.05 mm; 0.1 mm is a fraction of any clinical pixel. Thin slices: see the next line."""

MAX_DEVIATION_PART = 0.1
"""And at most this part of the distance between slices, so that thin slices are held to more."""

ORIENTATION_TOLERANCE = 5e-4
"""How much cosines of parallel slices may differ: 0.1 mm at 200 mm from the first pixel."""

ORTHONORMAL_TOLERANCE = 1e-3
"""Cosines rounded to three decimals still pass; beyond, the image plane itself is in doubt."""

MAX_TILT_DEGREES = 45.0
"""Gantries tilt by up to 30 degrees; steeper shear means wrong positions."""

_HOLE = 1.5
_TINY = 0.1
_NEAR_WHOLE = 0.2
_MAX_COORDINATE_MM = 1e5
_MAX_VOXELS = 2**29
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


class Handled(StrEnum):
    """What was found in a volume and dealt with."""

    GANTRY_TILT = "gantry_tilt"
    UNEQUAL_SPACING = "unequal_spacing"
    SINGLE_SLICE = "single_slice"
    COPIES = "copies"


@dataclass(frozen=True, eq=False)
class Plane:
    """What parallel slices of one stack have in common.

    Attributes:
        along_row: `(3,)` unit vector, LPS, in which the column index grows.
        along_column: `(3,)` unit vector, LPS, in which the row index grows.
        rows: number of rows.
        columns: number of columns.
        row_mm: distance between rows.
        column_mm: distance between columns.
    """

    along_row: Points
    along_column: Points
    rows: int
    columns: int
    row_mm: float
    column_mm: float

    @property
    def normal(self) -> Points:
        """Unit vector in which slices ascend, LPS."""
        return np.cross(self.along_row, self.along_column)


@dataclass(frozen=True, eq=False)
class Resampling:
    """How the slices of a regular orthogonal grid come out of the acquired ones.

    Attributes:
        lower: `(slices,)` index of the acquired slice at or below each slice of the grid.
        upper_weight: `(slices,)` in [0, 1): share of the acquired slice above it.
        offsets: `(slices, 2)`: acquired row and column that lie at the first pixel of each slice.
    """

    lower: NDArray[np.int64]
    upper_weight: Points
    offsets: Points


@dataclass(frozen=True, eq=False)
class Grid:
    """Regular grid of one volume.

    Attributes:
        shape: (slices, rows, columns).
        affine: `(4, 4)`: (slice, row, column, 1) to RAS mm.
        handled: what was found and dealt with.
        resampling: None where acquired slices are slices of the grid.
    """

    shape: tuple[int, int, int]
    affine: Points
    handled: tuple[Handled, ...]
    resampling: Resampling | None

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between slices, rows and columns."""
        slice_mm, row_mm, column_mm = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(slice_mm), float(row_mm), float(column_mm)


def ras_affine(origin: Points, slice_step: Points, plane: Plane) -> Points:
    """Affine of a grid from LPS vectors: the one place where LPS becomes RAS.

    Args:
        origin: `(3,)` centre of voxel (0, 0, 0), mm.
        slice_step: `(3,)` from one slice to the next, mm.
        plane: direction and distance of rows and columns.
    """
    lps = np.eye(4)
    lps[:3, 0] = slice_step
    lps[:3, 1] = plane.along_column * plane.row_mm
    lps[:3, 2] = plane.along_row * plane.column_mm
    lps[:3, 3] = origin
    affine: Points = _LPS_TO_RAS @ lps
    affine.setflags(write=False)
    return affine


@lru_cache(maxsize=4096)  # most slices of a series share one orientation, and cohorts have many slices
def orthonormal(orientation: tuple[float, ...]) -> Points | None:
    """Row and column cosines `(2, 3)` as exact unit vectors at right angles, or None if they are far off."""
    cosines = np.array(orientation, np.float64)
    if cosines.shape != (6,) or not np.isfinite(cosines).all():
        return None
    row, column = cosines[:3], cosines[3:]
    length = float(np.linalg.norm(row))
    errors = (length - 1, float(np.linalg.norm(column)) - 1, float(row @ column))
    if max(map(abs, errors)) > ORTHONORMAL_TOLERANCE:
        return None
    row = row / length
    column = column - (column @ row) * row
    axes: Points = np.stack((row, column / np.linalg.norm(column)))
    axes.setflags(write=False)
    return axes


def usable_position(position: tuple[float, ...]) -> bool:
    """Whether three coordinates are numbers that can be millimetres in a room."""
    return len(position) == 3 and all(
        math.isfinite(value) and abs(value) <= _MAX_COORDINATE_MM for value in position
    )


def places_of(positions: Points, normal: Points) -> NDArray[np.int64]:
    """Number the distinct positions along the normal, from 0.

    Args:
        positions: `(slices, 3)` LPS mm, any order.
        normal: `(3,)` unit vector.

    Returns:
        `(slices,)`: slices at one position have one number; slices that differ only within their plane
        have different numbers.
    """
    along = positions @ normal
    order = np.lexsort((*positions.T, along))
    steps = np.linalg.norm(np.diff(positions[order], axis=0), axis=1) > SAME_POSITION_MM
    places = np.empty(len(positions), np.int64)
    places[order] = np.concatenate(([0], np.cumsum(steps)))
    return places


def grid_of(positions: Points, plane: Plane, thickness_mm: Points | None) -> Grid:
    """Find the regular grid of slices that are sorted along the normal, one at each position.

    Args:
        positions: `(slices, 3)` LPS mm, ascending along `plane.normal`.
        plane: common to all slices.
        thickness_mm: `(slices,)` SliceThickness, or None; only tells a missing slice from a change of
            protocol, and how thick a single slice is.

    Raises:
        UnusableImageError: MISSING_SLICES, UNEQUAL_SPACING, MISALIGNED, GANTRY_TILT, SINGLE_SLICE, or
            OVER_LIMIT when the grid would not fit into memory.
    """
    if len(positions) == 1:
        return _single_slice(positions[0], plane, thickness_mm)
    along = positions @ plane.normal
    gaps = np.diff(along)
    if gaps.min() <= SAME_POSITION_MM / 2:  # side by side, not one behind the other
        raise UnusableImageError(Reason.MISALIGNED)
    tolerance = min(MAX_DEVIATION_MM, MAX_DEVIATION_PART * float(gaps.min()))
    step = np.arange(len(positions), dtype=np.float64)
    origin, slice_step, deviation = _fit_line(step, positions)
    regular = deviation <= tolerance
    if not regular:
        _refuse_holes(gaps, thickness_mm)
        origin, slice_step, deviation = _fit_line(along, positions)
        if deviation > min(MAX_DEVIATION_MM, 0.5 * min(plane.row_mm, plane.column_mm)):
            raise UnusableImageError(Reason.MISALIGNED)
    tilt = tilt_degrees(slice_step, plane)
    if tilt > MAX_TILT_DEGREES:
        raise UnusableImageError(Reason.GANTRY_TILT)
    shift = math.tan(math.radians(tilt)) * float(along[-1] - along[0])
    # Up to half a pixel over the whole stack, the affine carries the shear and no value is touched.
    tilted = shift > 0.5 * min(plane.row_mm, plane.column_mm)
    if regular and not tilted:
        _check_size((len(positions), plane.rows, plane.columns))
        shape = (len(positions), plane.rows, plane.columns)
        return Grid(shape, ras_affine(origin, slice_step, plane), (), None)
    return _resampled_grid(positions, plane, slice_step, regular=regular, tilted=tilted)


def tilt_degrees(slice_step: Points, plane: Plane) -> float:
    """Angle between the direction of stacking and the normal; 0 for an orthogonal stack."""
    along = float(slice_step @ plane.normal)
    within = float(np.linalg.norm(slice_step - along * plane.normal))
    return math.degrees(math.atan2(within, along))


def _single_slice(position: Points, plane: Plane, thickness_mm: Points | None) -> Grid:
    if thickness_mm is None:
        raise UnusableImageError(Reason.SINGLE_SLICE)
    affine = ras_affine(position, plane.normal * thickness_mm[0], plane)
    _check_size((1, plane.rows, plane.columns))
    return Grid((1, plane.rows, plane.columns), affine, (Handled.SINGLE_SLICE,), None)


def _fit_line(parameter: Points, positions: Points) -> tuple[Points, Points, float]:
    """Least squares of `positions = origin + parameter * step`, with the largest distance from it."""
    centred = parameter - parameter.mean()
    middle = positions.mean(axis=0)
    step: Points = centred @ (positions - middle) / (centred @ centred)
    origin: Points = middle - parameter.mean() * step
    deviation = positions - (origin + parameter[:, None] * step)
    return origin, step, float(np.linalg.norm(deviation, axis=1).max())


def _refuse_holes(gaps: Points, thickness_mm: Points | None) -> None:
    """Interpolate between slices that follow each other, never across one that is not there.

    Distances are compared after division by the thickness of the two slices, because a protocol that
    changes the thickness on its way (skull base, then brain) changes the distance with it.
    """
    if thickness_mm is not None:
        gaps = gaps / (0.5 * (thickness_mm[:-1] + thickness_mm[1:]))
    ratios = gaps / _typical(gaps)
    holes = ratios[ratios >= _HOLE]
    if len(holes) and (np.abs(holes - np.round(holes)) <= _NEAR_WHOLE).any():
        raise UnusableImageError(Reason.MISSING_SLICES)
    if len(holes) or ratios.min() < _TINY:
        raise UnusableImageError(Reason.UNEQUAL_SPACING)


def _typical(gaps: Points) -> float:
    """Lower quartile: a distance that really occurs, and not that of one odd pair of slices."""
    return float(np.percentile(gaps, 25, method="lower"))


def _resampled_grid(
    positions: Points, plane: Plane, slice_step: Points, *, regular: bool, tilted: bool
) -> Grid:
    """Lay an orthogonal, regular grid over slices that are not, in their own planes.

    The grid keeps the directions of rows and columns, so tilt alone moves each slice within its plane
    and never mixes two slices. First and last slice stay where they are. Between two slices, values
    are interpolated along the direction of stacking, as every affine resampling of them would.
    """
    normal = plane.normal
    along = positions @ normal
    direction = normal if tilted else slice_step / (slice_step @ normal)
    if regular:
        levels = along
    else:
        num_steps = max(1, round(float(along[-1] - along[0]) / _typical(np.diff(along))))
        levels = np.linspace(along[0], along[-1], num_steps + 1)
    lower = np.clip(np.searchsorted(along, levels + 1e-9, side="right") - 1, 0, len(along) - 2)
    weight = (levels - along[lower]) / (along[lower + 1] - along[lower])
    at_upper = weight > 1 - 1e-6
    lower, weight = lower + at_upper, np.where(at_upper | (weight < 1e-6), 0.0, weight)
    shifts = np.zeros((len(levels), 2))
    if tilted:
        beside = positions - positions[0] - (along - along[0])[:, None] * normal
        acquired = np.stack([beside @ plane.along_column, beside @ plane.along_row], axis=1)
        acquired /= (plane.row_mm, plane.column_mm)
        above = np.minimum(lower + 1, len(along) - 1)
        shifts = (1 - weight)[:, None] * acquired[lower] + weight[:, None] * acquired[above]
    first = np.floor(shifts.min(axis=0) + 1e-6)
    more_rows, more_columns = np.ceil(shifts.max(axis=0) - first - 1e-6).astype(np.int64).tolist()
    shape = (len(levels), plane.rows + more_rows, plane.columns + more_columns)
    _check_size(shape)
    corner = positions[0] + first[0] * plane.row_mm * plane.along_column
    corner = corner + first[1] * plane.column_mm * plane.along_row
    level_step = (levels[-1] - levels[0]) / (len(levels) - 1)
    handled = [Handled.GANTRY_TILT] if tilted else []
    handled += [] if regular else [Handled.UNEQUAL_SPACING]
    affine = ras_affine(corner, level_step * direction, plane)
    return Grid(shape, affine, tuple(handled), Resampling(lower, weight, first - shifts))


def _check_size(shape: tuple[int, int, int]) -> None:
    if math.prod(shape) > _MAX_VOXELS:
        raise UnusableImageError(Reason.OVER_LIMIT)
