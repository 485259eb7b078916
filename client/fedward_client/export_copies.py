"""Have the safe copies of an export made, by confined processes (hop 2); `safe_export.py` settles them.

The files are foreign, so none of them is opened up in the operator's own process. One kind of process copies
and proves: Python alone, which holds the site's key. Compressed pixels that have to be changed are decoded in
another kind, which holds none; what it says they are goes to the copying process beside the file, and the
proof is made there, against the bytes of the copy.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedward_client.dicom.copy_answers import CopyQuestion, NeedsDecodingError
from fedward_client.dicom.deidentify import ExportOptions, SafeCopy, make_copy
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.sandbox import DecodeSandbox, SiteFile
from fedward_client.sources.folder import read_content

_FILES_A_PROCESS = 40
"""Starting a process takes as long as copying so many small files."""

_MAX_PROCESSES = 8
_COPY_BYTES = 4 * 2**30
"""Address space of a process: copying holds a file several times over."""

_COPY_S = 100.0


@dataclass(frozen=True)
class ExportFile:
    """One file to be copied.

    Args:
        content: SHA-256, hex.
        name: path below the image folder, as the operating system's bytes.
        study: the site's pseudonym for its study.
    """

    content: str
    name: bytes = field(repr=False)
    study: str

    @property
    def shown_name(self) -> str:
        """Its name as text, for the operator's own terminal."""
        return os.fsdecode(self.name).encode("utf-8", "backslashreplace").decode()


def copies_of(
    files: Sequence[ExportFile],
    root: Path,
    key: bytes,
    options: ExportOptions,
    num_processes: int | None = None,
) -> Generator[SafeCopy | UnusableImageError, None, None]:
    """Make the copies.

    Args:
        files: below `root`.
        root: the image folder.
        key: the site's secret of 32 bytes; the same key gives the same pseudonyms.
        options: what stays.
        num_processes: that copy, by default as many as are worth their start. 0 copies in this process,
            which nothing but a test of the rules should ask for.

    Yields:
        for each file its copy, or why there is none; in their order.
    """
    if not files:
        return
    if num_processes is None:
        most = min(len(os.sched_getaffinity(0)), _MAX_PROCESSES)
        num_processes = max(1, min(most, len(files) // _FILES_A_PROCESS))  # never here: files are foreign
    with ExitStack() as resources:
        decoders = _Decoders(root, resources)
        if num_processes == 0:
            for file in files:
                yield _copied_here(root, file, key, options, decoders)
            return
        sandbox = resources.enter_context(
            DecodeSandbox(num_processes, memory_bytes=_COPY_BYTES, cpu_s=_COPY_S)
        )
        question = CopyQuestion(key=key.hex(), options=options).model_dump_json()
        asked = (SiteFile(root, file.name, file.content, question) for file in files)
        for file, outcome in zip(files, sandbox.map(asked, "copy"), strict=True):
            if isinstance(outcome, NeedsDecodingError):
                yield _copied_with_pixels(sandbox, root, file, question, decoders)
            else:
                yield _copy_in(outcome)


def _copied_with_pixels(
    sandbox: DecodeSandbox, root: Path, file: ExportFile, question: str, decoders: _Decoders
) -> SafeCopy | UnusableImageError:
    """Ask for a copy once more, with the pixels that another process has decoded."""
    try:
        pixels = decoders.decode(file)
    except UnusableImageError as error:
        return error
    again = SiteFile(root, file.name, file.content, question, pixels)
    (outcome,) = sandbox.map([again], "copy")
    return _copy_in(outcome)


def _copy_in(outcome: object) -> SafeCopy | UnusableImageError:
    if isinstance(outcome, SafeCopy | UnusableImageError):
        return outcome
    return UnusableImageError(Reason.CHANGED)


def _copied_here(
    root: Path, file: ExportFile, key: bytes, options: ExportOptions, decoders: _Decoders
) -> SafeCopy | UnusableImageError:
    try:
        return make_copy(_read(root, file), key, options, partial(decoders.decode, file))
    except UnusableImageError as error:
        return error


class _Decoders:
    """A sandbox that is started when the first compressed picture has to be changed; most never are."""

    def __init__(self, root: Path, resources: ExitStack) -> None:
        self._root = root
        self._resources = resources
        self._sandbox: DecodeSandbox | None = None

    def decode(self, file: ExportFile) -> NDArray[np.integer]:
        if self._sandbox is None:
            self._sandbox = self._resources.enter_context(DecodeSandbox(1))
        (outcome,) = self._sandbox.map([SiteFile(self._root, file.name, file.content)], "stored")
        if isinstance(outcome, UnusableImageError):
            raise outcome
        if not isinstance(outcome, np.ndarray):
            raise UnusableImageError(Reason.CHANGED)
        if outcome.dtype.kind not in "iu":  # a decoder that was taken over may say anything
            raise UnusableImageError(Reason.DECODE_FAILED)
        return outcome


def _read(root: Path, file: ExportFile) -> bytes:
    try:
        content = read_content(root, file.name)
    except OSError:
        raise UnusableImageError(Reason.CHANGED) from None
    if content.sha256 != file.content:
        raise UnusableImageError(Reason.CHANGED)
    if content.data is None:
        raise UnusableImageError(Reason.TOO_LARGE)
    return content.data
