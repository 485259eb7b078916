"""The process that executes a run, seen from the server: started early, told what to do, watched.

Orders are JSON lines on its standard input. The pipe is also its lifeline: when the server dies, however
suddenly, the pipe closes and the process ends by itself. It inherits the server's lock file, so that a
server that starts anew waits until the old run's process has let go of the run's record.
"""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

# -P keeps the current folder off the import path: a stray torch.py must not become ours.
COMMAND = (sys.executable, "-P", "-m", "fedward_server.runner")
_STDERR = 2
_log = logging.getLogger(__name__)


class RunnerProcess:
    """One runner.

    Args:
        command: program and arguments.
        lock: descriptor of the server's lock file, inherited.
        ended: told once, from a thread of this object, when the process has ended, with its exit code
            (negative: the signal that killed it).
    """

    def __init__(
        self, command: Sequence[str], *, lock: int, ended: Callable[[RunnerProcess, int], None]
    ) -> None:
        # A session of its own: Ctrl-C in the server's terminal reaches the server, which decides.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=_STDERR,
            pass_fds=(lock,),
            start_new_session=True,
        )
        self._ended = ended
        self._watcher = threading.Thread(target=self._watch, name=f"runner-{self._process.pid}", daemon=True)
        self._watcher.start()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process has not ended yet."""
        return self._process.poll() is None

    def tell(self, order: Mapping[str, object]) -> None:
        """Send one order; if the process is gone, `ended` will say so."""
        with suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()

    def release(self) -> None:
        """Close the lifeline: the process ends as if the server had died."""
        with suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.close()

    def kill(self) -> None:
        """End the process at once, if it is still there."""
        with suppress(ProcessLookupError):
            self._process.kill()

    def join(self, timeout_s: float) -> bool:
        """Wait until the process has ended and `ended` was told; whether that happened in time."""
        self._watcher.join(timeout_s)
        return not self._watcher.is_alive()

    def _watch(self) -> None:
        code = self._process.wait()
        self.release()
        try:
            self._ended(self, code)
        except Exception:  # thread edge: the server goes on
            _log.exception("runner_end_unrecorded", extra={"pid": self.pid, "code": code})


def how_it_ended(code: int) -> str:
    """Say in words how a process ended.

    >>> how_it_ended(3), how_it_ended(-9)
    ('with exit code 3', 'by SIGKILL, perhaps for lack of memory')
    """
    if code >= 0:
        return f"with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"by {name}, perhaps for lack of memory" if name == "SIGKILL" else f"by {name}"
