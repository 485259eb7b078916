"""Bring a site's images up to date: once, or again and again until told to stop (hop 1).

A folder is read where it lies. Everything else is first fetched into the site's spool and read from there,
so that whatever comes behind a source reads files and knows no network. Only the operator's commands fetch;
the process that trains does not.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from fedward_client.sources.access import PacsAwayError
from fedward_client.sources.folder import find_files
from fedward_client.sources.retrieval import Archive, Patience, Progress, Retrieval, Retrieved
from fedward_client.sources.settings import (
    DicomwebConfig,
    DimseConfig,
    FolderConfig,
    RemoteConfig,
    Selection,
    SourceConfig,
)
from fedward_client.sources.spool import Spool, SpoolBusyError
from fedward_common.errors import CohortError

_log = logging.getLogger(__name__)
_PUSHED_POLL_S = 30.0
"""What was pushed is on our own disk: nobody is bothered by looking at it more often than at a PACS."""


@dataclass(frozen=True)
class Wanted:
    """What the cohort's file says of a source.

    Args:
        selection: what to ask a PACS for; a folder holds what it holds.
        settle_s: look again after so long, for studies that the PACS itself is still receiving.
    """

    selection: Selection
    settle_s: float = 0.0


def refresh_source(
    config: SourceConfig,
    home: Path,
    selection: Selection,
    progress: Progress | None = None,
    *,
    full: bool = False,
    settle_s: float = 0.0,
) -> Retrieved:
    """Fetch what is new; nothing to do for a folder, nor for what a PACS pushes.

    Args:
        config: where the images are; relative paths in it are taken from the home.
        home: the site's.
        selection: what to ask a PACS for; a folder holds what it holds.
        progress: told after each study.
        full: list every study anew, also those that were complete and have as many instances as then.
        settle_s: look again after so long, for studies that the PACS itself is still receiving.

    Raises:
        CohortError: a PACS is to push its images, and nothing has come yet.
        UsageError: the selection is the whole archive, or the address to listen on cannot be used.
        PacsAwayError: the PACS went away; what arrived is kept and the next run continues.
        StorageError: the spool or the disk is full, or another process is retrieving.
        FederationError: the PACS refuses this site.
    """
    resolved = config.resolved(home)
    if isinstance(resolved, FolderConfig):
        return Retrieved()
    if _is_pushed(resolved):
        _see_that_something_came(resolved, home)
        return Retrieved()
    with Spool(home, max_bytes=resolved.max_spool_bytes, max_object_bytes=resolved.max_object_bytes) as spool:
        archive = _open_archive(resolved)
        patience = Patience(resolved.attempts, resolved.first_wait_s)
        try:
            retrieval = Retrieval(archive, spool, selection, patience, settle_s=settle_s)
            return retrieval.run(full=full, progress=progress)
        finally:
            archive.close()


def watch_source(
    config: SourceConfig,
    home: Path,
    wanted: Callable[[], Wanted],
    stamp: Callable[[], str] = str,
    progress: Progress | None = None,
) -> Generator[Retrieved, None, None]:
    """Yield now if there are files, then whenever there are others or `stamp` differs, until closed.

    Every `poll_s` a folder is looked at and an archive asked; with `retrieve = "push"` the receiver listens
    all the while, also while the caller is busy with what came. An archive that is away is asked again later,
    also where another process is retrieving at that moment.

    Args:
        config: where the images are; relative paths in it are taken from the home.
        home: the site's.
        wanted: what to ask a PACS for; asked before each pass, for it may change meanwhile.
        stamp: of what else decides what the files amount to.
        progress: told after each study.

    Raises:
        FederationError: as `refresh_source` does, but for a PACS that is away.
    """
    resolved = config.resolved(home)
    known = ("", "")
    pause_s = resolved.poll_s
    if _is_pushed(resolved) and "poll_s" not in resolved.model_fields_set:
        pause_s = _PUSHED_POLL_S
    with _listening(resolved, home):
        while True:
            retrieved = Retrieved()
            now = wanted()
            try:
                if not _is_pushed(resolved):
                    retrieved = refresh_source(resolved, home, now.selection, progress, settle_s=now.settle_s)
            except PacsAwayError:  # what had arrived is in the spool
                _log.warning("pacs_away", extra={"delay_s": pause_s})
            except SpoolBusyError:  # the operator's own `cohort index`; what it fetches shows below
                _log.info("spool_busy", extra={"delay_s": pause_s})
            seen = _listing(resolved.images(home)), stamp()
            if seen[0] and seen != known:
                known = seen
                yield retrieved
            time.sleep(pause_s)


def _see_that_something_came(config: RemoteConfig, home: Path) -> None:
    folder = config.images(home)
    if not folder.is_dir() or next(find_files(folder), None) is None:
        raise CohortError(
            "the PACS is to push its images to this site, and none has come yet",
            remedy="Let this site listen, fedward-site cohort index --watch, and send studies from the PACS.",
        )


def _is_pushed(config: FolderConfig | RemoteConfig) -> bool:
    return isinstance(config, DimseConfig) and config.retrieve == "push"


def _open_archive(config: RemoteConfig) -> Archive:
    if isinstance(config, DicomwebConfig):
        from fedward_client.sources.dicomweb import DicomwebArchive

        return DicomwebArchive(config)
    from fedward_client.sources.dimse import DimseArchive

    return DimseArchive(config)


def _listening(config: FolderConfig | RemoteConfig, home: Path) -> AbstractContextManager[object]:
    if isinstance(config, DimseConfig) and config.retrieve == "push":
        from fedward_client.sources.receiver import receiving

        return receiving(config, home)
    return nullcontext()


def _listing(folder: Path) -> str:
    """Digest of every file's name, size and time of change; "" when there is none."""
    digest, is_empty = hashlib.sha256(), True
    for found in find_files(folder) if folder.is_dir() else ():
        digest.update(b"%d %d %s\0" % (found.size, found.mtime_ns, found.name))
        is_empty = False
    return "" if is_empty else digest.hexdigest()
