"""Messages between the site and a decoder process: JSON and open files, never pickle (hop 2).

The decoder may have been taken over by an image, so its side of the conversation is hostile input too:
messages have a size limit and every field is rebuilt by type. Whatever does not fit is `WireError`.
Pixels take another way: `shared_pixels.py`.
"""

from __future__ import annotations

import errno
import json
import math
import os
import socket
import struct
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward_client.dicom.display import LookUpTable, Rescale
from fedward_client.dicom.frames import Frames
from fedward_client.dicom.functional_groups import FrameFacts
from fedward_client.dicom.header import MAX_FRAMES

DEPTH = 2
"""Requests a process has at hand at most: it goes on while its last answer is being used."""

MAX_FILES = 64
NO_FILE = 255
"""Said by a decoder process of the file at hand, by its place in the request: there is none."""

_CROWDED_S = 30.0
_MAX_MESSAGE = 64 * 2**20
_UNCOUNTED = 2**20
_MAX_CONTAINERS, _MAX_VALUES = 2**21, 2**22
"""Of a message longer than that: parsed, an empty list of three bytes takes sixty-four."""

_LENGTH = struct.Struct("<I")
_JSON = json.JSONEncoder(separators=(",", ":"), check_circular=False)

Take = Callable[..., NDArray[Any]]
"""Gives the array of a shape, type and place that an answer announces; see `Memories.array`."""


class WireError(Exception):
    """The other side broke off or said something that makes no sense."""


def send(channel: socket.socket, message: object, files: Sequence[int] = ()) -> None:
    """Send one message and open files, which stay open here."""
    payload = _JSON.encode(message).encode("ascii")
    parts = _LENGTH.pack(len(payload)) + payload
    sent = _send_with_files(channel, parts, files) if files else 0
    if sent < len(parts):
        channel.sendall(memoryview(parts)[sent:])


def _send_with_files(channel: socket.socket, parts: bytes, files: Sequence[int]) -> int:
    """Send as much as goes at once, with the files.

    The system limits what all processes of a user together have under way; others take theirs in a moment.
    """
    until = time.monotonic() + _CROWDED_S
    while True:
        try:
            return socket.send_fds(channel, [parts], list(files))
        except OSError as error:
            if error.errno != errno.ETOOMANYREFS or time.monotonic() > until:
                raise
            time.sleep(0.002)


def receive(channel: socket.socket) -> tuple[Any, list[int]]:
    """Receive one message and its open files, which the caller closes.

    The whole message has to come within the socket's timeout.

    Raises:
        WireError: the other side is gone, or what came is no message.
        OSError: from the socket, for example when it takes too long.
    """
    patience_s = channel.gettimeout()
    start, files, _, _ = socket.recv_fds(channel, _LENGTH.size, MAX_FILES)
    until = math.inf if patience_s is None else time.monotonic() + patience_s
    try:
        if not start:
            raise WireError
        start += _exactly(channel, _LENGTH.size - len(start), until)
        (length,) = _LENGTH.unpack(start)
        if length > _MAX_MESSAGE:
            raise WireError
        return _parsed(_exactly(channel, length, until)), files
    except (ValueError, RecursionError):
        close_all(files)
        raise WireError from None
    except BaseException:
        close_all(files)
        raise
    finally:
        if channel.gettimeout() != patience_s:
            channel.settimeout(patience_s)


def _exactly(channel: socket.socket, length: int, until: float) -> bytes:
    received = bytearray(length)
    view = memoryview(received)
    while view:
        count = channel.recv_into(view)
        if not count:
            raise WireError
        view = view[count:]
        if view and until != math.inf:  # or one byte at a time could keep us for ever
            channel.settimeout(max(until - time.monotonic(), 1e-3))
    return bytes(received)


def _parsed(payload: bytes) -> Any:
    if len(payload) > _UNCOUNTED and (
        payload.count(b"[") + payload.count(b"{") > _MAX_CONTAINERS or payload.count(b",") > _MAX_VALUES
    ):
        raise WireError
    return json.loads(payload)


def close_all(files: Sequence[int]) -> None:
    """Close open files."""
    for file in files:
        os.close(file)


def frames_message(frames: Frames) -> dict[str, Any]:
    """Put everything but the values into JSON's types."""
    message = {name: getattr(frames, name) for name in _FIELDS}
    message["values"] = [list(frames.values.shape), frames.values.dtype.name]
    if frames.voi_lut is not None:
        table = frames.voi_lut
        message["voi_lut"] = [table.first_mapped, table.bits, table.entries.tolist(), table.num_entries]
    for name in ("positions", "orientations"):  # those of a mosaic's slices are not the file's
        array = message[name]
        message[name] = "facts" if array is getattr(frames.facts, name) else _array_message(array)
    for name in _VALUE_LISTS:
        message[name] = _short(message[name])
    message["facts"] = _facts_message(frames.facts)
    return message


def _array_message(array: NDArray[Any] | None) -> list[Any] | None:
    """Shape and bytes: many numbers written out one by one take longer than small images do to decode."""
    return None if array is None else [array.shape, b64encode(array.tobytes()).decode("ascii")]


def _array_from(message: Any, dtype: type[np.generic]) -> NDArray[Any] | None:
    if message is None:
        return None
    shape, encoded = message
    return np.frombuffer(bytearray(b64decode(encoded, validate=True)), dtype).reshape(shape)


def _facts_message(facts: FrameFacts) -> dict[str, Any]:
    message = {name: getattr(facts, name) for name in _FACTS}
    for name in _FACT_ARRAYS:
        message[name] = _array_message(message[name])
    message["rescales"] = [each and [each.slope, each.intercept] for each in facts.rescales]
    for name in _FACT_LISTS:
        message[name] = _short(message[name])
    return message


def _short(listed: Sequence[Any] | None) -> Sequence[Any] | None:
    """What is said of every frame alike is said once."""
    return listed[:1] if listed and listed.count(listed[0]) == len(listed) else listed


def _long(listed: Any, count: int) -> Any:
    return listed if listed is None or len(listed) != 1 else list(listed) * count


_FACT_ARRAYS: dict[str, type[np.generic]] = {
    "positions": np.float64,
    "orientations": np.float64,
    "spacings": np.float64,
    "slice_thickness": np.float64,
    "spacing_between": np.float64,
    "dimension_indices": np.int64,
    "in_stack": np.int64,
    "temporal_positions": np.int64,
    "echo_times": np.float64,
    "triggers": np.float64,
    "b_values": np.float64,
}


_VALUE_LISTS = ("stored_range", "windows", "voi_functions")
_FACT_LISTS = ("rescales", "rescale_types", "windows", "voi_functions", "stack_ids", "frame_types")
_FIELDS = tuple(each.name for each in fields(Frames))
_FACTS = tuple(each.name for each in fields(FrameFacts))
_FRAME_FACTS = tuple(name for name in _FACTS if name not in ("num_frames", "dimension_pointers"))


def frames_from(message: Any, take: Take) -> Frames:
    """Undo `frames_message`, with the values out of shared memory.

    Raises:
        WireError: it is none.
    """
    try:
        given = dict(message)
        given["values"] = take(*given["values"])
        table = given["voi_lut"]
        if table is not None:
            given["voi_lut"] = LookUpTable(table[0], table[1], np.array(table[2], np.uint16), table[3])
        facts = given["facts"] = _facts_from(given["facts"])
        for name in ("positions", "orientations"):
            as_facts = given[name] == "facts"
            given[name] = getattr(facts, name) if as_facts else _array_from(given[name], np.float64)
        for name in _VALUE_LISTS:
            given[name] = _long(given[name], len(given["values"]))
        given["stored_range"] = tuple((float(low), float(high)) for low, high in given["stored_range"])
        given["windows"] = _pairs(given["windows"])
        given["voi_functions"] = tuple(map(str, given["voi_functions"]))
        given["spacing"] = None if given["spacing"] is None else _pair(given["spacing"])
        return _consistent(Frames(**given))
    except (TypeError, ValueError, KeyError, IndexError, OverflowError, OSError):
        raise WireError from None


def _pair(listed: Any) -> tuple[float, float]:
    first, second = listed
    return float(first), float(second)


def _pairs(listed: Any) -> tuple[tuple[float, float] | None, ...] | None:
    return None if listed is None else tuple(each if each is None else _pair(each) for each in listed)


def _facts_from(message: Any) -> FrameFacts:
    given = dict(message)
    num_frames = given["num_frames"] = int(given["num_frames"])
    if not 1 <= num_frames <= MAX_FRAMES:
        raise WireError
    for name in _FACT_LISTS:
        given[name] = _long(given[name], num_frames)
    for name, dtype in _FACT_ARRAYS.items():
        given[name] = _array_from(given[name], dtype)
    given["rescales"] = tuple(each and Rescale(*_pair(each)) for each in given["rescales"])
    given["windows"] = tuple(tuple(map(_pair, each)) for each in given["windows"])
    given["frame_types"] = tuple(tuple(map(str, each)) for each in given["frame_types"])
    given["dimension_pointers"] = tuple(map(int, given["dimension_pointers"]))
    for name in ("rescale_types", "voi_functions", "stack_ids"):
        given[name] = tuple(map(str, given[name]))
    return FrameFacts(**given)


def _consistent(frames: Frames) -> Frames:
    """See that everything which is said frame by frame is said of every frame."""
    facts, num_values = frames.facts, len(frames.values)
    per_frame: list[tuple[Any, int]] = [(getattr(facts, name), facts.num_frames) for name in _FRAME_FACTS]
    per_frame += [(each, num_values) for each in (frames.positions, frames.orientations, frames.windows)]
    per_frame.append((frames.voi_functions, num_values))
    per_frame.append((frames.stored_range, 0 if frames.is_colour else num_values))
    if (
        any(each is not None and len(each) != count for each, count in per_frame)
        or any(each is not None and each.shape[1:] != sides for each, sides in _sides(frames))
        or frames.values.dtype != (np.uint8 if frames.is_colour else np.float32)
        or not isinstance(frames.units, str)
        or not all(isinstance(flag, bool) for flag in (frames.inverted, frames.from_mosaic))
    ):
        raise WireError
    return frames


def _sides(frames: Frames) -> list[tuple[NDArray[np.float64] | None, tuple[int, ...]]]:
    facts = frames.facts
    return [
        *((each, (3,)) for each in (frames.positions, facts.positions)),
        *((each, (6,)) for each in (frames.orientations, facts.orientations)),
        (facts.spacings, (2,)),
    ]
