"""Damaged series at random: what comes out is in its place, or is refused by name. Nothing is guessed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedward_client.dicom.frames import decode_frames
from fedward_client.dicom.refusal import UnusableImageError
from fedward_client.dicom.series import SeriesVerdict, SliceFacts, group_series
from fedward_client.dicom.volume import Volume, assemble
from tests.client.series_builder import Floats, Truth, a_truth, files_of, rotation, slices_of
from tests.client.test_series import AXIAL, CORONAL, SAGITTAL, facts_of, time_series

RAMP = np.array((0.9, -0.6, 0.35))


def assert_each_slice_is_named_once(verdict: SeriesVerdict, slices: Sequence[SliceFacts]) -> None:
    named = [(content, index) for content, index, _ in verdict.dropped]
    for volume in verdict.volumes:
        used = [*volume.slices, *(copy for _, copy in volume.copies)]
        named += [(each.content, each.frame_index) for each in used]
    assert sorted(named) == sorted((each.content, each.frame_index) for each in slices)
    assert (verdict.refused is None) == bool(verdict.volumes)


def assembled(verdict: SeriesVerdict, images: dict[str, Floats]) -> list[Volume]:
    (file,) = files_of(slices_of(a_truth(num_slices=1)))
    decoded = decode_frames(file)
    frames = {
        content: replace(decoded, values=image[None].astype(np.float32)) for content, image in images.items()
    }
    found = []
    for geometry in verdict.volumes:
        try:
            found.append(assemble(geometry, frames))
        except UnusableImageError:
            continue
    return found


def error_mm(volume: Volume) -> float:
    """How far the worst acquired voxel is from where its value belongs, along the ramp."""
    index = np.indices(volume.values.shape).reshape(3, -1)
    true = (RAMP * (-1, -1, 1)) @ (volume.affine[:3, :3] @ index + volume.affine[:3, 3:])
    wrong = np.abs(volume.values.ravel() - true)
    if volume.fill is not None:
        wrong = wrong[volume.values.ravel() != np.float32(volume.fill)]
    return float(wrong.max()) / float(np.linalg.norm(RAMP))


def damaged(truth: Truth, dice: random.Random, noise_mm: float, digits: int) -> tuple[list[SliceFacts], Any]:
    """Slices with inexact positions, some lost, sent again, with other pixels, or turned over."""
    generator = np.random.default_rng(dice.randrange(2**32))
    slices, images, num_turned = [], {}, 0
    for each, image, origin in zip(
        facts_of(truth, slice_thickness=2.5), truth.values, truth.origins, strict=True
    ):
        position = np.round(origin + generator.normal(0, noise_mm, 3), digits)
        assert each.orientation is not None
        placed = replace(each, position=tuple(position.tolist()))
        if dice.random() < 0.04:
            num_turned += 1
            placed = replace(placed, orientation=tuple(-value for value in each.orientation))
        images[each.content] = image
        if dice.random() < 0.05:
            continue
        slices.append(placed)
        if dice.random() < 0.05:
            again = replace(placed, content=f"{each.content} again")
            images[again.content] = image if dice.random() < 0.6 else image + 5
            slices.append(again)
    if 2 * num_turned >= len(slices):  # nobody can know which half is right
        return [], {}
    dice.shuffle(slices)
    return slices, images


@settings(deadline=None, max_examples=150)
@given(
    dice=st.randoms(use_true_random=False),
    num_slices=st.integers(3, 9),
    distance=st.sampled_from([0.5, 1.0, 2.5, 5.0]),
    unequal=st.booleans(),
    spacing=st.tuples(*[st.sampled_from([0.3, 0.8, 1.5])] * 2),
    axes=st.sampled_from([AXIAL, SAGITTAL, CORONAL, *map(rotation, range(6))]),
    tilt=st.sampled_from([0, 0, 0.3, 1, 5, 15, -22, 29]),
    noise_mm=st.sampled_from([0, 0, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.5]),
    digits=st.sampled_from([6, 3, 2, 1, 0]),
)
def test_a_damaged_stack_is_in_its_place_or_refused(
    dice: random.Random,
    num_slices: int,
    distance: float,
    unequal: bool,
    spacing: tuple[float, float],
    axes: Floats,
    tilt: float,
    noise_mm: float,
    digits: int,
) -> None:
    gaps = [distance * (dice.uniform(0.7, 1.35) if unequal else 1) for _ in range(num_slices - 1)]
    truth = a_truth(
        distances=gaps, size=(14, 10), spacing=spacing, axes=axes, tilt_degrees=tilt, ramp=RAMP.tolist()
    )
    slices, images = damaged(truth, dice, noise_mm, digits)
    if not slices:
        return
    verdict = group_series(slices)
    assert_each_slice_is_named_once(verdict, slices)
    # Half a digit in three directions, noise of four sigma, and what counts as regular.
    allowed_mm = 0.15 + 0.87 * 10.0**-digits + 4 * noise_mm
    for volume in assembled(verdict, images):
        assert error_mm(volume) <= allowed_mm


ORDERS: dict[str, Callable[[int, int, int, int], int]] = {
    "volume after volume": lambda time, place, _, num_places: time * num_places + place,
    "from head to feet": lambda time, place, _, num_places: (time + 1) * num_places - place - 1,
    "by turns": lambda time, place, _, num_places: (
        time * num_places + (place // 2 if place % 2 == 0 else (num_places + 1) // 2 + place // 2)
    ),
    "position after position": lambda time, place, num_times, _: place * num_times + time,
}
FACTS: dict[str, Callable[[int, random.Random], Any]] = {
    "acquisition_number": lambda time, _: time + 1,
    "temporal_position": lambda time, _: time + 1,
    "trigger": lambda time, dice: 40.0 * time + dice.uniform(0, 3),
    "echo": lambda time, _: time + 1,
    "acquisition_time": lambda time, _: str(120000 + 10 * time),
    "b_value": lambda time, _: 1000.0 * min(time, 1),
    "echo_time": lambda time, _: 10.0 * time,
}


@pytest.mark.parametrize("order", ORDERS)
@settings(deadline=None, max_examples=150)
@given(
    dice=st.randoms(use_true_random=False),
    num_times=st.integers(2, 6),
    num_places=st.integers(2, 8),
    step=st.sampled_from([1, 1, 2, 10]),
    facts=st.lists(st.sampled_from(sorted(FACTS)), max_size=2),
    loss=st.sampled_from(["none", "some", "end", "beginning", "place"]),
)
def test_no_volume_mixes_time_points_whatever_is_missing(
    order: str,
    dice: random.Random,
    num_times: int,
    num_places: int,
    step: int,
    facts: list[str],
    loss: str,
) -> None:
    slices = []
    for index, each in enumerate(time_series(num_times, num_places)):
        time, place = divmod(index, num_places)
        known: dict[str, Any] = {name: FACTS[name](time, dice) for name in facts}
        number = 1 + step * ORDERS[order](time, place, num_times, num_places)
        slices.append(replace(each, instance_number=number, **known))
    num = len(slices)
    lost = {
        "none": set[int](),
        "some": set(dice.sample(range(num), dice.randint(1, num // 2))),
        "end": set(range(dice.randint(num // 2, num - 1), num)),
        "beginning": set(range(dice.randint(1, num // 2))),
        "place": set(range(dice.randrange(num_places), num, num_places)),
    }[loss]
    left = [each for index, each in enumerate(slices) if index not in lost]
    dice.shuffle(left)
    verdict = group_series(left)
    assert_each_slice_is_named_once(verdict, left)
    places = [each.position for each in left]
    if len(set(places)) == len(places):  # nothing says that there was more than one volume
        return
    for volume in verdict.volumes:
        if volume.copies:  # refused when their pixels turn out to differ
            assert any(kept.content != copy.content for kept, copy in volume.copies)
            continue
        assert len({each.content.split()[1] for each in volume.slices}) == 1
    if loss == "none":
        assert verdict.refused is None
        assert {len(volume.slices) for volume in verdict.volumes} == {num_places}
