"""Decode a file to the values it stores, before any look-up: what a safe copy keeps or blackens (hop 2).

A copy has to hold the original's very numbers, so neither rescale nor window nor palette is applied here;
colour comes out as RGB. Compressed files are decoded in the sandbox, which asks for this as "stored".
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedward_client.dicom.frames import Allocate
from fedward_client.dicom.header import MAX_PIXEL_BYTES, header_of, pixel_refusal_of
from fedward_client.dicom.parser import contained, parse_file
from fedward_client.dicom.pixels import reach_pixels, stored_frames
from fedward_client.dicom.refusal import Reason, UnusableImageError


def decode_stored(
    data: bytes, *, max_pixel_bytes: int = MAX_PIXEL_BYTES, allocate: Allocate = np.empty
) -> NDArray[np.integer]:
    """Decode all frames of one file held in memory.

    Args:
        data: the file.
        max_pixel_bytes: of all frames together, as the header announces them.
        allocate: where the values go; the sandbox puts them into shared memory.

    Returns:
        `(frames, rows, columns)`, in colour with a last axis of 3; bits above BitsStored are clear.

    Raises:
        UnusableImageError: not decodable, or pixels that are no whole bytes or no integers.
    """
    with contained(Reason.DECODE_FAILED):
        parsed = parse_file(data)
        header = header_of(parsed)
        refusal = pixel_refusal_of(header, max_pixel_bytes)
        if refusal is not None:
            raise refusal
        if header.pixel_kind != "integer" or header.bits_allocated < 8:
            raise UnusableImageError(Reason.PIXEL_FORMAT)
        frames = stored_frames(reach_pixels(parsed, header, data), header)
        colour = () if header.samples == 1 else (3,)
        shape = (header.num_frames, header.rows, header.columns, *colour)
        values: NDArray[np.integer] = allocate(
            shape, np.dtype(f"{'ui'[header.signed]}{header.bits_allocated // 8}")
        )
        for value, frame in zip(values, frames, strict=True):
            value[...] = frame
        return values
