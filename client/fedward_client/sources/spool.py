"""The site's own store of what it retrieved: HOME/spool, for its owner alone (hop 1).

A file's name is the SHA-256 of what it holds, never anything that a PACS said. It appears under that name
whole and safe on the disk, or not at all: it is written without a name, flushed, then linked. The same
content arriving twice is one file. A limit on the spool's size, and the disk's, end a retrieval with a clear
error instead of a full disk.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from fedward_client.sources.folder import find_files
from fedward_client.sources.manifest import Kept, Manifest, Refusal
from fedward_client.sources.part10 import Instance
from fedward_client.sources.settings import spool_root
from fedward_common.errors import StorageError
from fedward_common.files import flush_directory

_DRAFTS, _LOCK = "drafts", "lock"
_ABANDONED_S = 3600.0


class SpoolBusyError(StorageError):
    """Another process is putting images into the spool, or deleting it."""


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Be the only process that fills a spool or deletes it; the lock ends with the process.

    Args:
        folder: HOME/spool; where there is none, nobody can be at it.

    Raises:
        SpoolBusyError: another process is.
        StorageError: the folder cannot be used.
    """
    if not folder.is_dir() or folder.is_symlink():
        yield
        return
    with _translated():
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SpoolBusyError(
                "another process is retrieving into this spool",
                remedy="Wait until it is done, or end it; what it fetched is kept.",
            ) from None
        yield
    finally:
        os.close(descriptor)


class Spool:
    """The spool of one site; open it with `with`. Threads may share one, processes have one each.

    Args:
        home: the site's home.
        max_bytes: what the spool may hold.
        max_object_bytes: what one instance may have.

    Raises:
        StorageError: the folder cannot be made or is open to other users.
    """

    def __init__(self, home: Path, *, max_bytes: int, max_object_bytes: int) -> None:
        self.folder = home / "spool"
        self.max_bytes, self.max_object_bytes = max_bytes, max_object_bytes
        with _translated():
            for folder in (self.folder, self.root, self.folder / _DRAFTS):
                folder.mkdir(mode=0o700, exist_ok=True)
                folder.chmod(0o700)
            _remove_abandoned(self.folder / _DRAFTS)
        self.manifest = Manifest(self.folder)
        self._lock = threading.Lock()
        self._num_bytes: int | None = None  # known only while no other process can add to them

    @property
    def root(self) -> Path:
        """Where the files lie, for everything that reads images from a folder."""
        return spool_root(self.folder.parent)

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.manifest.close()

    def add(self, instance: Instance) -> Refusal | None:
        """Keep one instance, safe on the disk when this returns.

        Args:
            instance: as it arrived.

        Returns:
            None when it is kept, or was here already; else why not.

        Raises:
            StorageError: the spool or the disk is full, or cannot be written; nothing stays behind.
            SpoolBusyError: another process is retrieving: only one at a time can know how full it is.
        """
        if self._num_bytes is None:
            with self.retrieving():
                return self.add(instance)
        head = instance.head
        size = len(head) + len(instance.dataset)
        if size > self.max_object_bytes:
            self.refuse(instance.sop_instance, size, Refusal.TOO_LARGE)
            return Refusal.TOO_LARGE
        digest = hashlib.sha256(head)
        digest.update(instance.dataset)
        content = digest.hexdigest()
        self._reserve(size)
        try:
            with _translated():
                if not self._write(content, head, instance.dataset):
                    self._reserve(-size)
        except StorageError:
            self._reserve(-size)
            raise
        self.manifest.note(Kept(instance.sop_instance, content, size))
        return None

    def refuse(self, sop_instance: str, size: int, refusal: Refusal) -> None:
        """Remember that an instance is not kept, so that the next run need not fetch it to find out."""
        self.manifest.note(Kept(sop_instance, None, size, refusal))

    @contextmanager
    def retrieving(self) -> Iterator[None]:
        """Be the only process that adds to this spool; begin with a true manifest and a true size.

        Raises:
            SpoolBusyError: another process is at it.
        """
        with alone_in(self.folder):
            found = list(find_files(self.root))
            self.manifest.keep_only({os.path.basename(each.name) for each in found})  # noqa: PTH119
            self._num_bytes = sum(each.size for each in found)
            try:
                yield
            finally:
                self._num_bytes = None
                self.manifest.flush()

    def _reserve(self, num_bytes: int) -> None:
        with self._lock:
            assert self._num_bytes is not None
            if num_bytes > 0 and self._num_bytes + num_bytes > self.max_bytes:
                raise StorageError(
                    f"the spool is full: {self._num_bytes / 1e9:.1f} GB of {self.max_bytes / 1e9:.1f} GB",
                    remedy="Raise `spool_gb` in [source], narrow the cohort's filters, or purge the spool.",
                )
            self._num_bytes += num_bytes

    def _write(self, content: str, head: bytes, dataset: memoryview | bytes) -> bool:
        """Write a file unless it is there; whether it is new."""
        folder = self.root / content[:2]
        target = folder / content
        if target.exists():
            return False
        if not folder.exists():
            folder.mkdir(mode=0o700, exist_ok=True)
            flush_directory(self.root)
        descriptor, draft = _open_draft(self.folder / _DRAFTS)
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with os.fdopen(descriptor, "wb", buffering=0) as file:
                for piece in (memoryview(head), memoryview(dataset)):
                    while piece:
                        piece = piece[file.write(piece) :]
                os.fsync(descriptor)
                if draft is not None:
                    draft.replace(target)
                else:
                    # With a directory given, Python calls linkat(2), which alone can follow this link.
                    os.link(f"/proc/self/fd/{descriptor}", content, dst_dir_fd=directory)
            os.fsync(directory)
        except FileExistsError:  # another thread or process was first
            return False
        finally:
            os.close(directory)
            if draft is not None:
                with suppress(OSError):
                    draft.unlink()
        return True


def _open_draft(folder: Path) -> tuple[int, Path | None]:
    """A file to write to, without a name where the file system can do that: a crash leaves nothing."""
    try:
        return os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600), None
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
            raise
    path = folder / secrets.token_hex(16)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), path


def _remove_abandoned(folder: Path) -> None:
    """Drafts that a crash left, on file systems where a draft needs a name."""
    for path in folder.iterdir():
        if path.lstat().st_mtime < time.time() - _ABANDONED_S:
            path.unlink()


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageError(
                "the disk that holds the spool is full",
                remedy="Free space on the disk of the site's home, or move the home to a larger one.",
            ) from None
        raise StorageError(
            f"the spool cannot be written: {error.strerror}",
            remedy="Check that HOME/spool belongs to the user that runs the site, and the disk.",
        ) from None
