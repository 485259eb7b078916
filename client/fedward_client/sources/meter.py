"""Limits on what an association may send us, put where the bytes come in.

pynetdicom holds a message in memory until it is whole, and reads a PDU of any length that its sender names.
Here one PDU, one object and one association are bounded. An object over its limit is read over and answered
with a refusal, so that the others of the same association still come; the other limits end the connection.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pynetdicom import evt
from pynetdicom.pdu_primitives import P_DATA

_MAX_PDU = 2**20  # association requests are longer than any PDU that follows them
_MAX_COMMAND = 64 * 2**10
_QUICK_ACK = getattr(socket, "TCP_QUICKACK", None)


class Meter:
    """Limits what one association may send us.

    Args:
        max_object_bytes: of one dataset; more are read over and `oversize` holds how many there were.
        max_total_bytes: of everything; then the connection is closed.
        timeout_s: for the next bytes of something begun.
    """

    def __init__(self, max_object_bytes: int, max_total_bytes: int, timeout_s: float) -> None:
        self._max_object, self._left, self._timeout_s = max_object_bytes, max_total_bytes, timeout_s
        self._num_command = self._num_dataset = 0
        self._lock = threading.Lock()
        self._oversize: list[int] = []

    def take_oversize(self) -> int:
        """Bytes of the object just received when it was over the limit, else 0; to be asked once for each."""
        with self._lock:
            return self._oversize.pop(0) if self._oversize else 0

    def install(self, event: evt.Event) -> None:
        """Handler of `EVT_CONN_OPEN`: from here on the association reads through this meter."""
        connection: Any = event.assoc.dul.socket
        messages: Any = event.assoc.dimse
        self._channel: socket.socket = connection.socket
        self._channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._channel.settimeout(self._timeout_s)
        self._pass_on: Callable[[P_DATA], None] = messages.receive_primitive
        connection.recv = self._receive
        messages.receive_primitive = self._count

    def _receive(self, num_bytes: int) -> bytearray:
        """Read exactly `num_bytes`, as pynetdicom's own loop does, but bounded and in large pieces."""
        self._left -= num_bytes
        if num_bytes > _MAX_PDU or self._left < 0:
            self.hang_up()
            raise OSError("more than a PDU, or an association, may have")
        if _QUICK_ACK is not None:
            # A peer with Nagle's algorithm waits for our acknowledgement, 40 ms for each object.
            self._channel.setsockopt(socket.IPPROTO_TCP, _QUICK_ACK, 1)
        content = bytearray(num_bytes)
        view = memoryview(content)
        num_read = 0
        while num_read < num_bytes:
            num_new = self._channel.recv_into(view[num_read:])
            if num_new == 0:
                return content[:num_read]
            num_read += num_new
        return content

    def _count(self, primitive: P_DATA) -> None:
        """Count the fragments of each message, and empty those beyond the limit before they are held."""
        for index, (context, fragment) in enumerate(primitive.presentation_data_value_list):
            control = fragment[0] if fragment else 0
            if control & 1:
                self._num_command += len(fragment)
                self._num_dataset = 0
                if self._num_command > _MAX_COMMAND:
                    self.hang_up()
                    return
                if control & 2:
                    self._num_command = 0
            else:
                self._num_dataset += len(fragment) - 1
                if self._num_dataset > self._max_object:
                    primitive.presentation_data_value_list[index] = (context, fragment[:1])
                    if control & 2:
                        self._oversize_object()
        self._pass_on(primitive)

    def hang_up(self) -> None:
        """End the connection here and now; pynetdicom then finds it closed."""
        with suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)

    def _oversize_object(self) -> None:
        with self._lock:
            self._oversize.append(self._num_dataset)
        self._num_dataset = 0
