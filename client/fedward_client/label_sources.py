"""Bring the labels of a site into one form, wherever they come from (hop 3): rows with one key.

The label file is read as it is. Reports, segmentations and structure sets lie among the images; each is
read by a decoder process (`dicom/sandbox.py`) and becomes rows that are numbered by object. One that
cannot be used labels nothing and is named with its reason. A mask becomes a class: marked or not. Whether
rows fit the images is decided afterwards, for all sources alike, by `label_join.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from pydantic import ValidationError

from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.index_records import IndexedImage
from fedward_client.index_store import CaseIndex
from fedward_client.label_file import read_labels
from fedward_client.labels import (
    LabelConfig,
    LabelFile,
    LabelKey,
    LabelRow,
    MaskPart,
    classify,
    parse_concept,
)
from fedward_client.site_data import SiteData
from fedward_common.errors import CohortError

if TYPE_CHECKING:
    from fedward_client.dicom.label_objects import Answer, GridMessage, Question
    from fedward_client.dicom.sandbox import DecodeSandbox
    from fedward_client.dicom.series import VolumeGeometry

_REMEMBERED = "label_objects"
_VERSION = 1
"""Grows when the same objects would give other rows."""


@dataclass(frozen=True)
class GatheredLabels:
    """Label rows of one site, from one source.

    Args:
        labels: for `join_labels`.
        num_objects: reports, segmentations or structure sets; 0 for a label file.
        refused: (content, reason) of each object that labels nothing.
        warnings: what the operator should know, without identifiers.
    """

    labels: LabelFile
    num_objects: int = 0
    refused: tuple[tuple[str, Reason], ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass
class _Gathering:
    """Rows as they come in."""

    rows: dict[tuple[int, str, str], LabelRow] = field(default_factory=dict)
    refused: dict[str, Reason] = field(default_factory=dict)
    num_silent: int = 0
    num_without_image: int = 0

    def add(self, number: int, key: str, label: str) -> None:
        self.rows[number, key, label] = LabelRow(number, key, label, None)


def gather_labels(
    site: SiteData,
    index: CaseIndex,
    config: LabelConfig,
    volumes: Iterable[VolumeGeometry] | None = None,
) -> GatheredLabels:
    """Read all labels of a site.

    Args:
        site: whose label file and folder.
        index: of the folder, up to date.
        config: where labels come from.
        volumes: what cases are when they are no single images; None when they are. Masks are laid on
            their grids.

    Returns:
        Rows: of a label file by its key, of reports by their level, of masks by SOPInstanceUID or, for
        volumes, SeriesInstanceUID. Numbers are classes already if the site gives `cut_points`.

    Raises:
        CohortError: the label file cannot be used, there is no label object, reports measure in different
            units, a label is no number where it has to be, the key means one image and cases are volumes, or
            structure sets are to label single images.
    """
    geometries = None if volumes is None else tuple(volumes)
    if config.source == "structures" and geometries is None:
        raise CohortError(
            "structure sets are drawn on volumes, and cases are single images",
            remedy='Set unit = "volume" in HOME/cohort.toml, or export the structures as segmentations.',
        )
    if config.source == "csv":
        gathered = GatheredLabels(read_labels(site.labels, config.key))
    else:
        gathered = _from_objects(site, index, config, geometries)
    if geometries is not None and gathered.labels.key_column == "SOPInstanceUID":
        raise CohortError(
            "labels are keyed by SOPInstanceUID, which is one image; cases are volumes of many",
            remedy="Key the labels by SeriesInstanceUID or StudyInstanceUID.",
        )
    if not config.cut_points:
        return gathered
    labels = classify(gathered.labels, config.cut_points)
    return GatheredLabels(labels, gathered.num_objects, gathered.refused, gathered.warnings)


def _from_objects(
    site: SiteData, index: CaseIndex, config: LabelConfig, volumes: Sequence[VolumeGeometry] | None
) -> GatheredLabels:
    from fedward_client.dicom.label_objects import SOP_CLASSES_OF
    from fedward_client.dicom.sandbox import DecodeSandbox

    objects = index.objects(SOP_CLASSES_OF[config.source])
    if not objects:
        raise CohortError(
            f"labels come from {config.source}, and there is none among the images",
            remedy="Put them into the image folder and run: fedward-site cohort index",
        )
    images = {image.sop_instance: image for image in index.images("image")}
    digest = _digest(config, objects, images, volumes)
    gathering = _recall(index.setting(_REMEMBERED), digest)
    if gathering is None:
        gathering = _Gathering()
        with DecodeSandbox() as sandbox:
            reader = _ObjectReader(sandbox, site, index.file_names(), objects)
            if config.source == "reports":
                _add_reports(gathering, reader, config)
            elif volumes is None:
                _add_image_masks(gathering, reader, config, images)
            else:
                _add_volume_masks(gathering, reader, config, images, volumes)
        index.remember(_REMEMBERED, _memory(digest, gathering))
    rows = LabelFile(_key_of(config, volumes is not None), tuple(gathering.rows.values()))
    refused = tuple(sorted(gathering.refused.items()))
    return GatheredLabels(rows, len(objects), refused, _warnings(gathering, config, len(objects)))


def _key_of(config: LabelConfig, are_volumes: bool) -> LabelKey:
    if config.report is not None:
        return config.report.level
    return "SeriesInstanceUID" if are_volumes else "SOPInstanceUID"


class _ObjectReader:
    """Asks decoder processes about label objects; an answer that makes no sense refuses its object."""

    def __init__(
        self,
        sandbox: DecodeSandbox,
        site: SiteData,
        names: Mapping[str, bytes],
        objects: Sequence[IndexedImage],
    ) -> None:
        self._sandbox = sandbox
        self._site = site
        self._names = names
        self.numbers = {each.content: number for number, each in enumerate(objects, start=1)}

    def ask(self, questions: Mapping[str, Question]) -> Iterator[tuple[str, Answer | Reason]]:
        """Yield the answer for each content, or why there is none."""
        from fedward_client.dicom.label_objects import Answer
        from fedward_client.dicom.sandbox import SiteFile

        files = [
            # One that vanished while objects were listed has no name, and is refused when it is to be read.
            SiteFile(self._site.dicom, self._names.get(content, b""), content, question.model_dump_json())
            for content, question in questions.items()
        ]
        for content, outcome in zip(questions, self._sandbox.map(files, "labels"), strict=True):
            if isinstance(outcome, UnusableImageError):
                yield content, outcome.reason
            elif isinstance(outcome, CohortError):
                raise outcome
            elif isinstance(outcome, str):
                try:
                    yield content, Answer.model_validate_json(outcome)
                except ValidationError:
                    yield content, Reason.MALFORMED


def _add_reports(gathering: _Gathering, reader: _ObjectReader, config: LabelConfig) -> None:
    from fedward_client.dicom.label_objects import Question
    from fedward_client.dicom.report_labels import one_unit

    question = Question(source="reports", report=config.report)
    units = set()
    for content, answer in reader.ask(dict.fromkeys(reader.numbers, question)):
        if isinstance(answer, Reason):
            gathering.refused[content] = answer
            continue
        gathering.num_silent += answer.is_silent
        gathering.num_without_image += answer.without_image
        units |= {parse_concept(answer.unit)} if answer.unit else set()
        for key, label in answer.rows:
            gathering.add(reader.numbers[content], key, label)
    one_unit(units, None)


def _add_image_masks(
    gathering: _Gathering,
    reader: _ObjectReader,
    config: LabelConfig,
    images: Mapping[str, IndexedImage],
) -> None:
    """Rows of the single images that segmentations refer to."""
    for content, answer in reader.ask(dict.fromkeys(reader.numbers, _mask_question(config))):
        if isinstance(answer, Reason):
            gathering.refused[content] = answer
            continue
        counts = {each: count for each, count in answer.instances.items() if each in images}
        sizes = {(images[each].rows, images[each].columns) for each in counts}
        if not counts or min(counts.values()) < 0:
            gathering.refused[content] = Reason.LABEL_SOURCE
        elif sizes != {answer.size}:
            gathering.refused[content] = Reason.LABEL_GRID
        else:
            for instance, count in counts.items():
                gathering.add(reader.numbers[content], instance, _class_of(count, config.mask))


def _add_volume_masks(
    gathering: _Gathering,
    reader: _ObjectReader,
    config: LabelConfig,
    images: Mapping[str, IndexedImage],
    volumes: Sequence[VolumeGeometry],
) -> None:
    """Rows of the series on whose volumes a mask lies, pixel by pixel."""
    instance_of = {image.content: instance for instance, image in images.items()}
    grids_of: dict[str, list[GridMessage]] = defaultdict(list)
    for volume in volumes:
        grids_of[volume.slices[0].series].append(_grid(volume, instance_of))
    series_of: dict[str, list[str]] = {}
    for content, answer in reader.ask(dict.fromkeys(reader.numbers, _mask_question(config))):
        if isinstance(answer, Reason):
            gathering.refused[content] = answer
            continue
        named = {images[each].series for each in answer.instances if each in images}
        series_of[content] = sorted(named & grids_of.keys())
        if not series_of[content]:
            gathering.refused[content] = Reason.LABEL_SOURCE
    questions = {
        content: _mask_question(config, [grid for each in series for grid in grids_of[each]])
        for content, series in series_of.items()
        if series
    }
    for content, answer in reader.ask(questions):
        if isinstance(answer, Reason) or len(answer.marked) != len(questions[content].grids):
            gathering.refused[content] = answer if isinstance(answer, Reason) else Reason.MALFORMED
            continue
        marked = iter(answer.marked)
        for series in series_of[content]:
            found = [next(marked) for _ in grids_of[series]]
            counts = {_class_of(each, config.mask) for each in found if not isinstance(each, Reason)}
            if len(counts) == 1:
                gathering.add(reader.numbers[content], series, counts.pop())
            else:  # on none of the series' volumes, or volumes that it would label differently
                reasons = [each for each in found if isinstance(each, Reason)]
                gathering.refused[content] = reasons[0] if reasons else Reason.LABEL_GRID


def _mask_question(config: LabelConfig, grids: Sequence[GridMessage] = ()) -> Question:
    from fedward_client.dicom.label_objects import Question

    source: Literal["segmentations", "structures"] = (
        "segmentations" if config.source == "segmentations" else "structures"
    )
    return Question(source=source, mask=config.mask, grids=tuple(grids))


def _class_of(num_marked: int, mask: MaskPart | None) -> str:
    return "1" if mask is not None and num_marked >= mask.min_pixels else "0"


def _grid(volume: VolumeGeometry, instance_of: Mapping[str, str]) -> GridMessage:
    from fedward_client.dicom.label_objects import GridMessage

    contents = {each.content for each in volume.slices}
    return GridMessage(
        affine=tuple(volume.affine.ravel().tolist()),
        shape=volume.shape,
        frame_of_reference=volume.slices[0].frame_of_reference,
        instances=tuple(sorted(instance_of[each] for each in contents if each in instance_of)),
    )


def _warnings(gathering: _Gathering, config: LabelConfig, num_objects: int) -> tuple[str, ...]:
    reasons = Counter(gathering.refused.values())
    counts = [(f"cannot be used: {reason.meaning}", count) for reason, count in sorted(reasons.items())]
    counts += [
        ("do not have the concept that the cohort names", gathering.num_silent),
        ("do not say which image they are about", gathering.num_without_image),
    ]
    return tuple(f"{count} of {num_objects} {config.source} {what}" for what, count in counts if count)


def _digest(
    config: LabelConfig,
    objects: Sequence[IndexedImage],
    images: Mapping[str, IndexedImage],
    volumes: Sequence[VolumeGeometry] | None,
) -> str:
    """Digest of all that decides the rows, so that objects are read again only when it changed."""
    digest = hashlib.sha256(f"{_VERSION}|{config.model_dump_json()}".encode())
    for each in objects:
        digest.update(each.content.encode())
    if config.source != "reports":
        for image in images.values():
            digest.update(f"{image.content}|".encode())
        for volume in volumes or ():
            digest.update(repr((volume.shape, volume.affine.tolist(), volume.slices[0].content)).encode())
    return f"{digest.hexdigest()} {volumes is None}"


def _memory(digest: str, gathering: _Gathering) -> str:
    return json.dumps(
        {
            "digest": digest,
            "rows": list(gathering.rows),
            "refused": gathering.refused,
            "counts": [gathering.num_silent, gathering.num_without_image],
        }
    )


def _recall(memory: str, digest: str) -> _Gathering | None:
    if not memory:
        return None
    found = json.loads(memory)
    if found["digest"] != digest:
        return None
    gathering = _Gathering(
        refused={content: Reason(reason) for content, reason in found["refused"].items()},
        num_silent=found["counts"][0],
        num_without_image=found["counts"][1],
    )
    for number, key, label in found["rows"]:
        gathering.add(number, key, label)
    return gathering
