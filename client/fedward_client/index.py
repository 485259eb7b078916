"""Index a site's image folder (hops 1 and 2): every file becomes a usable image or stands in quarantine.

Incremental: a folder of which nothing changed is only listed; size and time of change decide whether a
file is read again. Files are read by several sandboxed processes and committed in batches, so that a run
that was interrupted, or killed, continues where it was. Only headers are read here; a file whose pixels
turn out to be damaged joins the quarantine when it is decoded.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedward_client.cohort_file import CohortFile, read_cohort_file
from fedward_client.dicom.gate import GatePolicy, GateVerdict, judge
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.index_arrival import (
    MAX_WAIT_S,
    announcements_for,
    arriving_series,
    moved,
    now_s,
    recent,
    wait_s,
)
from fedward_client.index_reading import facts_from
from fedward_client.index_records import (
    ContentRecord,
    FileRead,
    FileRecord,
    Found,
    QuarantinedContent,
    Rule,
)
from fedward_client.index_store import CaseIndex
from fedward_client.site_data import SiteData
from fedward_client.sources.folder import Candidate, find_files, read_content
from fedward_common.errors import CohortError

if TYPE_CHECKING:
    from fedward_client.dicom.sandbox import DecodeSandbox

Progress = Callable[[int, int], None]
"""Called with (files done, files in all)."""

_BATCH = 2000
_COMMIT_S = 2.0
"""Whatever was read by then is committed, so that a slow disk loses no more when it is interrupted."""

_FILES_A_PROCESS = 200
"""Starting a process takes as long as reading so many headers."""

_MAX_PROCESSES = 8


@dataclass(frozen=True)
class IndexSummary:
    """What indexing found.

    Args:
        num_files: regular files in the folder.
        num_read: files that were new or changed and therefore read.
        num_images: distinct usable images, of whatever modality.
        num_unreadable: files that the operating system did not let us read.
        num_copies: files whose content another file has too.
        quarantined: reason -> number of distinct contents.
    """

    num_files: int
    num_read: int
    num_images: int
    num_unreadable: int
    num_copies: int
    quarantined: Mapping[str, int]

    @property
    def num_quarantined(self) -> int:
        """Distinct contents that are not used."""
        return sum(self.quarantined.values())


def index_folder(
    site: SiteData,
    progress: Progress | None = None,
    *,
    num_processes: int | None = None,
    waiting: Callable[[float], None] | None = None,
) -> IndexSummary:
    """Bring the index up to date with the image folder, reading only files that changed.

    Where cases are volumes and files came a moment ago, it looks again once they have settled, so that
    what is still arriving is told from what is whole; see `index_arrival`.

    Args:
        site: whose folder; its home must exist.
        progress: told how far it is, now and then.
        num_processes: that read files; by default as many as processors, but not more than files need.
        waiting: told for how many seconds it waits before it looks again.

    Raises:
        CohortError: the folder cannot be listed or holds no file at all (not mounted?), or the index
            cannot be written. The index stays as it was at the last batch.
        UsageError: HOME/cohort.toml is not sound.
    """
    from fedward_client.dicom.decode import decoder_versions

    file = read_cohort_file(site.home)
    looked_s = now_s()
    found = _listed(site.dicom)
    with CaseIndex(site.home) as index:
        index.forget_if_outdated("; ".join(decoder_versions()))
        num_read = _update(index, site.dicom, found, progress, num_processes)
        moving = recent(found, file.arrival.settle_s, looked_s)
        wait = wait_s(found, file.settle_s)
        if moving and file.settle_s and wait <= MAX_WAIT_S:
            if waiting is not None:
                waiting(wait)
            time.sleep(wait)
            before, found = found, _listed(site.dicom)
            num_read += _update(index, site.dicom, found, progress, num_processes)
            moving = moved(before, found)
        announced = announcements_for(site.home, site.dicom)
        index.note_arriving(
            arriving_series(index, moving, announced, count_acquisitions=file.arrival.images_in_acquisition)
        )
        if progress is not None:
            progress(len(found), len(found))
        return _summary(index, file, len(found), num_read)


def _listed(root: Path) -> list[Candidate]:
    found = list(find_files(root))
    if not found:
        raise CohortError(
            "the image folder holds no files",
            remedy="See site.toml (`dicom` or [source]): is the folder mounted, has the PACS such studies?",
        )
    return found


def _update(
    index: CaseIndex,
    root: Path,
    found: list[Candidate],
    progress: Progress | None,
    num_processes: int | None,
) -> int:
    """Read what changed; how many files that was."""
    listing = _digest(found)
    if index.setting("listing") == listing:
        return 0
    known = index.known_files()
    changed = [candidate for candidate in found if known.get(candidate.name) != candidate]
    del known
    index.remember("listing", "")
    _read_all(index, root, changed, len(found), progress, num_processes)
    index.settle({candidate.name for candidate in found}, listing)
    return len(changed)


def list_quarantine(home: Path) -> list[QuarantinedContent]:
    """What indexing and decoding put in quarantine; the gate and the series are judged by the cohort."""
    file = read_cohort_file(home)
    with CaseIndex(home) as index:
        return index.quarantined(_rule(file))


def gate_verdicts(index: CaseIndex, policy: GatePolicy) -> dict[int, GateVerdict]:
    """What the site's gate decides, by `IndexedImage.signs_id`; judged anew each time, so a changed
    policy needs no file to be read again.
    """
    verdicts = {}
    for number, signs in index.signs().items():
        try:
            verdicts[number] = judge(facts_from(signs), policy)
        except ValueError:  # not what this version writes: fail closed
            verdicts[number] = UNJUDGED
    return verdicts


UNJUDGED = GateVerdict("quarantine", Reason.UNREADABLE_SIGNS)
"""What an image without signs gets."""


def _rule(file: CohortFile) -> Rule:
    return file.rule(("CR", "DX") if file.modalities is None else file.modalities)


def _summary(index: CaseIndex, file: CohortFile, num_files: int, num_read: int) -> IndexSummary:
    rule = _rule(file)
    verdicts = gate_verdicts(index, file.gate)
    refused: Counter[str] = Counter(index.count_quarantined(rule))
    for number, count in index.count_by_signs(rule).items():
        verdict = UNJUDGED if number is None else verdicts.get(number, UNJUDGED)
        if verdict.decision == "quarantine":
            refused[(verdict.reason or Reason.UNREADABLE_SIGNS).value] += count
    return IndexSummary(
        num_files=num_files,
        num_read=num_read,
        num_images=index.num_contents() - refused.total(),
        num_unreadable=index.num_unreadable(),
        num_copies=index.num_copies(),
        quarantined=dict(refused),
    )


def _digest(found: Iterable[Candidate]) -> str:
    """Of names, sizes and times: the same listing needs no further look."""
    digest = hashlib.sha256()
    for candidate in found:
        digest.update(b"%d %d %d " % (len(candidate.name), candidate.size, candidate.mtime_ns))
        digest.update(candidate.name)
    return digest.hexdigest()


def _read_all(
    index: CaseIndex,
    root: Path,
    changed: list[Candidate],
    num_files: int,
    progress: Progress | None,
    num_processes: int | None,
) -> None:
    if not changed:
        return
    from fedward_client.decoders import decoders

    num_done = num_files - len(changed)
    if num_processes is None:
        num_processes = min(len(os.sched_getaffinity(0)), _MAX_PROCESSES)
    num_processes = max(1, min(num_processes, -(-len(changed) // _FILES_A_PROCESS)))
    if progress is not None:
        progress(num_done, num_files)
    with decoders(num_processes) as sandbox:
        records = _records(sandbox, root, changed)
        # Read first, then write: no lock is held while a slow disk is read.
        while batch := _batch(records):
            index.record(batch)
            num_done += len(batch)
            if progress is not None:
                progress(num_done, num_files)


def _batch(records: Iterator[FileRecord]) -> list[FileRecord]:
    until = time.monotonic() + _COMMIT_S
    batch = []
    for record in records:
        batch.append(record)
        if len(batch) >= _BATCH or time.monotonic() > until:
            break
    return batch


def _records(sandbox: DecodeSandbox, root: Path, changed: list[Candidate]) -> Iterator[FileRecord]:
    from fedward_client.dicom.sandbox import SiteFile

    files = (SiteFile(root, candidate.name) for candidate in changed)
    for candidate, outcome in zip(changed, sandbox.map(files, "facts"), strict=True):
        if isinstance(outcome, FileRead):
            read = Candidate(candidate.name, outcome.size, outcome.mtime_ns)
            yield FileRecord(read, outcome.sha256, outcome.found)
        elif isinstance(outcome, UnusableImageError):
            yield _refused(root, candidate, outcome)
        else:
            yield FileRecord(candidate, None, None)


def _refused(root: Path, candidate: Candidate, error: UnusableImageError) -> FileRecord:
    """A file that took its reader down: known by its digest all the same, so that it is not tried again."""
    try:
        content = read_content(root, candidate.name)
    except OSError:
        return FileRecord(candidate, None, None)
    read = Candidate(candidate.name, content.size, content.mtime_ns)
    found = (error.reason.value, error.kind)
    return FileRecord(read, content.sha256, Found(ContentRecord(*found, *found)))
