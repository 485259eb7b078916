"""Decode a site's images in processes that can be killed (hop 2).

A decoder is megabytes of C that was written for speed and reads what anyone may have sent. So it runs
in processes of its own, with limits on memory, time and files and without network (`sandbox_worker.py`,
`confinement.py`); a file that makes one crash, hang or swell is refused with `Reason.OVER_LIMIT` and a
fresh process goes on with the next. Files are opened here, pixels come back in shared memory, and what
a decoder process says is checked like any other foreign input.
"""

from __future__ import annotations

import errno
import selectors
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fedward_client.dicom.frames import Frames
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.sandbox_answers import Outcome, What, not_to_be_had, outcomes_of
from fedward_client.dicom.sandbox_files import SiteFile, SiteFolders
from fedward_client.dicom.sandbox_process import DecoderProcess, Pace, Task, not_started, seconds
from fedward_client.dicom.sandbox_wire import DEPTH, WireError, close_all, receive, send
from fedward_client.dicom.shared_pixels import lend_file
from fedward_common.errors import CohortError

__all__ = ["DecodeSandbox", "Outcome", "SiteFile", "What"]

_WALL_S = 120.0
"""Processor time ends a busy process; this one, which should never be needed, a sleeping one."""

_CROWDED = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM))
"""Why a file that is there cannot be opened."""


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
        self._processes: list[DecoderProcess] = []
        self._folders = SiteFolders()
        self.confined = frozenset[str]()
        started: list[DecoderProcess] = []
        try:
            for _ in range(workers):  # all start at the same time
                started.append(DecoderProcess(*self._limits))
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
        self._folders.close()

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
                "labels" the answer to the file's question, "stored" what `decode_stored` gives, "copy" the
                safe copy that the file's question asks for.
            lend: leave pixels in the memory that the decoder wrote them to: for who is done with them
                soon and reads each once, because a decoder that was taken over could still change them.

        Yields:
            for each file its result, or the error that the method would raise.
        """
        if not self._processes:
            raise not_started()
        self._folders.close()  # what was moved since the last time is found where it is now
        waiting: deque[Task] = deque()
        rest, pace = iter(files), Pace(what)
        while True:
            while len(waiting) < DEPTH * len(self._processes):
                batch = list(islice(rest, pace.num_files))
                if not batch:
                    break
                waiting.append(self._submit(Task(what, batch, pace, lend)))
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

    def _admit(self, process: DecoderProcess) -> frozenset[str]:
        confined = process.await_ready(_WALL_S)
        self._processes.append(process)
        self._selector.register(process.channel, selectors.EVENT_READ, process)
        return confined

    def _submit(self, task: Task) -> Task:
        """Open a task's files and hand it to the least busy process; files not to be had are answered."""
        opened: list[int] = []
        try:
            for place in task.missing:
                try:
                    opened.append(self._folders.open(task.files[place]))
                    task.waiting.append(place)
                except OSError as error:
                    if error.errno in _CROWDED:
                        raise _too_many_files() from None
                    task.outcomes[place] = not_to_be_had()
            given = task.files[0].pixels  # of a request that is for one file
            if task.waiting and given is not None:
                opened.append(_lent(given))
            if task.waiting:
                self._send(task, opened)
        finally:
            close_all(opened)
        return task

    def _send(self, task: Task, opened: Sequence[int]) -> None:
        while all(len(each.tasks) >= DEPTH for each in self._processes):  # of a `map` that was left half-way
            self._wait()
        process = min(self._processes, key=lambda each: len(each.tasks))
        process.tasks.append(task)
        task.memory, task.sent = process.memories.reserve(), False
        if len(process.tasks) == 1:
            process.deadline = time.monotonic() + _WALL_S
        contents = [task.files[place].content for place in task.waiting]
        first = task.files[0]
        given = None if first.pixels is None else [first.pixels.shape, first.pixels.dtype.name]
        asked = {"what": task.what, "contents": contents, "question": first.question, "pixels": given}
        try:
            send(process.channel, asked | {"memory": task.memory}, opened)
            task.sent = True
        except OSError as error:
            if error.errno == errno.ETOOMANYREFS:  # a fresh process would not be handed them either
                process.tasks.pop()
                process.memories.settle(task.memory)
                task.waiting.clear()
                raise _too_many_files() from None
            if len(process.tasks) == 1:  # else it has ended, perhaps with an answer that is still to be read
                self._replace(process, blame=False)

    def _wait(self) -> None:
        """Take what answers there are, waiting for one; end processes that are past their time."""
        busy = [process for process in self._processes if process.tasks]
        left_s = min(process.deadline for process in busy) - time.monotonic()
        for key, _ in self._selector.select(max(left_s, 0.0)):
            if key.data in self._processes:  # not replaced over what another of them said
                self._take(key.data)
        for process in busy:
            if process in self._processes and process.tasks and time.monotonic() > process.deadline:
                self._replace(process, blame=True)

    def _take(self, process: DecoderProcess) -> None:
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
            task.pace.note(outcomes, seconds(message["cpu_s"]))
            process.retiring = bool(message["retiring"])
        except (WireError, KeyError, TypeError, ValueError, IndexError, OverflowError):
            self._replace(process, blame=True)
            return
        finally:
            close_all(files)
        process.tasks.popleft()
        process.deadline = time.monotonic() + _WALL_S
        for place, outcome in zip(task.waiting, outcomes, strict=False):
            task.outcomes[place] = outcome
        task.waiting.clear()
        if process.retiring:
            self._replace(process, blame=False)
        if task.missing:  # it had no room for more
            self._submit(task)

    def _replace(self, process: DecoderProcess, *, blame: bool) -> None:
        """Put a fresh process in a dead one's place; blame the file that it was at, ask again for others."""
        self._selector.unregister(process.channel)
        self._processes.remove(process)
        process.end()
        self._admit(DecoderProcess(*self._limits))
        at_hand = process.file_at_hand
        for number, task in enumerate(process.tasks):
            at_fault, is_alone = blame and task.sent and number == 0, len(task.waiting) == 1
            if at_fault and is_alone and at_hand is None:  # it may have died of something else
                task.num_deaths += 1
            known = 0 if is_alone and task.num_deaths > 1 else at_hand
            if at_fault and known is not None:
                task.outcomes[task.waiting[known]] = UnusableImageError(Reason.OVER_LIMIT)
            task.waiting.clear()
            if at_fault and known is None and not is_alone:  # one of several: each by itself, to see which
                self._split(task)
            elif task.missing:
                self._submit(task)

    def _split(self, task: Task) -> None:
        for place in task.missing:
            (task.outcomes[place],) = self.map([task.files[place]], task.what, lend=task.lend)


def _lent(pixels: NDArray[Any]) -> int:
    try:
        return lend_file(pixels)
    except OSError:
        raise _too_many_files() from None


def _too_many_files() -> CohortError:
    return CohortError(
        "this machine has no more open files to give, so images cannot be handed to their decoders",
        remedy="End other work of this user or raise its limit on open files (ulimit -n), then start again.",
    )
