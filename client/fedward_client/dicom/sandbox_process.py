"""One decoder process as the site sees it: how it is started, asked and ended (hop 2); see `sandbox.py`."""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import subprocess
import sys
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from fedward_client.dicom.frames import Frames
from fedward_client.dicom.sandbox_answers import Outcome, What
from fedward_client.dicom.sandbox_files import SiteFile
from fedward_client.dicom.sandbox_wire import NO_FILE, WireError, close_all, receive
from fedward_client.dicom.shared_pixels import PIECE_BYTES, SEALS, Memories
from fedward_common.errors import CohortError

_MOST_FILES = 16
_CPU_S_A_REQUEST = 0.004
"""A request costs both sides a tenth of a millisecond, most of it for waking each other up."""

_START_S = 60.0
_ENVIRONMENT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL")


class Pace:
    """How many files go into a request: more of those that take little time and room.

    A slow image goes alone: it would keep others waiting while a process has nothing to do.

    Attributes:
        num_files: for the next request.
    """

    def __init__(self, what: What) -> None:
        self._adapts = what in ("frames", "image", "stored")
        self.num_files = _MOST_FILES if what == "facts" else 1

    def note(self, outcomes: list[Outcome], cpu_s: float) -> None:
        """Learn from an answer; a process that lies gets more work, or less, at a time."""
        if not self._adapts:
            return
        largest = max(map(_num_bytes, outcomes))
        by_time = _CPU_S_A_REQUEST * len(outcomes) / max(cpu_s, 1e-6)
        by_room = PIECE_BYTES // max(largest, 1)
        self.num_files = int(max(1, min(_MOST_FILES, by_time, by_room)))


def _num_bytes(outcome: Outcome) -> int:
    values = outcome.values if isinstance(outcome, Frames) else outcome
    return int(getattr(values, "nbytes", 0))


@dataclass(eq=False)
class Task:
    """A request: the same about some files."""

    what: What
    files: list[SiteFile]
    pace: Pace
    lend: bool = False
    outcomes: list[Outcome | None] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)  # places in `files` that are asked for, not answered
    sent: bool = False
    num_deaths: int = 0  # of processes that were asked about its only file left and named none
    memory: int = -1  # piece of its process's memory for the answer

    def __post_init__(self) -> None:
        """Nothing is known at first."""
        self.outcomes = self.outcomes or [None] * len(self.files)

    @property
    def missing(self) -> list[int]:
        """Places of files without an outcome."""
        return [place for place, outcome in enumerate(self.outcomes) if outcome is None]


class DecoderProcess:
    """One decoder process and the requests it has at hand."""

    def __init__(self, memory_bytes: int, cpu_s: float) -> None:
        self.tasks: deque[Task] = deque()
        self.memories = Memories()
        self.deadline = 0.0
        self.retiring = False
        own = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        module = "fedward_client.dicom.sandbox_worker"
        with ExitStack() as unless_started, ExitStack() as whatever_comes:
            try:
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
                unless_started.callback(ours.close)
                whatever_comes.enter_context(theirs)
                byte = os.memfd_create("at_hand", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
                whatever_comes.callback(os.close, byte)
                os.ftruncate(byte, 1)
                fcntl.fcntl(byte, fcntl.F_ADD_SEALS, SEALS)
                self._at_hand = mmap.mmap(byte, 1)
                self._process = subprocess.Popen(
                    [
                        *(sys.executable, "-P", "-B", "-m", module),
                        *(str(theirs.fileno()), str(byte), str(memory_bytes), str(cpu_s)),
                    ],
                    pass_fds=[theirs.fileno(), byte],
                    env=own | threads,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=None,  # until it is ready; then what decoders print goes nowhere
                    start_new_session=True,
                )
            except OSError:
                raise not_started() from None
            unless_started.pop_all()
        self._at_hand[0] = NO_FILE
        self.channel = ours
        self.channel.settimeout(_START_S)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def file_at_hand(self) -> int | None:
        """Which file of its oldest request it is at, as it says itself; None between files.

        One that an image took over may name another file. It could as well have answered for that one.
        """
        place = self._at_hand[0]
        return place if self.tasks and place < len(self.tasks[0].waiting) else None

    def await_ready(self, answer_s: float) -> frozenset[str]:
        """Wait until it has loaded the decoders; say how it is confined. Each answer may take `answer_s`.

        Raises:
            CohortError: it does not start.
        """
        try:
            message, files = receive(self.channel)
            close_all(files)
            confined = frozenset(map(str, message["confined"]))
        except (WireError, OSError, KeyError, TypeError):
            self.end()
            raise not_started() from None
        self.channel.settimeout(answer_s)
        return confined

    def end(self) -> None:
        """Kill it, whatever it does."""
        self.channel.close()
        self._process.kill()
        self._process.wait()


def not_started() -> CohortError:
    """There are no decoder processes."""
    return CohortError(
        "the process that decodes images cannot be started",
        remedy="Run: fedward-site doctor; then check memory and that fedward is installed whole.",
    )


def seconds(said: Any) -> float:
    """A time that a decoder process says it took.

    Raises:
        WireError: it is none.
    """
    if not isinstance(said, float) or not 0 <= said < float("inf"):
        raise WireError
    return said
