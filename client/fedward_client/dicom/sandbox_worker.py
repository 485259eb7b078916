"""A process that decodes images for `sandbox.py` and can do nothing else (hop 2).

Started as a program of its own, so it holds no key and no open file of the site. It loads the decoders,
limits itself, gives up files and network (`confinement.py`), and then answers requests: each comes with
an open file and goes back as facts and pixels in shared memory. Whatever an image makes it do ends with
this process and costs that image.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import math
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
    WireError,
    close_all,
    frames_message,
    receive,
    send,
)
from fedward_client.dicom.shared_pixels import MEMORIES, SharedArray
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

_MAX_OPEN_FILES = 128
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
        # The same again in whole seconds: nothing that runs in this process can put it off.
        used_s = time.process_time()
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used_s + allowed_s) + 1, hard))

    def stop(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main(arguments: Sequence[str]) -> None:
    """Serve on an inherited socket until the other side closes it.

    Args:
        arguments: file number of the socket, bytes of memory, seconds of processor time.
    """
    channel = socket.socket(fileno=int(arguments[0]))
    limits = Limits(int(arguments[1]), float(arguments[2]))
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
    resource.setrlimit(resource.RLIMIT_NOFILE, (_MAX_OPEN_FILES, _MAX_OPEN_FILES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(nowhere, sys.stderr.fileno(), inheritable=False)  # decoders quote what they do not understand
    send(channel, {"ready": True, "confined": sorted(confined)})
    try:
        _serve(channel, limits, lambda: _memory(memory)[0] > mapped + _MAX_GROWTH_BYTES)
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


def _serve(channel: socket.socket, limits: Limits, has_grown: Callable[[], bool]) -> None:
    processor_time = _ProcessorTime(limits.cpu_s)
    memories: list[SharedArray] = []

    def make_room() -> None:
        for memory in memories:
            if not memory.holds_array:
                memory.close()

    memories.extend(SharedArray(make_room) for _ in range(MEMORIES))
    while True:
        request, files = receive(channel)
        replies, shared = [], memories[request["memory"]]
        try:
            for file, content in zip(files, request["contents"], strict=True):
                processor_time.start()
                if request["what"] == "labels":
                    processor_time.start(_LABEL_PIXELS)
                    replies.append(_labels(request["question"], file, content, limits))
                else:
                    replies.append(_answer(request["what"], file, content, limits, shared, processor_time))
            retiring = has_grown()
            send(channel, {"replies": replies, "retiring": retiring}, shared.unsent())
        finally:
            processor_time.stop()
            shared.release()
            close_all(files)
        if retiring:
            return


def _answer(
    what: str,
    file: int,
    content: str | None,
    limits: Limits,
    shared: SharedArray,
    processor_time: _ProcessorTime,
) -> dict[str, Any]:
    def allocate(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        processor_time.start(math.prod(shape))
        return shared.allocate(shape, dtype)

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
        if what == "frames":
            frames = decode_frames(data, max_pixel_bytes=limits.max_pixel_bytes, allocate=allocate)
            return {"frames": frames_message(frames)}
        if what == "stored":
            image: NDArray[Any] = decode_stored(
                data, max_pixel_bytes=limits.max_pixel_bytes, allocate=allocate
            )
        else:
            image = decode_image(data, allocate=allocate)
        return {"image": [list(image.shape), image.dtype.name]}
    except UnusableImageError as error:
        shared.release()
        return {"refused": error.reason.value, "kind": error.kind}
    except MemoryError:
        shared.release()
        return {"refused": Reason.OVER_LIMIT.value, "kind": ""}


def _labels(question: str, file: int, content: str | None, limits: Limits) -> dict[str, Any]:
    from fedward_client.dicom.label_objects import answer_question  # most processes are never asked

    try:
        sha256, data = _read(file, limits.max_file_bytes)
        if content is not None and content != sha256:
            return {"changed": True}
        if data is None:
            raise UnusableImageError(Reason.TOO_LARGE)
        return {"labels": answer_question(data, question)}
    except UnusableImageError as error:
        return {"refused": error.reason.value, "kind": error.kind}
    except MemoryError:
        return {"refused": Reason.OVER_LIMIT.value, "kind": ""}


def _read(file: int, most: int) -> tuple[str, bytes | None]:
    """Hash a file and, unless it is larger than `most`, hold it."""
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
