"""What the header says about one slice: a classic file, or one frame of a multi-frame file (hop 2).

Facts only; `series.py` judges them. Texts that could name somebody are not here at all, and UIDs stay
out of `repr`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fedward_client.dicom.functional_groups import FrameFacts, frame_facts
from fedward_client.dicom.header import Header, header_of
from fedward_client.dicom.mosaic import Mosaic, find_mosaic
from fedward_client.dicom.parser import contained, parse_file
from fedward_client.dicom.refusal import Reason
from fedward_client.dicom.values import integer_or_none, text_or_none

Content = str
"""Names the bytes of one file, whatever the file is called: a digest."""


@dataclass(frozen=True)
class SliceFacts:
    """Facts about one slice; None where the file does not say, or says it malformed.

    Attributes:
        content: digest of the file.
        frame_index: frame within the file, from 0.
        position: ImagePositionPatient, LPS mm.
        orientation: ImageOrientationPatient, six cosines.
        pixel_spacing: distance between rows, between columns, mm.
        acquisition_time: AcquisitionTime as written; only compared.
        echo: EchoNumbers.
        echo_time: EchoTime, ms.
        trigger: TriggerTime, ms.
        b_value: diffusion weighting, s/mm2.
        spacing_between: SpacingBetweenSlices; nominal, and of some makers negative or a gap.
        gantry_tilt: GantryDetectorTilt, degrees; nominal.
        stack: StackID of a frame.
        dimensions: DimensionIndexValues of a frame.
        concatenation: ConcatenationUID of a multi-frame image that was sent in parts.
        part: InConcatenationNumber, from 1.
        num_parts: InConcatenationTotalNumber.
    """

    content: Content = field(repr=False)
    frame_index: int
    series: str = field(repr=False)
    study: str = field(repr=False)
    modality: str = field(repr=False)
    rows: int
    columns: int
    position: tuple[float, ...] | None = None
    orientation: tuple[float, ...] | None = None
    pixel_spacing: tuple[float, ...] | None = None
    image_type: tuple[str, ...] = field(default=(), repr=False)
    instance_number: int | None = None
    acquisition_number: int | None = None
    acquisition_time: str = field(default="", repr=False)
    temporal_position: int | None = None
    echo: int | None = None
    echo_time: float | None = None
    trigger: float | None = None
    b_value: float | None = None
    frame_of_reference: str = field(default="", repr=False)
    slice_thickness: float | None = None
    spacing_between: float | None = None
    gantry_tilt: float | None = None
    stack: str = field(default="", repr=False)
    dimensions: tuple[int, ...] = ()
    concatenation: str = field(default="", repr=False)
    part: int | None = None
    num_parts: int | None = None


def has_more_to_say(header: Header) -> bool:
    """Whether the header alone does not place the slices: several frames, functional groups, a mosaic."""
    within = header.is_grid or "MOSAIC" in header.image_type
    return header.num_frames > 1 or header.position is None or within


def read_slice_facts(data: bytes, content: Content) -> tuple[SliceFacts, ...]:
    """Facts of all slices in one file held in memory, whatever its form, without its pixels.

    Args:
        data: the whole file.
        content: digest of the file.

    Raises:
        UnusableImageError: the header cannot be read, its functional groups are not one a frame, or it
            is a mosaic whose slices cannot be placed with certainty.
    """
    with contained(Reason.MALFORMED):
        parsed = parse_file(data)
        header = header_of(parsed)
        if not has_more_to_say(header):
            return (slice_facts(header, content),)
        frames = frame_facts(parsed.elements, header)
        mosaic = find_mosaic(parsed.elements, header, frames)
        common = replace(
            slice_facts(header, content),
            concatenation=text_or_none(parsed.elements, "ConcatenationUID"),
            part=integer_or_none(parsed.elements, "InConcatenationNumber"),
            num_parts=integer_or_none(parsed.elements, "InConcatenationTotalNumber"),
        )
        if mosaic is not None:
            return _tiles(common, mosaic, frames)
        return tuple(_of_frame(common, frames, index) for index in range(frames.num_frames))


def slice_facts(header: Header, content: Content) -> SliceFacts:
    """Facts of a classic file, which is one slice; others need `read_slice_facts`.

    Args:
        header: of the file.
        content: digest of the file.
    """
    placed = header.num_frames == 1
    return SliceFacts(
        content=content,
        frame_index=0,
        series=header.series,
        study=header.study,
        modality=header.modality,
        rows=header.rows,
        columns=header.columns,
        position=header.position if placed else None,
        orientation=header.orientation if placed else None,
        pixel_spacing=header.pixel_spacing,
        image_type=header.image_type,
        instance_number=header.instance_number,
        acquisition_number=header.acquisition_number,
        acquisition_time=header.acquisition_time,
        temporal_position=header.temporal_position,
        echo=header.echo_numbers,
        echo_time=header.echo_time,
        trigger=header.trigger,
        b_value=header.b_value,
        frame_of_reference=header.frame_of_reference,
        slice_thickness=header.slice_thickness,
        spacing_between=header.spacing_between,
        gantry_tilt=header.gantry_tilt,
    )


def _tiles(common: SliceFacts, mosaic: Mosaic, frames: FrameFacts) -> tuple[SliceFacts, ...]:
    """Slices that `decode_frames` makes of a mosaic; they are no mosaic any more."""
    rows, columns = mosaic.tile_shape
    spacing = None if frames.spacings is None else tuple(frames.spacings[0].tolist())
    image_type = tuple(value for value in common.image_type if value != "MOSAIC")
    places = zip(mosaic.positions.tolist(), mosaic.orientations.tolist(), strict=True)
    return tuple(
        replace(
            common,
            frame_index=index,
            rows=rows,
            columns=columns,
            position=tuple(position),
            orientation=tuple(orientation),
            pixel_spacing=spacing,
            image_type=image_type,
        )
        for index, (position, orientation) in enumerate(places)
    )


def _of_frame(common: SliceFacts, frames: FrameFacts, index: int) -> SliceFacts:
    """A frame's own facts go before those of the file."""

    def row(values: NDArray[np.float64] | None) -> tuple[float, ...] | None:
        return None if values is None else tuple(values[index].tolist())

    def one(values: NDArray[np.float64] | None, otherwise: float | None) -> float | None:
        return otherwise if values is None else float(values[index])

    times, numbers = frames.temporal_positions, frames.dimension_indices
    return replace(
        common,
        frame_index=index,
        position=row(frames.positions),
        orientation=row(frames.orientations),
        pixel_spacing=row(frames.spacings),
        image_type=frames.frame_types[index] or common.image_type,
        temporal_position=common.temporal_position if times is None else int(times[index]),
        echo_time=one(frames.echo_times, common.echo_time),
        trigger=one(frames.triggers, common.trigger),
        b_value=one(frames.b_values, common.b_value),
        slice_thickness=one(frames.slice_thickness, common.slice_thickness),
        spacing_between=one(frames.spacing_between, common.spacing_between),
        stack=frames.stack_ids[index],
        dimensions=() if numbers is None else tuple(numbers[index].tolist()),
    )
