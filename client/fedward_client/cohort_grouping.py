"""Make units of images that passed the gate: each image by itself, or the volumes of each series (hop 3).

A volume comes out only where the geometry of its series is certain; what is not used is named, image by
image, with the reason. Nothing is read but the index.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedward_client.dicom.gate import Box, GateVerdict
from fedward_client.dicom.header import MAX_FRAMES
from fedward_client.dicom.refusal import Reason
from fedward_client.dicom.series import SeriesVerdict, VolumeGeometry, group_series
from fedward_client.dicom.slice_facts import SliceFacts
from fedward_client.dicom.slice_text import slices_from_text
from fedward_client.index_records import IndexedImage
from fedward_client.index_store import CaseIndex

MAX_SLICES = 2**18
"""Of one series. A file of a kilobyte can speak of 65,536 frames, and each takes as much here."""

Part = tuple[str, int]
"""(content, frame index)."""

Judged = tuple[IndexedImage, GateVerdict]
Refused = dict[str, tuple[IndexedImage, Reason, str]]
"""Content -> image, reason, and the kind that goes with the reason."""


@dataclass(frozen=True)
class CohortUnit:
    """What may become a case: one image, or one volume.

    Args:
        content: SHA-256 (hex) of the file; for a volume, of its ordered contents and frames.
        name: what its pseudonym is made of: a UID, with the volume's mark where a series has several.
        image: the image; the first one of a volume.
        parts: its frames in order.
        keys: DICOM keyword -> identifier, for joining labels.
        regions: what stays of its pictures; None for all of it.
        geometry: of a volume.
        other_name: of a volume, `name` if its series had several, or just this one, when it was excluded.
    """

    content: str
    name: str = field(repr=False)
    image: IndexedImage
    parts: tuple[Part, ...] = field(repr=False)
    keys: Mapping[str, str] = field(repr=False)
    regions: tuple[Box, ...] | None = None
    geometry: VolumeGeometry | None = field(default=None, repr=False)
    other_name: str = field(default="", repr=False)


@dataclass
class Grouped:
    """What images amount to.

    Args:
        units: what may become cases.
        refused: images that nothing uses.
        left_out: images of which frames are left out while others of their series are used.
    """

    units: list[CohortUnit] = field(default_factory=list)
    refused: Refused = field(default_factory=dict)
    left_out: Refused = field(default_factory=dict)


def pictures(images: Sequence[Judged]) -> Grouped:
    """Take each image by itself; one of several frames is no picture, nor is a mosaic of slices."""
    found = Grouped()
    for image, verdict in images:
        if image.num_frames != 1 or "MOSAIC" in image.image_type.split("\\"):
            found.refused[image.content] = (image, Reason.MULTI_FRAME, "")
            continue
        parts = ((image.content, 0),)
        found.units.append(
            CohortUnit(image.content, image.sop_instance, image, parts, image.keys, _kept(verdict))
        )
    return found


def volumes(
    index: CaseIndex,
    images: Sequence[Judged],
    refused: Sequence[IndexedImage] = (),
    arriving: Mapping[str, str] | None = None,
) -> Grouped:
    """Find the volumes of each series.

    Args:
        index: that knows where their slices lie.
        images: of any number of series, in any order.
        refused: images of whatever series that may not be used.
        arriving: series that are not whole yet -> by what sign.
    """
    arriving = arriving or {}
    series: dict[str, dict[str, Judged]] = defaultdict(dict)
    for image, verdict in images:
        series[image.series][image.content] = (image, verdict)
    lacking: dict[str, set[_Kind]] = defaultdict(set)
    for image in refused:
        lacking[image.series].add(_kind(image))
    found = Grouped()
    for name, members in series.items():
        if name in arriving:
            sign = arriving[name]
            found.refused |= {
                content: (image, Reason.STILL_ARRIVING, sign) for content, (image, _) in members.items()
            }
            continue
        one = _series(index, members, lacking[name])
        found.units += one.units
        found.refused |= one.refused
        found.left_out |= one.left_out
    return found


def _kept(verdict: GateVerdict) -> tuple[Box, ...] | None:
    return verdict.regions if verdict.decision == "mask" else None


_Kind = tuple[str, int, int, str]


def _kind(image: IndexedImage) -> _Kind:
    """What slices of one volume have in common, and other objects of its series have not."""
    return image.sop_class, image.rows, image.columns, image.image_type


def _series(index: CaseIndex, members: Mapping[str, Judged], lacking: Collection[_Kind]) -> Grouped:
    """Volumes of one series, or the reasons why there are none."""
    images = [image for image, _ in members.values()]
    # One SeriesInstanceUID in two studies, or of two patients: which is right is not for us to say.
    if len({(image.patient, image.study) for image in images}) > 1:
        return _none(images, Reason.MIXED_SERIES)
    try:
        slices = _slices(index, members)
    except ValueError:  # not what this version writes
        return _none(images, Reason.FRAME_FACTS)
    if not slices or len(slices) > MAX_SLICES:
        return _none(images, Reason.OVER_LIMIT if slices else Reason.NO_POSITION)
    verdict = group_series(slices)
    reasons = {content: reason for content, _, reason in verdict.dropped}
    refused = verdict.refused or _cut_short(verdict, members, lacking)
    if refused is not None:
        return _none(images, refused, reasons)
    found = Grouped()
    for geometry in verdict.volumes:
        regions = {_kept(members[each.content][1]) for each in geometry.slices}
        if len(regions) > 1:  # each slice would need a mask of its own
            reasons |= {each.content: Reason.REGIONS for each in geometry.slices}
        else:
            found.units.append(_volume(geometry, members, regions.pop(), len(verdict.volumes)))
    used = {content for unit in found.units for content, _ in unit.parts}
    used |= {copy.content for unit in found.units if unit.geometry for _, copy in unit.geometry.copies}
    for image in images:
        reason = reasons.get(image.content)
        if reason is not None and found.units:
            found.left_out[image.content] = (image, reason, "")
        elif image.content not in used:
            found.refused[image.content] = (image, reason or Reason.NO_POSITION, "")
    return found


def _cut_short(
    verdict: SeriesVerdict, members: Mapping[str, Judged], lacking: Collection[_Kind]
) -> Reason | None:
    """Say that a refused slice may be one of these volumes', from an end of it, where it leaves no gap.

    Not where a volume is refused for its gap: then that is where the slice was.
    """
    if any(reason in (Reason.INCOMPLETE_VOLUME, Reason.MISSING_SLICES) for _, _, reason in verdict.dropped):
        return None
    stacks = [{each.content for each in volume.slices} for volume in verdict.volumes]
    # A file that is a whole volume is not cut short by another one.
    slices = [content for stack in stacks if len(stack) > 1 for content in stack]
    is_lacking = any(_kind(members[content][0]) in lacking for content in slices)
    return Reason.MISSING_SLICES if is_lacking else None


def _none(images: Sequence[IndexedImage], reason: Reason, own: Mapping[str, Reason] | None = None) -> Grouped:
    own = own or {}
    return Grouped(refused={image.content: (image, own.get(image.content, reason), "") for image in images})


def _slices(index: CaseIndex, members: Mapping[str, Judged]) -> list[SliceFacts]:
    """Slices of the members as indexed; of more than `MAX_SLICES` only so many that it shows.

    Raises:
        ValueError: the index holds something else.
    """
    first, _ = next(iter(members.values()))
    found: list[SliceFacts] = []
    for content, text in index.slices_of_series(first.series):
        if content in members and len(found) <= MAX_SLICES:
            image, _ = members[content]
            found += slices_from_text(
                text, content=content, series=first.series, study=first.study, modality=image.modality
            )
    return found


def possible_names(image: IndexedImage) -> Iterator[str]:
    """Say by which names a case that begins with this image may go; see `CohortUnit.name`."""
    yield from (image.sop_instance, image.series)
    for frame in range(max(1, min(image.num_frames or 1, MAX_FRAMES))):
        yield _name_in_series(image, frame)


def _name_in_series(image: IndexedImage, frame_index: int) -> str:
    return f"{image.series}|{image.sop_instance}:{frame_index}"


def _volume(
    geometry: VolumeGeometry,
    members: Mapping[str, Judged],
    regions: tuple[Box, ...] | None,
    num_volumes: int,
) -> CohortUnit:
    parts = tuple((each.content, each.frame_index) for each in geometry.slices)
    digest = hashlib.sha256(" ".join(f"{content}:{frame}" for content, frame in parts).encode())
    image, _ = members[parts[0][0]]
    keys = dict(image.keys)
    if len({content for content, _ in parts}) > 1 or num_volumes > 1:
        keys["SOPInstanceUID"] = ""  # it names one of the slices, or all volumes of the file
    names = [image.series, _name_in_series(image, parts[0][1])]
    name, other_name = names if num_volumes == 1 else reversed(names)
    return CohortUnit(
        content=digest.hexdigest(),
        name=name,
        other_name=other_name,
        image=replace(image, num_frames=len(parts)),
        parts=parts,
        keys=keys,
        regions=regions,
        geometry=geometry,
    )
