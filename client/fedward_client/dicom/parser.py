"""Run a DICOM parser on hostile input so that nothing it says gets out, and nothing it inflates.

Parser warnings, log lines and exception texts quote header values, and those name patients. In here
warnings go nowhere, the parsers' loggers are shut, and every exception becomes one code. A deflated
file is inflated here, piece by piece up to a limit; pydicom would inflate all of it for one value.
"""

from __future__ import annotations

import io
import logging
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from pydicom import config
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import FileDataset
from pydicom.errors import InvalidDicomError
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_partial
from pydicom.filewriter import write_sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
)

from fedward_client.dicom.behind_pixels import elements_behind
from fedward_client.dicom.elements import (
    PIXEL_TAGS,
    UNDEFINED_LENGTH,
    Elements,
    Encoding,
    OddDatasetError,
    Place,
    TooManyElementsError,
    find_elements,
)
from fedward_client.dicom.nested_repeats import refuse_nested_repeats
from fedward_client.dicom.refusal import Reason, UnusableImageError

MAX_INFLATED_HEADER_BYTES = 8 * 2**20
"""A deflated file must show its pixel data, or end, within so many inflated bytes."""

_PREAMBLE = 128
_META = struct.Struct("<HH2sH").unpack_from
_LONG_META_VRS = (b"OB", b"UN", b"OW", b"SQ", b"UT")
_TRANSFER_SYNTAX = 0x00020010
_LEAST_ELEMENT_BYTES = 8

for _name in ("pydicom", "pylibjpeg", "openjpeg", "rle", "jpeg_ls", "PIL"):
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)


@contextmanager
def contained(reason: Reason) -> Iterator[None]:
    """Silence the parser and turn whatever it raises into `UnusableImageError(reason)`.

    The original exception is dropped on purpose (`from None`): its text would reach a traceback.
    """
    mode = config.settings.reading_validation_mode
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config.settings.reading_validation_mode = config.IGNORE
        try:
            yield
        except UnusableImageError:
            raise
        except MemoryError:
            raise UnusableImageError(Reason.OVER_LIMIT) from None
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException:  # hostile input: parsers raise anything, and Rust's panics are no Exception
            raise UnusableImageError(reason) from None
        finally:
            config.settings.reading_validation_mode = mode


@dataclass(frozen=True)
class ParsedFile:
    """One file's elements, and where its pixels are.

    Args:
        syntax: TransferSyntaxUID, "" when the file does not say.
        elements: all but the pixel data; see `seen_to_end`.
        body: what `pixel_start` refers to: the file, or as much of it as was inflated.
        pixel_tag: one of `PIXEL_TAGS`; None when there is no pixel data.
        pixel_vr: as written, b"" when implicit.
        pixel_start: first byte of its value.
        pixel_length: of its value as declared, `UNDEFINED_LENGTH` when it is in fragments.
        header_end: where in `body` the pixel data's element begins, or the header ends.
        seen_to_end: what stands behind the pixel data was looked at (see `behind_pixels.py`); not so when
            that much of a deflated file was not inflated.
    """

    syntax: str = field(repr=False)
    elements: Elements = field(repr=False)
    body: bytes = field(repr=False)
    pixel_tag: int | None
    pixel_vr: bytes
    pixel_start: int
    pixel_length: int
    header_end: int
    seen_to_end: bool = True

    @property
    def pixel_bytes_left(self) -> int | None:
        """Bytes of the pixel data's value that are there; None when unknown (deflated)."""
        if self.syntax == DeflatedExplicitVRLittleEndian:
            return None
        end = len(self.body)
        if self.pixel_length != UNDEFINED_LENGTH:  # what stands behind it is no pixel
            end = min(end, self.pixel_start + self.pixel_length)
        return end - self.pixel_start


def parse_file(
    data: bytes, *, max_inflated: int = MAX_INFLATED_HEADER_BYTES, tolerant: bool = True
) -> ParsedFile:
    """Find the elements of a DICOM file held in memory; call it inside `contained`.

    Args:
        data: the whole file.
        max_inflated: bytes to inflate of a deflated file; more are left alone.
        tolerant: let pydicom read what departs from the standard; it holds every nested item in memory.

    Raises:
        UnusableImageError: empty, not DICOM, more elements than can be walked, a deflated file whose header
            alone passes the limit, or something stands behind the pixels that must not be there.
    """
    if not data:
        raise UnusableImageError(Reason.EMPTY)
    try:
        syntax, start = _file_meta(data)
    except (OddDatasetError, struct.error):
        return _parse_with_pydicom(data)
    if syntax == DeflatedExplicitVRLittleEndian:
        return _parse_deflated(data, start, max_inflated)
    encoding = Encoding(syntax != ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian)
    try:
        if _looks_explicit(data, start) != encoding.explicit:
            raise OddDatasetError
        return _parsed(syntax, find_elements(data, start, encoding))
    except TooManyElementsError:
        raise UnusableImageError(Reason.OVER_LIMIT) from None
    except OddDatasetError:
        if not tolerant:
            raise UnusableImageError(Reason.MALFORMED) from None
        return _parse_with_pydicom(data)


def inflate(data: bytes, limit: int) -> tuple[bytes, bool]:
    """Inflate a raw deflate stream up to `limit` bytes; also say whether that was all of it.

    Raises:
        zlib.error: not such a stream.
    """
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    return inflater.decompress(data, limit), inflater.eof


def _file_meta(data: bytes) -> tuple[str, int]:
    """Transfer syntax, and where the dataset begins; some writers leave out all in front of group 2."""
    if data[_PREAMBLE : _PREAMBLE + 4] == b"DICM":
        position = _PREAMBLE + 4
    elif data[:2] == b"\x02\x00":
        position = 0
    else:
        raise OddDatasetError
    syntax = b""
    while True:
        group, number, vr, length = _META(data, position)
        if group != 2:
            break
        start = position + 8
        if vr in _LONG_META_VRS:
            (length,) = struct.unpack_from("<L", data, start)
            start += 4
        elif not vr.isalpha():
            raise OddDatasetError
        if group << 16 | number == _TRANSFER_SYNTAX:
            syntax = data[start : start + length]
        position = start + length
    if not syntax:
        raise OddDatasetError
    return syntax.rstrip(b"\0 ").decode("ascii"), position


def _looks_explicit(data: bytes, start: int) -> bool:
    vr = data[start + 4 : start + 6]
    return vr.isalpha() and vr.isupper()


def _parsed(syntax: str, elements: Elements, *, complete: bool = True) -> ParsedFile:
    for tag in PIXEL_TAGS:
        place = elements.places.pop(tag, None)
        if place is not None:
            if complete:
                _, start, length = place
                behind = elements_behind(elements.data, tag, start, length, elements.encoding)
                elements.places.update(behind)
            return ParsedFile(syntax, elements, elements.data, tag, *place, elements.end, complete)
    return ParsedFile(syntax, elements, elements.data, None, b"", elements.end, 0, elements.end, complete)


def _parse_deflated(data: bytes, start: int, max_inflated: int) -> ParsedFile:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    body = inflater.decompress(data[start:], max_inflated)
    complete = inflater.eof
    # Some writers end the stream as gzip does, with checksum and size.
    rest = inflater.unused_data.removeprefix(struct.pack("<LL", zlib.crc32(body), len(body)))
    if complete and rest.strip(b"\0"):
        raise UnusableImageError(Reason.BEHIND_PIXELS)
    try:
        elements = find_elements(body, 0, Encoding(explicit=True, little=True))
    except OddDatasetError:
        raise UnusableImageError(Reason.MALFORMED if complete else Reason.DEFLATED) from None
    parsed = _parsed(DeflatedExplicitVRLittleEndian, elements, complete=complete)
    if parsed.pixel_tag is None and not complete:
        raise UnusableImageError(Reason.DEFLATED)
    return parsed


def _parse_with_pydicom(data: bytes) -> ParsedFile:
    """Read a file that departs from the standard as pydicom understands it."""
    # Looked for anywhere: trusting the header's own structure here is what a bomb would exploit.
    if DeflatedExplicitVRLittleEndian.encode() in data:
        raise UnusableImageError(Reason.DEFLATED)
    stream = io.BytesIO(data)
    try:
        dataset = read_partial(stream, stop_when=_stop_at_pixels(stream))
    except InvalidDicomError:
        raise UnusableImageError(Reason.NOT_DICOM) from None
    refuse_nested_repeats(dataset)
    encoding = _written_encoding(dataset)
    end = stream.tell()
    tag, vr, start, length = _pixel_place(data, end, encoding)
    behind = {} if tag is None else elements_behind(data, tag, start, length, encoding)
    return ParsedFile(
        str(dataset.file_meta.get("TransferSyntaxUID") or ""),
        _elements_of(dataset, encoding, data, behind),
        data,
        *(tag, vr, start, length),
        end,
    )


def _stop_at_pixels(stream: io.BytesIO) -> Callable[[int, str | None, int], bool]:
    """Have pydicom stop in front of the pixel data, and refuse a header that says something twice.

    pydicom takes what comes last, others what comes first: such a file can both deny text in the picture and
    admit it.
    """
    found_at: dict[int, int] = {}

    def stop(tag: int, _vr: str | None, _length: int) -> bool:
        if tag in PIXEL_TAGS:
            return True
        position = stream.tell()
        # of another syntax than it says, pydicom asks twice for the first element, some bytes on
        if position - found_at.setdefault(tag, position) >= _LEAST_ELEMENT_BYTES:
            raise UnusableImageError(Reason.MALFORMED)
        return False

    return stop


def _written_encoding(dataset: FileDataset) -> Encoding:
    """How the elements are in truth written, which a wrong transfer syntax does not tell."""
    for tag in dataset.keys():  # noqa: SIM118 - iterating over a dataset converts its values
        element = dataset.get_item(tag)
        if isinstance(element, RawDataElement):
            return Encoding(not element.is_implicit_VR, element.is_little_endian)
    implicit, little = dataset.original_encoding
    return Encoding(not implicit, bool(little))


def _elements_of(dataset: FileDataset, encoding: Encoding, data: bytes, behind: dict[int, Place]) -> Elements:
    """Lay out what pydicom found, and what stands behind the pixels, as `find_elements` would have."""
    places: dict[int, Place] = {}
    values: list[bytes] = []
    position = 0
    found = [(int(tag), *_raw_value(dataset.get_item(tag), encoding)) for tag in sorted(dataset.keys())]
    for tag, (vr, start, length) in behind.items():
        ended = length != UNDEFINED_LENGTH  # a private sequence that nobody asks for
        found.append((tag, vr, data[start : start + length] if ended else b""))
    for tag, vr, value in found:
        if places.setdefault(tag, (vr, position, len(value)))[1] != position:
            raise UnusableImageError(Reason.MALFORMED)
        values.append(value)
        position += len(value)
    return Elements(b"".join(values), encoding, places, position)


def _raw_value(element: RawDataElement | DataElement | None, encoding: Encoding) -> tuple[bytes, bytes]:
    if isinstance(element, RawDataElement):
        return (element.VR or "").encode("ascii", "replace"), element.value or b""
    if element is None or element.VR != "SQ":
        return b"UN", b""
    stream = DicomBytesIO()
    stream.is_implicit_VR, stream.is_little_endian = not encoding.explicit, encoding.little
    write_sequence(stream, element, ["iso8859"])
    return b"SQ", stream.getvalue()


def _pixel_place(data: bytes, end: int, encoding: Encoding) -> tuple[int | None, bytes, int, int]:
    order = "<" if encoding.little else ">"
    if end + 12 > len(data):
        return None, b"", end, 0
    group, number, vr, _ = struct.unpack_from(f"{order}HH2sH", data, end)
    tag = group << 16 | number
    if tag not in PIXEL_TAGS:
        return None, b"", end, 0
    if not encoding.explicit:
        return tag, b"", end + 8, *struct.unpack_from(f"{order}L", data, end + 4)
    return tag, vr, end + 12, *struct.unpack_from(f"{order}L", data, end + 8)
