"""Decode single frames of a segmentation (hop 3): one bit, a byte or two a pixel, native or compressed.

Binary frames of an uncompressed object follow one another bit by bit, so a frame may begin in the
middle of a byte. A frame is decoded when it is asked for and never holds more than the header's rows
times columns. Lossy syntaxes are refused: a label that was changed by a compressor is another label.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import uid

from fedward_client.dicom.codestream import frame_size
from fedward_client.dicom.elements import UNDEFINED_LENGTH
from fedward_client.dicom.fragments import MAX_ITEMS, coded_frames
from fedward_client.dicom.parser import ParsedFile, inflate
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.rle import unpack_bits
from fedward_client.dicom.syntaxes import (
    DEFLATED_IMAGE_FRAME,
    ENCAPSULATED_UNCOMPRESSED,
    NATIVE_SYNTAXES,
)
from fedward_client.dicom.values import raw_value

MAX_FRAME_PIXELS = 2**26

Stored = NDArray[np.uint8] | NDArray[np.uint16]

_RLE_HEADER = struct.Struct("<16L")
_JPEG_MARKERS: dict[str, int] = {
    uid.JPEGLSLossless: 0xF7,
    uid.JPEG2000Lossless: 0x51,
    uid.HTJ2KLossless: 0x51,
    uid.HTJ2KLosslessRPCL: 0x51,
}


@dataclass(frozen=True)
class SegmentationPixels:
    """All frames of one object, as stored.

    Args:
        rows: of each frame.
        columns: of each frame.
        bits: allocated for a pixel: 1, 8 or 16.
        num_frames: as the header says; so many are there.
        frames: the function that decodes frame `index`, from 0, to `(rows, columns)`.
    """

    rows: int
    columns: int
    bits: int
    num_frames: int
    frames: Callable[[int], Stored] = field(repr=False)


def open_pixels(
    parsed: ParsedFile, rows: int, columns: int, bits: int, num_frames: int
) -> SegmentationPixels:
    """Check that the frames are there, and return what decodes them; call it inside `contained`.

    Raises:
        UnusableImageError: sizes out of bounds, fewer pixels than the header says, or a syntax that is
            not permitted.
    """
    if rows < 1 or columns < 1 or rows * columns > MAX_FRAME_PIXELS:
        raise UnusableImageError(Reason.DIMENSIONS)
    if bits not in (1, 8, 16):
        raise UnusableImageError(Reason.PIXEL_FORMAT)
    if parsed.pixel_tag is None:
        raise UnusableImageError(Reason.NO_PIXELS)
    if parsed.syntax in NATIVE_SYNTAXES:
        frames = _native_frames(parsed, rows, columns, bits, num_frames)
    else:
        frames = _compressed_frames(parsed, rows, columns, bits, num_frames)
    return SegmentationPixels(rows, columns, bits, num_frames, frames)


def _native_frames(
    parsed: ParsedFile, rows: int, columns: int, bits: int, num_frames: int
) -> Callable[[int], Stored]:
    size = rows * columns
    stored = memoryview(parsed.body)[parsed.pixel_start : parsed.pixel_start + parsed.pixel_length]
    if parsed.pixel_length == UNDEFINED_LENGTH or len(stored) * 8 < size * bits * num_frames:
        raise UnusableImageError(Reason.TRUNCATED)
    big = not parsed.elements.encoding.little
    if big and bits < 16 and parsed.pixel_vr == b"OW":  # words of two bytes, the first byte last (PS3.5 8.2)
        words = np.frombuffer(stored[: len(stored) // 2 * 2], dtype=np.uint16)
        stored = memoryview(words.byteswap().tobytes())

    def binary(index: int) -> NDArray[np.uint8]:
        first = index * size
        packed = np.frombuffer(stored[first // 8 : -(-(first + size) // 8)], dtype=np.uint8)
        return _unpack(packed, first % 8, rows, columns)

    def whole(index: int) -> Stored:
        kind = np.dtype(np.uint8 if bits == 8 else ">u2" if big else "<u2")
        start = index * size * kind.itemsize
        values = np.frombuffer(stored[start : start + size * kind.itemsize], dtype=kind)
        return _stored(values, bits).reshape(rows, columns)

    return binary if bits == 1 else whole


def _compressed_frames(
    parsed: ParsedFile, rows: int, columns: int, bits: int, num_frames: int
) -> Callable[[int], Stored]:
    decode = _DECODERS.get(parsed.syntax)
    if decode is None:
        name = str(uid.UID(parsed.syntax).name)
        raise UnusableImageError(Reason.TRANSFER_SYNTAX, "" if name == parsed.syntax else name)
    if parsed.pixel_length != UNDEFINED_LENGTH:
        raise UnusableImageError(Reason.MALFORMED)
    coded = coded_frames(
        parsed.body[parsed.pixel_start :],
        num_frames,
        delimited=True,
        max_fragments=MAX_ITEMS,
        extended_offsets=raw_value(parsed.elements, "ExtendedOffsetTable") or b"",
    )

    def frame(index: int) -> Stored:
        return decode(coded[index], rows, columns, bits)

    return frame


def _unpack(packed: NDArray[np.uint8], skipped_bits: int, rows: int, columns: int) -> NDArray[np.uint8]:
    """Take a frame out of bits, the lowest bit of a byte first (PS3.5 8.1.1)."""
    size = rows * columns
    bits = np.unpackbits(packed, bitorder="little")[skipped_bits : skipped_bits + size]
    return bits.reshape(rows, columns)


def _from_bytes(plain: bytes, rows: int, columns: int, bits: int) -> Stored:
    num_bytes = -(-rows * columns * bits // 8)
    if len(plain) < num_bytes:
        raise UnusableImageError(Reason.TRUNCATED)
    if bits == 1:
        return _unpack(np.frombuffer(plain, np.uint8), 0, rows, columns)
    kind = np.dtype("<u2" if bits == 16 else np.uint8)
    return _stored(np.frombuffer(plain[:num_bytes], dtype=kind), bits).reshape(rows, columns)


def _stored(values: NDArray[Any], bits: int) -> Stored:
    return values.astype(np.uint16) if bits == 16 else values.astype(np.uint8)


def _deflated(coded: bytes, rows: int, columns: int, bits: int) -> Stored:
    plain, _ = inflate(coded, -(-rows * columns * bits // 8))
    return _from_bytes(plain, rows, columns, bits)


def _rle(coded: bytes, rows: int, columns: int, bits: int) -> Stored:
    """Decode RLE, whose segments are the byte planes, highest first; one bit a pixel stays packed.

    Source: DICOM PS3.5 G.
    """
    num_segments, *offsets = _RLE_HEADER.unpack_from(coded)
    if num_segments != max(1, bits // 8):
        raise UnusableImageError(Reason.CODESTREAM)
    num_bytes = -(-rows * columns // 8) if bits == 1 else rows * columns
    ends = [*offsets[1:num_segments], len(coded)]
    planes = [unpack_bits(coded[start:end], num_bytes) for start, end in zip(offsets, ends, strict=False)]
    if bits < 16:
        return _from_bytes(planes[0], rows, columns, bits)
    high, low = (np.frombuffer(plane, np.uint8).astype(np.uint16) for plane in planes)
    return _stored(high << 8 | low, bits).reshape(rows, columns)


def _codestream(marker: int) -> Callable[[bytes, int, int, int], Stored]:
    def decode(coded: bytes, rows: int, columns: int, bits: int) -> Stored:
        size = frame_size(coded)  # before the decoder, which allocates what the codestream asks for
        if (size.rows, size.columns, size.components, size.marker) != (rows, columns, 1, marker):
            raise UnusableImageError(Reason.CODESTREAM)
        values = np.asarray(_decode_jpeg_ls(coded) if marker == 0xF7 else _decode_jpeg_2000(coded))
        if values.shape != (rows, columns) or values.dtype.itemsize * 8 > max(8, bits):
            raise UnusableImageError(Reason.CODESTREAM)
        return _stored(values, bits)

    return decode


def _decode_jpeg_2000(coded: bytes) -> object:
    from openjpeg import decode  # type: ignore[attr-defined]

    return decode(coded)


def _decode_jpeg_ls(coded: bytes) -> object:
    from jpeg_ls import jlsread  # type: ignore[import-untyped]

    return jlsread(io.BytesIO(coded))


_DECODERS: dict[str, Callable[[bytes, int, int, int], Stored]] = {
    uid.RLELossless: _rle,
    DEFLATED_IMAGE_FRAME: _deflated,
    ENCAPSULATED_UNCOMPRESSED: _from_bytes,
    **{syntax: _codestream(marker) for syntax, marker in _JPEG_MARKERS.items()},
}
