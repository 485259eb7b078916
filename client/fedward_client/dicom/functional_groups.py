"""What an enhanced multi-frame object says frame by frame, and what others say once for all frames.

Slope, position, orientation, spacing and window live in functional groups there: one shared group and
one for each frame, which goes before the shared one. Readers that look only at the top of the header
take such files for images without rescale and without place. `read_frame_facts` needs no pixels.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from pydicom.uid import ParametricMapStorage

from fedward_client.dicom.display import Rescale, read_rescale, read_windows
from fedward_client.dicom.elements import Elements
from fedward_client.dicom.header import Header, header_of
from fedward_client.dicom.parser import contained, parse_file
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.values import (
    integer_or_none,
    number_or_none,
    numbers,
    numbers_or_none,
    raw_text,
    sequence,
    text_or_none,
)

Windows = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class FrameFacts:
    """Facts of each frame; a fact that a frame lacks is None for all of them.

    Lengths in mm, times in ms, b-values in s/mm2. Positions and orientations are those of DICOM's
    patient coordinates (left, posterior, head).

    Args:
        num_frames: as declared.
        rescales: of each frame, None where the file says nothing.
        rescale_types: RescaleType of each frame, "" where absent.
        windows: (center, width) pairs of each frame, in units.
        voi_functions: VOILUTFunction of each frame.
        positions: ImagePositionPatient, float64 `(frames, 3)`.
        orientations: ImageOrientationPatient, float64 `(frames, 6)`.
        spacings: PixelSpacing (between rows, between columns), float64 `(frames, 2)`.
        slice_thickness: float64 `(frames,)`.
        spacing_between: SpacingBetweenSlices, float64 `(frames,)`.
        dimension_indices: DimensionIndexValues, int64 `(frames, dimensions)`.
        dimension_pointers: the keyword or tag each dimension counts, in order; "" where unknown.
        stack_ids: StackID of each frame, "" where absent.
        in_stack: InStackPositionNumber, int64 `(frames,)`.
        temporal_positions: TemporalPositionIndex, int64 `(frames,)`.
        echo_times: EffectiveEchoTime, float64 `(frames,)`.
        triggers: NominalCardiacTriggerDelayTime, float64 `(frames,)`.
        b_values: DiffusionBValue, float64 `(frames,)`.
        frame_types: FrameType of each frame, () where absent.
    """

    num_frames: int
    rescales: tuple[Rescale | None, ...] = field(repr=False)
    rescale_types: tuple[str, ...] = field(repr=False)
    windows: tuple[Windows, ...] = field(repr=False)
    voi_functions: tuple[str, ...] = field(repr=False)
    positions: NDArray[np.float64] | None = field(repr=False)
    orientations: NDArray[np.float64] | None = field(repr=False)
    spacings: NDArray[np.float64] | None = field(repr=False)
    slice_thickness: NDArray[np.float64] | None = field(repr=False)
    spacing_between: NDArray[np.float64] | None = field(repr=False)
    dimension_indices: NDArray[np.int64] | None = field(repr=False)
    dimension_pointers: tuple[int, ...] = field(repr=False)
    stack_ids: tuple[str, ...] = field(repr=False)
    in_stack: NDArray[np.int64] | None = field(repr=False)
    temporal_positions: NDArray[np.int64] | None = field(repr=False)
    echo_times: NDArray[np.float64] | None = field(repr=False)
    triggers: NDArray[np.float64] | None = field(repr=False)
    b_values: NDArray[np.float64] | None = field(repr=False)
    frame_types: tuple[tuple[str, ...], ...] = field(repr=False)


class _Groups:
    """The functional groups of all frames: a frame's own, else the shared one."""

    def __init__(self, elements: Elements, num_frames: int) -> None:
        self._top = elements
        self._shared = next(iter(sequence(elements, "SharedFunctionalGroupsSequence")), None)
        self._frames: Sequence[Elements] = sequence(elements, "PerFrameFunctionalGroupsSequence")
        self.num_frames = num_frames
        self.are_there = bool(self._frames) or self._shared is not None
        if self._frames and len(self._frames) != num_frames:
            raise UnusableImageError(Reason.FRAME_FACTS)

    def of_each(self, keyword: str) -> list[Elements | None]:
        """The first item of a functional group for each frame, None where there is none."""
        shared = None if self._shared is None else next(iter(sequence(self._shared, keyword)), None)
        if not self._frames:
            return [shared] * self.num_frames
        return [next(iter(sequence(frame, keyword)), shared) for frame in self._frames]

    def refuse_several(self, keyword: str) -> None:
        """Refuse groups of several items, of which none is said to be the one."""
        groups = self._frames if self._shared is None else (*self._frames, self._shared)
        if any(len(sequence(group, keyword)) > 1 for group in groups):
            raise UnusableImageError(Reason.FRAME_FACTS)


def read_frame_facts(data: bytes) -> FrameFacts:
    """Read the facts of each frame of a file held in memory, without its pixels.

    Raises:
        UnusableImageError: the header cannot be read, or its functional groups are not one a frame.
    """
    with contained(Reason.MALFORMED):
        parsed = parse_file(data)
        return frame_facts(parsed.elements, header_of(parsed))


def frame_facts(elements: Elements, header: Header) -> FrameFacts:
    """Take the facts of each frame out of a parsed header; call it inside `contained`."""
    reason = Reason.FRAME_FACTS
    try:
        groups = _Groups(elements, header.num_frames)
        if groups.are_there:
            return _from_groups(groups, elements, header)
        reason = Reason.DISPLAY_VALUES  # rescale or window; a place that is malformed is None
        return _from_top(elements, header)
    except (ValueError, struct.error):
        raise UnusableImageError(reason) from None


def _from_groups(groups: _Groups, elements: Elements, header: Header) -> FrameFacts:
    measures = groups.of_each("PixelMeasuresSequence")
    content = groups.of_each("FrameContentSequence")
    voi = groups.of_each("FrameVOILUTSequence")
    rescaled = groups.of_each("PixelValueTransformationSequence")
    rescales = tuple(None if item is None else read_rescale(item) for item in rescaled)
    if header.sop_class == ParametricMapStorage:
        groups.refuse_several("RealWorldValueMappingSequence")
        rescales = tuple(_real_world(item) for item in groups.of_each("RealWorldValueMappingSequence"))
    if None in rescales and any(rescales):  # units of some frames only
        raise UnusableImageError(Reason.FRAME_FACTS)
    return FrameFacts(
        num_frames=groups.num_frames,
        rescales=rescales,
        rescale_types=tuple("" if item is None else text_or_none(item, "RescaleType") for item in rescaled),
        windows=tuple(() if item is None else read_windows(item) for item in voi),
        voi_functions=tuple(_voi_function(item) for item in voi),
        positions=_floats(groups.of_each("PlanePositionSequence"), "ImagePositionPatient", 3),
        orientations=_floats(groups.of_each("PlaneOrientationSequence"), "ImageOrientationPatient", 6),
        spacings=_floats(measures, "PixelSpacing", 2),
        slice_thickness=_scalars(measures, "SliceThickness"),
        spacing_between=_scalars(measures, "SpacingBetweenSlices"),
        dimension_indices=_dimension_indices(content),
        dimension_pointers=_dimension_pointers(elements),
        stack_ids=tuple("" if item is None else text_or_none(item, "StackID") for item in content),
        in_stack=_integers(content, "InStackPositionNumber"),
        temporal_positions=_integers(content, "TemporalPositionIndex"),
        echo_times=_scalars(groups.of_each("MREchoSequence"), "EffectiveEchoTime"),
        triggers=_scalars(groups.of_each("CardiacSynchronizationSequence"), "NominalCardiacTriggerDelayTime"),
        b_values=_b_values(groups.of_each("MRDiffusionSequence")),
        frame_types=_frame_types(groups),
    )


def _real_world(item: Elements | None) -> Rescale | None:
    """The mapping of a parametric map, whose units nothing else gives.

    Raises:
        UnusableImageError: a table, or a slope that is none.
    """
    if item is None:
        return None
    slope, intercept = (number_or_none(item, f"RealWorldValue{each}") for each in ("Slope", "Intercept"))
    if not slope or intercept is None:
        raise UnusableImageError(Reason.FRAME_FACTS)
    return Rescale(slope, intercept)


def _from_top(elements: Elements, header: Header) -> FrameFacts:
    """Facts of an object that says everything once; a place is a place of one frame only."""
    single = header.num_frames == 1
    top: list[Elements | None] = [elements]
    offsets = _frame_offsets(elements, header)
    placed = top if single or offsets is not None else [None]
    positions = _floats(placed, "ImagePositionPatient", 3)
    orientations = _floats(placed, "ImageOrientationPatient", 6)
    if offsets is not None and positions is not None and orientations is not None:
        normal = np.cross(orientations[0, :3], orientations[0, 3:])
        positions = positions + offsets[:, None] * normal
        orientations = np.repeat(orientations, header.num_frames, axis=0)
    num_frames = header.num_frames
    return FrameFacts(
        num_frames=num_frames,
        rescales=(read_rescale(elements),) * num_frames,
        rescale_types=(text_or_none(elements, "RescaleType"),) * num_frames,
        windows=(read_windows(elements),) * num_frames,
        voi_functions=(_voi_function(elements),) * num_frames,
        positions=positions,
        orientations=orientations,
        spacings=_repeated(_floats(top, "PixelSpacing", 2), num_frames),
        slice_thickness=_repeated(_scalars(top, "SliceThickness"), num_frames),
        spacing_between=_repeated(_scalars(top, "SpacingBetweenSlices"), num_frames),
        dimension_indices=None,
        dimension_pointers=(),
        stack_ids=("",) * num_frames,
        in_stack=None,
        temporal_positions=None,
        echo_times=_repeated(_scalars(top, "EchoTime"), num_frames),
        triggers=_scalars(top, "TriggerTime") if single else None,
        b_values=_each(header.b_value, num_frames),
        frame_types=(header.image_type,) * num_frames,
    )


def _frame_offsets(elements: Elements, header: Header) -> NDArray[np.float64] | None:
    """Distances of a dose grid's frames along the normal, mm (PS3.3 C.8.8.3.2).

    Offsets that begin elsewhere than at 0 are positions along an axis of the patient, an old form.
    """
    found = numbers(elements, "GridFrameOffsetVector")
    if len(found) != header.num_frames or not found or found[0] != 0:
        return None
    return np.array(found, dtype=np.float64)


def _voi_function(item: Elements | None) -> str:
    return (raw_text(item, "VOILUTFunction") if item is not None else "") or "LINEAR"


def _floats(items: Sequence[Elements | None], keyword: str, count: int) -> NDArray[np.float64] | None:
    found = [None if item is None else numbers_or_none(item, keyword, count) for item in items]
    if None in found:
        return None
    return np.array(found, dtype=np.float64)


def _scalars(items: Sequence[Elements | None], keyword: str) -> NDArray[np.float64] | None:
    return _column(items, lambda item: number_or_none(item, keyword))


def _integers(items: Sequence[Elements | None], keyword: str) -> NDArray[np.int64] | None:
    found = _column(items, lambda item: integer_or_none(item, keyword))
    return None if found is None else found.astype(np.int64)


def _column(
    items: Sequence[Elements | None], read: Callable[[Elements], float | None]
) -> NDArray[np.float64] | None:
    found = [None if item is None else read(item) for item in items]
    return None if None in found else np.array(found, dtype=np.float64)


def _b_values(items: Sequence[Elements | None]) -> NDArray[np.float64] | None:
    """A frame without diffusion weighting need not say that its b-value is 0."""

    def read(item: Elements) -> float | None:
        found = number_or_none(item, "DiffusionBValue")
        return 0.0 if found is None and raw_text(item, "DiffusionDirectionality") == "NONE" else found

    return _column(items, read)


def _dimension_indices(content: Sequence[Elements | None]) -> NDArray[np.int64] | None:
    found = [() if item is None else numbers(item, "DimensionIndexValues") for item in content]
    lengths = {len(values) for values in found}
    if len(lengths) != 1 or lengths == {0}:
        return None
    return np.array(found, dtype=np.int64)


def _dimension_pointers(elements: Elements) -> tuple[int, ...]:
    pointers = []
    for item in sequence(elements, "DimensionIndexSequence"):
        order = "<HH" if item.encoding.little else ">HH"
        group, number = struct.unpack(order, item.value(0x00209165) or b"\0\0\0\0")
        pointers.append(group << 16 | number)
    return tuple(pointers)


_FRAME_TYPE_GROUPS = (
    "MRImageFrameTypeSequence",
    "CTImageFrameTypeSequence",
    "PETFrameTypeSequence",
    "XRay3DFrameTypeSequence",
    "XAXRFFrameCharacteristicsSequence",
    "USImageDescriptionSequence",
)


def _frame_types(groups: _Groups) -> tuple[tuple[str, ...], ...]:
    for keyword in _FRAME_TYPE_GROUPS:
        items = groups.of_each(keyword)
        if any(items):
            return tuple(_type_of(item) for item in items)
    return ((),) * groups.num_frames


def _type_of(item: Elements | None) -> tuple[str, ...]:
    text = "" if item is None else text_or_none(item, "FrameType").upper()
    return tuple(text.split("\\")) if text else ()


def _each(value: float | None, num_frames: int) -> NDArray[np.float64] | None:
    return None if value is None else np.full(num_frames, value, dtype=np.float64)


def _repeated(values: NDArray[np.float64] | None, num_frames: int) -> NDArray[np.float64] | None:
    return None if values is None else np.repeat(values, num_frames, axis=0)
