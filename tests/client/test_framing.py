"""Frames between daemon and worker: whole or not at all, never unpickled, never more memory than meant."""

from __future__ import annotations

import json
import pickle
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedward_client.framing import receive_frame, send_frame

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.settimeout(20)
    yield ours, theirs
    ours.close()
    theirs.close()


def raw_frame(header: bytes, payload: bytes = b"") -> bytes:
    return struct.pack("<IQ", len(header), len(payload)) + header + payload


@pytest.mark.parametrize("size", [0, 1, 5_000_000])
def test_a_frame_arrives_as_it_was_sent_in_however_many_pieces(pair: Pair, size: int) -> None:
    header: dict[str, Any] = {"op": "train", "counts": {"a": [1, None, 2.5]}}
    payload = bytes(range(256)) * (size // 256) + bytes(size % 256)
    sender = threading.Thread(target=send_frame, args=(pair[0], header, memoryview(payload)))
    sender.start()
    assert receive_frame(pair[1]) == (header, bytearray(payload))
    sender.join()


def test_frames_follow_each_other(pair: Pair) -> None:
    for number in range(3):
        send_frame(pair[0], {"n": number}, bytes([number]))
    assert [receive_frame(pair[1]) for _ in range(3)] == [
        ({"n": number}, bytearray([number])) for number in range(3)
    ]


@pytest.mark.parametrize("kept", [0, 5, 12, 15, -1])
def test_a_stream_that_ends_in_a_frame_is_an_eof_error(pair: Pair, kept: int) -> None:
    whole = raw_frame(b'{"ok":true}', b"1234")
    pair[0].sendall(whole[:kept])
    pair[0].close()
    with pytest.raises(EOFError):
        receive_frame(pair[1])


@pytest.mark.parametrize("lengths", [(2**32 - 1, 0), (8 * 2**20 + 1, 0), (2, 2**64 - 1), (2, 8 * 2**30 + 1)])
def test_lengths_beyond_any_message_are_refused_before_memory_is_taken(
    pair: Pair, lengths: tuple[int, int]
) -> None:
    pair[0].sendall(struct.pack("<IQ", *lengths) + b"{}")
    with pytest.raises(ValueError, match="larger"):
        receive_frame(pair[1])


@pytest.mark.parametrize(
    "header",
    [b"", b"{", b"[1]", b"5", b"null", b'"text"', b"\xff\xfe", b"[" * 200_000, pickle.dumps({"ok": True})],
    ids=["empty", "open", "list", "number", "null", "text", "no-utf8", "deep", "pickle"],
)
def test_a_header_that_is_no_json_object_is_refused(pair: Pair, header: bytes) -> None:
    sender = threading.Thread(target=pair[0].sendall, args=(raw_frame(header),))
    sender.start()
    with pytest.raises((ValueError, TypeError)):
        receive_frame(pair[1])
    sender.join()


@given(st.binary(max_size=60))
def test_any_bytes_are_a_frame_or_one_of_the_listed_errors(raw: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(raw)
        ours.close()
        try:
            header, payload = receive_frame(theirs)
        except (EOFError, ValueError, TypeError):
            return
        begin = 12 + struct.unpack("<I", raw[:4])[0]
        assert json.loads(raw[12:begin]) == header
        assert raw[begin : begin + len(payload)] == payload
