"""Bring a volume to the spacing and size that a plan asks for, the same way at every site (hop 4).

Two ways, after the plan's `transforms`: with a spacing, the volume is resampled to it and its middle is cut
out or padded to the size; without one, the whole field of view is scaled to the size. Axes may be swapped
and turned round, so that equal anatomy lies the same way in all arrays, but nothing is rotated, so each
axis is resampled by itself. Growing interpolates linearly; shrinking averages what falls into a new voxel,
so that no texture is invented. The new affine tells where in the patient each voxel lies.

Plain numpy: products with small matrices take a fraction of the time that decoding took, and need neither
torch nor a second convention of where the edge of a voxel is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedward_client.dicom.geometry import Points
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.volume import Image, Volume
from fedward_common.errors import PlanError

GRID_VERSION = 1
"""Part of the key of anything cached: it grows when the same volume would give other values."""

View = Literal["acquired", "axial", "coronal", "sagittal"]
Triple = tuple[int, int, int]

_MAX_VOXELS = 2**28
_MIN_MM, _MAX_MM = 0.01, 1000.0
_CHUNK = 16
_SAME_PLACE = 0.02  # of a voxel, at the far end of an axis
# In which direction of RAS (axis, sign) slices, rows and columns run, as radiologists look at them.
_DIRECTIONS: dict[View, tuple[tuple[int, int], tuple[int, int], tuple[int, int]]] = {
    "axial": ((2, 1), (1, -1), (0, -1)),  # to the head, to the back, to the left
    "coronal": ((1, -1), (2, -1), (0, -1)),  # to the back, to the feet, to the left
    "sagittal": ((0, 1), (2, -1), (1, -1)),  # to the right, to the feet, to the back
}

Number = TypeVar("Number", bound=np.generic)


@dataclass(frozen=True, eq=False)
class TargetGrid:
    """A grid along the axes of a source volume, which may be swapped or turned round.

    Attributes:
        shape: (slices, rows, columns).
        affine: `(4, 4)`: (slice, row, column, 1) to RAS mm.
        axes: source axis of each axis here.
        flipped: whether it runs the other way here.
        starts: where the first voxel's centre lies along each axis, in source voxels, once turned.
        steps: source voxels from one voxel here to the next.
    """

    shape: Triple
    affine: Points = field(repr=False)
    axes: Triple
    flipped: tuple[bool, bool, bool]
    starts: tuple[float, float, float]
    steps: tuple[float, float, float]


def resample(
    volume: Volume,
    spacing_mm: tuple[float, float, float] | None,
    size: Triple,
    *,
    view: View = "acquired",
) -> Volume:
    """Bring a volume to a spacing and a size.

    Args:
        volume: from `assemble`.
        spacing_mm: between slices, rows and columns of the result; its middle is then cut out or padded, with
            the volume's fill or else its lowest value. None: scale the whole field of view to `size`.
        size: (slices, rows, columns) of the result.
        view: which way the result lies. "acquired" keeps the slices and turns each picture as radiologists
            look at it; the others make slices axial, coronal or sagittal. `spacing_mm` and `size` are those
            of the result.

    Returns:
        Values float32 `size` in the same units, with the affine of where they lie.

    Raises:
        PlanError: spacing or size is impossible.
        UnusableImageError: DISPLAY_VALUES when a voxel is not finite.
    """
    grid = target_grid(volume.values.shape, volume.affine, spacing_mm, size, view=view)
    lowest, highest = float(volume.values.min()), float(volume.values.max())
    if not (math.isfinite(lowest) and math.isfinite(highest)):  # one such voxel would spread over whole rows
        raise UnusableImageError(Reason.DISPLAY_VALUES)
    fill = lowest if volume.fill is None else volume.fill
    values: Image = _turned(volume.values, grid)
    centres = [_centres_inside(grid, axis, num) for axis, num in enumerate(values.shape)]
    # The axis that shrinks most goes first, so that the others have less to do.
    for axis in sorted(range(3), key=lambda each: len(centres[each]) / values.shape[each]):
        values = _resampled_along(values, axis, centres[axis], grid.steps[axis])
    if values.shape == grid.shape:
        return replace(volume, values=np.ascontiguousarray(values), affine=grid.affine)
    padded = np.full(grid.shape, fill, np.float32)
    padded[_block(grid, centres)] = values
    return replace(volume, values=padded, affine=grid.affine, fill=fill)


def resample_labels(labels: NDArray[Number], grid: TargetGrid) -> NDArray[Number]:
    """Bring a label image to the grid of its resampled volume: the nearest label, 0 outside.

    Args:
        labels: on the grid of the volume before it was resampled.
        grid: `target_grid` of that volume, with the same spacing, size and view.
    """
    turned = _turned(labels, grid)
    centres = [_centres_inside(grid, axis, num) for axis, num in enumerate(turned.shape)]
    # Half-way between two voxels the lower one counts, whatever the last digit says.
    nearest = [
        np.clip(np.ceil(each - 0.5 - 1e-6), 0, num - 1).astype(np.int64)
        for each, num in zip(centres, turned.shape, strict=True)
    ]
    found = np.zeros(grid.shape, labels.dtype)
    found[_block(grid, centres)] = turned[np.ix_(*nearest)]
    return found


def target_grid(
    shape: Sequence[int],
    affine: Points,
    spacing_mm: tuple[float, float, float] | None,
    size: Triple,
    *,
    view: View = "acquired",
) -> TargetGrid:
    """Lay the grid that `resample` fills; arguments as there, `shape` and `affine` those of the source.

    Raises:
        PlanError: spacing or size is impossible.
    """
    _check(spacing_mm, size)
    axes, flipped = _turns(affine, view)
    turned = affine.copy()
    for axis, (source, flip) in enumerate(zip(axes, flipped, strict=True)):
        turned[:3, axis] = affine[:3, source] * (-1 if flip else 1)
        turned[:3, 3] += affine[:3, source] * (shape[source] - 1 if flip else 0)
    present_mm = np.linalg.norm(turned[:3, :3], axis=0)
    along = [
        _along_axis(
            shape[source], size[axis], None if spacing_mm is None else spacing_mm[axis] / present_mm[axis]
        )
        for axis, source in enumerate(axes)
    ]
    starts, steps = zip(*along, strict=True)
    placed = turned.copy()
    placed[:3, :3] = turned[:3, :3] * steps
    placed[:3, 3] = turned[:3, 3] + turned[:3, :3] @ starts
    placed.setflags(write=False)
    return TargetGrid(size, placed, axes, flipped, starts, steps)


def _check(spacing_mm: tuple[float, float, float] | None, size: Triple) -> None:
    if len(size) != 3 or min(size) < 1 or math.prod(size) > _MAX_VOXELS:
        raise PlanError(
            f"{list(size)} is no size of a volume, or more than {_MAX_VOXELS} voxels",
            remedy="Set transforms.size to three numbers: slices, rows, columns.",
        )
    if spacing_mm is not None and not (
        len(spacing_mm) == 3 and all(_MIN_MM <= each <= _MAX_MM for each in spacing_mm)
    ):
        raise PlanError(
            f"a spacing of {list(spacing_mm)} mm is impossible",
            remedy=f"Give three numbers from {_MIN_MM} to {_MAX_MM} mm: between slices, rows, columns.",
        )


def _turns(affine: Points, view: View) -> tuple[Triple, tuple[bool, bool, bool]]:
    """Which source axis each axis of the result is, and whether it runs the other way there."""
    unit = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    views: tuple[View, ...] = ("axial", "coronal", "sagittal") if view == "acquired" else (view,)
    choices = [
        (
            sum(
                abs(float(unit[ras, source]))
                for (ras, _), source in zip(_DIRECTIONS[name], axes, strict=True)
            ),
            axes,
            name,
        )
        for name in views
        for axes in permutations(range(3))
        if view != "acquired" or axes[0] == 0
    ]
    # Rounding must not decide between two that fit alike: the first one counts.
    best = max(choice[0] for choice in choices)
    _, (first, second, third), name = next(choice for choice in choices if choice[0] > best - 1e-3)
    (a, b, c) = _DIRECTIONS[name]
    flips = [
        bool(unit[ras, source] * sign < 0) for (ras, sign), source in ((a, first), (b, second), (c, third))
    ]
    return (first, second, third), (flips[0], flips[1], flips[2])


def _along_axis(length: int, wanted: int, step: float | None) -> tuple[float, float]:
    """Centre of the first new voxel and distance to the next, in source voxels.

    Both fields of view have one middle. Where the spacing stays, whole voxels are cut off, never halves,
    and no value changes. What is thinner than one new voxel lies in one, not between two.
    """
    if step is None:
        step = length / wanted
    elif abs(step - 1) * length < _SAME_PLACE:
        step = 1.0
    before = wanted // 2 if length < step else (wanted - 1) / 2
    start = (length - 1) / 2 - step * before
    return (float(math.floor(start)) if step == 1.0 else start), float(step)


def _turned(values: NDArray[Any], grid: TargetGrid) -> NDArray[Any]:
    turned = values.transpose(grid.axes)
    return turned[tuple(slice(None, None, -1 if flip else 1) for flip in grid.flipped)]


def _centres_inside(grid: TargetGrid, axis: int, num: int) -> Points:
    """Centres of the new voxels that lie in the source, to its voxels' outer edges, in source voxels."""
    centres: Points = grid.starts[axis] + grid.steps[axis] * np.arange(grid.shape[axis], dtype=np.float64)
    return centres[(centres >= -0.5 - 1e-6) & (centres <= num - 0.5 + 1e-6)]


def _block(grid: TargetGrid, centres: Sequence[Points]) -> tuple[slice, ...]:
    """Where in the result the voxels with these centres are."""
    firsts = [
        round((each[0] - start) / step)
        for each, start, step in zip(centres, grid.starts, grid.steps, strict=True)
    ]
    return tuple(slice(first, first + len(each)) for first, each in zip(firsts, centres, strict=True))


def _resampled_along(values: Image, axis: int, centres: Points, step: float) -> Image:
    """Resample one axis."""
    whole = np.round(centres).astype(np.int64)
    if step == 1.0 and np.abs(centres - whole).max() < 1e-6:
        return values[(slice(None),) * axis + (slice(whole[0], whole[-1] + 1),)]
    found = np.empty((*values.shape[:axis], len(centres), *values.shape[axis + 1 :]), np.float32)
    for start in range(0, len(centres), _CHUNK):  # each needs only a stretch of the source
        chunk = slice(start, start + _CHUNK)
        weights, first = _weights(centres[chunk], step, values.shape[axis])
        part = values[(slice(None),) * axis + (slice(first, first + weights.shape[1]),)]
        if axis == 0:
            found[chunk] = np.tensordot(weights, part, axes=(1, 0))
        elif axis == 1:
            found[:, chunk] = np.matmul(weights, part)
        else:
            found[:, :, chunk] = np.matmul(part, weights.T)
    return found


def _weights(centres: Points, step: float, num: int) -> tuple[Image, int]:
    """Share of each source voxel in each new one, and the first source voxel that has any.

    The line that joins the source voxels, read at the new centre; when shrinking by `step`, its mean over a
    stretch of `step - 1`, which with the line's own blur is one new voxel. Either leaves a slope through the
    volume exactly in place, as a plain average of the voxels nearby does not. Beyond the outermost centres
    the line goes on level.
    """
    half = max(0.0, step - 1) / 2
    before, after = np.clip(centres - half, 0, num - 1), np.clip(centres + half, 0, num - 1)
    index = np.arange(num)
    if half < 1e-6:
        weights = np.maximum(0, 1 - np.abs(index - np.clip(centres, 0, num - 1)[:, None]))
    else:
        level = np.maximum(0, half - centres)[:, None] * (index == 0)
        level = level + np.maximum(0, centres + half - (num - 1))[:, None] * (index == num - 1)
        weights = _area(after[:, None] - index) - _area(before[:, None] - index) + level
        weights /= 2 * half
    used = np.flatnonzero(weights.any(axis=0))
    first, last = int(used[0]), int(used[-1])
    return weights[:, first : last + 1].astype(np.float32), first


def _area(end: Points) -> Points:
    """Area of a triangle of height 1 from -1 to 1, as far as `end`."""
    end = np.clip(end, -1, 1)
    area: Points = np.where(end < 0, (1 + end) ** 2 / 2, 1 - (1 - end) ** 2 / 2)
    return area
