"""Recognise images in which United Imaging scanners put all slices of a volume side by side (hop 2).

Nothing public says so: such a file looks like one large slice, and its position is that of no slice. Read as
an image it is a picture of dozens of small heads, read as a slice it makes a wrong volume. A Siemens mosaic
says what it is in ImageType; see `mosaic.py`.
"""

from __future__ import annotations

import struct

from fedward_client.dicom.elements import Elements
from fedward_client.dicom.refusal import UnusableImageError
from fedward_client.dicom.values import tagged_numbers, tagged_text

_CREATORS = tuple(range(0x00650010, 0x00650020))
_CREATOR = "Image Private Header"
_NUMBER_IN_GRID = 0x50


def is_grid(elements: Elements) -> bool:
    """Whether the private header counts more than one image in this one.

    Source: dcm2niix (github.com/rordenlab/dcm2niix), NumberOfImagesInGrid of UIH.
    """
    for creator in filter(elements.places.__contains__, _CREATORS):  # of nearly all files none
        counted = creator & 0xFFFF0000 | (creator & 0xFF) << 8 | _NUMBER_IN_GRID
        try:
            if counted in elements.places and tagged_text(elements, creator) == _CREATOR:
                return max(tagged_numbers(elements, counted, b"DS"), default=0) > 1
        except (ValueError, LookupError, struct.error, UnusableImageError):
            continue
    return False
