"""Messages between the site's daemon and its worker process, over one local socket.

A frame is a JSON header and raw bytes: two lengths, then both parts. Nothing is ever unpickled, so a
compromised worker cannot run code in the daemon that holds the keys.
"""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

_LENGTHS = struct.Struct("<IQ")
_MAX_HEADER = 8 * 2**20
_MAX_PAYLOAD = 8 * 2**30


def send_frame(channel: socket.socket, header: dict[str, Any], payload: bytes | memoryview = b"") -> None:
    """Write one frame. Raises OSError when the other side is gone."""
    body = json.dumps(header).encode()
    channel.sendall(_LENGTHS.pack(len(body), len(payload)) + body)
    if len(payload):
        channel.sendall(payload)


def receive_frame(channel: socket.socket) -> tuple[dict[str, Any], bytearray]:
    """Read one frame; after a malformed one the stream is of no more use.

    Raises:
        EOFError: the stream has ended.
        ValueError, TypeError: the frame is malformed.
    """
    header_size, payload_size = _LENGTHS.unpack(_read(channel, _LENGTHS.size))
    if header_size > _MAX_HEADER or payload_size > _MAX_PAYLOAD:
        raise ValueError("frame is larger than any message can be")
    try:
        header = json.loads(bytes(_read(channel, header_size)))
    except RecursionError as error:
        raise ValueError("frame header is nested too deep") from error
    if not isinstance(header, dict):
        raise TypeError("frame header is not an object")
    return header, _read(channel, payload_size)


def _read(channel: socket.socket, size: int) -> bytearray:
    buffer = bytearray(size)
    view = memoryview(buffer)
    filled = 0
    while filled < size:
        got = channel.recv_into(view[filled:])
        if got == 0:
            raise EOFError("the other process closed the connection")
        filled += got
    return buffer
