"""Read a multipart/related answer (RFC 2387, PS3.18 8.7.1) as it arrives, one part in memory at a time.

A series may be larger than the memory, and a PACS may send what nobody asked for: each part has a size
limit, and one that passes it is read over, not held. An answer that stops early is known by the closing
delimiter that it lacks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from email.message import Message

_MAX_PART_HEAD = 16 * 2**10


class BrokenAnswerError(ValueError):
    """The answer ends early or is not what its head announces."""


@dataclass(frozen=True)
class Part:
    """One part of an answer.

    Args:
        content: its bytes; None when they are more than the limit.
        declared_length: Content-Length of the part; None when it does not say.
    """

    content: bytearray | None = field(repr=False)
    declared_length: int | None

    @property
    def is_whole(self) -> bool:
        """Whether it has as many bytes as it announced."""
        return self.content is None or self.declared_length in (None, len(self.content))


def boundary_of(content_type: str) -> bytes | None:
    """The delimiter of a multipart/related answer; None when it is none.

    >>> boundary_of('multipart/related; type="application/dicom"; boundary=abc')
    b'abc'
    """
    message = Message()
    message["Content-Type"] = content_type[:1000]
    boundary = message.get_param("boundary")
    if message.get_content_type() != "multipart/related" or not isinstance(boundary, str) or not boundary:
        return None
    return boundary.encode("latin-1", "replace")


def read_parts(pieces: Iterable[bytes], boundary: bytes, max_part_bytes: int) -> Iterator[Part]:
    """Yield the parts of an answer in order.

    Args:
        pieces: the body, cut anywhere.
        boundary: without the leading hyphens.
        max_part_bytes: what one part may hold.

    Raises:
        BrokenAnswerError: no closing delimiter, or a part without a head.
    """
    reader = _Reader(iter(pieces), b"\r\n--" + boundary)
    reader.buffer += b"\r\n"  # the first delimiter may stand at the very beginning
    reader.skip_to_delimiter()
    while not reader.is_closed():
        declared_length = _declared_length(reader.take_head())
        yield Part(reader.take_content(max_part_bytes), declared_length)


def _declared_length(head: bytes) -> int | None:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length" and value.strip().isdigit():
            return int(value.strip()[:18])
    return None


class _Reader:
    """What has arrived and was not yet handed out."""

    def __init__(self, pieces: Iterator[bytes], delimiter: bytes) -> None:
        self.buffer = bytearray()
        self._pieces = pieces
        self._delimiter = delimiter

    def skip_to_delimiter(self) -> None:
        """Read over what stands in front of the first delimiter."""
        self.take_content(0)

    def is_closed(self) -> bool:
        """Whether the delimiter just passed was the closing one."""
        self._need(2)
        return self.buffer[:2] == b"--"

    def take_head(self) -> bytes:
        """The header lines of a part; the rest of its delimiter's line goes first."""
        seen = 0
        while (end := self.buffer.find(b"\r\n\r\n", seen)) < 0:
            seen = max(0, len(self.buffer) - 3)
            if len(self.buffer) > _MAX_PART_HEAD:
                raise BrokenAnswerError("a part without a head")
            self._more()
        head = bytes(self.buffer[:end])
        del self.buffer[: end + 4]
        return head

    def take_content(self, limit: int) -> bytearray | None:
        """All up to the next delimiter, which is passed; None when that is more than `limit`."""
        held: bytearray | None = bytearray()
        overlap = len(self._delimiter) - 1
        while (end := self.buffer.find(self._delimiter)) < 0:
            keep = max(0, len(self.buffer) - overlap)
            held = _joined(held, self.buffer, keep, limit)
            del self.buffer[:keep]
            self._more()
        held = _joined(held, self.buffer, end, limit)
        del self.buffer[: end + len(self._delimiter)]
        return held

    def _need(self, num_bytes: int) -> None:
        while len(self.buffer) < num_bytes:
            self._more()

    def _more(self) -> None:
        piece = next(self._pieces, None)
        if piece is None:
            raise BrokenAnswerError("the answer ends early")
        self.buffer += piece


def _joined(held: bytearray | None, buffer: bytearray, num_bytes: int, limit: int) -> bytearray | None:
    if held is None or len(held) + num_bytes > limit:
        return None
    held += memoryview(buffer)[:num_bytes]
    return held
