"""What a decoder process answers about a label object, asked here directly: small, complete, JSON."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code

from fedward_client.dicom import segmentation_masks
from fedward_client.dicom.label_grid import Grid
from fedward_client.dicom.label_objects import Answer, GridMessage, Question, answer_question
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.segmentation import read_segmentation
from fedward_client.dicom.segmentation_masks import count_marked
from fedward_client.labels import Concept, MaskPart, ReportPart
from tests.label_builders import (
    LIVER,
    SPLEEN,
    TUMOUR,
    a_report,
    a_segmentation,
    a_structure_set,
    a_volume,
    grid_of,
    written,
)

LIVER_CONCEPT = Concept("SCT", "10200004")
LENGTH, MM = Code("410668003", "SCT", "Length"), Code("mm", "UCUM", "millimeter")


def asked(data: bytes, **question: Any) -> Answer:
    return Answer.model_validate_json(answer_question(data, Question(**question).model_dump_json()))


def message(grid: Grid) -> GridMessage:
    return GridMessage(
        affine=tuple(grid.affine.ravel().tolist()),
        shape=grid.shape,
        frame_of_reference=grid.frame_of_reference,
        instances=tuple(sorted(grid.instances)),
    )


def noise(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return (np.random.default_rng(seed).random(shape) > 0.6).astype(np.uint8)


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
def test_marked_pixels_are_counted_in_every_image_of_a_segmentation(kind: str) -> None:
    slices = a_volume(5)
    truth = noise(5, 12, 10)
    truth[3] = 0
    values = truth.astype(float) if kind == "FRACTIONAL" else truth
    data = written(a_segmentation(slices, values, kind=kind))

    answer = asked(data, source="segmentations", mask=MaskPart(segment=LIVER_CONCEPT))

    assert answer.instances == {
        each.SOPInstanceUID: int(mask.sum()) for each, mask in zip(slices, truth, strict=True)
    }
    assert answer.size == (12, 10)


def test_segments_of_one_type_are_united_before_they_are_counted() -> None:
    slices = a_volume()
    truth = noise(4, 12, 10, 3)
    found = read_segmentation(written(a_segmentation(slices, truth, types=(TUMOUR, LIVER, TUMOUR))))

    united = count_marked(found, Concept("SCT", "108369006"))
    second = count_marked(found, 2)

    for index, each in enumerate(slices):
        assert united[each.SOPInstanceUID] == (truth[index, ..., 0] | truth[index, ..., 2]).sum()
        assert second[each.SOPInstanceUID] == truth[index, ..., 1].sum()


@pytest.mark.parametrize("threshold", [0.3, 0.9])
def test_fractions_count_from_the_threshold_on(threshold: float) -> None:
    slices = a_volume(2, 9, 9)
    fractions = np.random.default_rng(2).integers(0, 256, (2, 9, 9)) / 255
    data = written(a_segmentation(slices, fractions, kind="FRACTIONAL"))

    answer = asked(data, source="segmentations", mask=MaskPart(segment=LIVER_CONCEPT, threshold=threshold))

    assert [answer.instances[each.SOPInstanceUID] for each in slices] == [
        (part >= threshold).sum() for part in fractions
    ]


def without_sources(slices: list[Any], truth: NDArray[np.uint8]) -> bytes:
    dataset = a_segmentation(slices, truth)
    for group in dataset.PerFrameFunctionalGroupsSequence:
        del group.DerivationImageSequence
    return written(dataset)


def test_frames_that_do_not_name_their_image_are_not_counted_but_may_lie_on_a_volume() -> None:
    slices = a_volume()
    truth = noise(4, 12, 10)
    data = without_sources(slices, truth)
    mask = MaskPart(segment=LIVER_CONCEPT)

    answer = asked(data, source="segmentations", mask=mask)
    on_grid = asked(data, source="segmentations", mask=mask, grids=(message(grid_of(slices)),))

    assert set(answer.instances.values()) == {-1}
    assert set(answer.instances) == {each.SOPInstanceUID for each in slices}
    assert on_grid.marked == (int(truth.sum()),)
    (only,) = a_volume(1)
    alone = asked(without_sources([only], truth[:1]), source="segmentations", mask=mask)
    assert alone.instances == {only.SOPInstanceUID: truth[0].sum()}


def test_empty_reference_is_no_reference() -> None:
    slices = a_volume()
    dataset = a_segmentation(slices, noise(4, 12, 10))
    for group in dataset.PerFrameFunctionalGroupsSequence:
        group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID = ""

    answer = asked(written(dataset), source="segmentations", mask=MaskPart(segment=LIVER_CONCEPT))

    assert set(answer.instances.values()) == {-1}


def test_each_grid_has_a_count_or_a_reason() -> None:
    slices, others = a_volume(), a_volume(name="other")
    truth = noise(4, 12, 10)
    moved = grid_of(slices)
    moved.affine[:3, 3] += 0.5 * moved.affine[:3, 1]
    grids = (message(grid_of(slices)), message(grid_of(others)), message(moved))
    data = written(a_segmentation(slices, truth))

    answer = asked(data, source="segmentations", mask=MaskPart(segment=LIVER_CONCEPT), grids=grids)

    assert answer.marked == (int(truth.sum()), Reason.FRAME_OF_REFERENCE, Reason.LABEL_GRID)


def test_structure_set_tells_its_images_and_counts_on_a_grid() -> None:
    slices = a_volume()
    corners = np.array([[2.5, 2.5], [2.5, 6.5], [6.5, 6.5], [6.5, 2.5]])
    data = written(a_structure_set(slices, [(1, corners), (2, corners)]))
    mask = MaskPart(structure="GTV")

    answer = asked(data, source="structures", mask=mask)
    counted = asked(data, source="structures", mask=mask, grids=(message(grid_of(slices)),))
    missing = asked(
        data, source="structures", mask=MaskPart(structure="PTV"), grids=(message(grid_of(slices)),)
    )

    assert answer.instances == {each.SOPInstanceUID: -1 for each in slices[1:3]}
    assert counted.marked == (2 * 16,)
    assert missing.marked == (Reason.NO_SEGMENT,)


def test_report_gives_rows_and_their_unit() -> None:
    slices = a_volume()
    data = written(a_report(slices, [(LENGTH, 12.5, MM)]))

    answer = asked(data, source="reports", report=ReportPart(concept=Concept("SCT", "410668003")))
    silent = asked(data, source="reports", report=ReportPart(concept=LIVER_CONCEPT))

    assert answer.rows == ((slices[0].StudyInstanceUID, "12.5"),)
    assert (answer.unit, answer.is_silent, answer.without_image) == ("UCUM:mm", False, False)
    assert (silent.rows, silent.unit, silent.is_silent) == ((), "", True)


def test_object_that_cannot_be_used_is_refused_and_a_wrong_question_is_a_mistake() -> None:
    data = written(a_segmentation(a_volume(), noise(4, 12, 10), types=(SPLEEN,)))
    question = Question(source="segmentations", mask=MaskPart(segment=LIVER_CONCEPT)).model_dump_json()

    with pytest.raises(UnusableImageError) as caught:
        answer_question(data, question)
    assert caught.value.reason is Reason.NO_SEGMENT
    with pytest.raises(UnusableImageError):
        answer_question(b"", question)
    for wrong in (json.dumps({"source": "segmentations"}), question.replace("segment", "segments"), "{"):
        with pytest.raises((ValidationError, ValueError)):
            answer_question(data, wrong)
    with pytest.raises(ValueError, match="names a segment"):
        answer_question(
            data, Question(source="segmentations", mask=MaskPart(structure="x")).model_dump_json()
        )


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = written(a_segmentation(a_volume(), np.ones((4, 12, 10), np.uint8)))
    monkeypatch.setattr(segmentation_masks, "MAX_MASK_BYTES", 3 * 15)

    with pytest.raises(UnusableImageError) as caught:
        count_marked(read_segmentation(data), LIVER_CONCEPT)

    assert caught.value.reason is Reason.OVER_LIMIT


def test_answers_show_no_identifiers() -> None:
    slices = a_volume()
    answer = asked(
        written(a_segmentation(slices, noise(4, 12, 10))),
        source="segmentations",
        mask=MaskPart(segment=LIVER_CONCEPT),
    )

    assert slices[0].SOPInstanceUID not in repr(answer)
    assert slices[0].SOPInstanceUID not in repr(message(grid_of(slices)))


def _objects() -> dict[str, tuple[bytes, str]]:
    """One sound object of each kind, with a question that it answers."""
    slices = a_volume()
    corners = np.array([[2.5, 2.5], [2.5, 6.5], [6.5, 6.5], [6.5, 2.5]])
    grids = (message(grid_of(slices)),)
    liver, gtv = MaskPart(segment=LIVER_CONCEPT), MaskPart(structure="GTV")
    length = ReportPart(concept=Concept("SCT", "410668003"))
    made: dict[str, tuple[Dataset, dict[str, Any]]] = {
        "segmentation": (a_segmentation(slices, noise(4, 12, 10)), {"mask": liver}),
        "segmentation on a grid": (
            a_segmentation(slices, noise(4, 12, 10).astype(float), kind="FRACTIONAL"),
            {"mask": liver, "grids": grids},
        ),
        "label map": (a_segmentation(slices, noise(4, 12, 10), kind="LABELMAP"), {"mask": liver}),
        "structures": (a_structure_set(slices, [(1, corners)]), {"mask": gtv, "grids": grids}),
        "report": (a_report(slices, [(LENGTH, 12.5, MM)]), {"report": length}),
    }
    source = {"report": "reports", "structures": "structures"}
    return {
        name: (
            written(dataset),
            Question.model_validate(
                {"source": source.get(name, "segmentations"), **question}
            ).model_dump_json(),
        )
        for name, (dataset, question) in made.items()
    }


OBJECTS = _objects()


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(sorted(OBJECTS)),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=4)), max_size=6),
    st.floats(0.2, 1),
)
def test_damage_of_any_kind_is_an_answer_or_a_refusal(
    name: str, damage: list[tuple[float, bytes]], kept: float
) -> None:
    data, question = OBJECTS[name]
    broken = bytearray(data)
    for place, values in damage:
        start = 132 + int(place * (len(data) - 140))
        broken[start : start + len(values)] = values

    for content in (bytes(broken), bytes(broken[: int(kept * len(broken))])):
        with contextlib.suppress(UnusableImageError):
            Answer.model_validate_json(answer_question(content, question))
