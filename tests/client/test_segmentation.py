"""Segmentations: real dcmqi objects and ones that highdicom writes, against truth placed by hand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from fedward_client.dicom.label_grid import Grid, label_map
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.segmentation import read_segmentation
from fedward_client.dicom.segmentation_masks import align, align_image
from fedward_client.dicom.syntaxes import ENCAPSULATED_UNCOMPRESSED
from fedward_client.labels import Concept
from tests.builders import a_dataset, a_uid, encode
from tests.label_builders import AXIAL, LIVER, SPLEEN, TUMOUR, a_segmentation, a_volume, grid_of, written

LIVER_CONCEPT = Concept("SCT", "10200004")
SPLEEN_CONCEPT = Concept("SCT", "78961009")
OBLIQUE = (0.955336489, 0.295520207, 0.0, 0.0, 0.0, -1.0)


def refusal(action: Any, *args: Any, **options: Any) -> Reason:
    with pytest.raises(UnusableImageError) as caught:
        action(*args, **options)
    assert caught.value.__cause__ is None
    return caught.value.reason


def noise(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return (np.random.default_rng(seed).random(shape) > 0.6).astype(np.uint8)


@pytest.fixture
def dcmqi(shared_data: Path) -> Path:
    return shared_data / "dicom-varied" / "dcmqi" / "segmentations"


def ct_slices(folder: Path, pattern: str = "*.dcm") -> list[Dataset]:
    slices = [dcmread(path, stop_before_pixels=True) for path in folder.glob(pattern)]
    return sorted(slices, key=lambda each: float(each.ImagePositionPatient[2]))


@pytest.mark.data
@pytest.mark.parametrize("name", ["liver.dcm", "partial_overlaps.dcm"])
def test_real_segmentations_lie_where_their_positions_say(dcmqi: Path, name: str) -> None:
    path = dcmqi / name
    slices = ct_slices(dcmqi / "ct-3slice")
    dataset = dcmread(path)
    truth = np.zeros((len(dataset.SegmentSequence), 3, 512, 512), bool)
    heights = [float(each.ImagePositionPatient[2]) for each in slices]
    for frame, group in zip(dataset.pixel_array, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        number = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        height = float(group.PlanePositionSequence[0].ImagePositionPatient[2])
        truth[number - 1, int(np.argmin(np.abs(np.array(heights) - height)))] |= frame > 0

    masks = align(read_segmentation(path.read_bytes()), grid_of(slices))

    assert truth.sum() > 1000
    assert np.array_equal(masks.values, truth)


@pytest.mark.data
def test_real_segmentation_equals_what_highdicom_makes_of_it(dcmqi: Path) -> None:
    paths = sorted((dcmqi / "ct-3slice").glob("*.dcm"))
    volume = hd.get_volume_from_series([dcmread(path) for path in paths])
    found = hd.seg.segread(dcmqi / "partial_overlaps.dcm").get_volume().match_geometry(volume)
    affine = np.diag([-1.0, -1, 1, 1]) @ volume.affine
    grid = Grid(affine, volume.spatial_shape, volume.frame_of_reference_uid or "")

    masks = align(read_segmentation((dcmqi / "partial_overlaps.dcm").read_bytes()), grid)

    assert found.array.sum() > 1000
    assert np.array_equal(np.moveaxis(masks.values, 0, -1), found.array)


@pytest.mark.data
@pytest.mark.parametrize("name", ["23x38x3", "24x38x3"])
def test_frames_that_begin_within_a_byte(dcmqi: Path, name: str) -> None:
    (path,) = (dcmqi / name / "seg").iterdir()
    truth = dcmread(path).pixel_array

    masks = align(read_segmentation(path.read_bytes()), grid_of(ct_slices(dcmqi / name / "image")))

    groups = dcmread(path).PerFrameFunctionalGroupsSequence
    order = np.argsort([float(group.PlanePositionSequence[0].ImagePositionPatient[2]) for group in groups])
    assert np.array_equal(masks.values[0], truth[order] > 0)
    assert masks.values.any()


@pytest.mark.data
@pytest.mark.parametrize(
    "name",
    [
        *("liver_deflate", "liver_expb", "liver_j2k", "liver_rle"),
        *("nonbyte_aligned", "nonbyte_aligned_deflate", "nonbyte_aligned_j2k", "nonbyte_aligned_rle"),
    ],
)
def test_every_encoding_of_one_real_segmentation_is_the_same(shared_data: Path, name: str) -> None:
    folder = shared_data / "dicom-varied" / "pydicom-data"
    plain = folder / ("liver_nonbyte_aligned.dcm" if name.startswith("nonbyte") else "liver.dcm")
    coded = folder / f"{name if name.startswith('liver') else f'liver_{name}'}.dcm"
    truth = dcmread(plain).pixel_array

    found = read_segmentation(coded.read_bytes())

    assert np.array_equal([found.pixels.frames(index) for index in range(3)], truth)


@pytest.mark.parametrize("name", ["liver_1frame.dcm", "liver_expb_1frame.dcm"])
def test_object_with_more_frames_described_than_announced_is_refused(name: str) -> None:
    path = get_testdata_file(name)
    assert isinstance(path, str)
    dataset = dcmread(path)
    assert (dataset.get("NumberOfFrames"), len(dataset.PerFrameFunctionalGroupsSequence)) == (None, 3)

    assert refusal(read_segmentation, Path(path).read_bytes()) is Reason.SEGMENTATION_FRAMES


@pytest.mark.data
def test_retired_snomed_codes_mean_what_their_successors_mean(dcmqi: Path) -> None:
    found = read_segmentation((dcmqi / "liver.dcm").read_bytes())

    assert found.segments[0].property_type == Concept("SRT", "T-62000")
    assert found.numbers_of(LIVER_CONCEPT) == (1,)
    assert found.numbers_of(SPLEEN_CONCEPT) == ()


@pytest.mark.parametrize("orientation", [AXIAL, OBLIQUE, (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)])
@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL"])
def test_overlapping_segments_come_back_voxel_by_voxel(kind: str, orientation: Sequence[float]) -> None:
    slices = a_volume(5, 11, 7, orientation=orientation)
    truth = noise(5, 11, 7, 2)
    values = truth if kind == "BINARY" else truth.astype(float)
    data = written(a_segmentation(slices, values, types=(LIVER, SPLEEN), kind=kind))

    masks = align(
        read_segmentation(data), grid_of(slices), {"spleen": SPLEEN_CONCEPT, "liver": LIVER_CONCEPT}
    )

    assert (truth[..., 0] & truth[..., 1]).any()
    assert masks.segments == ("spleen", "liver")
    assert masks.values.dtype == bool
    assert np.array_equal(masks.values, np.moveaxis(truth[..., ::-1], -1, 0))


def test_label_map_objects() -> None:
    slices = a_volume(5, 11, 7)
    truth = np.random.default_rng(1).integers(0, 3, (5, 11, 7)).astype(np.uint8)
    data = written(a_segmentation(slices, truth, types=(LIVER, SPLEEN), kind="LABELMAP"))

    masks = align(read_segmentation(data), grid_of(slices))

    assert masks.segments == ("1", "2")
    assert np.array_equal(label_map(masks.values), truth)


@pytest.mark.parametrize("transfer_syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless])
@pytest.mark.parametrize("kind", ["FRACTIONAL", "LABELMAP"])
def test_compressed_objects(kind: str, transfer_syntax: str) -> None:
    slices = a_volume(3, 34, 36)
    truth = noise(3, 34, 36)
    values = truth.astype(float) if kind == "FRACTIONAL" else truth
    data = written(a_segmentation(slices, values, kind=kind, transfer_syntax=transfer_syntax))

    masks = align(read_segmentation(data), grid_of(slices), {"liver": LIVER_CONCEPT})

    assert np.array_equal(masks.values[0], truth)


def test_uncompressed_frames_in_fragments() -> None:
    slices = a_volume(3, 34, 36)
    truth = noise(3, 34, 36)
    dataset = a_segmentation(slices, truth.astype(float), kind="FRACTIONAL")
    stored = np.frombuffer(dataset.PixelData, np.uint8)[: dataset.NumberOfFrames * 34 * 36]
    dataset.PixelData = encapsulate([each.tobytes() for each in stored.reshape(-1, 34 * 36)])
    data = encode(dataset, ENCAPSULATED_UNCOMPRESSED)

    masks = align(read_segmentation(data), grid_of(slices), {"liver": LIVER_CONCEPT})

    assert np.array_equal(masks.values[0], truth)


def test_fractions_are_cut_at_the_threshold() -> None:
    slices = a_volume(2, 9, 9)
    fractions = np.random.default_rng(2).integers(0, 256, (2, 9, 9)) / 255
    data = written(a_segmentation(slices, fractions, kind="FRACTIONAL"))

    for threshold in (0.25, 0.5, 1.0):
        masks = align(read_segmentation(data), grid_of(slices), threshold=threshold)
        assert np.array_equal(masks.values[0], fractions >= threshold)


def test_empty_slices_that_were_left_out_stay_empty_and_order_does_not_matter() -> None:
    slices = a_volume(6)
    truth = noise(6, 12, 10)
    truth[[0, 3, 5]] = 0
    dataset = a_segmentation(slices, truth)
    assert dataset.NumberOfFrames == 3
    frames = dataset.pixel_array[::-1]
    dataset.PerFrameFunctionalGroupsSequence = list(dataset.PerFrameFunctionalGroupsSequence)[::-1]
    dataset.PixelData = np.packbits(frames.ravel(), bitorder="little").tobytes()

    masks = align(read_segmentation(written(dataset)), grid_of(slices))

    assert np.array_equal(masks.values[0], truth)


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("mirrored", list(itertools.product((False, True), repeat=3)))
def test_volume_may_be_mirrored_and_turned(axes: tuple[int, ...], mirrored: tuple[bool, ...]) -> None:
    """The same voxels under other indices: new index -> old index is a matrix, known here by hand."""
    slices = a_volume(4, 6, 5, orientation=OBLIQUE)
    truth = noise(4, 6, 5)
    grid = grid_of(slices)
    turn = np.zeros((4, 4))
    turn[3, 3] = 1
    for new, old in enumerate(axes):
        turn[old, new] = -1 if mirrored[old] else 1
        turn[old, 3] = grid.shape[old] - 1 if mirrored[old] else 0
    shape = (grid.shape[axes[0]], grid.shape[axes[1]], grid.shape[axes[2]])
    turned = Grid(grid.affine @ turn, shape, grid.frame_of_reference)
    flipped = truth[tuple(slice(None, None, -1 if each else 1) for each in mirrored)]

    masks = align(read_segmentation(written(a_segmentation(slices, truth))), turned)

    assert np.array_equal(masks.values[0], flipped.transpose(axes))


def test_segments_of_one_type_are_united_and_single_ones_chosen_by_number() -> None:
    slices = a_volume()
    truth = noise(4, 12, 10, 3)
    found = read_segmentation(written(a_segmentation(slices, truth, types=(TUMOUR, LIVER, TUMOUR))))

    masks = align(found, grid_of(slices), {"tumour": Concept("SCT", "108369006"), "third": 3})

    assert np.array_equal(masks.values[0], truth[..., 0] | truth[..., 2])
    assert np.array_equal(masks.values[1], truth[..., 2])


def test_missing_segment_is_refused_unless_declared_empty() -> None:
    slices = a_volume()
    found = read_segmentation(written(a_segmentation(slices, noise(4, 12, 10))))
    wanted = {"spleen": SPLEEN_CONCEPT}

    assert refusal(align, found, grid_of(slices), wanted) is Reason.NO_SEGMENT
    assert not align(found, grid_of(slices), wanted, absent_is_empty=True).values.any()


def shifted(grid: Grid, **changes: Any) -> Grid:
    values = {name: getattr(grid, name) for name in ("affine", "shape", "frame_of_reference", "instances")}
    return Grid(**values | changes)


def test_another_frame_of_reference_or_grid_is_refused() -> None:
    slices = a_volume()
    found = read_segmentation(written(a_segmentation(slices, noise(4, 12, 10))))
    grid = grid_of(slices)
    half_a_pixel, between, stretched = grid.affine.copy(), grid.affine.copy(), grid.affine.copy()
    half_a_pixel[:3, 3] += 0.5 * grid.affine[:3, 2]
    between[:3, 3] += 0.5 * grid.affine[:3, 0]
    stretched[:3, :3] *= 1.05

    assert refusal(align, found, shifted(grid, frame_of_reference="1.2.3")) is Reason.FRAME_OF_REFERENCE
    nothing_in_common = shifted(grid, frame_of_reference="", instances=frozenset({"1.2.3"}))
    assert refusal(align, found, nothing_in_common) is Reason.FRAME_OF_REFERENCE
    for affine in (half_a_pixel, between, stretched, np.zeros((4, 4)), np.full((4, 4), np.nan)):
        assert refusal(align, found, shifted(grid, affine=affine)) is Reason.LABEL_GRID
    fewer_slices = shifted(grid, shape=(3, 12, 10))
    assert refusal(align, found, fewer_slices) is Reason.LABEL_GRID


def test_images_without_frame_of_reference_are_told_by_their_instances() -> None:
    slices = a_volume()
    truth = noise(4, 12, 10)
    found = read_segmentation(written(a_segmentation(slices, truth)))

    masks = align(found, shifted(grid_of(slices), frame_of_reference=""))

    assert np.array_equal(masks.values[0], truth)


def test_rounded_coordinates_fit_and_a_tenth_of_a_pixel_does_not() -> None:
    slices = a_volume()
    found = read_segmentation(written(a_segmentation(slices, noise(4, 12, 10))))
    grid = grid_of(slices)
    for part, fits in ((0.05, True), (0.15, False)):
        affine = grid.affine.copy()
        affine[:3, 3] += part * grid.affine[:3, 1]
        moved = shifted(grid, affine=affine)
        if fits:
            assert align(found, moved).values.any()
        else:
            assert refusal(align, found, moved) is Reason.LABEL_GRID


def test_overlap_has_no_label_map() -> None:
    assert label_map(np.array([[[True, False]], [[False, True]]])).tolist() == [[1, 2]]
    assert refusal(label_map, np.array([[[True, False]], [[True, True]]])) is Reason.SEGMENTS_OVERLAP


def a_radiograph(name: str, rows: int = 20, columns: int = 15) -> Dataset:
    image = a_dataset(
        np.zeros((rows, columns), np.uint16),
        Modality="DX",
        SOPInstanceUID=a_uid(name),
        PatientName="A^B",
        PatientBirthDate="",
        PatientSex="",
        StudyDate="20200102",
        StudyTime="",
        AccessionNumber="",
        StudyID="",
        ReferringPhysicianName="",
        ImageType=["ORIGINAL", "PRIMARY"],
        InstanceNumber=1,
    )
    image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
    return image


def test_single_image_without_a_place_in_space() -> None:
    image = a_radiograph("thorax")
    truth = noise(1, 20, 15, 2)
    found = read_segmentation(written(a_segmentation([image], truth, types=(LIVER, SPLEEN))))

    masks = align_image(found, image.SOPInstanceUID, 20, 15)

    assert found.frames[0].affine is None
    assert np.array_equal(masks.values, np.moveaxis(truth[0], -1, 0))
    assert refusal(align_image, found, "1.2.3", 20, 15) is Reason.LABEL_SOURCE
    assert refusal(align_image, found, image.SOPInstanceUID, 15, 20) is Reason.LABEL_GRID


def test_one_slice_of_a_volume_takes_its_own_frames_only() -> None:
    slices = a_volume(5)
    truth = noise(5, 12, 10)
    truth[2] = 0
    found = read_segmentation(written(a_segmentation(slices, truth)))

    for index, each in enumerate(slices):
        masks = align_image(found, each.SOPInstanceUID, 12, 10)
        assert np.array_equal(masks.values[0], truth[index])


@pytest.mark.data
@pytest.mark.parametrize(("eye", "kind"), [("01L", "BINARY"), ("14R", "LABELMAP")])
def test_masks_of_two_real_observers_lie_on_their_photograph(shared_data: Path, eye: str, kind: str) -> None:
    """Vessels of the retina, a pixel wide, in an image whose size is no multiple of eight."""
    folder = shared_data / "chase-db1"
    masks = [np.array(Image.open(folder / f"Image_{eye}_{nth}HO.png")) for nth in ("1st", "2nd")]
    image = a_radiograph(eye, *masks[0].shape)
    truth = np.stack(masks).astype(np.uint8)
    if kind == "LABELMAP":
        truth[1] &= ~truth[0] & 1  # one number a pixel
    values = np.moveaxis(truth, 0, -1)[None]
    found = read_segmentation(written(a_segmentation([image], values, types=(LIVER, SPLEEN), kind=kind)))

    laid = align_image(found, image.SOPInstanceUID, *masks[0].shape)

    assert truth.any(axis=(1, 2)).all()
    assert np.array_equal(laid.values, truth)
