"""Say whether the site's daemon is alive: `python -m fedward_client.health --home HOME`.

The daemon calls `record` every few seconds for as long as it serves. A server that cannot be reached
does not make a site unwell: restarting it would not help. For container health checks and monitoring;
standard library only, because the check runs every half minute beside the training. The file holds a
process id and a time in UTC, nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

HEALTH_FILE = "health.json"
MAX_AGE_S = 60.0
DEFAULT_HOME = Path("/var/lib/fedward-site")


def record(home: Path, *, now: datetime | None = None) -> None:
    """Write HOME/health.json for this process; one caller a home.

    A full disk must not stop the site: if the file cannot be written, it grows old and the check says so.

    Args:
        home: the site's home.
        now: the moment, aware of its time zone; the clock's when not given.
    """
    draft = home / f".{HEALTH_FILE}"
    content = json.dumps({"pid": os.getpid(), "at": (now or datetime.now(UTC)).isoformat()})
    with suppress(OSError):
        draft.write_text(content, encoding="ascii")
        draft.replace(home / HEALTH_FILE)


def fault(home: Path, *, max_age_s: float = MAX_AGE_S, now: datetime | None = None) -> str:
    """Say in one sentence what is wrong; empty when the daemon is well.

    Args:
        home: the site's home.
        max_age_s: how long ago the daemon may have been heard of, in seconds.
        now: the moment, aware of its time zone; the clock's when not given.
    """
    moment = now or datetime.now(UTC)
    try:
        content = json.loads((home / HEALTH_FILE).read_text(encoding="ascii"))
        pid = int(content["pid"])
        age_s = (moment - datetime.fromisoformat(content["at"])).total_seconds()
    except FileNotFoundError:
        return f"no {HEALTH_FILE}: the daemon has not started with this home"
    except (OSError, ValueError, TypeError, KeyError, OverflowError):
        return f"{HEALTH_FILE} cannot be read"
    if abs(age_s) > max_age_s:  # a time to come: the clock was set back, and the file says nothing
        return f"the daemon was last heard of {age_s:.0f} s ago, at most {max_age_s:.0f} s expected"
    if pid <= 0 or not _is_running(pid):
        return f"the daemon (process {pid}) has ended"
    return ""


def _is_running(pid: int) -> bool:
    """Whether a process has this id, be it another user's."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, print what is wrong, and return 0 (well) or 1."""
    parser = argparse.ArgumentParser(
        prog="python -m fedward_client.health", description="Exit 0 if the site's daemon is alive."
    )
    parser.add_argument(
        "--home", type=Path, default=DEFAULT_HOME, help="the site's home (default: %(default)s)"
    )
    parser.add_argument(
        "--max-age", type=float, default=MAX_AGE_S, metavar="SECONDS", help="default: %(default).0f"
    )
    options = parser.parse_args(arguments)
    found = fault(options.home, max_age_s=options.max_age)
    if found:
        sys.stdout.write(f"{found}\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
