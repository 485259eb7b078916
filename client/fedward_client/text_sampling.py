"""Draw some of the cohort's pictures at random and look for text in them: `fedward-site cohort ocr` (hop 3).

The pictures are those that train: what the gate blackens is black here too. Decoded in the sandbox; the
sample comes from the operating system's randomness, so that nothing can be built to escape it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedward_client.cohort import asked_modalities
from fedward_client.cohort_file import read_cohort_file
from fedward_client.cohort_grouping import CohortUnit
from fedward_client.cohort_units import select_units
from fedward_client.dicom.frames import Frames
from fedward_client.dicom.gate import mask
from fedward_client.dicom.sandbox import DecodeSandbox, SiteFile
from fedward_client.index_store import CaseIndex
from fedward_client.ocr import FoundWord, find_tesseract, find_text
from fedward_client.pseudonyms import CaseId, case_id_of, load_pseudonym_key
from fedward_client.site_data import SiteData
from fedward_common.errors import CohortError

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ReadPicture:
    """One picture that was looked at.

    Args:
        case_id: of its case, labelled or not.
        frame_index: of the frame in its file, from 0.
        words: what was found; may name a patient.
    """

    case_id: CaseId
    frame_index: int
    words: tuple[FoundWord, ...] = field(repr=False)


def sample_text(site: SiteData, num_pictures: int, progress: Progress | None = None) -> list[ReadPicture]:
    """Look for text in a random sample; run `index_folder` first.

    Args:
        site: whose.
        num_pictures: at most.
        progress: told after each picture.

    Raises:
        UsageError: tesseract is not installed, or HOME/cohort.toml is not sound.
        CohortError: there is no picture.
    """
    tesseract = find_tesseract()
    file = read_cohort_file(site.home)
    key = load_pseudonym_key(site.home)
    with CaseIndex(site.home) as index:
        units = select_units(index, file, asked_modalities(file, None)).units
        names = index.file_names()
    pictures = [(unit, content, frame) for unit in units for content, frame in unit.parts]
    if not pictures:
        raise CohortError(
            "there is no picture to look at",
            remedy="See what is in quarantine and why: fedward-site cohort quarantine",
        )
    drawn = secrets.SystemRandom().sample(pictures, min(num_pictures, len(pictures)))
    # One that vanished while it was selected has no name, and cannot be read any more.
    files = [SiteFile(site.dicom, names.get(content, b""), content) for _, content, _ in drawn]
    read = []
    with DecodeSandbox(1) as sandbox:
        outcomes = sandbox.map(files, "frames")
        for number, ((unit, _, frame), outcome) in enumerate(zip(drawn, outcomes, strict=True), start=1):
            if isinstance(outcome, Frames):  # one that cannot be decoded does not train either
                words = find_text(_grey(outcome, frame, unit), tesseract)
                read.append(ReadPicture(case_id_of(key, unit.name), frame, words))
            if progress is not None:
                progress(number, len(drawn))
    return read


def _grey(frames: Frames, frame: int, unit: CohortUnit) -> NDArray[np.uint8]:
    """One frame over the full range of its values: text is at an end of it, whatever the window shows."""
    picture = frames.values[frame]
    colour = picture.ndim == 3
    if unit.regions is not None:
        picture = mask(picture, unit.regions, inverted=frames.inverted, colour=colour)
    if colour:
        brightest: NDArray[np.uint8] = picture.max(axis=2)
        return brightest
    low, high = float(picture.min()), float(picture.max())
    scaled = (picture.astype(np.float32) - low) / max(high - low, 1e-6) * 255
    shown: NDArray[np.uint8] = (255 - scaled if frames.inverted else scaled).astype(np.uint8)
    return shown
