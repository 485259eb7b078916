"""The head of a DICOM file (PS3.10 7.1): take it off what a PACS sends, and write one of our own.

A PACS sends the same dataset with one head over DICOMweb and with none over DIMSE. The spool gives every
dataset the same small head: so one image has one digest however it came, and nothing hides in a preamble
or in the names of nodes it passed through. Nothing here decodes more than it must, and every read is
bounded; what is not understood is refused or left unknown, never guessed.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass, field

_PREAMBLE = 128
_MAX_HEAD = 64 * 2**10
_META = struct.Struct("<HH2sH")
_LONG_VRS = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_SOP_CLASS, _SOP_INSTANCE, _SYNTAX = 0x00020002, 0x00020003, 0x00020010
_SOP_INSTANCE_IN_DATASET = 0x00080018
_IMPLICIT_LITTLE, _EXPLICIT_BIG = "1.2.840.10008.1.2", "1.2.840.10008.1.2.2"
_DEFLATED = "1.2.840.10008.1.2.1.99"
_IMPLEMENTATION = "2.25.201643075005549240802743892462928326873"
_UID = re.compile(r"[0-9]+(\.[0-9]+)+")


class NotPart10Error(ValueError):
    """Not a DICOM file, or its head is damaged; says nothing of what is in it."""


@dataclass(frozen=True)
class Instance:
    """One instance as it arrived: what its head, or the command that brought it, says, and its dataset.

    Args:
        sop_class, sop_instance, transfer_syntax: UIDs.
        dataset: encoded in that syntax, without group 2.
    """

    sop_class: str
    sop_instance: str = field(repr=False)
    transfer_syntax: str
    dataset: memoryview | bytes = field(repr=False)

    @property
    def head(self) -> bytes:
        """Preamble of zeros, and file meta information that says what must be said."""
        elements = b"".join(
            (
                _element(0x0001, b"OB", b"\x00\x01"),
                _element(0x0002, b"UI", _uid_bytes(self.sop_class)),
                _element(0x0003, b"UI", _uid_bytes(self.sop_instance)),
                _element(0x0010, b"UI", _uid_bytes(self.transfer_syntax)),
                _element(0x0012, b"UI", _uid_bytes(_IMPLEMENTATION)),
            )
        )
        length = _element(0x0000, b"UL", struct.pack("<L", len(elements)))
        return b"".join((bytes(_PREAMBLE), b"DICM", length, elements))


def is_uid(text: str) -> bool:
    """Whether a text is a UID (PS3.5 9.1): numbers and points, at most 64 characters."""
    return len(text) <= 64 and _UID.fullmatch(text) is not None


def split_file(data: bytes | bytearray) -> Instance:
    """Take the head off a DICOM file; the dataset is not copied.

    Raises:
        NotPart10Error: no such file, or its head lacks one of the three UIDs.
    """
    if data[_PREAMBLE : _PREAMBLE + 4] != b"DICM":
        raise NotPart10Error("not a DICOM file")
    found: dict[int, str] = {}
    position = _PREAMBLE + 4
    try:
        while _META.unpack_from(data, position)[0] == 2:
            group, number, vr, length = _META.unpack_from(data, position)
            start = position + _META.size
            if vr in _LONG_VRS:
                (length,) = struct.unpack_from("<L", data, start)
                start += 4
            position = start + length
            if position > min(len(data), _MAX_HEAD):
                raise NotPart10Error("the head is damaged")
            if length <= 66:
                found[group << 16 | number] = _text(bytes(data[start:position]))
    except struct.error:
        raise NotPart10Error("the head is damaged") from None
    sop_class, sop_instance, syntax = (found.get(tag, "") for tag in (_SOP_CLASS, _SOP_INSTANCE, _SYNTAX))
    if not (is_uid(sop_class) and is_uid(sop_instance) and is_uid(syntax)):
        raise NotPart10Error("the head is damaged")
    return Instance(sop_class, sop_instance, syntax, memoryview(data)[position:])


def sop_instance_of(instance: Instance) -> str | None:
    """SOPInstanceUID as the dataset itself says; None where that is not told or not understood."""
    start = bytes(instance.dataset[:_MAX_HEAD])
    try:
        if instance.transfer_syntax == _DEFLATED:
            start = zlib.decompressobj(-zlib.MAX_WBITS).decompress(start, _MAX_HEAD)
        explicit = instance.transfer_syntax != _IMPLICIT_LITTLE
        order = ">" if instance.transfer_syntax == _EXPLICIT_BIG else "<"
        return _find(start, order, explicit)
    except (struct.error, zlib.error):
        return None


def _find(data: bytes, order: str, explicit: bool) -> str | None:
    position = 0
    while True:
        group, number = struct.unpack_from(f"{order}HH", data, position)
        if explicit:
            vr, length = struct.unpack_from(f"{order}2sH", data, position + 4)
            position += 8
            if vr in _LONG_VRS:
                (length,) = struct.unpack_from(f"{order}L", data, position)
                position += 4
        else:
            (length,) = struct.unpack_from(f"{order}L", data, position + 4)
            position += 8
        tag = group << 16 | number
        if tag == _SOP_INSTANCE_IN_DATASET:
            return _text(data[position : position + length])
        if tag > _SOP_INSTANCE_IN_DATASET or length > len(data):  # also: of undefined length
            return None
        position += length


def _text(value: bytes) -> str:
    return value.rstrip(b"\0 ").decode("ascii", "replace")


def _uid_bytes(uid: str) -> bytes:
    value = uid.encode("ascii")
    return value + b"\0" * (len(value) % 2)


def _element(number: int, vr: bytes, value: bytes) -> bytes:
    if vr == b"OB":
        return struct.pack("<HH2sHL", 2, number, vr, 0, len(value)) + value
    return struct.pack("<HH2sH", 2, number, vr, len(value)) + value
