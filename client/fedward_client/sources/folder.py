"""A folder as a source of images (hop 1): find regular files, read their bytes, nothing more.

Promises: names in a stable order whatever the file system returns; no symbolic link is followed, so
nothing outside the folder is ever read; a device or a pipe is never opened for reading; a file that
does not fit in memory is hashed but not held.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fedward_common.errors import CohortError

MAX_FILE_BYTES = 256 * 2**20
"""Larger files are hashed in pieces and never handed to a parser."""

_PIECE = 2**20


@dataclass(frozen=True)
class Candidate:
    """One regular file under the root.

    Args:
        name: path relative to the root, as the operating system's bytes (it need not be UTF-8).
        size: bytes.
        mtime_ns: time of last change, nanoseconds since 1970.
    """

    name: bytes = field(repr=False)
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Content:
    """What a file held when it was read.

    Args:
        sha256: of the whole content, hex.
        data: the bytes; None when there are more than `MAX_FILE_BYTES`.
        size: bytes.
        mtime_ns: time of last change of exactly what was read.
    """

    sha256: str
    data: bytes | None = field(repr=False)
    size: int
    mtime_ns: int


def find_files(root: Path) -> Iterator[Candidate]:
    """Yield every regular file below `root`, folders and names in byte order.

    Symbolic links, pipes, sockets and devices are passed over. A subfolder that cannot be listed is yielded
    as if it were a file, which nobody can read either: so it is counted, and its images do not vanish unsaid.

    Raises:
        CohortError: `root` is not a folder that can be listed.
    """
    try:
        base = os.fsencode(root.resolve(strict=True))
        waiting = _entries(base, b"")
    except OSError as error:
        raise CohortError(
            "the image folder cannot be listed",
            remedy="Check `dicom` or [source] in site.toml, that it is mounted, and its mode.",
        ) from error
    while waiting:  # not recursive: folders may be nested deeper than Python's stack
        name = waiting.pop()
        try:
            status = os.lstat(os.path.join(base, name))  # noqa: PTH118 - names are bytes, not text
            if stat.S_ISDIR(status.st_mode):
                waiting += _entries(base, name)
        except FileNotFoundError:  # gone meanwhile
            continue
        except OSError:
            yield Candidate(name, 0, 0)
            continue
        if stat.S_ISREG(status.st_mode):
            yield Candidate(name, status.st_size, status.st_mtime_ns)


def _entries(base: bytes, folder: bytes) -> list[bytes]:
    """Names in a folder, last first, each with the folder in front."""
    names = os.listdir(os.path.join(base, folder))  # noqa: PTH118, PTH208
    return [os.path.join(folder, name) for name in sorted(names, reverse=True)]  # noqa: PTH118


def read_content(root: Path, name: bytes) -> Content:
    """Read and hash one file found by `find_files`.

    Raises:
        OSError: not readable, gone, no longer a regular file, or now reached through a link.
    """
    base = os.fsencode(root.resolve(strict=True))
    path = os.path.join(base, name)  # noqa: PTH118
    if os.path.realpath(path) != path:
        raise OSError("reached through a symbolic link")
    # O_NONBLOCK: opening a pipe that was put in the file's place must not hang.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError("no longer a regular file")
        if status.st_size > MAX_FILE_BYTES:
            digest = hashlib.sha256()
            while piece := file.read(_PIECE):
                digest.update(piece)
            return Content(digest.hexdigest(), None, status.st_size, status.st_mtime_ns)
        data = file.read(MAX_FILE_BYTES + 1)
    held = data if len(data) <= MAX_FILE_BYTES else None
    return Content(hashlib.sha256(data).hexdigest(), held, status.st_size, status.st_mtime_ns)
