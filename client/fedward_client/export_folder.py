"""The folder of an export, and the site's own note of what is in it: so that an export can be gone on with.

A copy appears in the folder in one step, after its proof; a process that is killed leaves at most a draft,
which the next run deletes. Which original a copy is of stands in a ledger in the site's home, with the
copy's digest: the folder leaves the hospital, and digests of originals must not. Copies that are no longer
what they were are made again; copies of files that left the cohort since are deleted. Copies made with other
options, another key or another version of the rules are never mixed.

While an export runs, and after it was killed, `.unfinished` in the folder holds drafts, a lock against other
homes, and a mark: a keyed digest that only this home, with these options, can make for this folder. Without
that mark nothing is deleted that the ledger does not know, for it may be somebody else's.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self, get_args

from fedward_client.dicom.copy_answers import NAME_OF_COPY
from fedward_client.dicom.copy_pixels import PixelChange
from fedward_client.dicom.deidentify import SafeCopy
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_common.errors import StorageError, UsageError
from fedward_common.files import flush_directory, write_atomically, write_new
from fedward_common.home_lock import lock_home

EXPORTS_FOLDER = "exports"
_DRAFTS = ".unfinished"
_LOCK, _MARK = f"{_DRAFTS}/lock", f"{_DRAFTS}/mark"
_FLUSH_EVERY = 64
_RUNNING = "another export into this folder is running"
_WAIT = "Wait for it, or name another folder."
_OTHER_FILES = "the folder for the copies holds other files too"


@dataclass(frozen=True)
class KeptCopy:
    """One copy in the folder.

    Args:
        content: SHA-256 of its original, hex.
        copy: path below the folder.
        sha256: of the copy, hex.
        pixels: what was done to the pixels.
        num_searched: identifiers of the original that it was searched for.
        num_not_searched: identifiers that it could not be searched for.
    """

    content: str = field(repr=False)
    copy: str
    sha256: str
    pixels: PixelChange
    num_searched: int
    num_not_searched: int


class ExportFolder:
    """The folder, as a context manager; one process has it at a time.

    Args:
        home: of the site.
        out: folder, new, empty, or of an earlier run with the same settings.
        settings: digest of all that decides how a copy looks.

    Raises:
        StorageError: something else is in the folder, it cannot be made, or the disk is full.
        UsageError: another process is exporting into it, of this home or of another.
    """

    def __init__(self, home: Path, out: Path, settings: str) -> None:
        self._out = out
        self._settings = settings
        name = hashlib.sha256(os.fsencode(out.resolve())).hexdigest()[:32]
        self._ledger_path = home / EXPORTS_FOLDER / f"{name}.jsonl"
        self._ledger: IO[str] | None = None
        self._mark = hashlib.sha256(f"{settings}|{name}".encode()).hexdigest()
        self._lock = self._lock_out = -1
        self._kept: dict[str, KeptCopy] = {}
        self._content_of: dict[str, str] = {}
        self._num_unflushed = 0
        self._is_of_other_settings = False

    def __enter__(self) -> Self:
        try:
            self._ledger_path.parent.mkdir(mode=0o700, exist_ok=True)
            self._lock = lock_home(self._ledger_path.with_suffix(".lock"), holder=_RUNNING, remedy=_WAIT)
            self._out.mkdir(mode=0o700, exist_ok=True)
            self._lock_folder()
            self._take_over()
            self._ledger = self._ledger_path.open("a", encoding="ascii")
        except OSError as error:
            self.close()
            raise StorageError(
                f"the folder for the copies cannot be made: {os.strerror(error.errno or 0)}",
                remedy="Name a folder in a place where this user may write.",
            ) from error
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Delete drafts and give the folder up."""
        if self._ledger is not None:
            with suppress(OSError):
                self._flush_ledger()  # when it fails the mark stays: copies may be there that are not noted
                shutil.rmtree(self._out / _DRAFTS, ignore_errors=True)
                flush_directory(self._out)
            with suppress(OSError):
                self._ledger.close()
            self._ledger = None
        elif self._lock_out >= 0:  # never taken over: as it was, whoever's it is
            with suppress(OSError):
                (self._out / _LOCK).unlink()
                (self._out / _DRAFTS).rmdir()
        for lock in (self._lock_out, self._lock):
            if lock >= 0:
                os.close(lock)
        self._lock = self._lock_out = -1

    def keep_only(self, contents: frozenset[str]) -> int:
        """Delete the copies of files that are no longer to be exported; say how many.

        Raises:
            StorageError: one cannot be deleted, or the disk is full.
        """
        gone = [kept for content, kept in self._kept.items() if content not in contents]
        for kept in gone:
            self._forget(kept)
        if gone:
            try:
                self._rewrite()
            except OSError as error:
                raise StorageError(
                    f"which copies are left cannot be noted: {os.strerror(error.errno or 0)}",
                    remedy="Free space on the disk of the site's home; then start the same command again.",
                ) from error
        return len(gone)

    def kept(self, content: str) -> KeptCopy | None:
        """The copy of a file, if it is there and byte by byte what was proven."""
        kept = self._kept.get(content)
        if kept is None:
            return None
        with suppress(OSError):
            if hashlib.sha256((self._out / kept.copy).read_bytes()).hexdigest() == kept.sha256:
                return kept
        self._forget(kept)
        return None

    def write(self, content: str, copy: SafeCopy) -> KeptCopy:
        """Put a proven copy into the folder, in one step.

        Raises:
            UnusableImageError: a copy of another file has its UID.
            StorageError: the disk is full, or the folder is gone.
        """
        if (
            NAME_OF_COPY.fullmatch(copy.name) is None
            or self._content_of.setdefault(copy.name, content) != content
        ):
            raise UnusableImageError(Reason.SAME_UID)
        digest = hashlib.sha256(copy.data).hexdigest()
        kept = KeptCopy(content, copy.name, digest, copy.pixels, copy.num_searched, copy.num_not_searched)
        path = self._out / copy.name
        draft = self._out / _DRAFTS / secrets.token_hex(8)
        try:
            for folder in reversed([each for each in path.parents if self._out in each.parents]):
                folder.mkdir(mode=0o700, exist_ok=True)
            write_new(draft, copy.data)
            self._note(kept)
            draft.replace(path)
        except OSError as error:
            with suppress(OSError):
                draft.unlink()
            raise StorageError(
                f"a copy cannot be written: {os.strerror(error.errno or 0)}",
                remedy="Free disk space; the same command then goes on where it stopped.",
            ) from error
        self._kept[content] = kept
        return kept

    def _lock_folder(self) -> None:
        """Keep other homes out, whose own locks this one does not see."""
        drafts = self._out / _DRAFTS
        _refuse_if(drafts.is_symlink(), _OTHER_FILES)  # the lock would be made elsewhere
        drafts.mkdir(mode=0o700, exist_ok=True)
        lock = self._out / _LOCK
        self._lock_out = lock_home(lock, holder=_RUNNING, remedy=_WAIT)
        if not lock.exists() or not os.path.samestat(lock.stat(), os.fstat(self._lock_out)):
            os.close(self._lock_out)  # whoever had it has just deleted it
            self._lock_out = -1
            raise UsageError(_RUNNING, remedy=_WAIT)

    def _take_over(self) -> None:
        """See that the folder is empty, or one to go on with."""
        noted = self._read_ledger()
        found = {str(path.relative_to(self._out)) for path in self._out.rglob("*") if not _is_folder(path)}
        found -= {_LOCK, _MARK}
        drafts = {name for name in found if name.startswith(f"{_DRAFTS}/")}
        found -= drafts
        if noted is None:
            _refuse_if(bool(found or drafts), "the folder for the copies is not empty")
            noted = {}
        elif found or drafts:
            _refuse_if(any(NAME_OF_COPY.fullmatch(name) is None for name in found), _OTHER_FILES)
            _refuse_if(self._is_of_other_settings, "the copies in this folder were made with other options")
        self._kept = {} if self._is_of_other_settings else noted
        self._content_of = {kept.copy: kept.content for kept in self._kept.values()}
        # Renamed, but not noted when the power failed; or drafts of then.
        unnoted = drafts | (found - self._content_of.keys())
        _refuse_if(bool(unnoted) and not self._was_here(), _OTHER_FILES)
        self._out.chmod(0o700)
        for name in unnoted:
            (self._out / name).unlink()
        self._rewrite()
        (self._out / _MARK).unlink(missing_ok=True)
        write_new(self._out / _MARK, self._mark.encode("ascii"))
        with suppress(OSError):  # without the mark nothing is deleted, that is all
            flush_directory(self._out / _DRAFTS)
            flush_directory(self._out)

    def _was_here(self) -> bool:
        """Whether an export of this home with these settings did not come to its end in this folder."""
        try:
            return (self._out / _MARK).read_bytes() == self._mark.encode("ascii")
        except OSError:
            return False

    def _read_ledger(self) -> dict[str, KeptCopy] | None:
        """What is noted; None when there is no ledger. A line cut off by a crash is passed over."""
        try:
            first, *lines = self._ledger_path.read_text(encoding="ascii").split("\n")
            self._is_of_other_settings = json.loads(first) != {"settings": self._settings}
        except FileNotFoundError:
            return None
        except ValueError:
            self._is_of_other_settings = True
            return {}
        found = {}
        for line in lines:
            with suppress(ValueError, TypeError):
                kept = KeptCopy(**json.loads(line))
                if NAME_OF_COPY.fullmatch(kept.copy) and kept.pixels in get_args(PixelChange):
                    found[kept.content] = kept
        return found

    def _rewrite(self) -> None:
        lines = [{"settings": self._settings}, *map(asdict, self._kept.values())]
        write_atomically(
            self._ledger_path, "".join(json.dumps(line) + "\n" for line in lines).encode("ascii")
        )
        before = self._ledger
        if before is not None:
            self._ledger = self._ledger_path.open("a", encoding="ascii")
            before.close()

    def _note(self, kept: KeptCopy) -> None:
        """Note a copy before it appears, so that none is there without its note."""
        assert self._ledger is not None
        self._ledger.write(json.dumps(asdict(kept)) + "\n")
        self._ledger.flush()
        self._num_unflushed += 1
        if self._num_unflushed >= _FLUSH_EVERY:
            self._flush()

    def _flush(self) -> None:
        self._flush_ledger()
        flush_directory(self._out)
        self._num_unflushed = 0

    def _flush_ledger(self) -> None:
        assert self._ledger is not None
        self._ledger.flush()
        os.fsync(self._ledger.fileno())

    def _forget(self, kept: KeptCopy) -> None:
        path = self._out / kept.copy
        try:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # others of the patient are there
                for folder in [each for each in path.parents if self._out in each.parents]:
                    folder.rmdir()
        except OSError as error:
            raise StorageError(
                f"a copy cannot be deleted: {os.strerror(error.errno or 0)}",
                remedy="Let this user write to the folder for the copies, or name a new one.",
            ) from error
        del self._kept[kept.content]
        del self._content_of[kept.copy]


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _refuse_if(wrong: bool, message: str) -> None:
    if wrong:
        raise StorageError(
            message, remedy="Name a new folder: copies of different exports must not be mixed."
        )
