"""Get the stored values of each frame: check it, then decode it with the one decoder of its syntax.

Every frame's own dimensions are compared with the header before its decoder runs, and a frame that
would grow a thousandfold is not decoded at all. Uncompressed grey frames are views of the file;
everything else goes through pydicom, whose corrections (signs, unused bits, colour) are kept.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import uid
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder

from fedward_client.dicom.behind_pixels import MAX_BEHIND_BYTES
from fedward_client.dicom.codestream import FrameSize, frame_size, mixes_colours
from fedward_client.dicom.elements import UNDEFINED_LENGTH
from fedward_client.dicom.fragments import coded_frames
from fedward_client.dicom.header import MAX_FRAMES, Header
from fedward_client.dicom.parser import ParsedFile, inflate, parse_file
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.rle import decode_single_bits
from fedward_client.dicom.syntaxes import (
    DEFLATED_IMAGE_FRAME,
    ENCAPSULATED_UNCOMPRESSED,
    LOSSY_SYNTAXES,
    PLUGIN_OF_SYNTAX,
    WITHOUT_PLUGIN,
)
from fedward_client.dicom.values import raw_value

Stored = NDArray[Any]

MAX_EXPANSION = 1000
"""Bytes of an uncompressed frame for each compressed byte; only blank frames come near it."""

_MAY_EXPAND_TO = 4 * 2**20  # a blank frame of usual size does no harm

_RLE_SPARE = 1024
"""Run lengths at their worst double a picture; the rest is their header and padding."""

_MAX_FRAGMENTS = 4 * MAX_FRAMES

# Coding processes that a syntax may hold; a progressive JPEG, say, can be made to decode for hours.
# RLE does not say how large its picture is; its decoder takes all that the segments expand to.
_JPEG2000 = (0x51,)
_JPEG2000_SYNTAXES = (
    *(uid.JPEG2000Lossless, uid.JPEG2000),
    *(uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K),
)
_MARKERS: dict[str, tuple[int, ...]] = {
    uid.JPEGBaseline8Bit: (0xC0, 0xC1),
    uid.JPEGExtended12Bit: (0xC0, 0xC1),
    uid.JPEGLossless: (0xC3,),
    uid.JPEGLosslessSV1: (0xC3,),
    uid.JPEGLSLossless: (0xF7,),
    uid.JPEGLSNearLossless: (0xF7,),
    **dict.fromkeys(_JPEG2000_SYNTAXES, _JPEG2000),
}


def reach_pixels(parsed: ParsedFile, header: Header, data: bytes) -> ParsedFile:
    """Inflate as far as the pixels, whose size is known by now; other files are returned as they are.

    Raises:
        UnusableImageError: fewer pixels than the header announces, or more behind them than can be looked at.
    """
    if parsed.pixel_bytes_left is not None:
        return parsed
    needed = parsed.pixel_start + header.num_native_bytes
    whole = parsed
    if not parsed.seen_to_end:
        whole = parse_file(data, max_inflated=needed + MAX_BEHIND_BYTES)
        if not whole.seen_to_end:
            raise UnusableImageError(Reason.DEFLATED)
        if any(tag not in parsed.elements.places for tag in whole.elements.places if tag >> 16 & 1):
            raise UnusableImageError(Reason.BEHIND_PIXELS)  # the gate has not counted them
    if len(whole.body) < needed or whole.pixel_length < header.num_native_bytes:
        raise UnusableImageError(Reason.TRUNCATED)
    return whole


def stored_frames(parsed: ParsedFile, header: Header) -> Iterator[Stored]:
    """Check all frames, then yield each one's stored values; call and iterate inside `contained`.

    Args:
        parsed: with its pixels within reach, see `reach_pixels`.
        header: of the same file, not refused.

    Yields:
        `(rows, columns)` grey or palette indices, or `(rows, columns, 3)` RGB.

    Raises:
        UnusableImageError: a frame is missing, contradicts the header, or cannot be decoded.
    """
    if header.transfer_syntax not in PLUGIN_OF_SYNTAX:
        return _native_grey(parsed, header) if header.samples == 1 else _native_colour(parsed, header)
    frames = _compressed_frames(parsed, header)
    for frame in frames:
        _check_size(frame, header)
    return (_checked(_decoded(frame, header), header) for frame in frames)


def _native_grey(parsed: ParsedFile, header: Header) -> Iterator[Stored]:
    shape = (header.rows, header.columns)
    num_pixels = header.rows * header.columns
    if parsed.pixel_length == UNDEFINED_LENGTH:
        raise UnusableImageError(Reason.MALFORMED)
    if header.bits_allocated == 1:
        yield from _single_bits(parsed, header)
        return
    stored_type = _stored_type(header, parsed.elements.encoding.little)
    swapped = stored_type.itemsize == 1 and parsed.pixel_vr == b"OW" and not parsed.elements.encoding.little
    for frame in range(header.num_frames):
        start = parsed.pixel_start + frame * num_pixels * stored_type.itemsize
        if swapped:  # bytes in words of the other order: two by two, across frames
            values = _swapped_bytes(parsed, frame * num_pixels, num_pixels)
            stored: Stored = values.view(stored_type).reshape(shape)
        else:
            stored = np.frombuffer(parsed.body, stored_type, num_pixels, start).reshape(shape)
        yield _without_unused_bits(stored, header)


def _stored_type(header: Header, little: bool) -> np.dtype[Any]:
    kind = "f" if header.pixel_kind != "integer" else "ui"[header.signed]
    return np.dtype(f"{'<' if little else '>'}{kind}{header.bits_allocated // 8}")


def _swapped_bytes(parsed: ParsedFile, first: int, count: int) -> NDArray[np.uint8]:
    places = parsed.pixel_start + (np.arange(first, first + count) ^ 1)
    found: NDArray[np.uint8] = np.frombuffer(parsed.body, np.uint8)[places]
    return found


def _single_bits(parsed: ParsedFile, header: Header) -> Iterator[Stored]:
    """Unpack frames of single bits, which follow each other without a gap (PS3.5 8.1.1)."""
    num_pixels = header.rows * header.columns
    if parsed.pixel_vr == b"OW" and not parsed.elements.encoding.little:
        body = _swapped_bytes(parsed, 0, min(header.num_pixel_bytes, parsed.pixel_length // 2 * 2))
    else:
        body = np.frombuffer(parsed.body, np.uint8, header.num_pixel_bytes, parsed.pixel_start)
    for frame in range(header.num_frames):
        first = frame * num_pixels
        packed = body[first // 8 : (first + num_pixels + 7) // 8]
        bits = np.unpackbits(packed, bitorder="little")
        yield bits[first % 8 : first % 8 + num_pixels].reshape(header.rows, header.columns)


def _without_unused_bits(stored: Stored, header: Header) -> Stored:
    """Clear bits above BitsStored, where old devices kept overlays; extend the sign into them."""
    unused = 8 * stored.dtype.itemsize - header.bits_stored
    if header.pixel_kind != "integer" or unused <= 0:
        return stored
    highest = 2 ** (header.bits_stored - header.signed) - 1
    if stored.max() <= highest and (not header.signed or stored.min() >= -highest - 1):
        return stored
    shifted: Stored = np.right_shift(np.left_shift(stored, unused), unused)
    return shifted


def _native_colour(parsed: ParsedFile, header: Header) -> Iterator[Stored]:
    per_frame = header.num_native_bytes // header.num_frames
    for frame in range(header.num_frames):
        start = parsed.pixel_start + frame * per_frame
        pixels = parsed.body[start : start + per_frame + per_frame % 2]
        yield _checked(_with_pydicom(pixels, header, parsed.pixel_vr), header)


def _compressed_frames(parsed: ParsedFile, header: Header) -> list[bytes]:
    end = None if parsed.pixel_length == UNDEFINED_LENGTH else parsed.pixel_start + parsed.pixel_length
    return coded_frames(
        parsed.body[parsed.pixel_start : end],
        header.num_frames,
        delimited=end is None,
        max_fragments=_MAX_FRAGMENTS,
        extended_offsets=raw_value(parsed.elements, "ExtendedOffsetTable") or b"",
    )


def _check_size(frame: bytes, header: Header) -> None:
    """Compare what a frame asks for with what the header announces, before a decoder sees it."""
    num_bytes = header.num_pixel_bytes // header.num_frames
    if num_bytes > _MAY_EXPAND_TO and num_bytes > MAX_EXPANSION * len(frame):
        raise UnusableImageError(Reason.OVER_LIMIT)
    if header.transfer_syntax == uid.RLELossless and len(frame) > 2 * num_bytes + _RLE_SPARE:
        raise UnusableImageError(Reason.CODESTREAM)
    markers = _MARKERS.get(header.transfer_syntax, ())
    if markers:
        expected = [FrameSize(header.rows, header.columns, header.samples, each) for each in markers]
        if frame_size(frame) not in expected:
            raise UnusableImageError(Reason.CODESTREAM)


def _decoded(frame: bytes, header: Header) -> Stored:
    """Decode one frame; what was compressed without loss has its unused bits as an uncompressed one has.

    Lossy coding may overshoot what BitsStored can hold. Such a value stays: without its upper bits it would
    turn from the brightest to the darkest.
    """
    stored = _decode(frame, header)
    lossy = header.transfer_syntax in LOSSY_SYNTAXES
    return stored if lossy else _without_unused_bits(stored, header)


def _decode(frame: bytes, header: Header) -> Stored:
    if header.transfer_syntax == DEFLATED_IMAGE_FRAME:
        return _inflated(frame, header)
    if header.transfer_syntax == ENCAPSULATED_UNCOMPRESSED:
        return _plain(frame, header)
    if header.transfer_syntax == uid.JPEGExtended12Bit:
        return _extended_jpeg(frame, header)
    if header.bits_allocated == 1 and header.transfer_syntax == uid.RLELossless:
        return decode_single_bits(frame, header.rows, header.columns)
    photometric = header.photometric
    # Archives that compress anew leave the label of the former encoding.
    if photometric.startswith("YBR_FULL") and _is_transformed(frame, header):
        photometric = "YBR_RCT"
    return _with_pydicom(encapsulate([frame]), header, b"OB", photometric=photometric)


def _is_transformed(frame: bytes, header: Header) -> bool:
    return header.transfer_syntax in _JPEG2000_SYNTAXES and mixes_colours(frame)


def _with_pydicom(pixels: bytes, header: Header, vr: bytes, *, photometric: str = "") -> Stored:
    options: dict[str, Any] = {
        "rows": header.rows,
        "columns": header.columns,
        "number_of_frames": 1,
        "samples_per_pixel": header.samples,
        "photometric_interpretation": photometric or header.photometric,
        "planar_configuration": header.planar,
        "pixel_representation": header.signed,
        "bits_allocated": header.bits_allocated,
        "bits_stored": header.bits_stored,
        "pixel_keyword": "PixelData",
        "pixel_vr": (vr or b"OW").decode("ascii"),
        "allow_excess_frames": False,
    }
    plugin = PLUGIN_OF_SYNTAX.get(header.transfer_syntax, "")
    plain = plugin in WITHOUT_PLUGIN
    decoder = get_decoder(uid.ExplicitVRLittleEndian if plain else uid.UID(header.transfer_syntax))
    stored: Stored = decoder.as_array(pixels, decoding_plugin="" if plain else plugin, **options)[0]
    return stored


def _extended_jpeg(frame: bytes, header: Header) -> Stored:
    """Decode 8 or 12 bits a sample; no plugin of pydicom under a permissive licence does 12."""
    from imagecodecs import jpeg_decode

    decoded: Stored = jpeg_decode(frame)
    if header.signed:
        unused = 8 * decoded.dtype.itemsize - header.bits_stored
        signed = decoded.view(np.dtype(f"i{decoded.dtype.itemsize}"))
        decoded = np.right_shift(np.left_shift(signed, unused), unused)
    return decoded


def _inflated(frame: bytes, header: Header) -> Stored:
    """Inflate one frame of Deflated Image Frame Compression (PS3.5 A.4.13)."""
    try:
        pixels, _ = inflate(frame, _num_plain_bytes(header))
    except zlib.error:
        raise UnusableImageError(Reason.CODESTREAM) from None
    return _plain(pixels, header)


def _plain(pixels: bytes, header: Header) -> Stored:
    """One frame that a fragment holds uncompressed, little-endian; it begins at a byte."""
    if len(pixels) < _num_plain_bytes(header):
        raise UnusableImageError(Reason.TRUNCATED)
    num_pixels = header.rows * header.columns
    if header.bits_allocated == 1:
        bits = np.unpackbits(np.frombuffer(pixels, np.uint8), bitorder="little", count=num_pixels)
        return bits.reshape(header.rows, header.columns)
    if header.samples != 1:
        return _with_pydicom(pixels, header, b"OW" if header.bits_allocated > 8 else b"OB")
    stored = np.frombuffer(pixels, _stored_type(header, little=True), num_pixels)
    return stored.reshape(header.rows, header.columns)


def _num_plain_bytes(header: Header) -> int:
    num_bits = header.rows * header.columns * header.samples * header.bits_allocated
    num_bytes = (num_bits + 7) // 8
    return num_bytes // 3 * 2 if header.photometric == "YBR_FULL_422" else num_bytes


def _checked(stored: Stored, header: Header) -> Stored:
    shape = (header.rows, header.columns) if header.samples == 1 else (header.rows, header.columns, 3)
    if stored.shape != shape or 8 * stored.dtype.itemsize > max(8, header.bits_allocated):
        raise UnusableImageError(Reason.DECODE_FAILED)
    return stored
