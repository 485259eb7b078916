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
from typing import Any

from fedward_client.framing import receive_frame, send_frame
from fedward_common.errors import FederationError, RefusalCode


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
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._lifeline: int | None = None
        self._killed = False

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
            assert self._channel is not None
            try:
                send_frame(self._channel, request, payload)
                header, reply = receive_frame(self._channel)
            except (EOFError, OSError, TypeError, ValueError) as error:
                raise self._died() from error
        if not header.get("ok"):
            raise WorkError(RefusalCode(header["code"]), str(header.get("where", "unknown")))
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

    def _start(self) -> bool:
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
        finally:
            theirs.close()
            os.close(read_end)
        self._channel, self._lifeline, self._killed = ours, write_end, False
        return True

    def _died(self) -> WorkError:
        process = self._process
        returncode = None if process is None else process.wait()
        killed = self._killed
        self._close()
        if killed:
            return WorkError(RefusalCode.CANCELLED, "killed-by-daemon")
        if returncode == -signal.SIGKILL:
            return WorkError(RefusalCode.OUT_OF_MEMORY, "killed-by-system")
        return WorkError(RefusalCode.TRAINING_FAILED, f"exit-code:{returncode}")

    def _close(self) -> None:
        if self._channel is not None:
            self._channel.close()
        if self._lifeline is not None:
            os.close(self._lifeline)
        self._channel = self._lifeline = None
        self._process = None if self._process is None or self._process.poll() is not None else self._process
