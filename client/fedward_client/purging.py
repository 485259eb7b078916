"""Delete what a site made from its images: prepared images, the spool of an archive, the index.

Everything named here can be made again, from the images and the labels. What cannot is not touched: the
images and labels themselves, the key of the case ids, exclusions, plans, the audit log.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from fedward_client.array_cache import purge_cache
from fedward_client.index_store import INDEX_FILE
from fedward_client.sources.spool import alone_in
from fedward_common.errors import CohortError

CACHE_FOLDER = "cache"
SPOOL_FOLDER = "spool"
CONTACT_SHEET_FILE = "contact-sheet.html"
_PURGED = (
    ("prepared images", CACHE_FOLDER),
    ("images fetched from an archive", SPOOL_FOLDER),
    ("contact sheet", CONTACT_SHEET_FILE),
    ("index", INDEX_FILE),
    ("index", f"{INDEX_FILE}-journal"),
    ("index", f"{INDEX_FILE}-wal"),
    ("index", f"{INDEX_FILE}-shm"),
)


@dataclass(frozen=True)
class Purgeable:
    """One kind of thing that a purge deletes."""

    what: str
    num_files: int
    num_bytes: int


def purgeable(home: Path) -> list[Purgeable]:
    """What a purge would delete now."""
    found: dict[str, list[int]] = {}
    for what, name in _PURGED:
        found.setdefault(what, []).extend(_sizes(home / name))
    return [Purgeable(what, len(sizes), sum(sizes)) for what, sizes in found.items()]


def purge(home: Path) -> None:
    """Delete all of it; nothing outside `home`, and through no link.

    Raises:
        CohortError: images are being prepared at this moment; or something could not be deleted, and the
            rest is gone.
        SpoolBusyError: images are being fetched, or received, at this moment.
    """
    with alone_in(home / SPOOL_FOLDER):  # a receiver would go on into a folder that is gone
        purge_cache(home / CACHE_FOLDER)
        failed = not all([_deleted(home / name) for _, name in _PURGED])
    if failed:
        raise CohortError(
            "not everything could be deleted", remedy="Make HOME writable for this user, and purge again."
        )


def _deleted(path: Path) -> bool:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _sizes(path: Path) -> list[int]:
    if not path.is_dir() or path.is_symlink():
        return [path.lstat().st_size] if path.is_symlink() or path.exists() else []
    return [(Path(folder) / name).lstat().st_size for folder, _, names in os.walk(path) for name in names]
