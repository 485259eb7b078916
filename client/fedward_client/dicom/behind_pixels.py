"""See what stands behind the pixel data, where a reader that stops at the pixels never looks (hop 2).

Programs that read whole files take what comes last: a second PixelData, an overlay or another
BurnedInAnnotation behind the first picture would be seen by them and not by the gate. PS3.5 7.1 wants
elements in ascending order, so behind the pixels there can be private elements, which are counted like all
others, digital signatures and padding. Whatever else is there, and any byte that is neither an element nor
zero, costs the file. Uncompressed pixels are passed over by their length, fragments one by one.
"""

from __future__ import annotations

from fedward_client.dicom.elements import (
    UNDEFINED_LENGTH,
    Encoding,
    OddDatasetError,
    Place,
    element_at,
)
from fedward_client.dicom.fragments import item_places
from fedward_client.dicom.refusal import Reason, UnusableImageError

MAX_BEHIND_BYTES = 2**20
"""So much of a deflated file is inflated behind its pixels to see what is there."""

_MAX_ELEMENTS = 10_000
_SIGNATURES, _PADDING = 0xFFFA, 0xFFFC


def elements_behind(
    body: bytes, pixel_tag: int, start: int, length: int, encoding: Encoding
) -> dict[int, Place]:
    """Places of the elements behind the pixel data; none when it ends the file.

    Args:
        body: the file, or all that it inflates to.
        pixel_tag: of the pixel data.
        start: first byte of its value.
        length: of its value, `UNDEFINED_LENGTH` for fragments.
        encoding: of the dataset.

    Raises:
        UnusableImageError: something is there that may not be.
    """
    end = start + length
    if length == UNDEFINED_LENGTH:
        fragments = item_places(body, start)
        end = len(body) if fragments is None else fragments[1]
    if end >= len(body):  # cut off: told by whoever needs the pixels
        return {}
    places: dict[int, Place] = {}
    previous = pixel_tag
    try:
        while end < len(body):
            tag, place, following = element_at(body, end, encoding)
            if tag <= previous or not _may_follow(tag >> 16) or len(places) == _MAX_ELEMENTS:
                raise OddDatasetError
            places[tag] = place
            previous, end = tag, following
    except OddDatasetError:
        if body[end:].strip(b"\0"):  # zeros fill up a block
            raise UnusableImageError(Reason.BEHIND_PIXELS) from None
    return places


def _may_follow(group: int) -> bool:
    return bool(group & 1) or group in (_SIGNATURES, _PADDING)
