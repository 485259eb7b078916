"""A contact sheet for the operator's eyes: some of the cohort's pictures on one page, in the site's home.

What no header tells (a name in the picture, a wrong label, an upside-down scan) only eyes find. The sheet
shows a sample as it would train: decoded in the sandbox, blackened where the gate blackens, each with its
case id, label, side and the gate's decision, and nothing else from a header. The page asks the network
for nothing, is readable by its owner alone, and never leaves the site; `cohort purge` deletes it.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedward_client.cohort import Case, open_cohort
from fedward_client.dicom.frames import Frames
from fedward_client.dicom.gate import mask
from fedward_client.dicom.intensity import FILE, Intensity, frames_in_unit_interval
from fedward_client.dicom.refusal import UnusableImageError
from fedward_client.dicom.sandbox import DecodeSandbox
from fedward_client.index import Progress
from fedward_client.index_store import CaseIndex
from fedward_client.preparation import Files
from fedward_client.purging import CONTACT_SHEET_FILE
from fedward_client.site_data import SiteData
from fedward_common.errors import CohortError
from fedward_common.files import write_atomically

LONGEST_SIDE = 512
"""Pixels of a picture on the sheet: burned-in letters stay legible."""

_SLICES_SHOWN = 3
_MAX_PROCESSES = 4
_TYPICAL = Intensity("percentiles", 0.5, 99.5)
_HERE = Path(__file__).resolve().parent
_BLACK = np.zeros((1, 1), np.uint8)


@dataclass(frozen=True)
class Picture:
    """One picture.

    Args:
        png: the file, without metadata.
        place: "slice 12 of 40", or "" of a case that is one picture.
    """

    png: bytes = field(repr=False)
    place: str

    @property
    def url(self) -> str:
        """The picture itself as a URL."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


@dataclass(frozen=True)
class Tile:
    """One case on the sheet.

    Args:
        decision: the gate's: it trains as it is, or outside some regions it is black.
        pictures: of a volume or several frames, at a quarter, half and three quarters of it.
        fault: why there is no picture, or "".
    """

    case_id: str
    label: str
    split: str
    modality: str
    decision: Literal["train", "mask"]
    pictures: tuple[Picture, ...]
    fault: str = ""


@dataclass(frozen=True)
class ContactSheet:
    """A sample of the cohort.

    Args:
        tiles: masked cases first, then by label and side.
        num_cases: of the whole cohort.
        seed: which sample.
    """

    tiles: tuple[Tile, ...]
    num_cases: int
    seed: int

    @property
    def num_faults(self) -> int:
        """Cases that could not be shown."""
        return sum(bool(tile.fault) for tile in self.tiles)


def make_contact_sheet(
    site: SiteData, *, num_cases: int = 48, seed: int = 0, progress: Progress | None = None
) -> ContactSheet:
    """Decode a sample of the cohort; run `index_folder` first.

    Args:
        site: whose.
        num_cases: at most.
        seed: another one gives another sample; the same one the same, as long as the cohort is.
        progress: told after each case.

    Raises:
        CohortError: there is no cohort, or a file changed since it was indexed.
        UsageError: HOME/cohort.toml is not sound.
    """
    cohort = open_cohort(site)
    drawn = sorted(cohort.cases, key=lambda case: _draw(seed, case))[:num_cases]
    with CaseIndex(site.home) as index:
        known = Files(site, index.file_names(), index.quarantine)
    asked = [_frames_of(case) for case in drawn]
    files = [known.of(content) for frames in asked for content in frames]
    processes = min(_MAX_PROCESSES, len(os.sched_getaffinity(0)), 1 + len(files) // 8)
    tiles = []
    with DecodeSandbox(processes) as sandbox:
        outcomes = iter(sandbox.map(files, "frames"))
        for number, (case, frames) in enumerate(zip(drawn, asked, strict=True), start=1):
            tiles.append(_tile(case, cohort.label_names[case.label], frames, outcomes))
            if progress is not None:
                progress(number, len(drawn))
    tiles.sort(key=lambda tile: (tile.decision != "mask", tile.label, tile.split, tile.case_id))
    return ContactSheet(tuple(tiles), len(cohort.cases), seed)


def render_contact_sheet(sheet: ContactSheet) -> str:
    """Put the sheet on one self-contained HTML page, every text escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = (_HERE / "contact_sheet.css").read_text(encoding="utf-8").strip()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    groups = [
        ("Masked by the gate", [tile for tile in sheet.tiles if tile.decision == "mask"]),
        ("As they are", [tile for tile in sheet.tiles if tile.decision == "train"]),
    ]
    return environment.get_template("contact_sheet.html.j2").render(
        sheet=sheet,
        groups=[group for group in groups if group[1]],
        style=style,
        policy=f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'",
    )


def write_contact_sheet(home: Path, sheet: ContactSheet) -> Path:
    """Write the page into the site's home, mode 0600, in place of an earlier one.

    Raises:
        CohortError: the disk is full, or the home is not writable.
    """
    path = home / CONTACT_SHEET_FILE
    try:
        write_atomically(path, render_contact_sheet(sheet).encode())
    except OSError:
        raise CohortError(
            "the contact sheet cannot be written", remedy="Free disk space, and make HOME writable."
        ) from None
    return path


def _draw(seed: int, case: Case) -> bytes:
    return hashlib.sha256(f"{seed}|{case.content}".encode()).digest()


def _frames_of(case: Case) -> dict[str, list[tuple[int, str]]]:
    """Content -> frames that are shown, each with what it is called; contents in order."""
    total = len(case.parts)
    shown = (
        range(total)
        if total <= _SLICES_SHOWN
        else [round(total * part / (_SLICES_SHOWN + 1)) for part in range(1, _SLICES_SHOWN + 1)]
    )
    what = "frame" if case.geometry is None else "slice"
    found: dict[str, list[tuple[int, str]]] = {}
    for number in shown:
        content, frame = case.parts[number]
        place = f"{what} {number + 1} of {total}" if total > 1 else ""
        found.setdefault(content, []).append((frame, place))
    return found


def _tile(
    case: Case, label: str, asked: dict[str, list[tuple[int, str]]], outcomes: Iterator[object]
) -> Tile:
    pictures: list[Picture] = []
    fault = ""
    for shown in asked.values():  # as many outcomes as contents, whatever becomes of them
        outcome = next(outcomes)
        try:
            if isinstance(outcome, Frames):
                pictures += [Picture(_png(outcome, frame, case), place) for frame, place in shown]
            elif isinstance(outcome, CohortError):
                raise outcome
        except UnusableImageError as error:
            fault = error.reason.meaning
    return Tile(
        case_id=case.case_id,
        label=label,
        split=case.split,
        modality=case.modality,
        decision="train" if case.regions is None else "mask",
        pictures=() if fault else tuple(pictures),
        fault=fault,
    )


def _png(frames: Frames, frame: int, case: Case) -> bytes:
    """One frame as it trains, but windowed for the eye: as its file says, else by its own values.

    Raises:
        UnusableImageError: a region reaches out of the picture, or the frame is not there.
    """
    from PIL import Image

    picture = Image.fromarray(_display(_one(frames, frame, case)))
    size = _size(picture.height, picture.width, case.spacing_mm)
    file = io.BytesIO()
    picture.resize(size, Image.Resampling.LANCZOS).save(file, "PNG")
    return file.getvalue()


def _one(frames: Frames, frame: int, case: Case) -> Frames:
    only = slice(frame, frame + 1)
    values = frames.values[only]
    return replace(
        frames,
        values=values if case.regions is None else mask(values, case.regions, inverted=frames.inverted),
        windows=None if frames.windows is None else frames.windows[only],
        voi_functions=frames.voi_functions[only],
        stored_range=frames.stored_range[only],
        positions=None,
        orientations=None,
    )


def _display(frames: Frames) -> NDArray[np.uint8]:
    has_window = frames.voi_lut is not None or any(each is not None for each in frames.windows or ())
    for intensity in (FILE, _TYPICAL) if has_window else (_TYPICAL, FILE):
        try:
            shown = frames_in_unit_interval(frames, intensity)[0]
        except UnusableImageError:  # one value throughout, or a window that makes no sense
            continue
        grey: NDArray[np.uint8] = np.rint(shown * 255).astype(np.uint8)
        return grey
    return _BLACK


def _size(rows: int, columns: int, spacing_mm: Sequence[float] | None) -> tuple[int, int]:
    """Width and height on the sheet, in the proportions of the patient.

    >>> _size(100, 200, None), _size(1000, 500, (1.0, 1.0)), _size(100, 100, (3.0, 2.0, 1.0))
    ((200, 100), (256, 512), (50, 100))
    """
    row_mm, column_mm = (1.0, 1.0) if spacing_mm is None else spacing_mm[-2:]
    height, width = rows * row_mm, columns * column_mm
    scale = min(LONGEST_SIDE, max(rows, columns)) / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))
