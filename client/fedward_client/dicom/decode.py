"""Turn one DICOM file into an image (hop 2): check, decode with the pinned decoder, display.

Bounds are checked before a decoder runs, against the header and, for compressed images, against the
codestream itself. The decoder of each syntax is pinned, never "whichever is installed". Whatever goes
wrong is one `UnusableImageError` with a code, so that one file never stops the others.
"""

from __future__ import annotations

import io
from functools import cache
from importlib import metadata

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import FileDataset
from pydicom.encaps import generate_frames
from pydicom.pixels.utils import pixel_array
from pydicom.uid import RLELossless

from fedward_client.dicom.codestream import FrameSize, frame_size
from fedward_client.dicom.display import DISPLAY_KEYWORDS, display_table, first_value
from fedward_client.dicom.header import HEADER_KEYWORDS, PLUGIN_OF_SYNTAX, Header, header_of, refusal_of
from fedward_client.dicom.parser import contained, parse
from fedward_client.dicom.refusal import Reason, UnusableImageError

_KEYWORDS = (*HEADER_KEYWORDS, *DISPLAY_KEYWORDS, "PixelData")


def decode_image(data: bytes) -> NDArray[np.float32]:
    """Decode the one image in a file held in memory.

    Returns:
        float32 `(rows, columns)` in [0, 1]; 0 is what a viewer shows black.

    Raises:
        UnusableImageError: refused by the header's rules, or the pixels cannot be decoded.
    """
    with contained(Reason.DECODE_FAILED):
        dataset, _ = parse(data, _KEYWORDS, pixels=True)
        header = header_of(dataset, None)
        refusal = refusal_of(header)
        if refusal is not None:
            raise refusal
        table = display_table(dataset, header)
        stored = _stored_pixels(dataset, header)
        return np.take(table, stored.astype(np.int32) - first_value(header) if header.signed else stored)


@cache
def decoder_versions() -> tuple[str, ...]:
    """Every package that has a say in decoded pixels, as "name version"; part of the cache's key."""
    names = ("pydicom", "numpy", "pillow", "pyjpegls", "pylibjpeg", "pylibjpeg-openjpeg", "python-gdcm")
    return tuple(f"{name} {_version(name)}" for name in names)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def _stored_pixels(dataset: FileDataset, header: Header) -> NDArray[np.integer]:
    if not dataset.get("PixelData"):
        raise UnusableImageError(Reason.NO_PIXELS)
    plugin = PLUGIN_OF_SYNTAX.get(header.transfer_syntax, "")
    if not plugin and len(dataset.PixelData) < header.num_pixel_bytes:
        raise UnusableImageError(Reason.TRUNCATED)
    if plugin and header.transfer_syntax != RLELossless:  # RLE allocates by the header, which is bounded
        frame = next(generate_frames(io.BytesIO(dataset.PixelData), number_of_frames=1))
        if frame_size(frame) != FrameSize(header.rows, header.columns, 1):
            raise UnusableImageError(Reason.CODESTREAM)
    stored: NDArray[np.integer] = pixel_array(dataset, raw=True, decoding_plugin=plugin)
    if stored.shape != (header.rows, header.columns) or stored.dtype.itemsize * 8 != header.bits_allocated:
        raise UnusableImageError(Reason.DECODE_FAILED)
    return stored
