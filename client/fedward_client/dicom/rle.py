"""Decode RLE frames of single bits, which the installed decoders do not know.

A frame is one segment of packed bits (PS3.5 A.4.2 and annex G, BitsAllocated of 1 since 2024).
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from fedward_client.dicom.refusal import Reason, UnusableImageError

_HEADER_BYTES = 64


def decode_single_bits(frame: bytes, rows: int, columns: int) -> NDArray[np.uint8]:
    """Decode one frame to 0 and 1.

    Returns:
        uint8 `(rows, columns)`.

    Raises:
        UnusableImageError: not one segment, or one of another length than the frame.
    """
    num_pixels = rows * columns
    if len(frame) < _HEADER_BYTES or struct.unpack_from("<2I", frame) != (1, _HEADER_BYTES):
        raise UnusableImageError(Reason.CODESTREAM)
    packed = unpack_bits(frame[_HEADER_BYTES:], (num_pixels + 7) // 8)
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little", count=num_pixels)
    return bits.reshape(rows, columns)


def unpack_bits(segment: bytes, num_bytes: int) -> bytes:
    """Undo PackBits of one segment, never beyond `num_bytes`, whatever more it would yield.

    Raises:
        UnusableImageError: it yields fewer bytes.

    Source: DICOM PS3.5 G.3.
    """
    plain = bytearray()
    position = 0
    while len(plain) < num_bytes and position + 1 < len(segment):
        count = segment[position]
        if count < 128:
            plain += segment[position + 1 : position + 2 + count]
            position += 2 + count
        else:
            if count > 128:
                plain += segment[position + 1 : position + 2] * (257 - count)
            position += 2 if count > 128 else 1
    if len(plain) < num_bytes:
        raise UnusableImageError(Reason.TRUNCATED)
    return bytes(plain[:num_bytes])
