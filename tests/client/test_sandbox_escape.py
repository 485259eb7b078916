"""What code inside a decoder process can do to its site: attacks, run where images are decoded.

The attacks run in the real worker, in the place where it would serve, once confined and once not: what
does not succeed without confinement either would prove nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.uid import CTImageStorage

from fedward_client.cohort_file import CohortFile
from fedward_client.cohort_units import select_units
from fedward_client.dicom.frames import decode_frames
from fedward_client.dicom.sandbox_answers import What, outcomes_of
from fedward_client.dicom.sandbox_wire import WireError, frames_message, receive
from fedward_client.dicom.shared_pixels import Memories, SharedArray
from fedward_client.index_reading import examine, found_message
from fedward_client.index_records import FileRead, FileRecord
from fedward_client.index_store import CaseIndex
from fedward_client.sources.folder import Candidate
from tests.builders import a_dicom

by_number = pytest.mark.skipif(platform.machine() != "x86_64", reason="the attacks call by number")

ATTACKS = {
    "read a key": "open(home / 'key.pem').read()",
    "list the home": "os.listdir(home)",
    "read a key through the parent": "open(f'/proc/{victim}/root{home}/key.pem').read()",
    "read the parent's memory": "open(f'/proc/{victim}/mem', 'rb')",
    "read the parent's environment": "open(f'/proc/{victim}/environ').read()",
    "overwrite a key": "open(home / 'key.pem', 'a')",
    "cut a key off": "os.truncate(home / 'key.pem', 1)",
    "show a key to everybody": "os.chmod(home / 'key.pem', 0o644)",
    "give a key away": "os.chown(home / 'key.pem', -1, os.getgid())",
    "backdate a key": "os.utime(home / 'key.pem', (0, 0))",
    "mark a key": "os.setxattr(home / 'key.pem', 'user.mark', b'1')",
    "move a key": "os.rename(home / 'key.pem', home / 'moved'); os.rename(home / 'moved', home / 'key.pem')",
    "link to a key": "os.link(home / 'key.pem', home / 'second'); os.unlink(home / 'second')",
    "change the mode of an image": "os.fchmod(image, 0o666)",
    "make a file": "open('/dev/shm/fedward-escape', 'w'); os.unlink('/dev/shm/fedward-escape')",
    "make a folder": "os.mkdir(home / 'new'); os.rmdir(home / 'new')",
    "connect": "socket.create_connection(('127.0.0.1', port), 2)",
    "send a datagram": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', port))",
    "speak to the kernel": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "make a unix socket": "socket.socket(socket.AF_UNIX)",
    "fork": "os.fork() or os._exit(0)",
    "fork by the newer call": "clone3()",
    "spawn": "os.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0)",
    "trace": "call(101, 0x4206, victim, 0, 0)",
    "signal": "os.kill(victim, 0)",
    "signal a thread": "call(234, victim, victim, 0)",
    "queue a signal": "libc.sigqueue(victim, 0, None) and fail()",
    "have the kernel signal": "fcntl.fcntl(channel, fcntl.F_SETOWN, victim)",
    "choose what the kernel signals": "fcntl.fcntl(channel, fcntl.F_SETSIG, 9)",
    "have the kernel signal, by ioctl": "fcntl.ioctl(channel, 0x8901, struct.pack('i', victim))",
    "limit another process": "resource.prlimit(victim, resource.RLIMIT_CORE, (0, 0))",
    "slow another process down": "os.setpriority(os.PRIO_PROCESS, victim, 19)",
    "move another process": "os.sched_setaffinity(victim, os.sched_getaffinity(victim))",
    "make memory that outlives it": "call(31, call(29, 0, 4096, 0o1600), 0, 0)",
    "watch files": "call(294, 0)",
    "take more memory": "bytearray(2**30)",
    "raise its limit on memory": "resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); bytearray(2**30)",
    "open many files": "[os.dup(0) for _ in range(5000)]",
    "write large files": "os.ftruncate(os.memfd_create('x'), 2**31)",
    "leave a core": "resource.setrlimit(resource.RLIMIT_CORE, (-1, -1))",
}

HARMLESS = {
    "read its program": "open(os.__file__).read()",
    "read what was handed to it": "os.pread(image, 1, 0)",
    "start a thread": "threading.Thread(target=int).start()",
    "make memory": "os.ftruncate(os.memfd_create('x'), 2**20)",
    "see its own limits": "resource.prlimit(0, resource.RLIMIT_AS)",
    "duplicate a file": "os.close(fcntl.fcntl(image, fcntl.F_DUPFD_CLOEXEC, 3))",
}

WORKER = """
import ctypes, fcntl, json, os, resource, socket, struct, sys, threading
from pathlib import Path
from fedward_client.dicom import sandbox_worker as worker

number, byte, home, victim, port, confined, statements = json.loads(sys.argv[1])
home = Path(home)
image = os.open(home / "image", os.O_RDONLY)
libc = ctypes.CDLL(None, use_errno=True)

def fail():
    raise OSError(ctypes.get_errno(), "")

def call(*arguments):
    result = libc.syscall(*arguments)
    if result < 0:
        fail()
    return result

def clone3():
    if call(435, struct.pack("11Q", *[0] * 4, 17, *[0] * 6), 88) == 0:
        os._exit(0)

def attack(channel, *serving):
    found = {}
    resource.setrlimit = setrlimit
    for name, statement in statements.items():
        try:
            exec(statement, globals() | {"channel": channel})
        except (OSError, MemoryError, ValueError, RuntimeError) as error:
            found[name] = type(error).__name__
        else:
            found[name] = "done"
    worker.send(channel, found)

worker._serve = attack
setrlimit = resource.setrlimit
if not confined:
    worker.confine = lambda readable: frozenset()
    resource.setrlimit = lambda kind, limit: None
worker.main([str(number), str(byte), str(512 * 2**20), "5"])
"""


@pytest.fixture
def victim() -> Iterator[int]:
    """Another process of the same user, which waits for its input to end."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.kill()


def tried(home: Path, victim: int, statements: dict[str, str], *, confined: bool) -> dict[str, Any]:
    """Statement -> "done", or what it raised, inside a worker."""
    (home / "key.pem").write_text("secret")
    (home / "key.pem").chmod(0o600)
    (home / "image").write_bytes(b"image")
    ours, theirs = socket.socketpair()
    byte = os.memfd_create("at_hand")
    os.ftruncate(byte, 1)
    with ours, theirs, os.fdopen(byte), socket.create_server(("127.0.0.1", 0)) as server:
        given = [theirs.fileno(), byte, str(home), victim, server.getsockname()[1], confined, statements]
        done = subprocess.Popen(
            [sys.executable, "-c", WORKER, json.dumps(given)],
            pass_fds=[theirs.fileno(), byte],
            # coverage would want to write down what it saw
            env={name: text for name, text in os.environ.items() if not name.startswith("COVERAGE")},
            start_new_session=True,
        )
        theirs.close()
        ours.settimeout(60)
        ready, _ = receive(ours)
        found, _ = receive(ours)
        assert done.wait(60) == 0
    assert ready["confined"] == (["calls", "files"] if confined else [])
    result: dict[str, Any] = found
    return result


@by_number
def test_no_attack_succeeds_that_would_without_confinement(tmp_path: Path, victim: int) -> None:
    free = tried(tmp_path, victim, ATTACKS, confined=False)
    held = tried(tmp_path, victim, ATTACKS, confined=True)

    assert {name for name, outcome in free.items() if outcome != "done"} <= needs_privilege()
    assert {name: outcome for name, outcome in held.items() if outcome == "done"} == {}


def needs_privilege() -> set[str]:
    """What a user without privilege is not permitted anyway, or this file system does not know."""
    return set() if os.geteuid() == 0 else {"leave a core", "read the parent's memory", "mark a key"}


def test_what_decoding_needs_is_left(tmp_path: Path, victim: int) -> None:
    assert set(tried(tmp_path, victim, HARMLESS, confined=True).values()) == {"done"}


# What a decoder process that was taken over may say. The site is this process.

BAD: tuple[Any, ...] = (
    *(None, True, -1, 0, 0.5, 1e999, -1e999, float("nan"), 2**70, -(2**70)),
    *("", "\ud800", "x" * 9000, "DOE^JOHN", [], {}, [[]], [None], {"a": 1}, [1, 2, 3]),
)


def places_in(message: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every place of a message at which something else could stand."""
    if path:
        yield path
    if isinstance(message, dict | list):
        inner = message.items() if isinstance(message, dict) else enumerate(message)
        for key, value in inner:
            yield from places_in(value, (*path, key))


def forged(message: Any, path: tuple[str | int, ...], value: Any) -> Any:
    """The message with another value, as it comes over the wire."""
    found = json.loads(json.dumps(message))
    place = found
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return json.loads(json.dumps(found))


def honest(what: What) -> dict[str, Any]:
    data = a_dicom(
        np.arange(4096, dtype=np.uint16).reshape(64, 64), Modality="CT", SOPClassUID=CTImageStorage
    )
    content = hashlib.sha256(data).hexdigest()
    found = found_message(examine(data, content))
    replies: dict[str, Any] = {
        "facts": {"facts": [content, len(data), 1, found]},
        "frames": {"frames": frames_message(decode_frames(data))},
        "image": {"image": [[64, 64], "float32"]},
    }
    return {"replies": [replies[what]], "retiring": False, "cpu_s": 0.1}


@pytest.mark.parametrize("what", ["facts", "frames", "image"])
def test_whatever_is_said_is_refused_or_can_be_kept(what: What, tmp_path: Path) -> None:
    """Each value of an honest answer is replaced by each bad one; the index takes what was let through."""
    shared = SharedArray()
    shared.allocate((1, 64, 64), np.dtype(np.float32))[...] = 0
    memories = Memories()
    number = memories.reserve()
    memories.renew(number, shared.file)
    message = honest(what)
    records: list[FileRecord] = []
    assert outcomes_of(message, 1, what, partial(memories.array, number, lend=False))
    for path in places_in(message):
        for bad in BAD:
            try:
                (outcome,) = outcomes_of(
                    forged(message, path, bad), 1, what, partial(memories.array, number, lend=False)
                )
            except (WireError, KeyError, TypeError, ValueError, IndexError):
                continue
            if isinstance(outcome, FileRead):
                name = b"%d" % len(records)
                candidate = Candidate(name, outcome.size, outcome.mtime_ns)
                records.append(FileRecord(candidate, hashlib.sha256(name).hexdigest(), outcome.found))
    with CaseIndex(tmp_path) as index:
        index.record(records)
        index.settle({record.file.name for record in records}, "forged")
        for file in (CohortFile(), CohortFile(unit="volume")):
            select_units(index, file, ("CR", "DX", "CT"))
            index.quarantined(file.rule(("CT",)))
    shared.close()


def said(payload: bytes, pause_s: float = 0.0, size: int = 2**20) -> WireError | OSError | Any:
    """What is received, in half a second's patience, of somebody who says this a piece at a time."""
    ours, theirs = socket.socketpair()

    def say() -> None:
        with theirs, suppress(OSError):
            for start in range(0, len(payload), size):
                theirs.sendall(payload[start : start + size])
                paused.wait(pause_s)

    paused, speaker = threading.Event(), threading.Thread(target=say)
    with ours:
        ours.settimeout(0.5)
        speaker.start()
        try:
            return receive(ours)[0]
        except (WireError, OSError) as error:
            return error
        finally:
            assert ours.gettimeout() == 0.5
            paused.set()
            ours.shutdown(socket.SHUT_RDWR)
            speaker.join()


def test_a_process_that_answers_byte_by_byte_is_given_up() -> None:
    drip = struct.pack("<I", 1000) + b"[" + b" " * 998 + b"]"
    started = time.monotonic()

    assert isinstance(said(drip, pause_s=0.02, size=1), OSError)
    assert time.monotonic() - started < 5
    assert said(drip) == []


@pytest.mark.parametrize("piece", [b"[],", b"{},", b"1,"])
def test_an_answer_that_would_swell_is_not_read(piece: bytes) -> None:
    """Sixty megabytes of empty lists are two gigabytes in memory."""
    inside = piece * (15 * 2**20 // len(piece))

    assert isinstance(said(struct.pack("<I", len(inside) + 3) + b"[" + inside + b"1]"), WireError)


@pytest.mark.parametrize("lend", [False, True])
def test_only_what_is_lent_can_change_after_it_was_looked_at(lend: bool) -> None:
    shared = SharedArray()
    theirs = shared.allocate((2, 64, 64), np.dtype(np.float32))
    theirs[...] = 1
    memories = Memories()
    number = memories.reserve()
    memories.renew(number, shared.file)
    ours = memories.array(number, [2, 64, 64], "float32", lend=lend)
    theirs[...] = np.nan

    assert np.isnan(ours).any() == lend
    shared.close()
