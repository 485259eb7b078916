"""One server a folder: two would start each other's runs and overwrite each other's checkpoints."""

from __future__ import annotations

from fedward_common.home_lock import lock_home
from fedward_server.config import ServerHome

_WAIT_S = 20.0


def only_server(home: ServerHome, *, wait_s: float = _WAIT_S) -> int:
    """Lock the folder and return the descriptor that holds the lock.

    Runners inherit the descriptor; so a server started in place of one that died waits here until the old
    runners have ended.

    Args:
        wait_s: seconds to wait for that.

    Raises:
        UsageError: somebody still holds the lock, or the file cannot be made.
    """
    return lock_home(
        home.lock,
        holder=f"another server, or a run of one that died, still uses {home.root}",
        remedy="Stop that process, or give this server another folder.",
        wait_s=wait_s,
    )
