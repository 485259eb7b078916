"""Transfer syntaxes that may be decoded, and the one decoder of each: an allow-list.

One plugin a syntax, never "whichever is there": lossy decoders differ by a grey level, and two sites
must see the same pixels. All of them have permissive licences. RLE is not left to pydicom itself: it
expands whatever a segment holds before it looks at the size.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

from pydicom import uid
from pydicom.pixels.decoders.base import get_decoder

DEFLATED_IMAGE_FRAME = "1.2.840.10008.1.2.8.1"
"""Each frame deflated by itself (PS3.5 A.4.13); pydicom 3.0 has no name for it."""

ENCAPSULATED_UNCOMPRESSED = "1.2.840.10008.1.2.1.98"
"""Each frame as it is in fragments, which hold more than 4 GB (PS3.5 A.4.11)."""

NATIVE_SYNTAXES = frozenset(
    {
        uid.ImplicitVRLittleEndian,
        uid.ExplicitVRLittleEndian,
        uid.ExplicitVRBigEndian,
        uid.DeflatedExplicitVRLittleEndian,
    }
)

PLUGIN_OF_SYNTAX: dict[str, str] = {
    uid.RLELossless: "pylibjpeg",
    uid.JPEGBaseline8Bit: "pillow",
    uid.JPEGExtended12Bit: "imagecodecs",
    uid.JPEGLossless: "gdcm",
    uid.JPEGLosslessSV1: "gdcm",
    uid.JPEGLSLossless: "pyjpegls",
    uid.JPEGLSNearLossless: "pyjpegls",
    uid.JPEG2000Lossless: "pylibjpeg",
    uid.JPEG2000: "pylibjpeg",
    uid.HTJ2KLossless: "pylibjpeg",
    uid.HTJ2KLosslessRPCL: "pylibjpeg",
    uid.HTJ2K: "pylibjpeg",
    DEFLATED_IMAGE_FRAME: "zlib",
    ENCAPSULATED_UNCOMPRESSED: "numpy",
}
"""Syntax with fragments -> pydicom's name of the plugin, or the package that is called directly."""

WITHOUT_PLUGIN = ("zlib", "numpy")
"""Packages among those that are there in any case: what they undo holds uncompressed pixels."""

LOSSY_SYNTAXES = frozenset(
    {uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLSNearLossless, uid.JPEG2000, uid.HTJ2K}
)


def is_permitted(transfer_syntax: str) -> bool:
    """Whether the syntax is on the list."""
    return transfer_syntax in NATIVE_SYNTAXES or transfer_syntax in PLUGIN_OF_SYNTAX


@cache
def can_decode(transfer_syntax: str) -> bool:
    """Whether the one plugin that is pinned for this syntax is installed."""
    plugin = PLUGIN_OF_SYNTAX.get(transfer_syntax)
    if plugin is None or plugin in WITHOUT_PLUGIN:
        return True
    if plugin == "imagecodecs":
        return find_spec("imagecodecs") is not None
    return plugin in get_decoder(uid.UID(transfer_syntax)).available_plugins
