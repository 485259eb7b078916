"""Write small files so that a crash or a full disk leaves the old content or the new, never a part.

Keys, rosters, approvals and settings are written through here. A file is private (0600) unless its
caller says otherwise, and from its first moment: it is created with its mode, not changed to it.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path


def write_new(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Create a file that must not exist yet, and flush it to the disk.

    Raises:
        FileExistsError: something, even a dangling link, has that name.
        OSError: the disk is full or the folder is not writable; nothing stays behind.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):
            path.unlink()
        raise


def write_atomically(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Put `data` at `path`, replacing what is there in one step.

    Raises:
        OSError: the disk is full or the folder is not writable; the old content stays.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    write_new(draft, data, mode)
    try:
        draft.replace(path)
    except OSError:
        draft.unlink()
        raise
    flush_directory(path.parent)


def flush_directory(directory: Path) -> None:
    """Make names created or replaced in a directory survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
