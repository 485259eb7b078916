"""The daemon's handle on its worker process: start it, ask it, kill it.

Killing is how training is cancelled: it works whatever the network's code is doing. The next request
starts a fresh worker, which costs the import of PyTorch and nothing else.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

from fedward_client.framing import receive_frame, send_frame
from fedward_common.errors import FederationError, RefusalCode

_ENDING_S = 5.0  # from the end of the stream to the end of the process that had it


class WorkError(FederationError):
    """The worker could not do what was asked.

    Args:
        code: what may be told to the server.
        where: what the worker says of the cause; for the site's own log only.
    """

    def __init__(self, code: RefusalCode, where: str) -> None:
        super().__init__(f"worker: {where}", remedy="See the site's log, then run: fedward-site doctor")
        self.code = code
        self.where = where


class WorkerProcess:
    """One worker process, started when first needed, restarted after it died or was killed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ends = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._lifeline: int | None = None
        self._killed = False
        self._retired = False

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return None if self._process is None or self._process.poll() is not None else self._process.pid

    def start(self) -> bool:
        """Start the process unless it runs; True when a fresh one was started (nothing is open in it)."""
        with self._lock:
            return self._start()

    def call(
        self, request: dict[str, Any], payload: bytes | memoryview = b""
    ) -> tuple[dict[str, Any], bytearray]:
        """Send one request and wait for its reply.

        Raises:
            WorkError: the worker refused, failed, or died; `code` says which.
        """
        with self._lock:
            self._start()
            channel = self._channel
            if channel is None:
                raise WorkError(RefusalCode.CANCELLED, "stopped-by-daemon")
            try:
                send_frame(channel, request, payload)
                header, reply = receive_frame(channel)
            except (EOFError, OSError) as error:
                raise self._died(_ENDING_S) from error
            except (TypeError, ValueError, MemoryError) as error:
                # Where the next frame begins is not known any more, and the process cannot be trusted.
                raise self._died(0) from error
        if header.get("ok") is not True:
            raise WorkError(_code_in(header), str(header.get("where", "unknown")))
        return header, reply

    def kill(self) -> None:
        """End the process at once; a call in progress in another thread ends with CANCELLED."""
        process = self._process
        if process is not None and process.poll() is None:
            self._killed = True
            process.kill()

    def stop(self) -> None:
        """Let the process end: its channel is closed, and it is killed if that takes too long."""
        process = self._process
        self._close()
        if process is not None:
            try:
                process.wait(timeout=2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def retire(self) -> None:
        """End the process for good: whatever is asked from now on is refused as cancelled."""
        self._retired = True
        self.kill()
        self.stop()

    def _start(self) -> bool:
        if self._retired:
            raise WorkError(RefusalCode.CANCELLED, "stopped-by-daemon")
        if self._process is not None and self._process.poll() is None:
            return False
        self._close()
        ours, theirs = socket.socketpair()
        read_end, write_end = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "fedward_client.worker", str(theirs.fileno()), str(read_end)],
                pass_fds=(theirs.fileno(), read_end),
                stdin=subprocess.DEVNULL,
                # -P above: a stray torch.py in the current folder must not become ours.
                # A decoder's own complaints may quote a patient's name: they go nowhere.
                stdout=subprocess.DEVNULL,
                stderr=None if os.environ.get("FEDWARD_WORKER_STDERR") == "1" else subprocess.DEVNULL,
            )
        except OSError:
            ours.close()
            os.close(write_end)
            raise
        finally:
            theirs.close()
            os.close(read_end)
        self._channel, self._lifeline, self._killed = ours, write_end, False
        return True

    def _died(self, patience_s: float) -> WorkError:
        """Make sure that the process has ended, and say why it did."""
        process = self._process
        returncode: int | None = None
        if process is not None:
            try:
                returncode = process.wait(timeout=patience_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        cancelled = self._killed or self._retired
        self._close()
        if cancelled:
            return WorkError(RefusalCode.CANCELLED, "killed-by-daemon")
        if returncode == -signal.SIGKILL:
            return WorkError(RefusalCode.OUT_OF_MEMORY, "killed-by-system")
        where = "malformed-reply" if returncode is None else f"exit-code:{returncode}"
        return WorkError(RefusalCode.TRAINING_FAILED, where)

    def _close(self) -> None:
        with self._ends:  # `stop` and a call that ends may both come here; a number is closed once
            channel, lifeline = self._channel, self._lifeline
            self._channel = self._lifeline = None
        if channel is not None:
            channel.close()
        if lifeline is not None:
            os.close(lifeline)
        self._process = None if self._process is None or self._process.poll() is not None else self._process


def _code_in(header: Mapping[str, Any]) -> RefusalCode:
    """The code of a worker's refusal; one that it cannot mean is a failure like any other."""
    try:
        code = RefusalCode(header["code"])
    except (KeyError, ValueError):
        return RefusalCode.TRAINING_FAILED
    return code if code.said_by_site else RefusalCode.TRAINING_FAILED
