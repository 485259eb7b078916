"""Facts about slices survive the index, and a text that nobody wrote is refused."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedward_client.dicom.series import group_series
from fedward_client.dicom.slice_facts import SliceFacts, read_slice_facts
from fedward_client.dicom.slice_text import slices_from_text, slices_to_text
from tests.client.series_builder import a_multiframe, a_truth, files_of, slices_of

OF_FILE = {"content": "c", "series": "1.2.3", "study": "1.2", "modality": "MR"}

_reals = st.floats(allow_nan=False, width=64)
_integers = st.integers(-(2**63) + 1, 2**63 - 1)
_texts = st.text(max_size=20)
SLICES = st.builds(
    SliceFacts,
    **{name: st.just(value) for name, value in OF_FILE.items()},
    frame_index=st.integers(0, 70_000),
    rows=st.integers(0, 65_535),
    columns=st.integers(0, 65_535),
    position=st.none() | st.tuples(_reals, _reals, _reals),
    orientation=st.none() | st.tuples(*[_reals] * 6),
    pixel_spacing=st.none() | st.tuples(_reals, _reals),
    image_type=st.lists(_texts, max_size=5).map(tuple),
    acquisition_time=_texts,
    frame_of_reference=_texts,
    stack=_texts,
    concatenation=_texts,
    dimensions=st.lists(_integers, max_size=4).map(tuple),
    **dict.fromkeys(
        (
            *("instance_number", "acquisition_number", "temporal_position", "echo"),
            *("part", "num_parts"),
        ),
        st.none() | _integers,
    ),
    **dict.fromkeys(
        (
            *("echo_time", "trigger", "b_value"),
            *("slice_thickness", "spacing_between", "gantry_tilt"),
        ),
        st.none() | _reals,
    ),
)


def back(text: str) -> list[SliceFacts]:
    return slices_from_text(text, **OF_FILE)


@settings(deadline=None, max_examples=60)
@given(st.lists(SLICES, min_size=1, max_size=4))
def test_facts_survive_writing_and_reading(slices: list[SliceFacts]) -> None:
    text = slices_to_text(slices)
    assert back(text) == slices
    assert slices_to_text(back(text)) == text


def test_every_fact_is_written_but_what_the_index_knows_of_the_file() -> None:
    names = {each.name for each in fields(SliceFacts)} - set(OF_FILE)
    first, second = (json.loads(line) for line in slices_to_text([FULL]).split("\n"))
    assert set(first) | set(second[1]) | {"frame_index"} == names


FULL = SliceFacts(
    **OF_FILE,
    frame_index=0,
    rows=4,
    columns=5,
    position=(1.0, 2.0, 3.0),
    orientation=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    pixel_spacing=(0.5, 0.5),
    image_type=("ORIGINAL",),
    instance_number=1,
    acquisition_number=1,
    acquisition_time="1200",
    temporal_position=1,
    echo=1,
    echo_time=30.0,
    trigger=1.0,
    b_value=0.0,
    frame_of_reference="1.2",
    slice_thickness=2.0,
    spacing_between=2.0,
    gantry_tilt=0.0,
    stack="1",
    dimensions=(1, 2),
    concatenation="1.3",
    part=1,
    num_parts=2,
)


def test_the_verdict_on_what_was_written_is_the_verdict_on_the_files() -> None:
    for datasets in (slices_of(a_truth(tilt_degrees=12)), [a_multiframe([a_truth(), a_truth(seed=1)])]):
        facts: list[SliceFacts] = []
        again: list[SliceFacts] = []
        for data in files_of(datasets):
            found = read_slice_facts(data, str(len(facts)))
            facts += found
            again += slices_from_text(
                slices_to_text(found),
                content=found[0].content,
                series=found[0].series,
                study=found[0].study,
                modality=found[0].modality,
            )
        assert again == facts
        one, other = group_series(facts), group_series(again)
        assert [volume.slices for volume in one.volumes] == [volume.slices for volume in other.volumes]
        assert len(one.volumes) == len(datasets[:1]) + (len(datasets) == 1)


def test_files_of_one_series_share_the_line_that_is_read_once() -> None:
    texts = [
        slices_to_text(read_slice_facts(data, "c")) for data in files_of(slices_of(a_truth(num_slices=9)))
    ]
    assert len({text.split("\n")[0] for text in texts}) == 1
    assert max(map(len, texts)) < 450


def test_what_a_malformed_header_holds_too_much_of_is_cut() -> None:
    endless = replace(FULL, acquisition_time="1" * 5000, image_type=("A",) * 500, instance_number=10**30)
    (found,) = back(slices_to_text([endless]))
    assert (len(found.acquisition_time), len(found.image_type), found.instance_number) == (1024, 64, None)


def damaged(**changes: Any) -> str:
    """A text whose first line says something else."""
    first, second = slices_to_text([FULL]).split("\n")
    return json.dumps(json.loads(first) | changes) + "\n" + second


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "{}",
        "[]\n[]",
        "{}\n[1,{}]",
        '{"rows":4,"columns":4}\n[1000000000,{}]',
        '{"rows":4,"columns":4}\n[2,{"position":[[1.0,2.0,3.0]]}]',
        '{"rows":4,"columns":4}\n[0,{"position":[]}]',
        '{"rows":4,"columns":4}\n[true,{"position":[[1.0,2.0,3.0]]}]',
        '{"rows":4,"columns":4}\n[1,{"rows":[5]}]',
        '{"rows":4,"columns":4}\n[1,{"position":5}]',
        '{"rows":4,"columns":4}\n[1,[1]]',
        '{"rows":4,"columns":4}\n' + "[" * 5000,
        "[" * 5000 + "\n[1,{}]",
        damaged(rows=4.0),
        damaged(rows=True),
        damaged(rows=2**64),
        damaged(content="other"),
        damaged(unknown=1),
        damaged(frame_of_reference=7),
        damaged(frame_of_reference="1" * 5000),
        damaged(orientation="1"),
        damaged(orientation=["1"] * 6),
        damaged(image_type=["A"] * 500),
    ],
)
def test_a_text_that_nobody_wrote_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not|Expecting|Extra"):
        back(text)


@settings(deadline=None, max_examples=150)
@given(st.text(max_size=60), st.integers(0, 500), st.integers(0, 20))
def test_a_damaged_text_is_refused_or_still_facts(noise: str, start: int, cut: int) -> None:
    text = slices_to_text([FULL])
    try:
        found = back(text[:start] + noise + text[start + cut :])
    except ValueError:
        return
    assert all(isinstance(each, SliceFacts) for each in found)
    group_series(found)


@pytest.mark.data
def test_facts_of_real_series_survive(shared_data: Path) -> None:
    paths = sorted((shared_data / "dicom-vendors").glob("*/*.dcm"))
    assert len(paths) > 200
    for path in paths[::4]:
        facts = list(read_slice_facts(path.read_bytes(), path.name))
        text = slices_to_text(facts)
        first = facts[0]
        assert facts == slices_from_text(
            text, content=first.content, series=first.series, study=first.study, modality=first.modality
        )
