"""Decode any image into frames in its modality's units, each with its place in the patient (hop 2).

This is the decoder for everything but radiographs for presentation (`decode.py`): it applies the
modality LUT frame by frame and stops there. Window and inversion are the plan's to choose and come
later, in this order and once (`intensity.py`). Colour comes out as RGB, a Siemens mosaic as its slices.
What cannot be decoded with certainty is refused with a code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward_client.dicom.display import (
    DisplayRules,
    LookUpTable,
    Rescale,
    display_rules,
    stored_ends,
    to_units,
)
from fedward_client.dicom.elements import Elements
from fedward_client.dicom.functional_groups import FrameFacts, frame_facts
from fedward_client.dicom.header import MAX_PIXEL_BYTES, Header, header_of, pixel_refusal_of
from fedward_client.dicom.mosaic import Mosaic, find_mosaic
from fedward_client.dicom.palette import byte_tables, expand, read_palette
from fedward_client.dicom.parser import contained, parse_file
from fedward_client.dicom.pixels import Stored, reach_pixels, stored_frames
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.values import text_or_none

Allocate = Callable[[tuple[int, ...], np.dtype[Any]], NDArray[Any]]
"""Makes the array for the values: (shape, dtype) -> array, not necessarily zeroed."""

# RescaleType and Units are texts that anyone may write: only the standard's own terms are handed on.
_RESCALE_TYPES = frozenset(["OD", "HU", "US", "MGML", "Z_EFF", "ED", "EDW", "HU_MOD", "PCT"])
_PET_UNITS = frozenset(
    (
        *("CNTS", "NONE", "CM2", "CM2ML", "PCNT", "CPS", "BQML", "MGMINML", "UMOLMINML", "MLMING", "MLG"),
        *("1CM", "UMOLML", "PROPCNTS", "PROPCPS", "MLMINML", "MLML", "GML", "STDDEV"),
    )
)


@dataclass(frozen=True, eq=False)
class Frames:
    """The frames of one file, or the slices of one mosaic.

    Positions, orientations and times are DICOM's: patient coordinates (left, posterior, head) in mm.

    Args:
        values: float32 `(frames, rows, columns)` in `units`, or uint8 `(frames, rows, columns, 3)` RGB.
        units: "HU", "BQML", ...; "US" (unspecified) when the file does not say; "RGB" for colour.
        inverted: low values are to be shown white; `values` are as stored, not inverted.
        stored_range: lowest and highest value, in units, that BitsStored can hold, of each frame.
        voi_functions: VOILUTFunction of each frame.
        windows: (center, width) of each frame in units, as a viewer would choose; None when no frame
            has one.
        voi_lut: the table that goes before the windows; None when the file has none.
        positions: ImagePositionPatient of each frame, float64 `(frames, 3)`; None when not all have it.
        orientations: ImageOrientationPatient, float64 `(frames, 6)`, likewise.
        spacing: mm between rows, between columns; None when absent or not the same for all frames.
        facts: everything else that is said frame by frame; of the mosaic as one frame, if it was one.
        from_mosaic: the frames were the tiles of one stored image.
    """

    values: NDArray[Any] = field(repr=False)
    units: str
    inverted: bool
    stored_range: tuple[tuple[float, float], ...] = field(repr=False)
    voi_functions: tuple[str, ...] = field(repr=False)
    windows: tuple[tuple[float, float] | None, ...] | None = field(repr=False)
    voi_lut: LookUpTable | None = field(repr=False)
    positions: NDArray[np.float64] | None = field(repr=False)
    orientations: NDArray[np.float64] | None = field(repr=False)
    spacing: tuple[float, float] | None
    facts: FrameFacts = field(repr=False)
    from_mosaic: bool = False

    @property
    def is_colour(self) -> bool:
        """Whether `values` are RGB."""
        return self.values.ndim == 4


def decode_frames(
    data: bytes, *, max_pixel_bytes: int = MAX_PIXEL_BYTES, allocate: Allocate = np.empty
) -> Frames:
    """Decode every frame of a file held in memory.

    Args:
        data: the whole file.
        max_pixel_bytes: of the uncompressed pixels as stored, and number of grey pixels, four bytes each
            in the result.
        allocate: where the values go; the sandbox puts them into shared memory.

    Raises:
        UnusableImageError: refused, or the pixels cannot be decoded; always with its reason.
    """
    with contained(Reason.DECODE_FAILED):
        parsed = parse_file(data)
        header = header_of(parsed)
        refusal = pixel_refusal_of(header, max_pixel_bytes)
        if refusal is not None:
            raise refusal
        facts = frame_facts(parsed.elements, header)
        rules = display_rules(parsed.elements, header)
        mosaic = find_mosaic(parsed.elements, header, facts)
        stored = stored_frames(reach_pixels(parsed, header, data), header)
        if header.samples > 1 or header.photometric == "PALETTE COLOR":
            values: NDArray[Any] = _colour(stored, parsed.elements, header, allocate)
            modalities: list[Modality] = []
        else:
            if header.rows * header.columns * header.num_frames > max_pixel_bytes:
                raise UnusableImageError(Reason.OVER_LIMIT)
            modalities = [_modality(rules, rescale) for rescale in facts.rescales]
            values = _grey(stored, header, modalities, mosaic, allocate)
        return _frames(values, parsed.elements, header, facts, rules, modalities, mosaic)


Modality = LookUpTable | Rescale | None


def _modality(rules: DisplayRules, rescale: Rescale | None) -> Modality:
    """What turns one frame's stored values into units; a table is the whole file's."""
    return rules.modality if rescale is None or isinstance(rules.modality, LookUpTable) else rescale


def _grey(
    stored: Iterator[Stored],
    header: Header,
    modalities: Sequence[Modality],
    mosaic: Mosaic | None,
    allocate: Allocate,
) -> NDArray[np.float32]:
    if mosaic is not None:
        stored = iter(mosaic.tiles(next(stored)))
        modalities = list(modalities) * mosaic.num_tiles
    shape = (header.rows, header.columns) if mosaic is None else mosaic.tile_shape
    values = allocate((len(modalities), *shape), np.dtype(np.float32))
    for frame, image, modality in zip(values, stored, modalities, strict=True):
        _put_in_units(image, modality, frame)
    return values


def _put_in_units(stored: Stored, modality: Modality, out: NDArray[np.float32]) -> None:
    """Write one frame in units; as exact as float32 holds it."""
    if modality is None:
        out[...] = stored
    elif isinstance(modality, LookUpTable):
        out[...] = modality.apply(stored.astype(np.float64))
    elif modality.slope == 1 and modality.intercept == int(modality.intercept) and _is_short(stored):
        np.add(stored, np.float32(modality.intercept), out=out, dtype=np.float32)  # exact, half the work
    else:
        units = np.multiply(stored, modality.slope, dtype=np.float64)
        np.add(units, modality.intercept, out=out, casting="same_kind")


def _is_short(stored: Stored) -> bool:
    return stored.dtype.kind in "iu" and stored.dtype.itemsize <= 2


def _colour(
    stored: Iterator[Stored], elements: Elements, header: Header, allocate: Allocate
) -> NDArray[np.uint8]:
    values = allocate((header.num_frames, header.rows, header.columns, 3), np.dtype(np.uint8))
    tables = None if header.samples > 1 else byte_tables(read_palette(elements, header))
    for frame, image in zip(values, stored, strict=True):
        if tables is not None:
            frame[...] = expand(image, *tables)
        elif image.dtype == np.uint8:
            frame[...] = image
        else:  # deep colour keeps its upper bits
            frame[...] = image >> (header.bits_stored - 8)
    return values


def _frames(
    values: NDArray[Any],
    elements: Elements,
    header: Header,
    facts: FrameFacts,
    rules: DisplayRules,
    modalities: Sequence[Modality],
    mosaic: Mosaic | None,
) -> Frames:
    num_frames = len(values)
    repeats = num_frames // facts.num_frames
    windows = tuple(each[0] if each else None for each in facts.windows) * repeats
    ranges = tuple(_range_in_units(header, modality, values) for modality in modalities) * repeats
    return Frames(
        values=values,
        units="RGB" if values.ndim == 4 else _units(elements, header, facts, modalities),
        inverted=rules.inverted,
        stored_range=ranges,
        voi_functions=facts.voi_functions * repeats,
        windows=windows if any(windows) else None,
        voi_lut=rules.voi_lut,
        positions=facts.positions if mosaic is None else mosaic.positions,
        orientations=facts.orientations if mosaic is None else mosaic.orientations,
        spacing=_one_spacing(facts),
        facts=facts,
        from_mosaic=mosaic is not None,
    )


def _range_in_units(header: Header, modality: Modality, values: NDArray[Any]) -> tuple[float, float]:
    if header.pixel_kind != "integer":
        finite = values[np.isfinite(values)]
        return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if isinstance(modality, LookUpTable):
        return float(modality.entries.min()), float(modality.entries.max())
    ends = to_units(modality, np.array(stored_ends(header)))
    if not (np.abs(ends) <= np.finfo(np.float32).max).all():
        raise UnusableImageError(Reason.DISPLAY_VALUES)
    return float(ends.min()), float(ends.max())


def _units(elements: Elements, header: Header, facts: FrameFacts, modalities: Sequence[Modality]) -> str:
    written = facts.rescale_types[0] or text_or_none(elements, "RescaleType")
    is_rescaled = bool(modalities) and modalities[0] is not None  # a type alone turns nothing into units
    if is_rescaled and written in _RESCALE_TYPES and written != "US":
        return written
    if header.modality == "CT" and not written and isinstance(modalities[0], Rescale):
        return "HU"
    units = text_or_none(elements, "Units")
    return units if header.modality == "PT" and units in _PET_UNITS else "US"


def _one_spacing(facts: FrameFacts) -> tuple[float, float] | None:
    if facts.spacings is None or not (facts.spacings == facts.spacings[0]).all():
        return None
    return float(facts.spacings[0, 0]), float(facts.spacings[0, 1])
