"""Read width and height from a compressed image before anything decodes it.

A decoder allocates what the codestream asks for, not what the DICOM header says: 144 bytes can ask for
gigabytes. Only the first few bytes are looked at, and what is not understood is refused.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from fedward_client.dicom.refusal import Reason, UnusableImageError

_JP2_SIGNATURE = b"\x00\x00\x00\x0cjP  \r\n\x87\n"
_MAX_BOXES = 16
_MAX_SEGMENTS = 64


@dataclass(frozen=True)
class FrameSize:
    """What a codestream says about itself.

    Args:
        rows: height.
        columns: width.
        components: 1 for grey.
        marker: second byte of the marker that says so; it tells the coding process (0xC0 baseline,
            0xC3 lossless, 0xF7 JPEG-LS, 0x51 JPEG 2000).
    """

    rows: int
    columns: int
    components: int
    marker: int


def frame_size(codestream: bytes) -> FrameSize:
    """Dimensions of a JPEG, JPEG-LS or JPEG 2000 codestream (High-Throughput JPEG 2000 included).

    Raises:
        UnusableImageError: none of them, or its first headers are damaged.

    Source: ITU-T T.81 B.2.2 (SOF), T.87 C.2.2 (SOF55), T.800 A.5.1 (SIZ) and I.4 (JP2 boxes).
    """
    try:
        if codestream[:12] == _JP2_SIGNATURE:
            return _jpeg2000_size(codestream, _codestream_in_boxes(codestream))
        if codestream[:4] == b"\xff\x4f\xff\x51":
            return _jpeg2000_size(codestream, 0)
        if codestream[:2] == b"\xff\xd8":
            return _jpeg_size(codestream)
    except (struct.error, IndexError):
        raise UnusableImageError(Reason.CODESTREAM) from None
    raise UnusableImageError(Reason.CODESTREAM)


def mixes_colours(codestream: bytes) -> bool:
    """Whether a sound JPEG 2000 codestream has its colours transformed, so that decoders give RGB.

    Source: ITU-T T.800 A.6.1 (COD, the byte behind the number of layers).
    """
    start = _codestream_in_boxes(codestream) if codestream[:12] == _JP2_SIGNATURE else 0
    position = start + 2
    for _ in range(_MAX_SEGMENTS):
        marker, length = struct.unpack_from(">HH", codestream, position)
        if marker == 0xFF52:
            return codestream[position + 8] == 1
        position += 2 + length
    return False


def _codestream_in_boxes(container: bytes) -> int:
    """Where in a JP2 file its codestream begins; some writers put the whole file in a fragment."""
    position = 0
    for _ in range(_MAX_BOXES):
        length, kind = struct.unpack_from(">L4s", container, position)
        start = position + 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", container, start)
            start += 8
        if kind == b"jp2c":
            if container[start : start + 4] != b"\xff\x4f\xff\x51":
                break
            return start
        if length < 8:
            break
        position += length
    raise UnusableImageError(Reason.CODESTREAM)


def _jpeg2000_size(codestream: bytes, start: int) -> FrameSize:
    right, bottom, left, top = struct.unpack_from(">4I", codestream, start + 8)
    (components,) = struct.unpack_from(">H", codestream, start + 40)
    for component in range(min(components, 4)):
        depth, *steps = struct.unpack_from(">3B", codestream, start + 42 + 3 * component)
        if steps != [1, 1] or depth & 0x7F >= 32:  # a component of another size than the image
            raise UnusableImageError(Reason.CODESTREAM)
    return FrameSize(bottom - top, right - left, components, 0x51)


def _jpeg_size(codestream: bytes) -> FrameSize:
    position = 2
    while True:
        if codestream[position] != 0xFF:
            raise UnusableImageError(Reason.CODESTREAM)
        marker = codestream[position + 1]
        if marker == 0xFF:  # fill byte in front of a marker
            position += 1
            continue
        if _is_start_of_frame(marker):
            rows, columns, components = struct.unpack_from(">HHB", codestream, position + 5)
            return FrameSize(rows, columns, components, marker)
        (length,) = struct.unpack_from(">H", codestream, position + 2)
        if length < 2 or marker == 0xDA:
            raise UnusableImageError(Reason.CODESTREAM)
        position += 2 + length


def _is_start_of_frame(marker: int) -> bool:
    return marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC))
