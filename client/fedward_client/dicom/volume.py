"""Put the decoded slices of one volume together, on a regular orthogonal grid (hop 2).

Where the acquired slices are such a grid, their values are copied and not one is changed. Tilted and
unequally spaced stacks are resampled by linear interpolation at the true positions; what lies outside
the acquired slices gets the volume's darkest value and nothing is extrapolated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedward_client.dicom.frames import Frames
from fedward_client.dicom.geometry import Points, Resampling
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.series import VolumeGeometry
from fedward_client.dicom.slice_facts import Content, SliceFacts

VOLUME_VERSION = 2
"""Part of the key of anything cached: it grows when the same files would give other values."""

Image = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Volume:
    """One volume in the patient.

    Attributes:
        values: float32 `(slices, rows, columns)` in modality units, not yet inverted.
        affine: `(4, 4)` float64: (slice, row, column, 1) to RAS mm; see `geometry.py`.
        units: of the values: "HU" ...
        inverted: low values are shown white.
        window: (centre, width) if the files give all slices the same one, and no table before it.
        voi_function: VOILUTFunction that goes with it.
        fill: value of voxels outside the acquired slices; None where there are none.
    """

    values: Image = field(repr=False)
    affine: Points = field(repr=False)
    units: str
    inverted: bool
    window: tuple[float, float] | None
    voi_function: str
    fill: float | None


def assemble(geometry: VolumeGeometry, frames_by_content: Mapping[Content, Frames]) -> Volume:
    """Put a volume together.

    Args:
        geometry: from `group_series`.
        frames_by_content: decoded files, at least those that `geometry` names. Slices are asked for once
            and in order, so a mapping that decodes when it is asked never holds the whole series.

    Raises:
        UnusableImageError: the pixels contradict the header, slices differ in units or inversion, they
            are in colour, or alleged copies have different pixels.
    """
    for kept, copy in geometry.copies:
        one, other = (_pixels(each, frames_by_content[each.content]) for each in (kept, copy))
        if not np.array_equal(one, other, equal_nan=True):
            raise UnusableImageError(Reason.REPEATED_POSITION)
    acquired = _Acquired(geometry, frames_by_content)
    values, fill = np.empty(geometry.shape, np.float32), None
    if geometry.grid.resampling is None:
        for number in range(len(values)):
            values[number] = acquired.values(number)
    else:
        for number, image in enumerate(_resampled(geometry.grid.resampling, acquired, geometry.shape[1:])):
            values[number] = image
        fill = acquired.highest if any(inverted for _, inverted in acquired.meanings) else acquired.lowest
        if not np.isfinite(fill):
            raise UnusableImageError(Reason.DISPLAY_VALUES)
        np.copyto(values, np.float32(fill), where=np.isnan(values))
    if len(acquired.meanings) > 1:
        raise UnusableImageError(Reason.DISPLAY_VALUES)
    (units, inverted), *_ = acquired.meanings
    window, function = acquired.windows.pop() if len(acquired.windows) == 1 else (None, "LINEAR")
    return Volume(values, geometry.affine, units, inverted, window, function, fill)


class _Acquired:
    """The slices of a volume, each decoded once when they are asked for in order; two are kept."""

    def __init__(self, geometry: VolumeGeometry, frames_by_content: Mapping[Content, Frames]) -> None:
        self._slices = geometry.slices
        self._frames = frames_by_content
        self._held: dict[int, Image] = {}
        self.meanings: set[tuple[str, bool]] = set()
        self.windows: set[tuple[tuple[float, float] | None, str]] = set()
        self.lowest, self.highest = np.inf, -np.inf

    def values(self, number: int) -> Image:
        if number not in self._held:
            each = self._slices[number]
            frames = self._frames[each.content]
            image = _pixels(each, frames)
            self._held = {before: held for before, held in self._held.items() if before == number - 1}
            self._held[number] = image
            self.meanings.add((frames.units, frames.inverted))
            windows = frames.windows if frames.voi_lut is None else None
            window = None if windows is None else windows[each.frame_index]
            self.windows.add((window, frames.voi_functions[each.frame_index]))
            self.lowest = min(self.lowest, float(image.min()))
            self.highest = max(self.highest, float(image.max()))
        return self._held[number]


def _pixels(each: SliceFacts, frames: Frames) -> Image:
    if frames.values.ndim != 3:
        raise UnusableImageError(Reason.COLOUR)
    if each.frame_index >= len(frames.values) or frames.values.shape[1:] != (each.rows, each.columns):
        raise UnusableImageError(Reason.DIMENSIONS)
    image: Image = frames.values[each.frame_index].astype(np.float32, copy=False)
    return image


def _resampled(resampling: Resampling, acquired: _Acquired, size: tuple[int, ...]) -> Iterator[Image]:
    """Slices of the grid in order, NaN outside the acquired ones."""
    for lower, weight, offset in zip(
        resampling.lower.tolist(), resampling.upper_weight.tolist(), resampling.offsets, strict=True
    ):
        image = acquired.values(lower)
        if weight:
            image = image + np.float32(weight) * (acquired.values(lower + 1) - image)
        yield _moved(image, offset, size)


def _moved(image: Image, offset: Points, size: tuple[int, ...]) -> Image:
    """Values of one slice at the pixels of the grid, whose first lies at `offset` (row, column).

    Less than one pixel beyond the last centre, the line through the last two is continued: so an
    acquired pixel at the edge is found again by interpolation. Nothing further out is made up.
    """
    from scipy import ndimage

    whole = np.round(offset)
    between = np.abs(offset - whole) > 1e-6
    border = between.astype(np.int64)
    image = np.pad(image, [(each, each) for each in border.tolist()], mode="reflect", reflect_type="odd")
    start = np.where(between, offset, whole) + border
    moved: Image = ndimage.affine_transform(
        image, (1, 1), offset=start, output_shape=size, order=1, mode="constant", cval=np.nan
    )
    return moved
