"""Files below a site's folder, opened for a decoder process (hop 2).

A decoder process opens nothing itself: it is handed files. They are reached folder by folder from the
root and no link is followed, so nothing that is put in a folder's place meanwhile leads elsewhere.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_NONBLOCK: opening a pipe that was put in the file's place must not hang.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MOST_FOLDERS = 32


@dataclass(frozen=True)
class SiteFile:
    """A file below a root.

    Args:
        root: folder.
        name: path relative to it, as the operating system's bytes.
        content: SHA-256 (hex) that it must still have; None takes whatever is there.
        question: for "labels" and "copy"; see `label_objects.py` and `copy_answers.py`.
        pixels: for "copy": what its compressed pixels are, where they are known already.
    """

    root: Path = field(repr=False)
    name: bytes = field(repr=False)
    content: str | None = field(default=None, repr=False)
    question: str = field(default="", repr=False)
    pixels: NDArray[np.integer] | None = field(default=None, repr=False, compare=False)


class SiteFolders:
    """Folders that files are opened in, held open: a series lies in one, and the way there is long."""

    def __init__(self) -> None:
        self._open: dict[tuple[Path, bytes], int] = {}

    def open(self, file: SiteFile) -> int:
        """Open a regular file below its root, through no link; the caller closes it.

        Raises:
            OSError: it is gone, not ours to read, or no such file.
        """
        folder, _, name = file.name.rpartition(b"/")
        held = self._open.get((file.root, folder))
        if held is not None:
            try:
                return _regular(name, held)
            except OSError:  # another folder may have taken the held one's place
                self.close()
        if len(self._open) >= _MOST_FOLDERS:
            self.close()
        held = self._open[file.root, folder] = _reached(file.root, folder)
        return _regular(name, held)

    def close(self) -> None:
        """Let go of all folders."""
        for folder in self._open.values():
            os.close(folder)
        self._open.clear()


def _reached(root: Path, folder: bytes) -> int:
    reached = os.open(root.resolve(strict=True), _FOLDER)
    for part in folder.split(b"/") if folder else []:
        above = reached
        try:
            reached = os.open(_step(part), _FOLDER, dir_fd=above)
        finally:
            os.close(above)
    return reached


def _regular(name: bytes, folder: int) -> int:
    descriptor = os.open(_step(name), _FILE, dir_fd=folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("no longer a regular file")
    return descriptor


def _step(part: bytes) -> bytes:
    if part in (b"", b".", b".."):
        raise OSError("a name that leads elsewhere")
    return part
