"""What a viewer would show for a stored value: modality LUT -> window -> inversion, in [0, 1].

Each step is a function of the stored value alone, so it is worked out once for every value that the
allocated bits can hold and then looked up: exact, and cheap in memory. Inversion (MONOCHROME1, or
PresentationLUTShape INVERSE) comes last and once, so 0 is black whatever the file's convention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRBigEndian

from fedward_client.dicom.header import Header
from fedward_client.dicom.parser import contained
from fedward_client.dicom.refusal import Reason, UnusableImageError

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

Values = NDArray[np.float64]


def first_value(header: Header) -> int:
    """Lowest stored value that the allocated bits can hold: index 0 of the display table."""
    return -(2 ** (header.bits_allocated - 1)) if header.signed else 0


def display_table(dataset: Dataset, header: Header) -> NDArray[np.float32]:
    """Displayed value of every stored value, from `first_value` up.

    Returns:
        float32 `(2 ** bits_allocated,)` in [0, 1].

    Raises:
        UnusableImageError: rescale, window or look-up table hold values that cannot be used.

    Source: DICOM PS3.3 C.11.1 (modality LUT), C.11.2 (VOI LUT), C.7.6.3.1.2 (MONOCHROME1).
    """
    with contained(Reason.DISPLAY_VALUES):
        first = first_value(header)
        stored = np.arange(first, first + 2**header.bits_allocated, dtype=np.float64)
        shown = _voi(dataset, header, _modality(dataset, header, stored))
        if header.photometric == "MONOCHROME1" or dataset.get("PresentationLUTShape") == "INVERSE":
            shown = 1.0 - shown
        if not np.isfinite(shown).all():
            raise UnusableImageError(Reason.DISPLAY_VALUES)
        return shown.astype(np.float32)


def _modality(dataset: Dataset, header: Header, stored: Values) -> Values:
    if dataset.get("ModalityLUTSequence"):
        return _look_up(stored, dataset.ModalityLUTSequence[0], header)
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    if slope is None or intercept is None:
        return stored
    if float(slope) == 0:
        raise UnusableImageError(Reason.DISPLAY_VALUES)
    return stored * float(slope) + float(intercept)


def _voi(dataset: Dataset, header: Header, values: Values) -> Values:
    """Choose as a viewer does: the VOI LUT, else the first window, else the whole stored range."""
    if dataset.get("VOILUTSequence"):
        item = dataset.VOILUTSequence[0]
        highest = float(2 ** int(item.LUTDescriptor[2]) - 1)
        return _clip(_look_up(values, item, header) / highest)
    center, width = dataset.get("WindowCenter"), dataset.get("WindowWidth")
    if center is not None and width is not None:
        function = str(dataset.get("VOILUTFunction") or "LINEAR")
        return window_values(values, _first(center), _first(width), function)
    lowest = -(2 ** (header.bits_stored - 1)) if header.signed else 0
    start = lowest - first_value(header)
    within = values[start : start + 2**header.bits_stored]
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
    allowed = width > 1 if function == "LINEAR" else width > 0
    if not (math.isfinite(center) and math.isfinite(width) and allowed):
        raise UnusableImageError(Reason.DISPLAY_VALUES)
    if function == "LINEAR":  # the standard's half-pixel convention
        shown = (values - (center - 0.5)) / (width - 1) + 0.5
    elif function == "LINEAR_EXACT":
        shown = (values - center) / width + 0.5
    elif function == "SIGMOID":
        shown = 1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - center) / width, -700.0, 700.0)))
    else:
        raise UnusableImageError(Reason.DISPLAY_VALUES)
    return _clip(shown)


def _clip(shown: Values) -> Values:
    clipped: Values = np.clip(shown, 0.0, 1.0)
    return clipped


def _look_up(values: Values, item: Dataset, header: Header) -> Values:
    """Apply a look-up table: values below its first entry take that one, above its last the last."""
    num_entries, first_mapped, bits = (int(part) for part in item.LUTDescriptor)
    num_entries = num_entries or 2**16  # 65,536 does not fit in the element and is written as 0
    table = _table_entries(item.LUTData, header)
    if not 8 <= bits <= 16 or len(table) < num_entries:
        raise UnusableImageError(Reason.DISPLAY_VALUES)
    index = np.clip(np.rint(values) - first_mapped, 0, num_entries - 1).astype(np.int64)
    looked_up: Values = table[index].astype(np.float64)
    return looked_up


def _table_entries(lut_data: object, header: Header) -> NDArray[np.uint16]:
    if isinstance(lut_data, bytes):  # OW: two bytes an entry, in the file's byte order
        order = ">u2" if header.transfer_syntax == ExplicitVRBigEndian else "<u2"
        return np.frombuffer(lut_data, dtype=order).astype(np.uint16)
    return np.asarray(lut_data, dtype=np.uint16)


def _first(value: Any) -> float:
    several = isinstance(value, Sequence) and not isinstance(value, str)
    return float(value[0] if several else value)
