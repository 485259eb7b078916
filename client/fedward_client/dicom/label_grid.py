"""The grid of an image, and where the pixels of a label object lie on it (hop 3).

A segmentation or structure set is a different object than its image: it may hold fewer slices, in
another order, mirrored, or belong to another scan altogether. So nothing is matched by order or name.
Every frame is placed by its coordinates in the patient; a placement that does not meet the image's pixels
one by one, or that leaves the image, is refused. Labels are never resampled here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedward_client.dicom.refusal import Reason, UnusableImageError

MAX_MASK_BYTES = 256 * 2**20
"""Of one mask; 512 x 512 x 1000 voxels are as many."""

TOLERANCE_PIXELS = 0.1
"""Largest distance between the centres of a label's and an image's pixel: decimal text is rounded."""

_RAS_OF_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True, eq=False)
class Grid:
    """The pixels of an image volume; a single image with a position is a volume of one slice.

    Args:
        affine: float64 `(4, 4)`; maps (slice, row, column, 1), counted from 0, to RAS millimetres.
        shape: slices, rows, columns.
        frame_of_reference: FrameOfReferenceUID; "" when the image has none.
        instances: SOPInstanceUIDs of the image; the proof that a label belongs to it where a frame of
            reference is missing.
    """

    affine: NDArray[np.float64]
    shape: tuple[int, int, int]
    frame_of_reference: str = field(default="", repr=False)
    instances: frozenset[str] = field(default=frozenset(), repr=False)


@dataclass(frozen=True, eq=False)
class MaskLabel:
    """Each pixel belongs to any number of segments.

    Args:
        values: bool, `(segments, slices, rows, columns)`, or `(segments, rows, columns)` of one image;
            the same grid as the image.
        segments: their names, in order.
    """

    values: NDArray[np.bool_] = field(repr=False)
    segments: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Placement:
    """Where the pixels of one frame lie on a grid.

    Args:
        axes: int64 `(3, 2)`; each column is a signed unit vector: the step in (slice, row, column) of the
            grid from one row, and from one column, of the frame to the next.
        origin: int64 `(3,)`; place of the frame's first pixel; may lie outside the grid.
    """

    axes: NDArray[np.int64]
    origin: NDArray[np.int64]

    def indices(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places `(3, n)` of n pixels of the frame."""
        return self.axes @ np.stack([rows, columns]) + self.origin[:, None]


def check_same_space(grid: Grid, frame_of_reference: str, instances: frozenset[str]) -> None:
    """Refuse a label object that is not in the coordinates of the image.

    Args:
        grid: of the image.
        frame_of_reference: of the label object, "" when it has none.
        instances: SOPInstanceUIDs of the images that it refers to.

    Raises:
        UnusableImageError: another frame of reference, or none and no reference to these images.
    """
    if grid.frame_of_reference and frame_of_reference:
        fits = grid.frame_of_reference == frame_of_reference
    else:
        fits = bool(grid.instances & instances)
    if not fits:
        raise UnusableImageError(Reason.FRAME_OF_REFERENCE)


def frame_affine(
    position: Sequence[float], orientation: Sequence[float], spacing: Sequence[float]
) -> NDArray[np.float64]:
    """Affine `(4, 3)` from (row, column, 1) of a frame to RAS millimetres.

    Args:
        position: ImagePositionPatient, LPS millimetres.
        orientation: ImageOrientationPatient: direction along a row, then along a column.
        spacing: PixelSpacing: between rows, then between columns.

    Raises:
        UnusableImageError: not finite, not perpendicular unit vectors, or a spacing that is not positive.

    Source: DICOM PS3.3 C.7.6.2.1.1, equation C.7.6.2.1-1.
    """
    along_row, along_column = np.array(orientation[:3], float), np.array(orientation[3:], float)
    numbers = np.array([*position, *orientation, *spacing], float)
    sound = len(numbers) == 11 and bool(np.isfinite(numbers).all()) and min(spacing) > 0
    if sound:
        products = along_row @ along_row, along_column @ along_column, along_row @ along_column
        sound = bool(np.allclose(products, (1, 1, 0), atol=1e-3))
    if not sound:
        raise UnusableImageError(Reason.LABEL_GEOMETRY)
    affine = np.zeros((4, 3))
    affine[:3, 0] = along_column * spacing[0]
    affine[:3, 1] = along_row * spacing[1]
    affine[:, 2] = [*position, 1.0]
    return np.asarray(_RAS_OF_LPS @ affine)


def place_frame(grid: Grid, affine: NDArray[np.float64], rows: int, columns: int) -> Placement:
    """Find where a frame's pixels lie on the grid.

    Args:
        grid: of the image.
        affine: of the frame, from `frame_affine`.
        rows: of the frame.
        columns: of the frame.

    Raises:
        UnusableImageError: the frame's pixels are not pixels of the grid.
    """
    exact = np.linalg.solve(grid.affine, affine)[:3]
    with np.errstate(invalid="ignore", over="ignore"):
        bounded = bool(np.isfinite(exact).all()) and bool((np.abs(exact) < 2**31).all())
    if not bounded:
        raise UnusableImageError(Reason.LABEL_GRID)
    nearest = np.rint(exact).astype(np.int64)
    corners = np.array([[0, 0, rows - 1, rows - 1], [0, columns - 1, 0, columns - 1], [1, 1, 1, 1]])
    apart = float(np.abs((exact - nearest) @ corners).max())
    axes = nearest[:, :2]
    # Two different axes of the grid, one step each: not stretched, not sheared, not between slices.
    steps = np.abs(axes)
    fits = bool((steps.sum(axis=0) == 1).all() and (steps.sum(axis=1) <= 1).all())
    if not fits or apart > TOLERANCE_PIXELS:
        raise UnusableImageError(Reason.LABEL_GRID)
    return Placement(axes, nearest[:, 2])


def mark(mask: NDArray[np.generic], places: NDArray[np.int64], value: int) -> None:
    """Set the pixels of a mask `(slices, rows, columns)` at `places` `(3, n)`.

    Raises:
        UnusableImageError: a place outside the grid; cutting it off would leave a part of the label.
    """
    limits = np.array(mask.shape)[:, None]
    if ((places < 0) | (places >= limits)).any():
        raise UnusableImageError(Reason.LABEL_GRID)
    mask[tuple(places)] = value


def empty_masks(num_segments: int, shape: Sequence[int]) -> NDArray[np.bool_]:
    """Empty masks `(segments, ...)`.

    Raises:
        UnusableImageError: beyond `MAX_MASK_BYTES`.
    """
    if num_segments * int(np.prod([int(side) for side in shape], dtype=object)) > MAX_MASK_BYTES:
        raise UnusableImageError(Reason.OVER_LIMIT)
    return np.zeros((num_segments, *shape), dtype=np.bool_)


def label_map(masks: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """One number a pixel, 0 for none and 1 to 255 for the segments in order, from masks `(segments, ...)`.

    Raises:
        UnusableImageError: two segments overlap, so that one number cannot say both, or more than 255.
    """
    if len(masks) > 255:
        raise UnusableImageError(Reason.OVER_LIMIT)
    labels = np.zeros(masks.shape[1:], dtype=np.uint8)
    for number, mask in enumerate(masks, start=1):
        if labels[mask].any():
            raise UnusableImageError(Reason.SEGMENTS_OVERLAP)
        labels[mask] = number
    return labels
