"""Answer one question about one label object, as JSON: what a decoder process does for labels (hop 3).

Segmentations, reports and structure sets are as foreign as images, and larger than headers; so they are
read where a crash, a loop or a swelling costs that object and nothing else (`sandbox.py`). What comes back
is small: which images it is about, and how many pixels are marked in each, or which values it reports.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from fedward_client.dicom.label_grid import Grid
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.report_labels import report_labels
from fedward_client.dicom.rtstruct import StructureSet, align_structures, read_structures
from fedward_client.dicom.segmentation import SEGMENTATION_SOP_CLASSES, Segmentation, read_segmentation
from fedward_client.dicom.segmentation_masks import align, count_marked
from fedward_client.dicom.structured_report import REPORT_SOP_CLASSES, read_report
from fedward_client.labels import Concept, MaskPart, ReportPart

RT_STRUCTURE_SETS = ("1.2.840.10008.5.1.4.1.1.481.3",)

SOP_CLASSES_OF: dict[str, tuple[str, ...]] = {
    "reports": tuple(map(str, REPORT_SOP_CLASSES)),
    "segmentations": tuple(map(str, SEGMENTATION_SOP_CLASSES)),
    "structures": RT_STRUCTURE_SETS,
}
"""Source of labels -> what its objects are."""


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class GridMessage(_Message):
    """A `label_grid.Grid`."""

    affine: tuple[float, ...] = Field(min_length=16, max_length=16, repr=False)
    shape: tuple[int, int, int]
    frame_of_reference: str = Field(repr=False)
    instances: tuple[str, ...] = Field(repr=False)

    def grid(self) -> Grid:
        """Rebuild it."""
        affine = np.array(self.affine, dtype=np.float64).reshape(4, 4)
        return Grid(affine, self.shape, self.frame_of_reference, frozenset(self.instances))


class Question(_Message):
    """What is asked of one object.

    Args:
        source: kind of object.
        report: for reports.
        mask: for segmentations and structure sets.
        grids: image volumes to count marked pixels in; without any, which images it is about, and for
            segmentations the count in each of these.
    """

    source: Literal["reports", "segmentations", "structures"]
    report: ReportPart | None = None
    mask: MaskPart | None = None
    grids: tuple[GridMessage, ...] = ()


class Answer(_Message):
    """What an object says.

    Args:
        rows: of a report: (key, label) pairs.
        unit: of a report's numbers, as its concept's text; "" when there are none.
        is_silent: a report without the concept.
        without_image: a report that has it but does not say of which image.
        instances: SOPInstanceUID -> marked pixels, of the images it refers to; -1 when not counted.
        size: rows and columns of a segmentation's frames.
        marked: for each grid the marked pixels, or the reason why it does not lie on it.
    """

    rows: tuple[tuple[str, str], ...] = Field(default=(), repr=False)
    unit: str = Field(default="", repr=False)
    is_silent: bool = False
    without_image: bool = False
    instances: dict[str, int] = Field(default={}, repr=False)
    size: tuple[int, int] | None = None
    marked: tuple[int | Reason, ...] = ()


def answer_question(data: bytes, question: str) -> str:
    """Answer one question about one object held in memory.

    Args:
        data: the whole file.
        question: a `Question` as JSON.

    Returns:
        An `Answer` as JSON.

    Raises:
        UnusableImageError: the object cannot be used.
        ValidationError: no question.
    """
    asked = Question.model_validate_json(question)
    if asked.report is not None:
        return _of_report(data, asked.report).model_dump_json()
    if asked.mask is None:
        raise ValueError("a question about masks names one")
    found = read_segmentation(data) if asked.source == "segmentations" else read_structures(data)
    answer = (
        Answer(marked=tuple(_marked(found, each.grid(), asked.mask) for each in asked.grids))
        if asked.grids
        else _references(found, asked.mask)
    )
    return answer.model_dump_json()


def _of_report(data: bytes, part: ReportPart) -> Answer:
    found = report_labels(read_report(data), part)
    return Answer(
        rows=found.rows,
        unit="" if found.unit is None else str(found.unit),
        is_silent=found.is_silent,
        without_image=found.without_image,
    )


def _references(found: Segmentation | StructureSet, mask: MaskPart) -> Answer:
    if isinstance(found, StructureSet):
        drawn_on = {
            each for one in found.structures for contour in one.contours for each in contour.instances
        }
        return Answer(instances=dict.fromkeys(sorted(drawn_on - {""}), -1))
    size = (found.pixels.rows, found.pixels.columns)
    try:
        counts = count_marked(
            found, _segment(mask), threshold=mask.threshold, absent_is_empty=mask.absent_is_empty
        )
    except UnusableImageError as error:
        if error.reason is not Reason.LABEL_SOURCE:
            raise
        # It may still lie on a volume, by its coordinates.
        counts = dict.fromkeys(sorted(found.source_instances), -1)
    return Answer(instances=counts, size=size)


def _marked(found: Segmentation | StructureSet, grid: Grid, mask: MaskPart) -> int | Reason:
    try:
        if isinstance(found, StructureSet):
            label = align_structures(found, grid, {"": mask.structure}, absent_is_empty=mask.absent_is_empty)
        else:
            label = align(
                found,
                grid,
                {"": _segment(mask)},
                threshold=mask.threshold,
                absent_is_empty=mask.absent_is_empty,
            )
    except UnusableImageError as error:
        return error.reason
    return int(np.count_nonzero(label.values))


def _segment(mask: MaskPart) -> Concept | int:
    if mask.segment is None:
        raise ValueError("a question about segmentations names a segment")
    return mask.segment
