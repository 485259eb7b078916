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


@dataclass(frozen=True, slots=True)
class Candidate:
    """One regular file under the root.

    Args:
        name: path relative to the root, as the operating system's bytes (it need not be UTF-8).
        size: bytes.
        mtime_ns: time of last change, nanoseconds since 1970.
        placed_ns: when it came to lie here as it is, likewise: a copy may keep the time of its original,
            but not this one. Says nothing about what the file holds, so two that differ in it are equal.
    """

    name: bytes = field(repr=False)
    size: int
    mtime_ns: int
    placed_ns: int = field(default=0, compare=False)


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
        waiting = _entries(base)
    except OSError as error:
        raise CohortError(
            "the image folder cannot be listed",
            remedy="Check `dicom` or [source] in site.toml, that it is mounted, and its mode.",
        ) from error
    start = len(base.rstrip(b"/")) + 1
    while waiting:  # not recursive: folders may be nested deeper than Python's stack
        entry = waiting.pop()
        try:
            if entry.is_dir(follow_symlinks=False):
                waiting += _entries(entry.path)
                continue
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:  # gone meanwhile
            continue
        except OSError:
            yield Candidate(entry.path[start:], 0, 0)
            continue
        if stat.S_ISREG(status.st_mode):
            yield Candidate(entry.path[start:], status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _entries(folder: bytes) -> list[os.DirEntry[bytes]]:
    """What a folder holds, by name, last first."""
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name, reverse=True)


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
