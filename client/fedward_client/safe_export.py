"""Export safe copies of the cohort's studies: `fedward-site cohort deidentify OUT` (hop 3).

What the site declares as its cohort, labelled or not, without excluded cases, and the segmentations,
reports and structure sets of the same studies, except of a study in which the operator excluded a case: they
may be about that one. Every copy is made and proven by `dicom/deidentify.py` before it is written; a file of
which there is no copy stands in the report with a reason. Confined processes make the copies
(`export_copies.py`). An export that was stopped goes on where it was (`export_folder.py`).

Reports name a file by its content's digest and its study's pseudonym; file names, which may name
patients, are for the operator's terminal only.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from pydantic import ValidationError

from fedward_client.cohort import asked_modalities
from fedward_client.cohort_file import read_cohort_file
from fedward_client.cohort_grouping import possible_names
from fedward_client.cohort_units import select_units
from fedward_client.dicom.byte_scan import Leak
from fedward_client.dicom.copy_pixels import PixelChange
from fedward_client.dicom.deidentify import (
    WITHOUT_PICTURE,
    ExportOptions,
    IdentifierLeftError,
    SafeCopy,
)
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.exclusions import is_excluded, read_exclusions
from fedward_client.export_copies import ExportFile, copies_of
from fedward_client.export_folder import ExportFolder, KeptCopy
from fedward_client.index_records import IndexedImage
from fedward_client.index_store import CaseIndex
from fedward_client.pseudonyms import CaseId, case_id_of, load_pseudonym_key, study_code_of
from fedward_client.site_data import SiteData
from fedward_common.errors import CohortError, StorageError, UsageError

_COPY_VERSION = 1
"""Grows when the same file would get another copy."""

Progress = Callable[[int, int], None]
"""Called with (files done, files in all)."""


@dataclass(frozen=True)
class FileReport:
    """What became of one file.

    Args:
        file: which.
        copy: its copy's path below the folder; "" when none was written.
        reason: why there is none.
        kind: name of a SOP class or transfer syntax from the DICOM dictionary, or "".
        pixels: what was done to the pixels.
        num_searched: identifiers of the source that the copy was searched for.
        num_not_searched: identifiers too short, too common or too plain to be searched for.
        leaks: what was found in the copy that was not kept.
    """

    file: ExportFile
    copy: str = ""
    reason: Reason | None = None
    kind: str = ""
    pixels: PixelChange = "none"
    num_searched: int = 0
    num_not_searched: int = 0
    leaks: tuple[Leak, ...] = ()


@dataclass(frozen=True)
class ExportReport:
    """What became of the files.

    Args:
        files: those that were settled, in the order of their content.
        num_files: to be exported.
        num_kept: of which a copy was there from an earlier run.
        num_withdrawn: copies of an earlier run that were deleted, because their files left the cohort.
        stopped: by Ctrl-C, before all were settled.
    """

    files: tuple[FileReport, ...]
    num_files: int
    num_kept: int = 0
    num_withdrawn: int = 0
    stopped: bool = False

    @property
    def written(self) -> tuple[FileReport, ...]:
        """Those whose copy is in the folder."""
        return tuple(each for each in self.files if each.reason is None)

    @property
    def refused(self) -> tuple[FileReport, ...]:
        """Those of which there is no copy."""
        return tuple(each for each in self.files if each.reason is not None)


def export_options(
    *, keep_times: bool, keep_characteristics: bool, keep_private: Sequence[str]
) -> ExportOptions:
    """Check what the operator typed.

    Raises:
        UsageError: a private element is not named as GROUP|CREATOR|ELEMENT.
    """
    try:
        return ExportOptions(
            keep_times=keep_times,
            keep_characteristics=keep_characteristics,
            safe_private=frozenset(keep_private),
        )
    except ValidationError:
        raise UsageError(
            "a private element to keep is not named in full",
            remedy='Name group, creator and element, for example: "0019|SIEMENS MR HEADER|0C".',
        ) from None


def export_cohort(
    site: SiteData, out: Path, options: ExportOptions, progress: Progress | None = None
) -> ExportReport:
    """Copy the cohort's studies; run `index_folder` first.

    Args:
        site: whose.
        out: folder outside the image folder: new, empty, or of a run with the same options that was stopped.
        options: what stays; its gate is replaced by the site's own.
        progress: told after each file.

    Raises:
        CohortError: nothing is in the cohort, or the index cannot be read.
        StorageError: something else is in the folder, it cannot be written, or the disk is full.
        UsageError: HOME/cohort.toml is not sound, or another export into the folder is running.
    """
    if site.dicom.resolve() in [out.resolve(), *out.resolve().parents]:
        raise StorageError(
            "the folder for the copies lies in the image folder",
            remedy="Name a folder elsewhere: copies must not be indexed as images of patients.",
        )
    files = files_of_cohort(site)
    if not files and not out.exists():
        raise _nothing_to_export()
    own = options.model_copy(update={"gate": read_cohort_file(site.home).gate})
    key = load_pseudonym_key(site.home)
    with ExportFolder(site.home, out, settings_digest(key, own)) as folder:
        if not files:
            raise _nothing_to_export(folder.keep_only(frozenset()))
        return export(files, site.dicom, folder, key, own, progress)


def _nothing_to_export(num_withdrawn: int = 0) -> CohortError:
    deleted = f"; {num_withdrawn} copies of files that left the cohort since were deleted"
    return CohortError(
        f"there is no image to export{deleted if num_withdrawn else ''}",
        remedy="See what is in quarantine and why: fedward-site cohort quarantine",
    )


def settings_digest(key: bytes, options: ExportOptions) -> str:
    """Digest of all that decides how a copy looks: options, gate, key and rules."""
    versions = [f"{name} {metadata.version(name)}" for name in ("fedward", "pydicom", "dicom-anonymizer")]
    said = json.dumps([_COPY_VERSION, *versions, _in_order(options.model_dump(mode="json"))], sort_keys=True)
    return hmac.new(key, b"fedward|export settings|" + said.encode(), hashlib.sha256).hexdigest()


def _in_order(value: object) -> object:
    """Sets have come out as lists in any order."""
    if isinstance(value, dict):
        return {name: _in_order(each) for name, each in value.items()}
    if isinstance(value, list):
        parts = [_in_order(each) for each in value]
        return sorted(parts, key=str) if all(isinstance(each, str) for each in parts) else parts
    return value


def files_of_cohort(site: SiteData) -> list[ExportFile]:
    """One file for each content of the cohort's studies, in the order of the contents."""
    file = read_cohort_file(site.home)
    key = load_pseudonym_key(site.home)
    excluded = read_exclusions(site.home)
    with CaseIndex(site.home) as index:
        selected = select_units(index, file, asked_modalities(file, None)).units
        taken_out = [unit for unit in selected if is_excluded(unit, key, excluded)]
        withheld = {content for unit in taken_out for content, _ in unit.parts}  # may hold other volumes too
        units = [unit for unit in selected if withheld.isdisjoint(content for content, _ in unit.parts)]
        touched = _studies_of(excluded, index, key)
        studies = {unit.image.study: unit.image.patient for unit in units if unit.image.study not in touched}
        found = {content: unit.image for unit in units for content, _ in unit.parts}
        found |= {each.content: each for each in _objects(index, studies)}
        names = index.file_names()
    return [
        # One that vanished while it was selected has no name, and is refused when it is to be read.
        ExportFile(content, names.get(content, b""), study_code_of(key, found[content].study))
        for content in sorted(found)
    ]


def _studies_of(excluded: Collection[CaseId], index: CaseIndex, key: bytes) -> set[str]:
    """Studies in which the operator took a case out, also one that is none at the moment."""
    if not excluded:
        return set()
    every = [*index.images("image"), *index.images("image", refused=True)]
    return {
        image.study
        for image in every
        if image.sop_class not in WITHOUT_PICTURE
        and any(case_id_of(key, name) in excluded for name in possible_names(image))
    }


def _objects(index: CaseIndex, studies: dict[str, str]) -> Iterable[IndexedImage]:
    """Segmentations, reports and the like in these studies, of the same patient."""
    return (each for each in index.objects(WITHOUT_PICTURE) if studies.get(each.study) == each.patient)


def export(
    files: Sequence[ExportFile],
    root: Path,
    folder: ExportFolder,
    key: bytes,
    options: ExportOptions,
    progress: Progress | None = None,
    *,
    num_processes: int | None = None,
) -> ExportReport:
    """Write a proven safe copy of every file that may leave and has none yet.

    Ctrl-C ends it between two files; the report then says so.

    Args:
        files: below `root`.
        root: the image folder.
        folder: for the copies, opened.
        key: the site's secret of 32 bytes; the same key gives the same pseudonyms.
        options: what stays.
        progress: told after each file.
        num_processes: see `copies_of`.

    Raises:
        StorageError: a copy cannot be written, or the disk is full.
    """
    num_withdrawn = folder.keep_only(frozenset(file.content for file in files))
    found = {file.content: folder.kept(file.content) for file in files}
    reports = {
        file.content: _report(file, kept) for file in files if (kept := found[file.content]) is not None
    }
    num_kept = len(reports)
    missing = [file for file in files if file.content not in reports]
    stopped = False
    try:
        with closing(copies_of(missing, root, key, options, num_processes)) as copies:
            for file, copy in zip(missing, copies, strict=True):
                reports[file.content] = _settled(file, copy, folder)
                if progress is not None:
                    progress(len(reports), len(files))
    except KeyboardInterrupt:
        stopped = True
    done = [reports[file.content] for file in files if file.content in reports]
    return ExportReport(tuple(done), len(files), num_kept, num_withdrawn, stopped=stopped)


def _settled(file: ExportFile, copy: SafeCopy | UnusableImageError, folder: ExportFolder) -> FileReport:
    try:
        if isinstance(copy, UnusableImageError):
            raise copy
        return _report(file, folder.write(file.content, copy))
    except UnusableImageError as error:
        leaks = error.leaks if isinstance(error, IdentifierLeftError) else ()
        return FileReport(file, reason=error.reason, kind=error.kind, leaks=leaks)


def _report(file: ExportFile, kept: KeptCopy) -> FileReport:
    return FileReport(
        file,
        kept.copy,
        pixels=kept.pixels,
        num_searched=kept.num_searched,
        num_not_searched=kept.num_not_searched,
    )
