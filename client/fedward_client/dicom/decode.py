"""Turn one radiograph into an image (hop 2): check, decode with the pinned decoder, display.

Bounds are checked before a decoder runs, against the header and, for compressed images, against the
codestream itself. The decoder of each syntax is pinned, never "whichever is installed". Whatever goes
wrong is one `UnusableImageError` with a code, so that one file never stops the others.
"""

from __future__ import annotations

from functools import cache
from importlib import metadata

import numpy as np
from numpy.typing import NDArray

from fedward_client.dicom.display import display_rules, display_table, first_value
from fedward_client.dicom.frames import Allocate
from fedward_client.dicom.header import header_of, refusal_of
from fedward_client.dicom.parser import contained, parse_file
from fedward_client.dicom.pixels import reach_pixels, stored_frames
from fedward_client.dicom.refusal import Reason


def decode_image(data: bytes, *, allocate: Allocate = np.empty) -> NDArray[np.float32]:
    """Decode the one image in a file held in memory.

    Args:
        data: the whole file.
        allocate: where the values go; the sandbox puts them into shared memory.

    Returns:
        float32 `(rows, columns)` in [0, 1]; 0 is what a viewer shows black.

    Raises:
        UnusableImageError: refused by the header's rules, or the pixels cannot be decoded.
    """
    with contained(Reason.DECODE_FAILED):
        parsed = parse_file(data)
        header = header_of(parsed)
        refusal = refusal_of(header)
        if refusal is not None:
            raise refusal
        table = display_table(display_rules(parsed.elements, header), header)
        frames = stored_frames(reach_pixels(parsed, header, data), header)
        shown: NDArray[np.float32] = allocate((header.rows, header.columns), np.dtype(np.float32))
        (stored,) = frames
        places = stored.astype(np.int32) - first_value(header) if header.signed else stored
        # Every stored value has its place; the mode says only that numpy need not look for others.
        return np.take(table, places, out=shown, mode="clip")


@cache
def decoder_versions() -> tuple[str, ...]:
    """Every package that has a say in decoded pixels, as "name version"; part of the cache's key."""
    names = (
        "pydicom",
        "numpy",
        "pillow",
        "pyjpegls",
        "pylibjpeg",
        "pylibjpeg-openjpeg",
        "pylibjpeg-rle",
        "python-gdcm",
        "imagecodecs",
    )
    return tuple(f"{name} {_version(name)}" for name in names)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"
