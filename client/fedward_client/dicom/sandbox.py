"""Decode a site's images in processes that can be killed (hop 2).

A decoder is megabytes of C that was written for speed and reads what anyone may have sent. So it runs
in processes of its own, with limits on memory, time and files and without network (`sandbox_worker.py`,
`confinement.py`); a file that makes one crash, hang or swell is refused with `Reason.OVER_LIMIT` and a
fresh process goes on with the next. Files are opened here, pixels come back in shared memory, and what
a decoder process says is checked like any other foreign input.
"""

from __future__ import annotations

import os
import selectors
import socket
import stat
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fedward_client.dicom.frames import Frames
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.sandbox_answers import Outcome, What, not_to_be_had, outcomes_of
from fedward_client.dicom.sandbox_wire import DEPTH, WireError, close_all, receive, send
from fedward_client.dicom.shared_pixels import Memories
from fedward_common.errors import CohortError

__all__ = ["DecodeSandbox", "Outcome", "SiteFile", "What"]

_HEADERS_A_REQUEST = 16
_START_S = 60.0
_WALL_S = 120.0
"""Processor time ends a busy process; this one, which should never be needed, a sleeping one."""

_ENVIRONMENT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL")


@dataclass(frozen=True)
class SiteFile:
    """A file below a root.

    Args:
        root: folder.
        name: path relative to it, as the operating system's bytes.
        content: SHA-256 (hex) that it must still have; None takes whatever is there.
        question: for "labels"; see `label_objects.answer_question`.
    """

    root: Path = field(repr=False)
    name: bytes = field(repr=False)
    content: str | None = field(default=None, repr=False)
    question: str = field(default="", repr=False)


@dataclass(eq=False)
class _Task:
    what: What
    files: list[SiteFile]
    outcomes: list[Outcome | None]
    waiting: list[int]  # places in `files` that are asked for and not answered
    lend: bool = False
    memory: int = -1  # piece of its process's memory for the answer


class _Process:
    """One decoder process and the requests it has at hand."""

    def __init__(self, memory_bytes: int, cpu_s: float) -> None:
        self.tasks: deque[_Task] = deque()
        self.memories = Memories()
        self.deadline = 0.0
        self.retiring = False
        own = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        module = "fedward_client.dicom.sandbox_worker"
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with ExitStack() as unless_started, theirs:
            unless_started.callback(ours.close)
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-B", "-m", module),
                    *(str(theirs.fileno()), str(memory_bytes), str(cpu_s)),
                ],
                pass_fds=[theirs.fileno()],
                env=own | threads,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=None,  # until it is ready; then what decoders print goes nowhere
                start_new_session=True,
            )
            unless_started.pop_all()
        self.channel = ours
        self.channel.settimeout(_START_S)

    @property
    def pid(self) -> int:
        return self._process.pid

    def await_ready(self) -> frozenset[str]:
        """Wait until it has loaded the decoders; say how it is confined."""
        try:
            message, files = receive(self.channel)
            close_all(files)
            confined = frozenset(map(str, message["confined"]))
        except (WireError, OSError, KeyError, TypeError):
            self.end()
            raise _not_started() from None
        self.channel.settimeout(_WALL_S)
        return confined

    def end(self) -> None:
        """Kill it, whatever it does."""
        self.channel.close()
        self._process.kill()
        self._process.wait()


class DecodeSandbox:
    """Decoder processes, as a context manager; one thread uses it.

    Args:
        workers: processes.
        memory_bytes: most that one may take, libraries included. A quarter of it is the largest image.
        cpu_s: processor time for one image, plus one second for every eight million pixels.

    Attributes:
        confined: how the processes are confined; see `confinement.confine`.

    Raises:
        CohortError: the processes do not start.
    """

    def __init__(self, workers: int = 1, *, memory_bytes: int = 512 * 2**20, cpu_s: float = 1.25) -> None:
        if workers < 1 or memory_bytes < 256 * 2**20 or cpu_s <= 0:
            raise ValueError("at least one process, 256 MiB and some processor time are needed")
        self._limits = (memory_bytes, cpu_s)
        self._selector = selectors.DefaultSelector()
        self._processes: list[_Process] = []
        self._bases: dict[Path, bytes] = {}
        self.confined = frozenset[str]()
        started: list[_Process] = []
        try:
            for _ in range(workers):  # all start at the same time
                started.append(_Process(*self._limits))
            for process in started:
                self.confined = self._admit(process)
        except BaseException:
            for process in started:
                process.end()
            self._selector.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all processes."""
        for process in self._processes:
            self._selector.unregister(process.channel)
            process.end()
        self._processes.clear()
        self._selector.close()

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids, for limits from outside."""
        return tuple(process.pid for process in self._processes)

    def decode_frames(self, root: Path, name: bytes, content: str | None = None) -> Frames:
        """Decode one file; see `frames.decode_frames`.

        Raises:
            UnusableImageError: refused, or it took more than permitted.
            CohortError: the file cannot be read, or does not hold `content`.
        """
        outcome = self._one(SiteFile(root, name, content), "frames")
        assert isinstance(outcome, Frames)
        return outcome

    def decode_image(self, root: Path, name: bytes, content: str | None = None) -> NDArray[np.float32]:
        """Decode one radiograph; see `decode.decode_image`. Raises as `decode_frames`."""
        outcome = self._one(SiteFile(root, name, content), "image")
        assert isinstance(outcome, np.ndarray)
        return outcome

    def map(self, files: Iterable[SiteFile], what: What, *, lend: bool = False) -> Iterator[Outcome]:
        """Do the same with many files, in their order, a few at a time.

        Args:
            files: asked for as they are needed.
            what: "frames" or "image", as the methods of these names; "facts" gives a `FileRead`,
                "labels" the answer to the file's question, "stored" what `decode_stored` gives.
            lend: leave pixels in the memory that the decoder wrote them to: for who is done with them
                soon and reads each once, because a decoder that was taken over could still change them.

        Yields:
            for each file its result, or the error that the method would raise.
        """
        if not self._processes:
            raise _not_started()
        waiting: deque[_Task] = deque()
        rest = iter(files)
        size = _HEADERS_A_REQUEST if what == "facts" else 1
        while True:
            while len(waiting) < DEPTH * len(self._processes):
                batch = list(islice(rest, size))
                if not batch:
                    break
                waiting.append(self._submit(_Task(what, batch, [None] * len(batch), [], lend)))
            if not waiting:
                return
            while waiting[0].waiting:
                self._wait()
            yield from (outcome for outcome in waiting.popleft().outcomes if outcome is not None)

    def _one(self, file: SiteFile, what: What) -> Outcome:
        (outcome,) = self.map([file], what)
        if isinstance(outcome, CohortError):
            raise outcome
        return outcome

    def _admit(self, process: _Process) -> frozenset[str]:
        confined = process.await_ready()
        self._processes.append(process)
        self._selector.register(process.channel, selectors.EVENT_READ, process)
        return confined

    def _submit(self, task: _Task) -> _Task:
        """Open a task's files and hand it to the least busy process; files not to be had are answered."""
        opened: list[int] = []
        try:
            for place in [each for each, outcome in enumerate(task.outcomes) if outcome is None]:
                try:
                    opened.append(self._open(task.files[place]))
                    task.waiting.append(place)
                except OSError:
                    task.outcomes[place] = not_to_be_had()
            if task.waiting:
                self._send(task, opened)
        finally:
            close_all(opened)
        return task

    def _send(self, task: _Task, opened: Sequence[int]) -> None:
        while all(len(each.tasks) >= DEPTH for each in self._processes):  # of a `map` that was left half-way
            self._wait()
        process = min(self._processes, key=lambda each: len(each.tasks))
        process.tasks.append(task)
        task.memory = process.memories.reserve()
        if len(process.tasks) == 1:
            process.deadline = time.monotonic() + _WALL_S
        contents = [task.files[place].content for place in task.waiting]
        asked = {"what": task.what, "contents": contents, "question": task.files[0].question}
        try:
            send(process.channel, asked | {"memory": task.memory}, opened)
        except OSError:  # it has died over an earlier file, if it had one
            self._replace(process, blame=len(process.tasks) > 1)

    def _open(self, file: SiteFile) -> int:
        """Open a regular file below its root, through no link.

        Raises:
            OSError: it is gone, not ours to read, or no longer such a file.
        """
        base = self._bases.get(file.root)
        if base is None:
            base = self._bases[file.root] = os.fsencode(file.root.resolve(strict=True))
        path = os.path.join(base, file.name)  # noqa: PTH118 - names are bytes, not text
        if os.path.realpath(path) != path:
            raise OSError("reached through a symbolic link")
        # O_NONBLOCK: opening a pipe that was put in the file's place must not hang.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError("no longer a regular file")
        return descriptor

    def _wait(self) -> None:
        """Take what answers there are, waiting for one; end processes that are past their time."""
        busy = [process for process in self._processes if process.tasks]
        left_s = min(process.deadline for process in busy) - time.monotonic()
        for key, _ in self._selector.select(max(left_s, 0.0)):
            self._take(key.data)
        for process in busy:
            if process in self._processes and process.tasks and time.monotonic() > process.deadline:
                self._replace(process, blame=True)

    def _take(self, process: _Process) -> None:
        try:
            message, files = receive(process.channel)
        except (WireError, OSError):
            self._replace(process, blame=not process.retiring)
            return
        try:
            task = process.tasks[0]
            for file in files[:1]:
                process.memories.renew(task.memory, file)
            take = partial(process.memories.array, task.memory, lend=task.lend)
            outcomes = outcomes_of(message, len(task.waiting), task.what, take)
            process.memories.settle(task.memory)
            process.retiring = bool(message["retiring"])
        except (WireError, KeyError, TypeError, ValueError, IndexError):
            self._replace(process, blame=True)
            return
        finally:
            close_all(files)
        process.tasks.popleft()
        process.deadline = time.monotonic() + _WALL_S
        for place, outcome in zip(task.waiting, outcomes, strict=True):
            task.outcomes[place] = outcome
        task.waiting.clear()
        if process.retiring:
            self._replace(process, blame=False)

    def _replace(self, process: _Process, *, blame: bool) -> None:
        """Put a fresh process in a dead one's place; blame the file that it was at, ask again for others."""
        self._selector.unregister(process.channel)
        self._processes.remove(process)
        process.end()
        self._admit(_Process(*self._limits))
        for number, task in enumerate(process.tasks):
            if blame and number == 0 and len(task.waiting) == 1:
                task.outcomes[task.waiting.pop()] = UnusableImageError(Reason.OVER_LIMIT)
                continue
            task.waiting.clear()
            if blame and number == 0:  # one of several: each by itself, to see which
                self._split(task)
            else:
                self._submit(task)

    def _split(self, task: _Task) -> None:
        for place, outcome in enumerate(task.outcomes):
            if outcome is None:
                (task.outcomes[place],) = self.map([task.files[place]], task.what, lend=task.lend)


def _not_started() -> CohortError:
    return CohortError(
        "the process that decodes images cannot be started",
        remedy="Run: fedward-site doctor; then check memory and that fedward is installed whole.",
    )
