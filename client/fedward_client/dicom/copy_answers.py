"""Safe copies made in decoder processes: what they are asked, and what they say, rebuilt by type (hop 2).

Copying is Python's work from the first byte to the proof, and takes as long as decoding a large picture, so
it is spread over processes. These hold the site's key; so none of the C decoders runs in them: a file whose
compressed pixels have to be changed comes back as `NeedsDecodingError`, and is asked for once more together
with its pixels, which another process has decoded.
"""

from __future__ import annotations

import re
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from pydicom.datadict import tag_for_keyword

from fedward_client.dicom.byte_scan import Leak, Zone
from fedward_client.dicom.copy_pixels import PixelChange
from fedward_client.dicom.deidentify import ExportOptions, IdentifierLeftError, SafeCopy, make_copy
from fedward_client.dicom.needles import NOTATIONS
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.sandbox_wire import Take, WireError

NAME_OF_COPY = re.compile(r"P[0-9A-F]{15}(/[0-9a-f]{16}){3}\.dcm")
"""Patient, study, series and object, as pseudonyms."""

_NOT_KEYWORDS = frozenset(("private element", "unknown element", "preamble"))
_MOST_LEAKS = 10_000


class CopyQuestion(BaseModel):
    """What copies are to be made of, beside the file.

    Args:
        key: the site's secret of 32 bytes, hex.
        options: what stays.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str = Field(repr=False, pattern="^[0-9a-f]{64}$")
    options: ExportOptions


class NeedsDecodingError(UnusableImageError):
    """Compressed pixels have to be changed, which takes a decoder."""

    def __init__(self) -> None:
        super().__init__(Reason.DECODE_FAILED)


def answer_copy(
    data: bytes, question: str, pixels: NDArray[np.integer] | None = None
) -> tuple[dict[str, Any], bytes]:
    """Make one copy, on the side that may do no harm.

    Args:
        data: the file.
        question: a `CopyQuestion` as JSON.
        pixels: of the file, where they were decoded already.

    Returns:
        what there is to say, and the copy, b"" when there is none.

    Raises:
        UnusableImageError: see `make_copy`; when identifiers are left, the answer says so instead.
    """
    asked = CopyQuestion.model_validate_json(question)

    def decode() -> NDArray[np.integer]:
        if pixels is None:
            raise NeedsDecodingError
        return pixels

    try:
        copy = make_copy(data, bytes.fromhex(asked.key), asked.options, decode)
    except NeedsDecodingError:
        return {"needs_decoding": True}, b""
    except IdentifierLeftError as error:
        leaks = [[leak.keyword, leak.notation, leak.zone] for leak in error.leaks[:_MOST_LEAKS]]
        return {"left": leaks}, b""
    return {"copy": [copy.name, copy.pixels, copy.num_searched, copy.num_not_searched]}, copy.data


def copy_from(reply: dict[str, Any], take: Take) -> SafeCopy | UnusableImageError:
    """Undo `answer_copy`, field by field.

    Raises:
        WireError, KeyError, TypeError, ValueError, OverflowError: it makes no sense.
    """
    if "needs_decoding" in reply:
        return NeedsDecodingError()
    if "left" in reply:
        return IdentifierLeftError(tuple(_leak(*each) for each in reply["left"]))
    name, pixels, *counts = reply["copy"]
    if NAME_OF_COPY.fullmatch(name) is None or pixels not in get_args(PixelChange):
        raise WireError
    num_searched, num_not_searched = map(int, counts)
    return SafeCopy(name, take(*reply["image"]).tobytes(), pixels, num_searched, num_not_searched)


def _leak(keyword: str, notation: str, zone: Zone) -> Leak:
    known = keyword in _NOT_KEYWORDS or tag_for_keyword(keyword) is not None
    if not known or notation not in NOTATIONS or zone not in get_args(Zone):
        raise WireError
    return Leak(keyword, notation, zone)
