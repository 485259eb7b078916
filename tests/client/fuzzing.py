"""What both fuzzers need: faults that hide behind a refusal, and damage that leaves a file readable.

A reader of hostile files turns whatever is raised into a refusal, a `KeyError` of ours as well as what
pydicom says of a damaged file. So a fuzzer that only looks at what comes out finds no fault in it;
`faults_shown` looks at what was being handled whenever a refusal was made. And damage to single bytes
mostly ends the reading early: `with_odd_element` changes one element and leaves the others readable.
"""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from random import Random
from types import TracebackType

from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian

import fedward_client
from fedward_client.dicom import parser
from fedward_client.dicom.elements import Encoding, OddDatasetError, find_elements
from fedward_client.dicom.refusal import UnusableImageError

_OURS = str(Path(fedward_client.__file__).parent)
_DECLARED = (ValueError, struct.error, zlib.error, MemoryError, UnusableImageError)
"""What our own code may raise over a damaged file: `OddDatasetError` and Unicode's are ValueErrors."""


@contextmanager
def faults_shown() -> Iterator[None]:
    """Raise, in place of a refusal, what our own code should not have raised."""
    made = UnusableImageError.__init__

    def watched(self: UnusableImageError, *given: object, **named: object) -> None:
        error = sys.exception()
        if isinstance(error, UndeclaredError):
            raise error
        if error is not None and not isinstance(error, _DECLARED) and _is_ours(error.__traceback__):
            raise UndeclaredError(type(error).__name__) from error
        made(self, *given, **named)  # type: ignore[arg-type]

    UnusableImageError.__init__ = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        UnusableImageError.__init__ = made  # type: ignore[method-assign]


class UndeclaredError(BaseException):
    """Passes every `except Exception`."""


def _is_ours(trace: TracebackType | None) -> bool:
    """Whether it was raised in fedward, or in C that fedward called."""
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_code.co_filename.startswith(_OURS)


_VALUES = (
    *(b"", b"\0", b" ", b"\\", b"\\\\\\", b"0", b"-1", b"1e999", b"NaN", b"inf", b"999999999999", b"1\\2\\3"),
    *(b"\0\0", b"\xff\xff", b"\1\0", b"\0\x80", b"\xff\xff\xff\xff", b"\0" * 8, b"\x80" * 3, b"A" * 1100),
    *(
        b"\x1b$B",
        b"\xc3\x28",
        b"1.2.840.10008.1.2",
        b"MONOCHROME1",
        b"20250231",
        b"*",
        b"\xfe\xff\x00\xe0\0\0\0\0",
    ),
)
_VRS = (
    b"US",
    b"SS",
    b"UL",
    b"DS",
    b"IS",
    b"LO",
    b"UI",
    b"SQ",
    b"UN",
    b"OB",
    b"OW",
    b"FD",
    b"AT",
    b"PN",
    b"UT",
    b"??",
)
_LONG_VRS = (b"OB", b"OW", b"SQ", b"UN", b"UT", b"OF", b"OD", b"OL", b"UC", b"UR")


def with_odd_element(data: bytes, random: Random) -> bytes:
    """Empty an element, take it out, say it twice, or give it another value, length or type."""
    encoding, places = _places(data)
    if not places:
        return data
    vr, start, length = random.choice(places)
    head_bytes = 12 if vr in _LONG_VRS else 8
    head, value = data[start - head_bytes : start - head_bytes + 4], data[start : start + length]
    match random.randrange(6):
        case 0:
            new = _element(head, vr, b"", encoding)
        case 1:
            new = b""
        case 2:
            new = data[start - head_bytes : start + length] * 2
        case 3:
            new = _element(head, vr, random.choice(_VALUES), encoding)
        case 4:
            _, other, other_length = random.choice(places)
            new = _element(head, vr, data[other : other + min(other_length, 4096)], encoding)
        case _:
            new = _element(head, random.choice(_VRS) if vr else vr, value, encoding)
    return data[: start - head_bytes] + new + data[start + length :]


def _element(tag: bytes, vr: bytes, value: bytes, encoding: Encoding) -> bytes:
    order = "<" if encoding.little else ">"
    if not vr:
        return tag + struct.pack(order + "L", len(value)) + value
    if vr in _LONG_VRS:
        return tag + vr + struct.pack(order + "HL", 0, len(value)) + value
    return tag + vr + struct.pack(order + "H", len(value) & 0xFFFF) + value


@lru_cache(maxsize=512)
def _places(data: bytes) -> tuple[Encoding, tuple[tuple[bytes, int, int], ...]]:
    """Elements in front of the pixels, of a sound file that is not deflated."""
    try:
        syntax, start = parser._file_meta(data)
        encoding = Encoding(syntax != ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian)
        found = find_elements(data, start, encoding).places.values()
    except (OddDatasetError, struct.error, UnicodeError):
        return Encoding(explicit=True, little=True), ()
    return encoding, tuple(each for each in found if each[1] + each[2] <= len(data))
