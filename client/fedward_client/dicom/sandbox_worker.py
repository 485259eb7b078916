"""A process that decodes images for `sandbox.py` and can do nothing else (hop 2).

Started as a program of its own, so it holds no key and no open file of the site. It loads the decoders,
limits itself, gives up files and network (`confinement.py`), and then answers requests: each comes with
open files, which go back as facts and pixels in shared memory. Each file has its own limits, also where
several come together. Whatever an image makes it do ends with this process and costs that image.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import math
import mmap
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward_client.dicom.confinement import confine
from fedward_client.dicom.decode import decode_image
from fedward_client.dicom.frames import decode_frames
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.sandbox_wire import (
    NO_FILE,
    WireError,
    close_all,
    frames_message,
    receive,
    send,
)
from fedward_client.dicom.shared_pixels import MEMORIES, SharedArray, borrowed
from fedward_client.dicom.stored_pixels import decode_stored
from fedward_client.index_reading import examine, found_message

_PIXELS_PER_CPU_S = 8_000_000
"""The slowest decoder (JPEG 2000) does three times as many on a slow machine."""

_LABEL_PIXELS = 2**27
"""Of a segmentation or structure set: 512 x 512 in 512 frames; how many it has is known only when read."""

_MAX_GROWTH_BYTES = 128 * 2**20
"""A process that has grown by so much, by leaks or fragments, makes room for a fresh one.

Half of it may be shared memory, a quarter what `malloc` keeps.
"""

_MALLOC_KEEPS_BYTES = 32 * 2**20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h

_MAX_OPEN_FILES = 4096
"""It needs forty. But the system takes this for the limit of what all processes of the user have under way,
files handed to other decoder processes among them, and lets nobody above it send any.
"""

_PIECE = 2**20
_LIBRARY_FOLDERS = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/local/lib", "/etc/ld.so.cache")


@dataclass(frozen=True)
class Limits:
    """What one image may take.

    Args:
        memory_bytes: of the whole process.
        cpu_s: processor time, plus one second for every eight million pixels.
    """

    memory_bytes: int
    cpu_s: float

    @property
    def max_pixel_bytes(self) -> int:
        """A file, its pixels and their float32 copy fit into memory together."""
        return self.memory_bytes // 4

    @property
    def max_file_bytes(self) -> int:
        """The most that is read of a file into memory."""
        return self.memory_bytes // 2


class _ProcessorTime:
    """Ends this process when an image has had its processor time."""

    def __init__(self, cpu_s: float) -> None:
        self._cpu_s = cpu_s

    def start(self, num_pixels: int = 0) -> None:
        allowed_s = self._cpu_s + num_pixels / _PIXELS_PER_CPU_S
        signal.setitimer(signal.ITIMER_PROF, allowed_s)
        # The same again in whole seconds, for a decoder that never comes back to Python. One that an image
        # took over can put off both; the site's clock ends it (`sandbox.py`).
        used_s = time.process_time()
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used_s + allowed_s) + 1, hard))

    def stop(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main(arguments: Sequence[str]) -> None:
    """Serve on an inherited socket until the other side closes it.

    Args:
        arguments: file numbers of the socket and of the byte that says which file is at hand, bytes of
            memory, seconds of processor time.
    """
    channel = socket.socket(fileno=int(arguments[0]))
    at_hand = mmap.mmap(int(arguments[1]), 1)
    os.close(int(arguments[1]))
    limits = Limits(int(arguments[2]), float(arguments[3]))
    memory = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    gc.collect()
    gc.freeze()
    _keep_freed_memory()
    confined = confine(map(Path, _readable()))
    mapped, resident = _memory(memory)
    # Libraries are mapped but hardly resident: the limit on mapped memory bounds what is added.
    most = mapped + max(limits.memory_bytes - resident, 2**26)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits.memory_bytes, limits.memory_bytes))
    open_files = min(_MAX_OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(nowhere, sys.stderr.fileno(), inheritable=False)  # decoders quote what they do not understand
    send(channel, {"ready": True, "confined": sorted(confined)})
    try:
        _serve(channel, limits, lambda: _memory(memory)[0] > mapped + _MAX_GROWTH_BYTES, at_hand)
    except (WireError, OSError):  # the site is done with us
        return


def _keep_freed_memory() -> None:
    """Tell `malloc` not to hand every freed buffer back: the next image would pay for fresh pages."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc; others do without
        mallopt(_M_MMAP_THRESHOLD, _MALLOC_KEEPS_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _MALLOC_KEEPS_BYTES)


def _readable() -> set[str]:
    return {sys.prefix, sys.base_prefix, sys.exec_prefix, *filter(None, sys.path), *_LIBRARY_FOLDERS}


def _memory(statm: int) -> tuple[int, int]:
    """Bytes mapped and bytes resident."""
    mapped, resident = os.pread(statm, 128, 0).split()[:2]
    page = resource.getpagesize()
    return int(mapped) * page, int(resident) * page


def _serve(
    channel: socket.socket, limits: Limits, has_grown: Callable[[], bool], at_hand: mmap.mmap | bytearray
) -> None:
    processor_time = _ProcessorTime(limits.cpu_s)
    memories: list[SharedArray] = []

    def make_room() -> None:
        for memory in memories:
            if not memory.holds_array:
                memory.close()

    memories.extend(SharedArray(make_room) for _ in range(MEMORIES))
    while True:
        request, files = receive(channel)
        shared, started_s = memories[request["memory"]], time.process_time()
        try:
            replies = _replies(request, files, limits, shared, processor_time, at_hand)
            retiring = has_grown()
            answer = {"replies": replies, "retiring": retiring, "cpu_s": time.process_time() - started_s}
            send(channel, answer, shared.unsent())
        finally:
            processor_time.stop()
            shared.release()
            close_all(files)
        if retiring:
            return


def _replies(
    request: dict[str, Any],
    files: Sequence[int],
    limits: Limits,
    shared: SharedArray,
    processor_time: _ProcessorTime,
    at_hand: mmap.mmap | bytearray,
) -> list[dict[str, Any]]:
    """Answer for each file, or for as many as there is room for; the site asks again for the others."""

    def allocate(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        processor_time.start(math.prod(shape))
        return shared.allocate(shape, dtype)

    replies = []
    contents = request["contents"]
    given = files[len(contents)] if request["pixels"] else -1
    for place, (file, content) in enumerate(zip(files[: len(contents)], contents, strict=True)):
        at_hand[0] = place
        processor_time.start(_LABEL_PIXELS if request["what"] == "labels" else 0)
        reply = _reply(request | {"given": given}, file, content, limits, shared, allocate)
        if shared.is_full:
            break
        replies.append(reply)
    at_hand[0] = NO_FILE
    return replies


def _reply(
    request: dict[str, Any],
    file: int,
    content: str | None,
    limits: Limits,
    shared: SharedArray,
    allocate: Callable[[tuple[int, ...], np.dtype[Any]], NDArray[Any]],
) -> dict[str, Any]:
    """Answer for one file; whatever it may be refused for is an answer too."""
    what = request["what"]
    try:
        sha256, data = _read(file, limits.max_file_bytes)
        if content is not None and content != sha256:
            return {"changed": True}
        if what == "facts":
            status = os.fstat(file)
            found = found_message(examine(data, sha256))
            return {"facts": [sha256, status.st_size, status.st_mtime_ns, found]}
        if data is None:
            raise UnusableImageError(Reason.TOO_LARGE)
        if what == "labels":
            return _labels(data, request["question"])
        if what == "copy":
            return _copied(data, request, shared)
        return _decoded(what, data, limits, shared, allocate)
    except UnusableImageError as error:
        shared.drop()
        return {"refused": error.reason.value, "kind": error.kind}
    except MemoryError:
        shared.drop()
        return {"refused": Reason.OVER_LIMIT.value, "kind": ""}


def _decoded(
    what: str,
    data: bytes,
    limits: Limits,
    shared: SharedArray,
    allocate: Callable[[tuple[int, ...], np.dtype[Any]], NDArray[Any]],
) -> dict[str, Any]:
    if what == "frames":
        frames = decode_frames(data, max_pixel_bytes=limits.max_pixel_bytes, allocate=allocate)
        message = frames_message(frames)
        message["values"].append(shared.keep())
        return {"frames": message}
    if what == "stored":
        image: NDArray[Any] = decode_stored(data, max_pixel_bytes=limits.max_pixel_bytes, allocate=allocate)
    else:
        image = decode_image(data, allocate=allocate)
    return {"image": [list(image.shape), image.dtype.name, shared.keep()]}


def _labels(data: bytes, question: str) -> dict[str, Any]:
    from fedward_client.dicom.label_objects import answer_question  # most processes are never asked

    return {"labels": answer_question(data, question)}


def _copied(data: bytes, request: dict[str, Any], shared: SharedArray) -> dict[str, Any]:
    from fedward_client.dicom.copy_answers import answer_copy  # most processes are never asked

    pixels = borrowed(request["given"], *request["pixels"]) if request["pixels"] else None
    reply, written = answer_copy(data, request["question"], pixels)
    if written:
        image = shared.allocate((1, len(written)), np.dtype(np.uint8))
        image[0] = np.frombuffer(written, np.uint8)
        reply["image"] = [list(image.shape), image.dtype.name, shared.keep()]
    return reply


def _read(file: int, most: int) -> tuple[str, bytes | None]:
    """Hash a file and, unless it is larger than `most`, hold it.

    Raises:
        UnusableImageError: the disk, or the server that the folder lies on, does not give it.
    """
    try:
        return _content(file, most)
    except OSError:
        raise UnusableImageError(Reason.UNREADABLE) from None


def _content(file: int, most: int) -> tuple[str, bytes | None]:
    size = os.fstat(file).st_size
    if size <= most:
        parts = []
        while piece := os.read(file, max(size, 1) + 1):
            parts.append(piece)
            if sum(map(len, parts)) > most:
                raise UnusableImageError(Reason.TOO_LARGE)
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        return hashlib.sha256(data).hexdigest(), data
    digest = hashlib.sha256()
    while piece := os.read(file, _PIECE):
        digest.update(piece)
    return digest.hexdigest(), None


if __name__ == "__main__":
    main(sys.argv[1:])
