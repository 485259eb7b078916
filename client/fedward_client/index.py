"""Index a site's image folder (hops 1 and 2): every file becomes a usable image or stands in quarantine.

Incremental: size and time of change decide whether a file is read again, its SHA-256 whether it is
parsed again. Committed in batches, so that an interrupted run continues where it was. Only headers
are read here; a file whose pixels turn out to be damaged joins the quarantine when it is decoded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.index_store import CaseIndex, ContentRecord, FileRecord, QuarantinedContent
from fedward_client.site_data import SiteData
from fedward_client.sources.folder import Candidate, Content, find_files, read_content
from fedward_common.errors import CohortError

Progress = Callable[[int, int], None]
"""Called with (files done, files in all)."""

_BATCH = 250


@dataclass(frozen=True)
class IndexSummary:
    """What indexing found.

    Args:
        num_files: regular files in the folder.
        num_read: files that were new or changed and therefore read.
        num_images: distinct usable images.
        num_unreadable: files that the operating system did not let us read.
        quarantined: reason -> number of distinct contents.
    """

    num_files: int
    num_read: int
    num_images: int
    num_unreadable: int
    quarantined: Mapping[str, int]

    @property
    def num_quarantined(self) -> int:
        """Distinct contents that are not used."""
        return sum(self.quarantined.values())


def index_folder(site: SiteData, progress: Progress | None = None) -> IndexSummary:
    """Bring the index up to date with the image folder, reading only files that changed.

    Args:
        site: whose folder; its home must exist.
        progress: told how far it is, now and then.

    Raises:
        CohortError: the folder cannot be listed or holds no file at all (not mounted?), or the index
            cannot be written. The index stays as it was at the last batch.
    """
    from fedward_client.dicom.decode import decoder_versions

    found = list(find_files(site.dicom))
    if not found:
        raise CohortError(
            "the image folder holds no files",
            remedy="Check `dicom` in site.toml, and that the folder is mounted.",
        )
    with CaseIndex(site.home) as index:
        index.forget_if_outdated("; ".join(decoder_versions()))
        known = index.known_files()
        changed = [candidate for candidate in found if known.get(candidate.name) != candidate]
        for start in range(0, len(changed), _BATCH):
            if progress is not None:
                progress(len(found) - len(changed) + start, len(found))
            # Read first, then write: no lock is held while a slow disk is read.
            records = [_read(index, site.dicom, name) for name in changed[start : start + _BATCH]]
            index.record(records)
        index.forget_absent({candidate.name for candidate in found})
        if progress is not None:
            progress(len(found), len(found))
        return IndexSummary(
            num_files=len(found),
            num_read=len(changed),
            num_images=len(index.images()),
            num_unreadable=index.num_unreadable(),
            quarantined=Counter(entry.reason.value for entry in index.quarantined()),
        )


def list_quarantine(home: Path) -> list[QuarantinedContent]:
    """What the last indexing put in quarantine."""
    with CaseIndex(home) as index:
        return index.quarantined()


def _read(index: CaseIndex, root: Path, candidate: Candidate) -> FileRecord:
    try:
        content = read_content(root, candidate.name)
    except OSError:
        return FileRecord(candidate, None, None)
    read = Candidate(candidate.name, content.size, content.mtime_ns)
    return FileRecord(read, content.sha256, None if index.knows(content.sha256) else _examine(content))


def _examine(content: Content) -> ContentRecord:
    from fedward_client.dicom.header import read_header, refusal_of

    try:
        if content.data is None:
            raise UnusableImageError(Reason.TOO_LARGE)
        header = read_header(content.data)
    except UnusableImageError as error:
        return ContentRecord(error.reason, error.kind)
    refusal = refusal_of(header)
    return ContentRecord(
        reason=refusal.reason if refusal else None,
        kind=refusal.kind if refusal else "",
        sop_instance=header.sop_instance or None,
        series=header.series,
        study=header.study,
        patient=header.patient,
        modality=header.modality,
        study_year=header.study_year,
        sex=header.sex,
        age_years=header.age_years,
    )
