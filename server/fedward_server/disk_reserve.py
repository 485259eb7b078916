"""Some space put aside, so that a full disk can still be reported.

A run that ends because the disk is full must be able to say so, on the same disk. The server keeps a file
of zeros beside its records and gives it up when a record could not be written; it is made again as soon
as there is space for it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

NUM_BYTES = 2 * 2**20


class DiskReserve:
    """The file, held or given up.

    Args:
        path: on the disk that may become full.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def hold(self) -> bool:
        """Put the space aside unless that is done; whether it is now."""
        with suppress(OSError):
            if self._path.stat().st_size == NUM_BYTES:
                return True
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                # Real zeros: a sparse file holds no space, and not every file system can allocate.
                os.write(descriptor, bytes(NUM_BYTES))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if self._path.stat().st_size == NUM_BYTES:
                return True
        except OSError:
            pass
        self.release()
        return False

    def release(self) -> None:
        """Give the space up."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
