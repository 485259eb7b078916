"""Volumes against ground truth in world coordinates, against highdicom, and on series of five vendors."""

from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import highdicom as hd
import numpy as np
import pytest
from highdicom.spatial import get_series_volume_positions
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from scipy import ndimage

from fedward_client.dicom.frames import decode_frames
from fedward_client.dicom.geometry import Handled
from fedward_client.dicom.intensity import FILE, frames_in_unit_interval, in_unit_interval
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.series import SeriesVerdict, group_series
from fedward_client.dicom.volume import Volume, assemble
from tests.builders import a_uid
from tests.client.series_builder import (
    SLOPE,
    Floats,
    Truth,
    a_multiframe,
    a_truth,
    files_of,
    part_in_place,
    quantised,
    read_series,
    rotation,
    slices_of,
    stored_values,
    volumes_of,
)

RAMP = (0.9, -0.6, 0.35)
UNEQUAL = (2.5, 3.0, 2.0, 2.5, 3.3, 2.6)


def only_volume(files: Sequence[bytes]) -> Volume:
    verdict, volumes = volumes_of(files)
    assert verdict.refused is None
    (volume,) = volumes
    return volume


def shuffled(files: Sequence[bytes], seed: int = 0) -> list[bytes]:
    found = list(files)
    random.Random(seed).shuffle(found)
    return found


def with_slopes(truth: Truth) -> tuple[Truth, list[Dataset]]:
    """Every slice with another slope; the truth is what the integers can say."""
    datasets, values = [], []
    for number, dataset in enumerate(slices_of(truth), start=1):
        slope = SLOPE * (1 + number % 4)
        stored = stored_values(truth.values[number - 1], slope, -7.0)
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, -7.0
        dataset.PixelData = stored.tobytes()
        datasets.append(dataset)
        values.append(stored * slope - 7.0)
    return replace(truth, values=np.stack(values)), datasets


def reversed_numbers(datasets: list[Dataset]) -> list[Dataset]:
    for number, dataset in enumerate(reversed(datasets), start=1):
        dataset.InstanceNumber = number
    return datasets


CASES: dict[str, Callable[[], tuple[Truth, list[Dataset]]]] = {
    "plain": lambda: (truth := a_truth(), slices_of(truth)),
    "oblique": lambda: (truth := a_truth(axes=rotation(3)), slices_of(truth)),
    "reversed InstanceNumber": lambda: (truth := a_truth(), reversed_numbers(slices_of(truth))),
    "anisotropic": lambda: (truth := a_truth(spacing=(0.7, 1.3), distances=4.0), slices_of(truth)),
    "slope of each slice": lambda: with_slopes(a_truth()),
    "MONOCHROME1": lambda: (
        truth := a_truth(),
        slices_of(truth, PhotometricInterpretation="MONOCHROME1"),
    ),
    "single slice": lambda: (truth := a_truth(num_slices=1), slices_of(truth)),
    "two slices": lambda: (truth := a_truth(num_slices=2), slices_of(truth)),
    "positions of two decimals": lambda: (truth := a_truth(distances=0.625), slices_of(truth, digits=2)),
    "localizer": lambda: (
        truth := a_truth(),
        [
            *slices_of(truth),
            *slices_of(
                a_truth(num_slices=1, axes=np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])),
                name="scout",
                ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"],
            ),
        ],
    ),
    "localizer that does not say so": lambda: (
        truth := a_truth(),
        [
            *slices_of(truth),
            *slices_of(
                a_truth(num_slices=1, size=(30, 40), axes=np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])),
                name="scout",
            ),
        ],
    ),
    "slice sent twice": lambda: (
        truth := a_truth(),
        [*slices_of(truth), *slices_of(truth.part([4]), name="again", InstanceNumber=5)],
    ),
    "slice sent twice with another number": lambda: (
        truth := a_truth(),
        [*slices_of(truth), *slices_of(truth.part([4]), name="again", InstanceNumber=8)],
    ),
    "enhanced": lambda: (truth := quantised(a_truth()), [a_multiframe([truth])]),
    "enhanced, frames reversed, oblique": lambda: (
        truth := quantised(a_truth(axes=rotation(8))),
        [a_multiframe([truth], reverse=True)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_sampled_voxel_is_in_its_place(name: str) -> None:
    truth, datasets = CASES[name]()
    volume = only_volume(shuffled(files_of(datasets)))
    assert volume.values.shape == truth.values.shape
    assert part_in_place(volume.values, volume.affine, truth) == 1.0
    assert (volume.units, volume.fill, volume.inverted) == ("HU", None, name == "MONOCHROME1")
    assert volume.values.dtype == np.float32


RESAMPLED: dict[str, tuple[Truth, tuple[Handled, ...]]] = {
    "tilt": (a_truth(tilt_degrees=15, ramp=RAMP), (Handled.GANTRY_TILT,)),
    "tilt to the other side, oblique": (
        a_truth(tilt_degrees=-22, axes=rotation(4), ramp=RAMP),
        (Handled.GANTRY_TILT,),
    ),
    "unequal": (a_truth(distances=UNEQUAL, ramp=RAMP), (Handled.UNEQUAL_SPACING,)),
    "unequal, oblique, anisotropic": (
        a_truth(distances=UNEQUAL, axes=rotation(5), spacing=(0.7, 1.3), ramp=RAMP),
        (Handled.UNEQUAL_SPACING,),
    ),
}


@pytest.mark.parametrize("name", RESAMPLED)
def test_a_ramp_through_the_patient_survives_resampling_everywhere(name: str) -> None:
    truth, handled = RESAMPLED[name]
    verdict, (volume,) = volumes_of(shuffled(files_of(slices_of(truth))))
    assert verdict.volumes[0].handled == handled
    assert part_in_place(volume.values, volume.affine, truth, exact=False) == 1.0
    assert_orthogonal(volume.affine)


def assert_orthogonal(affine: Floats) -> None:
    unit = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    np.testing.assert_allclose(unit.T @ unit, np.eye(3), atol=1e-6)


def ramp_at(volume: Volume) -> tuple[NDArray[np.bool_], Floats]:
    """Which voxels are acquired ones, and the ramp's true value at every voxel."""
    index = np.indices(volume.values.shape).reshape(3, -1)
    ras = volume.affine[:3, :3] @ index + volume.affine[:3, 3:]
    true = (np.array(RAMP) * (-1.0, -1.0, 1.0)) @ ras
    return volume.values.ravel() != np.float32(volume.fill), true


@pytest.mark.parametrize("tilt", [0.0, 8.0, -18.5])
def test_every_resampled_voxel_has_the_ramps_value_or_the_fill(tilt: float) -> None:
    truth = a_truth(tilt_degrees=tilt, distances=UNEQUAL, axes=rotation(6), size=(33, 21), ramp=RAMP)
    verdict, (volume,) = volumes_of(files_of(slices_of(truth)))
    assert Handled.UNEQUAL_SPACING in verdict.volumes[0].handled
    acquired, true = ramp_at(volume)
    np.testing.assert_allclose(volume.values.ravel()[acquired], true[acquired], atol=2 * SLOPE)
    assert acquired.mean() > (0.5 if tilt else 0.999)
    assert_orthogonal(volume.affine)


def test_tilt_alone_mixes_no_slices_and_keeps_whole_pixels_exact() -> None:
    shift = np.degrees(np.arctan(0.8 * 3 / 2.5))  # three rows from slice to slice
    truth = a_truth(tilt_degrees=float(shift))
    volume = only_volume(files_of(slices_of(truth)))
    assert volume.values.shape == (7, 13 + 18, 11)
    assert part_in_place(volume.values, volume.affine, truth) == 1.0
    assert volume.fill == np.float32(truth.values.min())


def test_a_stack_that_leans_by_less_than_half_a_pixel_keeps_its_values() -> None:
    truth = a_truth(tilt_degrees=1.2)
    volume = only_volume(files_of(slices_of(truth)))
    assert volume.fill is None
    assert part_in_place(volume.values, volume.affine, truth) == 1.0


REFUSED: dict[str, tuple[Callable[[], list[Dataset]], Reason]] = {
    "slice missing": (lambda: slices_of(a_truth().part([0, 1, 2, 4, 5, 6])), Reason.MISSING_SLICES),
    "other pixels at one position": (
        lambda: [
            *slices_of(a_truth()),
            *slices_of(a_truth(seed=9).part([4]), name="other", InstanceNumber=5),
        ],
        Reason.REPEATED_POSITION,
    ),
    "colour": (
        lambda: [as_colour(each) for each in slices_of(a_truth())],
        Reason.COLOUR,
    ),
    "units": (
        lambda: [
            *slices_of(a_truth().part([0, 1, 2, 3])),
            *slices_of(a_truth().part([4, 5, 6]), name="other", RescaleType="US"),
        ],
        Reason.DISPLAY_VALUES,
    ),
    "inversion": (
        lambda: [
            *slices_of(a_truth().part([0, 1, 2, 3])),
            *slices_of(a_truth().part([4, 5, 6]), name="b", PhotometricInterpretation="MONOCHROME1"),
        ],
        Reason.DISPLAY_VALUES,
    ),
}


def as_colour(dataset: Dataset) -> Dataset:
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 3, "RGB"
    dataset.PlanarConfiguration = 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
    dataset.PixelRepresentation = 0
    pixels = bytes(dataset.Rows * dataset.Columns * 3)
    dataset.PixelData = pixels + b"\0" * (len(pixels) % 2)
    dataset["PixelData"].VR = "OB"
    return dataset


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_volume_is_refused_by_name(name: str) -> None:
    build, reason = REFUSED[name]
    slices, frames = read_series(files_of(build()))
    verdict = group_series(slices)
    if verdict.refused is not None:
        assert verdict.refused is reason
        return
    with pytest.raises(UnusableImageError) as refused:
        assemble(verdict.volumes[0], frames)
    assert refused.value.reason is reason


def test_pixels_that_contradict_the_header_are_refused() -> None:
    slices, frames = read_series(files_of(slices_of(a_truth())))
    other = next(iter(read_series(files_of(slices_of(a_truth(size=(9, 9)))))[1].values()))
    first = slices[0].content
    with pytest.raises(UnusableImageError) as refused:
        assemble(group_series(slices).volumes[0], frames | {first: other})
    assert refused.value.reason is Reason.DIMENSIONS


def test_a_window_common_to_all_slices_is_handed_on() -> None:
    datasets = slices_of(a_truth(), WindowCenter=40, WindowWidth=400)
    assert only_volume(files_of(datasets)).window == (40.0, 400.0)
    datasets[2].WindowCenter = 50
    assert only_volume(files_of(datasets)).window is None


def test_a_window_keeps_its_function_and_a_table_before_it_is_not_passed_over() -> None:
    datasets = slices_of(a_truth(), WindowCenter=40, WindowWidth=400, VOILUTFunction="SIGMOID")
    volume = only_volume(files_of(datasets))
    assert (volume.window, volume.voi_function) == ((40.0, 400.0), "SIGMOID")
    shown = in_unit_interval(
        volume.values, FILE, inverted=False, window=volume.window, voi_function=volume.voi_function
    )
    np.testing.assert_allclose(shown, 1 / (1 + np.exp(-4 * (volume.values - 40) / 400)), atol=1e-6)

    datasets[2].VOILUTFunction = "LINEAR"
    assert only_volume(files_of(datasets)).window is None

    table = Dataset()
    table.LUTDescriptor, table.LUTData = [2, 0, 16], b"\0\0\xff\xff"
    table["LUTDescriptor"].VR, table["LUTData"].VR = "US", "OW"
    datasets = slices_of(a_truth(), WindowCenter=40, WindowWidth=400, VOILUTSequence=[table])
    assert only_volume(files_of(datasets)).window is None


def test_each_frame_is_shown_with_its_own_function() -> None:
    dataset = a_multiframe([quantised(a_truth())])
    for number, group in enumerate(dataset.PerFrameFunctionalGroupsSequence):
        voi = Dataset()
        voi.WindowCenter, voi.WindowWidth = 40, 400
        voi.VOILUTFunction = ("LINEAR_EXACT", "SIGMOID")[number % 2]
        group.FrameVOILUTSequence = [voi]
    frames = decode_frames(files_of([dataset])[0])
    shown = frames_in_unit_interval(frames, FILE)
    values = frames.values.astype(np.float64)
    np.testing.assert_allclose(shown[0], np.clip((values[0] - 40) / 400 + 0.5, 0, 1), atol=1e-6)
    np.testing.assert_allclose(shown[1], 1 / (1 + np.exp(-4 * (values[1] - 40) / 400)), atol=1e-6)


def test_what_lies_outside_a_tilted_stack_is_dark_also_when_low_values_are_white() -> None:
    tilted = a_truth(tilt_degrees=15, ramp=RAMP)
    volume = only_volume(files_of(slices_of(tilted, PhotometricInterpretation="MONOCHROME1")))
    assert volume.inverted
    assert volume.fill == np.float32(tilted.values.max())


def test_time_points_of_one_enhanced_file_become_volumes() -> None:
    truths = [quantised(a_truth(seed=seed)) for seed in range(3)]
    verdict, volumes = volumes_of([*files_of([a_multiframe(truths)])])
    assert [volume.label for volume in verdict.volumes] == [
        (("temporal_position", time),) for time in (1, 2, 3)
    ]
    for truth, volume in zip(truths, volumes, strict=True):
        assert part_in_place(volume.values, volume.affine, truth) == 1.0


def test_parts_of_a_concatenation_are_one_volume_and_one_that_is_missing_is_missed() -> None:
    truth = quantised(a_truth())
    whole = a_multiframe([truth])
    groups, parts = whole.PerFrameFunctionalGroupsSequence, []
    pixels = np.frombuffer(whole.PixelData, np.int16).reshape(len(groups), -1)
    for number, frames in enumerate((slice(0, 2), slice(2, 5), slice(5, 7)), start=1):
        part = deepcopy(whole)
        part.SOPInstanceUID = a_uid(f"part {number}")
        part.ConcatenationUID, part.InConcatenationNumber = a_uid("concatenation"), number
        part.InConcatenationTotalNumber, part.ConcatenationFrameOffsetNumber = 3, frames.start
        part.PerFrameFunctionalGroupsSequence, part.NumberOfFrames = groups[frames], len(groups[frames])
        part.PixelData = pixels[frames].tobytes()
        parts.append(part)

    volume = only_volume(shuffled(files_of(parts)))

    assert part_in_place(volume.values, volume.affine, truth) == 1.0
    for present in (parts[:2], parts[1:], parts[::2]):
        assert group_series(read_series(files_of(present))[0]).refused is Reason.MISSING_SLICES


@pytest.mark.parametrize("name", ["plain", "oblique", "anisotropic", "slope of each slice", "two slices"])
def test_highdicom_puts_every_voxel_where_we_do(name: str) -> None:
    _, datasets = CASES[name]()
    read = [dcmread(io.BytesIO(data)) for data in files_of(datasets)]
    assert_as_highdicom(read, only_volume(files_of(datasets)))


def assert_as_highdicom(datasets: Sequence[Dataset], volume: Volume) -> None:
    spacing, numbers = get_series_volume_positions(datasets)
    assert spacing == pytest.approx(np.linalg.norm(volume.affine[:3, 0]), abs=1e-3)
    assert numbers is not None
    theirs = hd.get_volume_from_series(datasets, apply_presentation_lut=False)
    index = np.indices(theirs.array.shape).reshape(3, -1)
    ras = np.array([[-1.0], [-1.0], [1.0]]) * (theirs.affine[:3, :3] @ index + theirs.affine[:3, 3:])
    ours = np.linalg.solve(volume.affine[:3, :3], ras - volume.affine[:3, 3:])
    nearest = np.round(ours).astype(int)
    assert np.abs(ours - nearest).max() < 0.02
    np.testing.assert_allclose(volume.values[tuple(nearest)], theirs.array.ravel(), rtol=1e-6, atol=1e-3)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    distance=st.floats(0.3, 9.0),
    spacing=st.tuples(st.floats(0.2, 3.0), st.floats(0.2, 3.0)),
    num_slices=st.integers(2, 9),
    origin=st.tuples(*[st.floats(-400, 400)] * 3),
)
def test_any_rigid_orientation_and_spacing_keeps_every_voxel_in_place(
    seed: int,
    distance: float,
    spacing: tuple[float, float],
    num_slices: int,
    origin: tuple[float, float, float],
) -> None:
    truth = a_truth(
        num_slices=num_slices,
        size=(8, 9),
        spacing=spacing,
        distances=distance,
        axes=rotation(seed),
        origin=origin,
    )
    volume = only_volume(shuffled(files_of(slices_of(truth)), seed))
    assert part_in_place(volume.values, volume.affine, truth) == 1.0


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    tilt=st.floats(-30, 30),
    distances=st.lists(st.floats(2.0, 2.9), min_size=2, max_size=6),
    equal=st.booleans(),
)
def test_any_tilt_and_distances_recover_the_ramp(
    seed: int, tilt: float, distances: list[float], equal: bool
) -> None:
    gaps = [distances[0]] * len(distances) if equal else distances
    truth = a_truth(distances=gaps, tilt_degrees=tilt, axes=rotation(seed), size=(20, 12), ramp=RAMP)
    volume = only_volume(shuffled(files_of(slices_of(truth)), seed))
    index = np.indices(volume.values.shape).reshape(3, -1)
    true = (np.array(RAMP) * (-1.0, -1.0, 1.0)) @ (volume.affine[:3, :3] @ index + volume.affine[:3, 3:])
    # Positions within 0.1 mm of a regular grid count as regular.
    tolerance = 2 * SLOPE + 0.1 * float(np.linalg.norm(RAMP))
    fill = np.inf if volume.fill is None else np.float32(volume.fill)
    wrong = np.abs(volume.values.ravel() - true) > tolerance
    assert (volume.values.ravel()[wrong] == fill).all()


@settings(deadline=None, max_examples=20)
@given(st.randoms(use_true_random=False))
def test_no_order_or_renaming_of_the_files_changes_a_voxel(order: random.Random) -> None:
    files = files_of(slices_of(a_truth(tilt_degrees=11, distances=UNEQUAL)))
    first = only_volume(files)
    order.shuffle(files)
    again = only_volume(files)
    np.testing.assert_array_equal(first.values, again.values)
    np.testing.assert_array_equal(first.affine, again.affine)


def series_in(folder: Path) -> list[bytes]:
    files = [path.read_bytes() for path in sorted(folder.glob("*.dcm"))]
    assert files
    return files


def sheared_reference(files: Sequence[bytes], volume: Volume, seed: int = 0) -> tuple[Floats, Floats]:
    """Values of sampled voxels of a volume, and what the stack of files holds at their places.

    Worked out with pydicom and one interpolation in the acquired, sheared grid.
    """
    datasets = sorted(
        (dcmread(io.BytesIO(data)) for data in files), key=lambda each: float(each.ImagePositionPatient[2])
    )
    stack = np.stack(
        [each.pixel_array * float(each.RescaleSlope) + float(each.RescaleIntercept) for each in datasets]
    )
    origins = np.array([each.ImagePositionPatient for each in datasets], float)
    right, down = np.reshape(np.array(datasets[0].ImageOrientationPatient, float), (2, 3))
    normal = np.cross(right, down)
    row_mm, column_mm = (float(value) for value in datasets[0].PixelSpacing)
    generator = np.random.default_rng(seed)
    index = np.stack([generator.integers(0, size, 4000) for size in volume.values.shape])
    lps = ((volume.affine[:3, :3] @ index).T + volume.affine[:3, 3]) * (-1.0, -1.0, 1.0)
    along = origins @ normal
    place = np.interp(lps @ normal, along, np.arange(len(along)))
    origin = np.stack([np.interp(lps @ normal, along, origins[:, axis]) for axis in range(3)], axis=1)
    rows, columns = (lps - origin) @ down / row_mm, (lps - origin) @ right / column_mm
    inside = (rows > 0) & (rows < stack.shape[1] - 1) & (columns > 0) & (columns < stack.shape[2] - 1)
    found = ndimage.map_coordinates(stack, [place[inside], rows[inside], columns[inside]], order=1)
    return volume.values[tuple(index[:, inside])], found


@pytest.mark.data
def test_a_tilted_head_with_unequal_distances_is_one_regular_volume(shared_data: Path) -> None:
    files = shuffled(series_in(shared_data / "dicom-vendors" / "ct_ge_tilted_head"))
    verdict, (volume,) = volumes_of(files)
    assert verdict.volumes[0].handled == (Handled.GANTRY_TILT, Handled.UNEQUAL_SPACING)
    assert_orthogonal(volume.affine)
    assert volume.values.shape[0] == 37  # (157.78 - 5.84) cos(18.5 degrees) = 144.09 mm in steps of 4.0 mm
    np.testing.assert_allclose(np.linalg.norm(volume.affine[:3, 0]), 4.002, atol=1e-3)
    ours, theirs = sheared_reference(files, volume)
    assert len(ours) > 2000
    np.testing.assert_allclose(ours, theirs, atol=0.05)


@pytest.mark.data
def test_a_tilted_phantom_is_sorted_by_position_and_straightened(shared_data: Path) -> None:
    files = series_in(shared_data / "dicom-vendors" / "ct_philips_phantom")
    verdict, (volume,) = volumes_of(files)
    assert verdict.volumes[0].handled == (Handled.GANTRY_TILT,)
    assert [each.instance_number for each in verdict.volumes[0].slices] == list(range(1, 17))
    assert_orthogonal(volume.affine)
    ours, theirs = sheared_reference(files, volume)
    assert len(ours) > 2000
    np.testing.assert_allclose(ours, theirs, atol=0.05)


@pytest.mark.data
@pytest.mark.parametrize("series", ["0004", "0005"])
def test_a_time_series_is_divided_and_its_cut_last_volume_left_out(shared_data: Path, series: str) -> None:
    files = series_in(shared_data / "dicom-vendors" / f"mr_ge_epi_mr_{series}")
    verdict, volumes = volumes_of(shuffled(files))
    assert [volume.values.shape for volume in volumes] == [(15, 64, 64)] * 4
    assert Counter(reason for *_, reason in verdict.dropped) == {Reason.INCOMPLETE_VOLUME: 8}
    datasets = [dcmread(io.BytesIO(data)) for data in files]
    for time, volume in enumerate(volumes):
        members = [each for each in datasets if (each.InstanceNumber - 1) // 15 == time]
        assert_as_highdicom(members, volume)


@pytest.mark.data
def test_a_sagittal_series_is_where_highdicom_puts_it(shared_data: Path) -> None:
    files = series_in(shared_data / "dicom-vendors" / "mr_uih_t1")
    assert_as_highdicom([dcmread(io.BytesIO(data)) for data in files], only_volume(shuffled(files)))


@pytest.mark.data
def test_enhanced_images_are_the_same_volumes_through_both_archives(shared_data: Path) -> None:
    folder = shared_data / "dicom-vendors"
    agfa_verdict, agfa = volumes_of(shuffled(series_in(folder / "mr_siemens_vida_via_agfa")))
    siemens_verdict, siemens = volumes_of(series_in(folder / "mr_siemens_vida_via_siemens"))
    assert [each.label for each in agfa_verdict.volumes] == [each.label for each in siemens_verdict.volumes]
    assert [volume.values.shape for volume in agfa] == [(25, 64, 64)] * 4
    for one, other in zip(agfa, siemens, strict=True):
        np.testing.assert_array_equal(one.values, other.values)
        np.testing.assert_array_equal(one.affine, other.affine)


@pytest.mark.data
def test_an_enhanced_image_is_where_highdicom_puts_it(shared_data: Path) -> None:
    (path, *_) = sorted((shared_data / "dicom-vendors" / "mr_siemens_vida_via_siemens").glob("*.dcm"))
    theirs = hd.imread(path).get_volume(apply_presentation_lut=False)
    volume = only_volume([path.read_bytes()])
    ras = np.diag([-1.0, -1.0, 1.0, 1.0]) @ theirs.affine
    if ras[2, 0] < 0:  # from head to feet
        flip = np.diag([-1.0, 1.0, 1.0, 1.0])
        flip[0, 3] = len(theirs.array) - 1
        ras, values = ras @ flip, theirs.array[::-1]
    else:
        values = theirs.array
    np.testing.assert_allclose(volume.affine, ras, atol=1e-4)
    np.testing.assert_allclose(volume.values, values, rtol=1e-6)


@pytest.mark.data
def test_one_mosaic_in_nine_encodings_is_one_volume(shared_data: Path) -> None:
    files = [
        path.read_bytes() for path in sorted((shared_data / "dicom-varied" / "dcm_qa_ts").rglob("*.dcm"))
    ]
    assert len(files) == 9
    verdict, (volume,) = volumes_of(shuffled(files))
    assert (volume.values.shape, len(verdict.volumes[0].copies)) == ((35, 64, 64), 8 * 35)
    np.testing.assert_array_equal(volume.values, only_volume(files[:1]).values)


@pytest.mark.data
def test_mosaics_are_taken_apart_into_volumes(shared_data: Path) -> None:
    folder = shared_data / "dicom-vendors" / "mr_siemens_mosaic"
    for direction in ("ap", "pa", "lr", "rl"):
        files = [path.read_bytes() for path in sorted(folder.glob(f"*_{direction}-*.dcm"))]
        verdict, volumes = volumes_of(files)
        assert [volume.values.shape for volume in volumes] == [(5, 72, 72)] * 2
        assert verdict.dropped == ()


@pytest.mark.data
@pytest.mark.parametrize("name", ["23x38x3", "24x38x3"])
def test_slices_and_their_multi_frame_copy_are_one_volume(shared_data: Path, name: str) -> None:
    folder = shared_data / "dicom-varied" / "dcmqi" / "segmentations" / name
    single = series_in(folder / "image")
    one, other = only_volume(single), only_volume(series_in(folder / "multiframe"))
    np.testing.assert_array_equal(one.values, other.values)
    np.testing.assert_allclose(one.affine, other.affine, atol=1e-6)
    assert_as_highdicom([dcmread(io.BytesIO(data)) for data in single], one)


@pytest.mark.data
def test_three_slices_of_a_ct_from_head_to_feet_ascend(shared_data: Path) -> None:
    files = series_in(shared_data / "dicom-varied" / "dcmqi" / "segmentations" / "ct-3slice")
    volume = only_volume(files)
    assert volume.affine[2, 0] == pytest.approx(1.0)
    assert_as_highdicom([dcmread(io.BytesIO(data)) for data in files], volume)


@pytest.mark.data
def test_frames_without_places_are_refused(shared_data: Path) -> None:
    path = shared_data / "dicom-varied" / "pydicom-data" / "emri_small.dcm"
    verdict: SeriesVerdict = group_series(read_series([path.read_bytes()])[0])
    assert verdict.refused is Reason.NO_POSITION


def test_identifiers_stay_out_of_volumes_and_errors() -> None:
    datasets = slices_of(a_truth(), PatientID="CNRY", SeriesInstanceUID=a_uid("CNRY"))
    verdict, (volume,) = volumes_of(files_of(datasets))
    text = repr(verdict) + repr(verdict.volumes[0]) + repr(volume)
    assert "CNRY" not in text
    assert a_uid("CNRY") not in text
