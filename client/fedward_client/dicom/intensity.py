"""From units to what a network is fed: the one convention for intensities in fedward (hop 2).

1. The modality LUT, frame by frame, turns stored values into units (`frames.py`; HU for CT).
2. One window turns units into [0, 1], linear and clipped at both ends. The plan says which: two values
   in units ("units"), two percentiles of all finite values of the image or volume ("percentiles"), or
   what the file itself would have a viewer show ("file": VOI LUT, else its first window, else the range
   of its stored bits).
3. Inversion (MONOCHROME1 or PresentationLUTShape INVERSE) comes last and once: 0 is black.

Values that are no number are black before inversion. Padding (PixelPaddingValue) is the value that it
stores, in a window and among the percentiles. Readers that invert before the modality LUT turn
HU of -1000 into +1000; readers that clip to the file's window give every slice another scale. For
radiographs "file" equals `decode.decode_image`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedward_client.dicom.display import window_values
from fedward_client.dicom.frames import Frames
from fedward_client.dicom.refusal import Reason, UnusableImageError

Image = NDArray[np.float32]


@dataclass(frozen=True)
class Intensity:
    """Which window.

    Args:
        kind: see the module.
        low: value in units, or percentile; shown black. Not used for "file".
        high: likewise; shown white.

    Raises:
        ValueError: `low` is not below `high`, or a percentile is outside 0 to 100.
    """

    kind: Literal["units", "percentiles", "file"]
    low: float = 0.0
    high: float = 0.0

    def __post_init__(self) -> None:
        if self.kind == "file":
            return
        if not (np.isfinite([self.low, self.high]).all() and self.low < self.high):
            raise ValueError("the window's low end must lie below its high end")
        if self.kind == "percentiles" and not 0 <= self.low < self.high <= 100:
            raise ValueError("percentiles lie between 0 and 100")


FILE = Intensity("file")


def frames_in_unit_interval(frames: Frames, intensity: Intensity) -> Image:
    """Bring the frames of one file to [0, 1]; percentiles are those of all frames together.

    Returns:
        float32, the shape of `frames.values`; RGB is divided by 255 whatever the window.

    Raises:
        UnusableImageError: no window can be had: all values are equal, or the file's own is malformed.
    """
    if frames.is_colour:
        return frames.values.astype(np.float32) / np.float32(255)
    if intensity.kind == "file":
        shown = np.empty(frames.values.shape, np.float32)
        for number in range(len(shown)):
            shown[number] = _as_file_says(frames, number)
        return _inverted(shown, frames.inverted)
    return in_unit_interval(frames.values, intensity, inverted=frames.inverted)


def in_unit_interval(
    values: Image,
    intensity: Intensity,
    *,
    inverted: bool,
    window: tuple[float, float] | None = None,
    voi_function: str = "LINEAR",
) -> Image:
    """Bring an image or volume in units to [0, 1].

    Args:
        values: float32 of any shape, in units, not inverted.
        intensity: which window.
        inverted: low values are to be shown white.
        window: (center, width) that all its files agree on, for "file".
        voi_function: VOILUTFunction that goes with it.

    Raises:
        UnusableImageError: no window can be had: all values are equal, or the files have no common one.
    """
    if intensity.kind == "file":
        if window is None:
            raise UnusableImageError(Reason.NO_COMMON_WINDOW)
        shown = window_values(values.astype(np.float64), *window, voi_function).astype(np.float32)
        return _inverted(np.nan_to_num(shown, copy=False), inverted)
    low, high = intensity.low, intensity.high
    if intensity.kind == "percentiles":
        low, high = _percentiles(values, low, high)
    shown = values - np.float32(low)
    shown *= np.float32(1 / (high - low))
    np.clip(shown, 0, 1, out=shown)
    return _inverted(np.nan_to_num(shown, copy=False), inverted)


def _percentiles(values: Image, low: float, high: float) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise UnusableImageError(Reason.DISPLAY_VALUES)
    ends: Any = np.percentile(finite, [low, high])
    if not ends[0] < ends[1]:
        raise UnusableImageError(Reason.DISPLAY_VALUES)
    return float(ends[0]), float(ends[1])


def _as_file_says(frames: Frames, number: int) -> NDArray[np.float64]:
    values: NDArray[np.float64] = frames.values[number].astype(np.float64)
    shown: NDArray[np.float64]
    if frames.voi_lut is not None:
        shown = frames.voi_lut.apply(np.nan_to_num(values)) / float(2**frames.voi_lut.bits - 1)
        return np.clip(shown, 0, 1, out=shown)
    window = frames.windows[number] if frames.windows else None
    if window is not None:
        return np.nan_to_num(window_values(values, *window, frames.voi_functions[number]), copy=False)
    low, high = frames.stored_range[number]
    if not high > low:
        raise UnusableImageError(Reason.DISPLAY_VALUES)
    shown = (values - low) / (high - low)
    np.clip(shown, 0, 1, out=shown)
    return np.nan_to_num(shown, copy=False)


def _inverted(shown: Image, inverted: bool) -> Image:
    return np.float32(1) - shown if inverted else shown
