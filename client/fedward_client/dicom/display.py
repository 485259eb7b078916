"""What a viewer would show for a stored value: modality LUT -> window -> inversion, in [0, 1].

`display_rules` reads how a file wants its values understood. For radiographs each step is a function of
the stored value alone, so `display_table` works it out once for every value that the allocated bits can
hold and then it is looked up: exact, and cheap in memory. Inversion (MONOCHROME1, or
PresentationLUTShape INVERSE) comes last and once, so 0 is black whatever the file's convention.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedward_client.dicom.elements import Elements
from fedward_client.dicom.header import Header
from fedward_client.dicom.parser import contained
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.values import numbers, raw_text, raw_value, sequence, written_vr

DISPLAY_KEYWORDS = (
    "RescaleSlope",
    "RescaleIntercept",
    "ModalityLUTSequence",
    "VOILUTSequence",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "PresentationLUTShape",
)

_MAX_WINDOWS = 64

Values = NDArray[np.float64]


@dataclass(frozen=True)
class LookUpTable:
    """A table from values to values.

    Args:
        first_mapped: value of its first entry; lower values take that entry, higher ones the last.
        bits: of its entries, 8 to 16.
        entries: uint16 `(entries,)`.
        num_entries: as announced; a segmented table has another number in `entries` until it is expanded.
    """

    first_mapped: int
    bits: int
    entries: NDArray[np.uint16] = field(repr=False)
    num_entries: int

    def apply(self, values: Values) -> Values:
        """Look up values of any shape, rounded to whole numbers."""
        index = np.clip(np.rint(values) - self.first_mapped, 0, len(self.entries) - 1)
        looked_up: Values = self.entries[index.astype(np.int64)].astype(np.float64)
        return looked_up


@dataclass(frozen=True)
class Rescale:
    """Stored values to units: `stored * slope + intercept`."""

    slope: float = 1.0
    intercept: float = 0.0


@dataclass(frozen=True)
class DisplayRules:
    """How a file wants its stored values understood and shown.

    Args:
        modality: to units; None when the file says nothing.
        voi_lut: of values in units; goes before the windows.
        windows: (WindowCenter, WindowWidth) in units, the first is the one a viewer takes.
        voi_function: VOILUTFunction.
        inverted: the lowest value is shown white.
    """

    modality: LookUpTable | Rescale | None
    voi_lut: LookUpTable | None
    windows: tuple[tuple[float, float], ...]
    voi_function: str
    inverted: bool


def display_rules(elements: Elements, header: Header) -> DisplayRules:
    """Read the display elements of a file; call it inside `contained`.

    Raises:
        UnusableImageError: rescale, window or look-up table are malformed.
    """
    try:
        shape = raw_text(elements, "PresentationLUTShape")
        stored = stored_ends(header)
        modality = _look_up_table(elements, "ModalityLUTSequence", stored) or read_rescale(elements)
        units = to_units(modality, np.array(stored))
        return DisplayRules(
            modality=modality,
            voi_lut=_look_up_table(elements, "VOILUTSequence", (float(units.min()), float(units.max()))),
            windows=read_windows(elements),
            voi_function=raw_text(elements, "VOILUTFunction") or "LINEAR",
            inverted=header.photometric == "MONOCHROME1" or shape == "INVERSE",
        )
    except (ValueError, struct.error):
        raise UnusableImageError(Reason.DISPLAY_VALUES) from None


def stored_ends(header: Header) -> tuple[float, float]:
    """Lowest and highest value that BitsStored can hold; no bounds for floating-point pixels."""
    if header.pixel_kind != "integer":
        return -math.inf, math.inf
    lowest = -(2 ** (header.bits_stored - 1)) if header.signed else 0
    return float(lowest), float(lowest + 2**header.bits_stored - 1)


def read_rescale(elements: Elements) -> Rescale | None:
    """RescaleSlope and RescaleIntercept, None unless both are there.

    Raises:
        UnusableImageError: several values, a slope of zero, or one of the two that would change the values.
        ValueError: no numbers.
    """
    slope, intercept = numbers(elements, "RescaleSlope"), numbers(elements, "RescaleIntercept")
    if not slope or not intercept:
        if any(each != 1 for each in slope) or any(intercept):
            raise UnusableImageError(Reason.DISPLAY_VALUES)
        return None
    if len(slope) > 1 or len(intercept) > 1 or slope[0] == 0:
        raise UnusableImageError(Reason.DISPLAY_VALUES)
    return Rescale(float(slope[0]), float(intercept[0]))


def read_windows(elements: Elements) -> tuple[tuple[float, float], ...]:
    """WindowCenter and WindowWidth in pairs.

    Raises:
        ValueError: no numbers, or more windows than anyone has a use for: each frame gets them all.
    """
    pairs = zip(numbers(elements, "WindowCenter"), numbers(elements, "WindowWidth"), strict=False)
    windows = tuple((float(center), float(width)) for center, width in pairs)
    if len(windows) > _MAX_WINDOWS:
        raise ValueError
    return windows


def first_value(header: Header) -> int:
    """Lowest stored value that the allocated bits can hold: index 0 of the display table."""
    return _Bits(header.bits_allocated, header.bits_stored, header.signed).first_value


def display_table(rules: DisplayRules, header: Header) -> NDArray[np.float32]:
    """Displayed value of every stored value, from `first_value` up.

    Returns:
        float32 `(2 ** bits_allocated,)` in [0, 1]; not to be written to.

    Raises:
        UnusableImageError: rescale, window or look-up table hold values that cannot be used.

    Source: DICOM PS3.3 C.11.1 (modality LUT), C.11.2 (VOI LUT), C.7.6.3.1.2 (MONOCHROME1).
    """
    bits = _Bits(header.bits_allocated, header.bits_stored, header.signed)
    has_table = isinstance(rules.modality, LookUpTable) or rules.voi_lut is not None
    return _table(rules, bits) if has_table else _usual_table(rules, bits)


class _Bits(NamedTuple):
    """All that a table depends on beside the rules."""

    allocated: int
    stored: int
    signed: int

    @property
    def first_value(self) -> int:
        return -(2 ** (self.allocated - 1)) if self.signed else 0


def _table(rules: DisplayRules, bits: _Bits) -> NDArray[np.float32]:
    with contained(Reason.DISPLAY_VALUES):
        stored = np.arange(bits.first_value, bits.first_value + 2**bits.allocated, dtype=np.float64)
        shown = _voi(rules, bits, to_units(rules.modality, stored))
        if rules.inverted:
            shown = 1.0 - shown
        if not np.isfinite(shown).all():
            raise UnusableImageError(Reason.DISPLAY_VALUES)
        table = shown.astype(np.float32)
        table.flags.writeable = False
        return table


_usual_table = lru_cache(maxsize=8)(_table)
"""One device writes the same window into thousands of files."""


def to_units(modality: LookUpTable | Rescale | None, stored: Values) -> Values:
    """Apply the modality LUT to stored values of any shape."""
    if modality is None:
        return stored
    if isinstance(modality, LookUpTable):
        return modality.apply(stored)
    return stored * modality.slope + modality.intercept


def _voi(rules: DisplayRules, bits: _Bits, values: Values) -> Values:
    """Choose as a viewer does: the VOI LUT, else the first window, else the whole stored range."""
    if rules.voi_lut is not None:
        return _clip(rules.voi_lut.apply(values) / float(2**rules.voi_lut.bits - 1))
    if rules.windows:
        return window_values(values, *rules.windows[0], rules.voi_function)
    lowest = -(2 ** (bits.stored - 1)) if bits.signed else 0
    start = lowest - bits.first_value
    within = values[start : start + 2**bits.stored]
    low, high = within.min(), within.max()
    if not high > low:
        raise UnusableImageError(Reason.DISPLAY_VALUES)
    return _clip((values - low) / (high - low))


def window_values(values: Values, center: float, width: float, function: str = "LINEAR") -> Values:
    """Map values to [0, 1] through one window.

    Args:
        values: after the modality LUT, any shape.
        center: WindowCenter.
        width: WindowWidth, in the units of `values`.
        function: VOILUTFunction: "LINEAR", "LINEAR_EXACT" or "SIGMOID".

    Raises:
        UnusableImageError: a width or function that the standard does not allow.

    Source: DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3.

    >>> window_values(np.array([0.0, 51.0, 255.0]), 128, 256)
    array([0. , 0.2, 1. ])
    """
    allowed = width >= 1 if function == "LINEAR" else width > 0
    if not (math.isfinite(center) and math.isfinite(width) and allowed):
        raise UnusableImageError(Reason.DISPLAY_VALUES)
    if function == "LINEAR" and width == 1:
        shown = (values > center - 0.5).astype(np.float64)
    elif function == "LINEAR":  # the standard's half-pixel convention
        shown = (values - (center - 0.5)) / (width - 1) + 0.5
    elif function == "LINEAR_EXACT":
        shown = (values - center) / width + 0.5
    elif function == "SIGMOID":
        shown = 1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - center) / width, -700.0, 700.0)))
    else:
        raise UnusableImageError(Reason.DISPLAY_VALUES)
    return _clip(shown)


def _look_up_table(elements: Elements, keyword: str, ends: tuple[float, float]) -> LookUpTable | None:
    items = sequence(elements, keyword)
    return read_table(items[0], "LUTDescriptor", "LUTData", ends) if items else None


def read_table(
    item: Elements, descriptor: str, data: str, ends: tuple[float, float], *, whole: bool = True
) -> LookUpTable:
    """Read a look-up table by the keywords of its descriptor and data.

    Args:
        item: where the table is.
        descriptor: keyword.
        data: keyword.
        ends: lowest and highest value that can be looked up.
        whole: the data are the entries, as many as announced; else all the data are returned as they are.

    Raises:
        UnusableImageError: fewer entries than announced, or of an odd size.
        ValueError: no numbers.

    Source: DICOM PS3.3 C.11.1.1.
    """
    described = numbers(item, descriptor)
    entries = raw_value(item, data) or b""
    if len(described) != 3:
        raise UnusableImageError(Reason.DISPLAY_VALUES)
    # The count is unsigned whatever the VR says; 65,536 does not fit in it and is written as 0.
    num_entries = int(described[0]) % 2**16 or 2**16
    first_mapped, bits = int(described[1]), int(described[2])
    if first_mapped >= 2**15:
        # Signed where values may be negative, which implicit VR cannot say; and a table that begins
        # beyond every value would be no table.
        signed = ends[0] < 0 and written_vr(item, descriptor) != b"US"
        first_mapped -= 2**16 * (signed or first_mapped > ends[1])
    if not 8 <= bits <= 16:
        raise UnusableImageError(Reason.DISPLAY_VALUES)
    packed = bits == 8 and (not whole or num_entries <= len(entries) <= num_entries + 1)
    order = "<u2" if item.encoding.little else ">u2"
    table = np.frombuffer(entries, dtype=np.uint8 if packed else order, count=num_entries if whole else -1)
    return LookUpTable(first_mapped, bits, table.astype(np.uint16), num_entries)


def _clip(shown: Values) -> Values:
    clipped: Values = np.clip(shown, 0.0, 1.0)
    return clipped
