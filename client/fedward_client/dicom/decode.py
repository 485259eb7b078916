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
from pydicom import uid
from pydicom.dataset import FileDataset
from pydicom.encaps import generate_frames
from pydicom.pixels.utils import pixel_array

from fedward_client.dicom.codestream import FrameSize, frame_size
from fedward_client.dicom.display import DISPLAY_KEYWORDS, display_table, first_value
from fedward_client.dicom.header import (
    HEADER_KEYWORDS,
    PLUGIN_OF_SYNTAX,
    Header,
    header_of,
    read_header,
    refusal_of,
)
from fedward_client.dicom.parser import contained, parse
from fedward_client.dicom.refusal import Reason, UnusableImageError

# Coding processes that a syntax may hold; a progressive JPEG, say, can be made to decode for hours.
# RLE has no header of its own: its decoder allocates by the DICOM header, which is bounded.
_MARKERS: dict[str, tuple[int, ...]] = {
    uid.JPEGBaseline8Bit: (0xC0, 0xC1),
    uid.JPEGLossless: (0xC3,),
    uid.JPEGLosslessSV1: (0xC3,),
    uid.JPEGLSLossless: (0xF7,),
    uid.JPEGLSNearLossless: (0xF7,),
    uid.JPEG2000Lossless: (0x51,),
    uid.JPEG2000: (0x51,),
}

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
        if not dataset.get("PixelData"):  # absent, or cut so that the parser gave up on all of the file
            raise refusal_of(read_header(data)) or UnusableImageError(Reason.TRUNCATED)
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
    plugin = PLUGIN_OF_SYNTAX.get(header.transfer_syntax, "")
    if not plugin and len(dataset.PixelData) < header.num_pixel_bytes:
        raise UnusableImageError(Reason.TRUNCATED)
    markers = _MARKERS.get(header.transfer_syntax, ())
    if markers:
        frame = next(generate_frames(io.BytesIO(dataset.PixelData), number_of_frames=1))
        if frame_size(frame) not in [FrameSize(header.rows, header.columns, 1, each) for each in markers]:
            raise UnusableImageError(Reason.CODESTREAM)
    stored: NDArray[np.integer] = pixel_array(dataset, raw=True, decoding_plugin=plugin)
    if stored.shape != (header.rows, header.columns) or stored.dtype.itemsize * 8 != header.bits_allocated:
        raise UnusableImageError(Reason.DECODE_FAILED)
    return stored
