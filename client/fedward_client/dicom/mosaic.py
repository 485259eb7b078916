"""Unpack a Siemens mosaic: all slices of a volume as tiles of one image (hop 2).

ImagePositionPatient of such a file is that of no slice, and read as one image it is a picture of forty
small heads. A mosaic is unpacked only when its two private headers agree with the public ones on where
every slice lies; anonymised files, from which those are gone, are refused by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward_client.dicom.elements import Elements
from fedward_client.dicom.functional_groups import FrameFacts
from fedward_client.dicom.header import Header
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.siemens_csa import IMAGE_HEADER, SERIES_HEADER, protocol_centres, read_csa
from fedward_client.dicom.values import number_or_none

_MAX_DEVIATION_MM = 0.1
"""Between where the public header puts a slice and where the scan protocol wanted it."""

_MAX_TILES = 1024


@dataclass(frozen=True, eq=False)
class Mosaic:
    """How the slices lie in the stored image and in the patient.

    Args:
        num_tiles: slices; the last places of the image may be empty.
        tile_shape: rows and columns of each.
        positions: ImagePositionPatient of each slice, float64 `(slices, 3)`.
        orientations: ImageOrientationPatient of each, float64 `(slices, 6)`.
    """

    num_tiles: int
    tile_shape: tuple[int, int]
    positions: NDArray[np.float64] = field(repr=False)
    orientations: NDArray[np.float64] = field(repr=False)

    def tiles(self, stored: NDArray[Any]) -> NDArray[Any]:
        """Cut the stored `(rows, columns)` into `(slices, rows of a tile, columns of a tile)`."""
        rows, columns = self.tile_shape
        across = stored.shape[1] // columns
        grid = stored.reshape(across, rows, across, columns).swapaxes(1, 2)
        return grid.reshape(across * across, rows, columns)[: self.num_tiles]


def find_mosaic(elements: Elements, header: Header, facts: FrameFacts) -> Mosaic | None:
    """Recognise a mosaic and find out where its slices lie; None for any other image.

    Raises:
        UnusableImageError: a mosaic whose slices cannot be placed with certainty.
    """
    if header.is_grid:  # of a maker whose way of placing the slices is not known for certain
        raise UnusableImageError(Reason.MOSAIC)
    if "MOSAIC" not in header.image_type:
        return None
    try:
        return _placed(elements, header, facts)
    except (ValueError, KeyError, IndexError, ZeroDivisionError):
        raise UnusableImageError(Reason.MOSAIC) from None


def _placed(elements: Elements, header: Header, facts: FrameFacts) -> Mosaic:
    image_header, series_header = read_csa(elements, IMAGE_HEADER), read_csa(elements, SERIES_HEADER)
    num_tiles = int(image_header["NumberOfImagesInMosaic"][0])
    normal = np.array([float(part) for part in image_header["SliceNormalVector"]])
    centres = np.array(protocol_centres(series_header))
    step_mm = number_or_none(elements, "SpacingBetweenSlices")
    if (
        not 2 <= num_tiles <= _MAX_TILES
        or centres.shape != (num_tiles, 3)
        or normal.shape != (3,)
        or step_mm is None
        or facts.positions is None
        or facts.orientations is None
        or facts.spacings is None
        or facts.num_frames != 1
        or header.samples != 1
    ):
        raise ValueError
    across = math.isqrt(num_tiles - 1) + 1
    rows, columns = header.rows // across, header.columns // across
    if rows * across != header.rows or columns * across != header.columns:
        raise ValueError
    row_direction, column_direction = facts.orientations[0, :3], facts.orientations[0, 3:]
    row_mm, column_mm = facts.spacings[0]

    def towards_centre(num_rows: int, num_columns: int) -> NDArray[np.float64]:
        half: NDArray[np.float64] = (
            row_direction * column_mm * num_columns / 2 + column_direction * row_mm * num_rows / 2
        )
        return half

    # The header's position is that of a slice as large as the whole image around the first one's centre.
    first = facts.positions[0] + towards_centre(header.rows - rows, header.columns - columns)
    positions = first + np.arange(num_tiles)[:, None] * step_mm * normal
    deviations = np.linalg.norm(positions + towards_centre(rows, columns) - centres, axis=1)
    if not deviations.max() <= _MAX_DEVIATION_MM:
        raise ValueError
    orientations = np.repeat(facts.orientations, num_tiles, axis=0)
    return Mosaic(num_tiles, (rows, columns), positions, orientations)
