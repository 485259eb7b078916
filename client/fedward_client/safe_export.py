"""Export safe copies of the cohort's studies: `fedward-site cohort deidentify OUT` (hop 3).

What the site declares as its cohort, labelled or not, without excluded cases, and the segmentations,
reports and structure sets of the same studies. Every copy is made and proven by `dicom/deidentify.py`
before it is written; a file of which there is no copy stands in the report with a reason. Pixels of
compressed files are decoded in the sandbox.

Reports name a file by its content's digest and its study's pseudonym; file names, which may name
patients, are for the operator's terminal only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from fedward_client.cohort import asked_modalities
from fedward_client.cohort_file import read_cohort_file
from fedward_client.cohort_units import select_units
from fedward_client.dicom.byte_scan import Leak
from fedward_client.dicom.copy_pixels import PixelChange
from fedward_client.dicom.deidentify import (
    WITHOUT_PICTURE,
    ExportOptions,
    IdentifierLeftError,
    make_copy,
)
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.sandbox import DecodeSandbox, SiteFile
from fedward_client.exclusions import is_excluded, read_exclusions
from fedward_client.index_records import IndexedImage
from fedward_client.index_store import CaseIndex
from fedward_client.pseudonyms import load_pseudonym_key, study_code_of
from fedward_client.site_data import SiteData
from fedward_client.sources.folder import read_content
from fedward_common.errors import CohortError, StorageError, UsageError
from fedward_common.files import write_new

Progress = Callable[[int, int], None]
"""Called with (files done, files in all)."""


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
    """What became of all files, in the order of their content."""

    files: tuple[FileReport, ...]

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
        out: folder, new or empty, outside the image folder.
        options: what stays; its gate is replaced by the site's own.
        progress: told after each file.

    Raises:
        CohortError: nothing is in the cohort, or the index cannot be read.
        StorageError: the folder is not empty or cannot be written, or the disk is full.
        UsageError: HOME/cohort.toml is not sound.
    """
    if site.dicom.resolve() in [out.resolve(), *out.resolve().parents]:
        raise StorageError(
            "the folder for the copies lies in the image folder",
            remedy="Name a folder elsewhere: copies must not be indexed as images of patients.",
        )
    files = files_of_cohort(site)
    own = options.model_copy(update={"gate": read_cohort_file(site.home).gate})
    return export(files, site.dicom, out, load_pseudonym_key(site.home), own, progress)


def files_of_cohort(site: SiteData) -> list[ExportFile]:
    """One file for each content of the cohort's studies, in the order of the contents.

    Raises:
        CohortError: there is none.
    """
    file = read_cohort_file(site.home)
    key = load_pseudonym_key(site.home)
    excluded = read_exclusions(site.home)
    with CaseIndex(site.home) as index:
        selected = select_units(index, file, asked_modalities(file, None)).units
        taken_out = [unit for unit in selected if is_excluded(unit, key, excluded)]
        withheld = {content for unit in taken_out for content, _ in unit.parts}  # may hold other volumes too
        units = [unit for unit in selected if withheld.isdisjoint(content for content, _ in unit.parts)]
        studies = {unit.image.study: unit.image.patient for unit in units}
        found = {content: unit.image for unit in units for content, _ in unit.parts}
        found |= {each.content: each for each in _objects(index, studies)}
        names = index.file_names()
    if not found:
        raise CohortError(
            "there is no image to export",
            remedy="See what is in quarantine and why: fedward-site cohort quarantine",
        )
    return [
        ExportFile(content, names[content], study_code_of(key, found[content].study))
        for content in sorted(found)
    ]


def _objects(index: CaseIndex, studies: dict[str, str]) -> Iterable[IndexedImage]:
    """Segmentations, reports and the like in these studies, of the same patient."""
    return (each for each in index.objects(WITHOUT_PICTURE) if studies.get(each.study) == each.patient)


def export(
    files: Sequence[ExportFile],
    root: Path,
    out: Path,
    key: bytes,
    options: ExportOptions,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a proven safe copy of every file that may leave.

    Args:
        files: below `root`; read one at a time.
        root: the image folder.
        out: folder, new or empty.
        key: the site's secret of 32 bytes; the same key gives the same pseudonyms.
        options: what stays.
        progress: told after each file.

    Raises:
        StorageError: the folder is not empty or cannot be written, or the disk is full.
    """
    _make_folder(out)
    reports = []
    with ExitStack() as resources:
        decoders = _Decoders(root, resources)
        for number, file in enumerate(files, start=1):
            try:
                copy = make_copy(_read(root, file), key, options, partial(decoders.decode, file))
                _write(out / copy.name, copy.data, out)
            except UnusableImageError as error:
                leaks = error.leaks if isinstance(error, IdentifierLeftError) else ()
                reports.append(FileReport(file, reason=error.reason, kind=error.kind, leaks=leaks))
            else:
                reports.append(
                    FileReport(
                        file,
                        copy.name,
                        pixels=copy.pixels,
                        num_searched=copy.num_searched,
                        num_not_searched=copy.num_not_searched,
                    )
                )
            if progress is not None:
                progress(number, len(files))
    return ExportReport(tuple(reports))


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


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(mode=0o700, exist_ok=True)
        if any(out.iterdir()):
            raise StorageError(
                "the folder for the copies is not empty",
                remedy="Name a new folder: copies of different exports must not be mixed.",
            )
        out.chmod(0o700)
    except OSError as error:
        raise StorageError(
            f"the folder for the copies cannot be made: {os.strerror(error.errno or 0)}",
            remedy="Name a folder in a place where this user may write.",
        ) from error


def _write(path: Path, data: bytes, out: Path) -> None:
    """Write one copy, with private folders on the way."""
    try:
        for folder in reversed([each for each in path.parents if out in each.parents]):
            folder.mkdir(mode=0o700, exist_ok=True)
        write_new(path, data)
    except FileExistsError:
        raise UnusableImageError(Reason.SAME_UID) from None
    except OSError as error:
        raise StorageError(
            f"a copy cannot be written: {os.strerror(error.errno or 0)}",
            remedy="Free disk space and export again into a new folder.",
        ) from error
