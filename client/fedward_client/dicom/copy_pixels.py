"""The pixels of a safe copy: taken over byte by byte, or blackened where the gate says so; then proven.

Only two things ever change pixels: a mask, and bits above BitsStored that may hold an overlay. Both
need the stored values, so such a copy is written uncompressed. Bytes behind the last pixel are cut off, and
comments inside compressed pictures blanked where they stand; compressed data that holds anything else beside
the picture is decoded and written uncompressed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ExplicitVRLittleEndian

from fedward_client.dicom.codestream_texts import without_texts
from fedward_client.dicom.gate import GateVerdict, mask
from fedward_client.dicom.header import Header, header_of
from fedward_client.dicom.parser import ParsedFile, parse_file
from fedward_client.dicom.pixels import reach_pixels
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.stored_pixels import decode_stored
from fedward_client.dicom.syntaxes import (
    DEFLATED_IMAGE_FRAME,
    ENCAPSULATED_UNCOMPRESSED,
    NATIVE_SYNTAXES,
    is_permitted,
)

PixelChange = Literal["none", "identical", "trimmed", "blanked", "decoded", "cleared", "masked"]
"""No pixels; the same bytes; the same without bytes behind the last pixel; compressed, with comments blanked;
decoded; unused bits cleared; masked."""

Decoder = Callable[[], NDArray[np.integer]]
"""Decodes the source as `decode_stored` does, where a decoder may do no harm."""

PIXEL_KEYWORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")


class PutPixels(NamedTuple):
    """What became of the pixels.

    Attributes:
        change: what was done.
        syntax: transfer syntax that the copy must be written in.
        originals: stored values of the source, where they had to be decoded.
        value: of the compressed pixel data in the copy.
    """

    change: PixelChange
    syntax: str
    originals: NDArray[np.integer] | None = None
    value: bytes = b""


def put_pixels(
    copy: Dataset, parsed: ParsedFile, data: bytes, verdict: GateVerdict, decode: Decoder | None = None
) -> PutPixels:
    """Bring the copy's pixels into the state that the gate asks for; call it inside `contained`.

    Args:
        copy: with the source's own pixel data, if it has any.
        parsed: the source file.
        data: its bytes.
        verdict: of the gate.
        decode: for compressed sources; None decodes in this process.

    Raises:
        UnusableImageError: fewer pixels than announced, or pixels to be changed that cannot be decoded.
    """
    syntax = _syntax_of_copy(parsed)
    keyword = next((name for name in PIXEL_KEYWORDS if name in copy), None)
    if keyword is None:
        return PutPixels("none", syntax)
    if not is_permitted(parsed.syntax):  # videos carry sound
        raise UnusableImageError(Reason.TRANSFER_SYNTAX)
    header = header_of(parsed)
    native = parsed.syntax in NATIVE_SYNTAXES
    masks = verdict.decision == "mask"
    clears = verdict.clear_unused_bits or _has_unused_bits_set(parsed, header, data)
    value = None if native or masks or clears else without_texts(parsed, header.num_frames)
    if masks or clears or not (native or value):
        originals = decode_stored(data) if decode is None or native else decode()
        _replace_pixels(copy, parsed, header, _masked(originals, header, verdict) if masks else originals)
        plain = syntax if native else str(ExplicitVRLittleEndian)
        return PutPixels("masked" if masks else "cleared" if clears else "decoded", plain, originals)
    if value:
        copy[keyword].value = value
        as_it_was = parsed.body[parsed.pixel_start : parsed.pixel_start + len(value)]
        return PutPixels("identical" if value == as_it_was else "blanked", syntax, value=value)
    num_bytes = header.num_native_bytes
    if len(copy[keyword].value) < num_bytes:
        raise UnusableImageError(Reason.TRUNCATED)
    num_bytes += num_bytes % 2
    if len(copy[keyword].value) > num_bytes:
        copy[keyword].value = copy[keyword].value[:num_bytes]
        return PutPixels("trimmed", syntax)
    return PutPixels("identical", syntax)


def prove_pixels(written: bytes, source: Dataset, data: bytes, put: PutPixels, verdict: GateVerdict) -> None:
    """Compare the pixels in the bytes of the copy with those of its source; call it inside `contained`.

    Args:
        written: the encoded copy.
        source: dataset of the source.
        data: bytes of the source.
        put: what `put_pixels` did.
        verdict: of the gate.

    Raises:
        UnusableImageError: they are not what they must be.
    """
    parsed = parse_file(written)
    if put.change == "none":
        equal = parsed.pixel_tag is None
    elif put.originals is not None:
        equal = _changed_as_told(decode_stored(written), put.originals, verdict)
    elif put.value:
        end = parsed.pixel_start + len(put.value)
        equal = parsed.body[parsed.pixel_start : end] == put.value and _described_alike(parsed, data)
    else:
        equal = _holds_same_bytes(parsed, source, data, trimmed=put.change == "trimmed")
    if not equal:
        raise UnusableImageError(Reason.PIXELS_CHANGED)


def _holds_same_bytes(parsed: ParsedFile, source: Dataset, data: bytes, *, trimmed: bool) -> bool:
    keyword = next(name for name in PIXEL_KEYWORDS if name in source)
    original = source[keyword].value
    start = parsed.pixel_start
    end = start + parsed.pixel_length
    same = parsed.body[start:end] == original[: end - start]
    complete = trimmed or end - start == len(original)
    return same and complete and _described_alike(parsed, data)


def _syntax_of_copy(parsed: ParsedFile) -> str:
    """The source's own; a deflated file is written plainly, so that its bytes can be searched.

    Raises:
        UnusableImageError: nothing here can write that syntax.
    """
    if parsed.syntax in (DEFLATED_IMAGE_FRAME, ENCAPSULATED_UNCOMPRESSED):
        raise UnusableImageError(Reason.TRANSFER_SYNTAX)
    return str(ExplicitVRLittleEndian) if parsed.syntax == DeflatedExplicitVRLittleEndian else parsed.syntax


def _has_unused_bits_set(parsed: ParsedFile, header: Header, data: bytes) -> bool:
    """Whether uncompressed pixels hold anything above BitsStored but the sign."""
    unused = header.bits_allocated - header.bits_stored
    if parsed.syntax not in NATIVE_SYNTAXES or not unused or header.pixel_kind != "integer":
        return False
    if header.bits_allocated not in (8, 16, 32):
        return False
    reached = reach_pixels(parsed, header, data)
    order = "<" if parsed.elements.encoding.little else ">"
    kind = "i" if header.signed else "u"
    count = min(header.num_native_bytes, len(reached.body) - reached.pixel_start)
    width = header.bits_allocated // 8
    stored = np.frombuffer(reached.body, f"{order}{kind}{width}", count // width, reached.pixel_start)
    return bool((np.right_shift(np.left_shift(stored, unused), unused) != stored).any())


def _replace_pixels(copy: Dataset, parsed: ParsedFile, header: Header, frames: NDArray[np.integer]) -> None:
    big = parsed.syntax == ExplicitVRBigEndian
    pixels = frames.astype(frames.dtype.newbyteorder(">" if big else "<")).tobytes()
    for keyword in (*PIXEL_KEYWORDS, "ExtendedOffsetTable", "ExtendedOffsetTableLengths"):
        if keyword in copy:
            del copy[keyword]
    copy.BitsAllocated = 8 * frames.dtype.itemsize
    if header.samples == 3:
        copy.PhotometricInterpretation, copy.PlanarConfiguration = "RGB", 0
    copy.add_new(
        "PixelData", "OB" if frames.dtype.itemsize == 1 else "OW", pixels + b"\0" * (len(pixels) % 2)
    )


def _masked(frames: NDArray[np.integer], header: Header, verdict: GateVerdict) -> NDArray[np.integer]:
    masked: NDArray[np.integer] = mask(
        frames, verdict.regions, inverted=header.photometric == "MONOCHROME1", colour=header.samples == 3
    )
    return masked


def _described_alike(parsed: ParsedFile, data: bytes) -> bool:
    """Whether the copy describes its pixels as the source does, element by element."""
    ours, theirs = header_of(parsed), header_of(parse_file(data))
    names = (
        *("rows", "columns", "samples", "num_frames", "bits_allocated", "bits_stored", "high_bit", "signed"),
        *("photometric", "planar", "pixel_kind"),
    )
    return all(getattr(ours, name) == getattr(theirs, name) for name in names)


def _changed_as_told(
    copies: NDArray[np.integer], originals: NDArray[np.integer], verdict: GateVerdict
) -> bool:
    """Equal where the picture stays, one value everywhere else."""
    if copies.shape != originals.shape or not verdict.regions:
        return copies.shape == originals.shape and bool((copies == originals).all())
    is_colour = copies.ndim == 4
    stays = np.zeros(copies.shape[1:3], dtype=bool)
    for box in verdict.regions:
        stays[box.top : box.bottom, box.left : box.right] = True
    if not (copies[:, stays] == originals[:, stays]).all():
        return False
    outside = copies[:, ~stays]
    return bool((outside == 0).all()) if is_colour else bool((outside == outside.flat[0]).all())
