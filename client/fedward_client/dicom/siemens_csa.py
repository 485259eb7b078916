"""Read the two CSA headers in which Siemens scanners describe a mosaic (hop 2).

They are private elements with a format of their own: a list of named text values, one of which is the
scan protocol. Only the few that place slices are looked at. The format is not published; it was found
out by others and is checked against real files in the tests. What does not fit it raises ValueError.
"""

from __future__ import annotations

import re
import struct

from fedward_client.dicom.elements import Elements
from fedward_client.dicom.values import tagged_text

_CREATOR = "SIEMENS CSA HEADER"
_GROUP = 0x0029
IMAGE_HEADER, SERIES_HEADER = 0x10, 0x20

_MAX_TAGS = 1000
_MAX_ITEMS = 1000
_TAG = struct.Struct("<64si4siii")
_ITEM = struct.Struct("<4i")
_SLICE_CENTRE = re.compile(
    rb"^sSliceArray\.asSlice\[(\d{1,3})\]\.sPosition\.d(Sag|Cor|Tra)[ \t]*=[ \t]*([-+.0-9eE]{1,32})",
    re.MULTILINE,
)
_AXES = {b"Sag": 0, b"Cor": 1, b"Tra": 2}


def read_csa(elements: Elements, which: int) -> dict[str, list[bytes]]:
    """Names and values of one CSA header; empty when the file has none.

    Args:
        elements: of the file.
        which: `IMAGE_HEADER` or `SERIES_HEADER`.

    Raises:
        ValueError: not in the format of software from VB13 on.

    Source: NiBabel, "The CSA header" (nipy.org/nibabel/dicom/siemens_csa.html).
    """
    for block in range(0x10, 0x20):
        creator = _GROUP << 16 | block
        if creator in elements.places and tagged_text(elements, creator) == _CREATOR:
            data = elements.value(_GROUP << 16 | block << 8 | which)
            if data:
                try:
                    return _parsed(data)
                except struct.error:
                    raise ValueError from None
    return {}


def _parsed(data: bytes) -> dict[str, list[bytes]]:
    if data[:4] != b"SV10":
        raise ValueError
    (num_tags,) = struct.unpack_from("<I", data, 8)
    if not 1 <= num_tags <= _MAX_TAGS:
        raise ValueError
    found: dict[str, list[bytes]] = {}
    position = 16
    for _ in range(num_tags):
        name, _, _, _, num_items, _ = _TAG.unpack_from(data, position)
        position += _TAG.size
        if not 0 <= num_items <= _MAX_ITEMS:
            raise ValueError
        values = []
        for _ in range(num_items):
            _, length, _, _ = _ITEM.unpack_from(data, position)
            position += _ITEM.size
            if not 0 <= length <= len(data) - position:
                raise ValueError
            values.append(data[position : position + length].split(b"\0", 1)[0].strip())
            position += (length + 3) // 4 * 4
        found[name.split(b"\0", 1)[0].decode("ascii")] = [value for value in values if value]
    return found


def protocol_centres(series_header: dict[str, list[bytes]]) -> list[tuple[float, float, float]]:
    """Centres of the slices as the scan protocol lists them: (left, posterior, head) mm.

    Returns:
        one for each slice, in the protocol's order; none when there is no protocol.

    Raises:
        ValueError: slices are missing from the list.
    """
    texts = series_header.get("MrPhoenixProtocol") or series_header.get("MrProtocol") or [b""]
    centres: dict[int, list[float]] = {}
    for number, axis, value in _SLICE_CENTRE.findall(texts[0]):
        centre = centres.setdefault(int(number), [0.0, 0.0, 0.0])  # a coordinate of 0 is left out
        centre[_AXES[axis]] = float(value)
    if sorted(centres) != list(range(len(centres))):
        raise ValueError
    return [(centre[0], centre[1], centre[2]) for _, centre in sorted(centres.items())]
