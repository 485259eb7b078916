"""One process a folder: two servers or two site daemons in one home would undo each other's work.

The lock is the kernel's (flock): it ends with the last process that holds it, however that process ends, so
there is no stale lock to remove. The file stays; it holds the number of the process that locked it last.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

from fedward_common.errors import UsageError


def lock_home(file: Path, *, holder: str, remedy: str, wait_s: float = 0.0) -> int:
    """Lock a folder by a file in it and return the descriptor that holds the lock; closing it gives it up.

    A process that inherits the descriptor holds the lock as well.

    Args:
        file: the lock file; made if absent, its folder must exist.
        holder: who else might have it, and of what, for the message: "another daemon serves /home".
        remedy: what to do then.
        wait_s: seconds to wait for whoever has it.

    Raises:
        UsageError: somebody has it, or the file cannot be made or locked.
    """
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise UsageError(
            f"{file}: {error.strerror}", remedy="Let this user write to the folder, which must exist."
        ) from error
    try:
        _lock(descriptor, holder, remedy, time.monotonic() + wait_s)
    except OSError as error:
        os.close(descriptor)
        raise UsageError(
            f"{file} cannot be locked: {error.strerror}",
            remedy="Put the folder on a file system that knows locks: a local disk, or NFS 4.",
        ) from error
    except BaseException:
        os.close(descriptor)
        raise
    with suppress(OSError):  # a full disk: the lock holds all the same
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def _lock(descriptor: int, holder: str, remedy: str, until: float) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() >= until:
                raise UsageError(f"{holder}{_locked_by(descriptor)}", remedy=remedy) from error
            time.sleep(0.05)
        else:
            return


def _locked_by(descriptor: int) -> str:
    content = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
    return f" (locked by process {content})" if content.isdigit() else ""
