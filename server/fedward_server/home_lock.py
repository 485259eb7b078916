"""One server a folder: two would start each other's runs and overwrite each other's checkpoints."""

from __future__ import annotations

import fcntl
import os
import time

from fedward_common.errors import UsageError
from fedward_server.config import ServerHome

_WAIT_S = 20.0


def only_server(home: ServerHome, *, wait_s: float = _WAIT_S) -> int:
    """Lock the folder and return the descriptor that holds the lock.

    Runners inherit the descriptor, and a lock of this kind is held until its last copy is closed; so a
    server started in place of one that died waits here until the old runners have ended.

    Args:
        wait_s: seconds to wait for that.

    Raises:
        UsageError: somebody still holds the lock, or the file cannot be made.
    """
    try:
        descriptor = os.open(home.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UsageError(
            f"{home.lock}: {error.strerror}", remedy="Let the server write to its folder."
        ) from error
    until = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError as error:
            if time.monotonic() >= until:
                os.close(descriptor)
                raise UsageError(
                    f"another server, or a run of one that died, still uses {home.root}",
                    remedy="Stop that process, or give this server another folder.",
                ) from error
            time.sleep(0.05)
