"""From folder to tensors: every image once, bad ones aside, nothing from a header."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import JPEG2000Lossless, UltrasoundImageStorage

from fedward_client import dataset
from fedward_client.case_set import StoredImages
from fedward_client.cohort import open_cohort
from fedward_client.compute import threads
from fedward_client.dataset import Splits, open_dicom_folder
from fedward_client.dicom.decode import decode_image
from fedward_client.dicom.refusal import Reason
from fedward_client.dicom.sandbox import DecodeSandbox, Outcome, SiteFile, What
from fedward_client.evaluator import predict
from fedward_client.index import index_folder, list_quarantine
from fedward_client.index_store import CaseIndex
from fedward_client.site_data import SiteData
from fedward_client.trainer import TrainingJob, train
from fedward_common.errors import CohortError
from fedward_common.models import build_model
from fedward_common.registry import DATASETS, TRANSFORMS
from tests.builders import a_dataset, a_plan, a_site, a_uid, canary_elements, encode, write_labels
from tests.client.series_builder import Truth, a_multiframe, a_truth, quantised, slices_of

SIDES = ("train", "validation", "test")


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Content of each file that is decoded, as it is asked for."""
    contents: list[str | None] = []
    decode = DecodeSandbox.map

    def counting(
        self: DecodeSandbox, files: Iterable[SiteFile], what: What, *, lend: bool = False
    ) -> Iterator[Outcome]:
        listed = list(files)
        contents.extend(file.content for file in listed if what in ("image", "frames"))
        return decode(self, listed, what, lend=lend)

    monkeypatch.setattr(DecodeSandbox, "map", counting)
    return contents


def tensor(images: torch.Tensor | StoredImages) -> torch.Tensor:
    return images[:]


def by_turns(patient: int) -> str:
    return SIDES[patient % 3]


def equal(one: Splits, other: Splits) -> bool:
    pairs = [(getattr(one, side), getattr(other, side)) for side in SIDES]
    return all(
        torch.equal(tensor(a.images), tensor(b.images)) and torch.equal(a.labels, b.labels) for a, b in pairs
    )


def test_every_image_is_its_decoded_and_transformed_self(tmp_path: Path) -> None:
    plan = a_plan(transforms={"size": (8, 12)})
    site = a_site(tmp_path, split=by_turns)

    splits = open_dicom_folder(plan, site)

    preprocess = TRANSFORMS.load("chest_xray").preprocess(plan)
    cases = open_cohort(site, plan.data, plan.task.labels)
    with CaseIndex(site.home) as index:
        names = index.file_names()
    for side in SIDES:
        found = getattr(splits, side)
        wanted = cases.of(side)  # type: ignore[arg-type]
        assert tensor(found.images).dtype == torch.float32
        assert found.labels.dtype == torch.int64
        assert found.case_ids == tuple(case.case_id for case in wanted)
        assert found.labels.tolist() == [case.label for case in wanted]
        for image, case in zip(tensor(found.images), wanted, strict=True):
            data = (site.dicom / names[case.content].decode()).read_bytes()
            assert torch.equal(image, preprocess(decode_image(data)))
    assert splits.train.images.shape == (6, 1, 8, 12)
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 16


def test_the_dataset_is_found_by_its_name() -> None:
    assert DATASETS.load("dicom_folder") is open_dicom_folder


def test_a_second_start_decodes_nothing_and_a_new_image_only_itself(
    tmp_path: Path, decoded: list[str | None]
) -> None:
    site = a_site(tmp_path, split=by_turns)
    first = open_dicom_folder(a_plan(), site)
    assert len(decoded) == 16

    assert equal(open_dicom_folder(a_plan(), site), first)
    assert len(decoded) == 16

    dataset = a_dataset(PatientID="new")
    (site.dicom / "new.dcm").write_bytes(encode(dataset))
    with site.labels.open("a") as file:
        file.write(f"{dataset.SOPInstanceUID},1,train\n")
    assert len(open_dicom_folder(a_plan(), site).train) == 7
    assert len(decoded) == 17

    open_dicom_folder(a_plan(transforms={"size": (8, 8)}), site)
    assert len(decoded) == 34


def test_two_homes_give_the_same_tensors_in_the_same_order(tmp_path: Path) -> None:
    one, other = a_site(tmp_path / "a", num_patients=20), a_site(tmp_path / "b", num_patients=20)

    first, second = open_dicom_folder(a_plan(), one), open_dicom_folder(a_plan(), other)

    assert equal(first, second)
    assert not set(first.train.case_ids) & set(second.train.case_ids)


@pytest.mark.parametrize(
    ("filling", "end", "reason"), [(b"\x55", 8, Reason.DECODE_FAILED), (b"\0", 0, Reason.CODESTREAM)]
)
def test_a_file_that_cannot_be_decoded_is_quarantined_and_the_others_go_on(
    tmp_path: Path, decoded: list[str | None], filling: bytes, end: int, reason: Reason
) -> None:
    site = a_site(tmp_path, split=by_turns)
    dataset = a_dataset(np.tile(np.arange(64, dtype=np.uint8), (64, 1)), PatientID="bad")
    dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
    data = encode(dataset, JPEG2000Lossless)
    start = data.index(b"\xff\x4f\xff\x51") + 60
    (site.dicom / "bad.dcm").write_bytes(
        data[:start] + filling * (len(data) - start - end) + data[len(data) - end :]
    )
    with site.labels.open("a") as file:
        file.write(f"{dataset.SOPInstanceUID},1,train\n")
    assert index_folder(site).num_images == 17

    splits = open_dicom_folder(a_plan(), site)

    assert len(splits.train) == 6
    (entry,) = list_quarantine(site.home)
    assert entry.reason == reason
    again = open_dicom_folder(a_plan(), site)
    assert len(decoded) == 17
    assert equal(splits, again)


def test_a_file_that_changes_while_images_are_prepared_is_refused(tmp_path: Path) -> None:
    site = a_site(tmp_path, split=by_turns, num_patients=60)  # more than are asked for at a time

    def disturb(done: int, total: int) -> None:
        for path in site.dicom.iterdir():
            path.write_bytes(b"other")

    with threads(1), pytest.raises(CohortError, match="changed or vanished"):
        open_dicom_folder(a_plan(), site, disturb)


def test_sides_may_be_empty_but_not_training(tmp_path: Path) -> None:
    whole = open_dicom_folder(a_plan(), a_site(tmp_path / "a", split=lambda _: "train"))
    assert [len(whole.train), len(whole.validation), len(whole.test)] == [16, 0, 0]
    assert whole.test.images.shape == (0, 1, 16, 16)

    with pytest.raises(CohortError, match="no training case"):
        open_dicom_folder(a_plan(), a_site(tmp_path / "b", split=lambda _: "test"))


def test_a_cohort_that_does_not_fit_into_memory_stays_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = a_site(tmp_path, split=by_turns)
    plan = a_plan(model={"name": "cnn2d", "options": {"channels": (4,)}})
    held = open_dicom_folder(plan, site)
    monkeypatch.setattr(dataset, "_available_bytes", lambda: 0)

    mapped = open_dicom_folder(plan, site)

    assert isinstance(held.train.images, torch.Tensor)
    assert isinstance(mapped.train.images, StoredImages)
    assert equal(held, mapped)
    assert mapped.train.images.shape == tuple(held.train.images.shape)
    assert mapped.train.images.dim() == 4
    assert [torch.equal(*pair) for pair in zip(mapped.train.images, held.train.images, strict=True)] == [
        True
    ] * 6
    results = []
    for splits in (held, mapped):
        torch.manual_seed(0)
        model = build_model(plan)
        train(model, splits.train, TrainingJob(plan=plan, round_index=1, seed=3))
        scores = predict(model, splits.test, plan, "cpu")
        results.append((pack_bits(model), scores.tobytes()))
    assert results[0] == results[1]


def pack_bits(model: torch.nn.Module) -> bytes:
    return b"".join(value.numpy().tobytes() for value in model.state_dict().values())


def test_the_limit_of_the_cache_is_the_sites(tmp_path: Path) -> None:
    site = a_site(tmp_path, split=by_turns)
    (site.home / "cohort.toml").write_text("cache_gb = 0.000001\n")

    with pytest.raises(CohortError, match="GB are permitted"):
        open_dicom_folder(a_plan(), site)


def test_a_withdrawn_image_is_not_kept(tmp_path: Path) -> None:
    site = a_site(tmp_path, split=by_turns)
    open_dicom_folder(a_plan(), site)
    withdrawn = site.dicom / "0-0.dcm"
    content = hashlib.sha256(withdrawn.read_bytes()).hexdigest()
    assert any(content.encode() in path.read_bytes() for path in cached(site))
    withdrawn.unlink()
    lines = site.labels.read_text().splitlines()
    site.labels.write_text("\n".join(line for line in lines if not line.startswith(a_uid("0-0"))) + "\n")

    assert len(open_dicom_folder(a_plan(), site).train) == 5

    assert not any(content.encode() in path.read_bytes() for path in cached(site))


def cached(site: SiteData) -> list[Path]:
    return [path for path in (site.home / "cache").rglob("*") if path.is_file()]


def test_two_and_a_half_percent_of_broken_files_are_named_and_the_others_train(tmp_path: Path) -> None:
    site = a_site(tmp_path, num_patients=40, images_per_patient=1, split=lambda _: "train")
    dataset = a_dataset(np.tile(np.arange(64, dtype=np.uint8), (64, 1)), PatientID="bad")
    dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
    data = bytearray(encode(dataset, JPEG2000Lossless))
    start = data.index(b"\xff\x4f\xff\x51") + 60
    data[start:-8] = b"\x55" * (len(data) - 8 - start)
    (site.dicom / "bad.dcm").write_bytes(data)
    with site.labels.open("a") as file:
        file.write(f"{dataset.SOPInstanceUID},1,train\n")
    seen: list[tuple[int, int]] = []

    splits = open_dicom_folder(a_plan(), site, lambda done, total: seen.append((done, total)))

    assert len(splits.train) == 40
    assert seen == [(number, 41) for number in range(1, 42)]
    cohort = open_cohort(site, a_plan().data, a_plan().task.labels)
    assert [entry.content for entry in cohort.quarantined] == [hashlib.sha256(data).hexdigest()]


def a_site_of(
    folder: Path, files: dict[str, bytes], rows: list[list[object]], cohort: str, key: str
) -> SiteData:
    site = SiteData(folder / "home", folder / "dicom", folder / "labels.csv")
    site.home.mkdir(parents=True)
    site.dicom.mkdir()
    for name, data in files.items():
        (site.dicom / name).write_bytes(data)
    write_labels(site.labels, rows, (key, "label", "split"))
    (site.home / "cohort.toml").write_text(cohort)
    return site


def two_series(folder: Path, **elements: Any) -> tuple[SiteData, list[Truth]]:
    truths = [a_truth(seed=seed, num_slices=6, size=(12, 10)) for seed in (1, 2)]
    files = {}
    for number, truth in enumerate(truths):
        own: dict[str, Any] = elements | {
            "SeriesInstanceUID": a_uid(f"series {number}"),
            "StudyInstanceUID": a_uid(f"study {number}"),
            "PatientID": f"P{number}",
        }
        for place, each in enumerate(slices_of(truth, name=f"{number}", **own)):
            files[f"{number}-{5 - place}"] = encode(each)
    rows: list[list[object]] = [[a_uid(f"series {number}"), number, "train"] for number in range(2)]
    return a_site_of(folder, files, rows, 'unit = "volume"\n', "SeriesInstanceUID"), truths


VOLUMES: dict[str, Any] = {
    "name": "volume",
    "size": (6, 12, 10),
    "window": (-1000.0, 1000.0),
}


def test_volumes_come_out_in_the_plans_window_to_half_a_step(tmp_path: Path) -> None:
    site, truths = two_series(tmp_path)
    plan = a_plan(transforms=VOLUMES, data={"modalities": ("CT",)})

    splits = open_dicom_folder(plan, site)

    images, labels = tensor(splits.train.images), splits.train.labels.tolist()
    assert images.shape == (2, 1, 6, 12, 10)
    for image, label in zip(images, labels, strict=True):
        truth = truths[label]
        shown = np.clip((truth.values + 1000) / 2000, 0, 1) * 2 - 1
        flipped = [np.flip(shown, axes) for axes in ((), (1,), (2,), (1, 2))]
        errors = [float(np.abs(image[0].numpy() - each).max()) for each in flipped]
        assert min(errors) <= 0.5 / 32767 + 1e-6


def test_what_one_plans_window_cannot_show_another_plan_may(tmp_path: Path) -> None:
    site, _ = two_series(tmp_path)  # no file has a window
    for_file = a_plan(transforms=VOLUMES | {"window": "file"}, data={"modalities": ("CT",)})
    in_hu = a_plan(transforms=VOLUMES, data={"modalities": ("CT",)})

    with pytest.raises(CohortError, match="no image can be decoded"):
        open_dicom_folder(for_file, site)
    assert {each.reason for each in list_quarantine(site.home)} == {Reason.NO_COMMON_WINDOW}

    assert len(open_dicom_folder(in_hu, site).train.labels) == 2
    assert list_quarantine(site.home) == []


def test_a_window_in_hounsfield_units_is_never_laid_on_other_values(tmp_path: Path) -> None:
    site, _ = two_series(tmp_path)
    for path in site.dicom.iterdir():
        image = pydicom.dcmread(path)
        if image.SeriesInstanceUID == a_uid("series 0"):
            del image.RescaleSlope, image.RescaleIntercept
            image.save_as(path)

    splits = open_dicom_folder(a_plan(transforms=VOLUMES, data={"modalities": ("CT",)}), site)

    assert splits.train.labels.tolist() == [1]
    assert {each.reason for each in list_quarantine(site.home)} == {Reason.NOT_HOUNSFIELD}
    percentiles = VOLUMES | {"window": "percentiles"}
    splits = open_dicom_folder(a_plan(transforms=percentiles, data={"modalities": ("CT",)}), site)
    assert sorted(splits.train.labels.tolist()) == [0, 1]


def test_volumes_are_resampled_to_the_plans_size_and_cached(
    tmp_path: Path, decoded: list[str | None]
) -> None:
    site, truths = two_series(tmp_path)
    smaller = a_plan(transforms=VOLUMES | {"size": (3, 6, 5)}, data={"modalities": ("CT",)})

    first = open_dicom_folder(smaller, site)
    assert len(decoded) == 12
    assert equal(first, open_dicom_folder(smaller, site))
    assert len(decoded) == 12

    (label,) = first.train.labels[:1].tolist()
    shown = np.clip((truths[label].values + 1000) / 2000, 0, 1) * 2 - 1
    means = shown.reshape(3, 2, 6, 2, 5, 2).mean(axis=(1, 3, 5))
    found = tensor(first.train.images)[0, 0].numpy()
    errors = [float(np.abs(found - np.flip(means, axes)).max()) for axes in ((), (1,), (2,), (1, 2))]
    assert min(errors) < 1e-3

    spaced = a_plan(
        transforms=VOLUMES | {"size": (10, 20, 20), "spacing_mm": (2.5, 0.8, 0.8)},
        data={"modalities": ("CT",)},
    )
    padded = tensor(open_dicom_folder(spaced, site).train.images)
    assert padded.shape == (2, 1, 10, 20, 20)
    assert padded[:, :, 0].eq(-1).all()  # black outside


def test_a_volume_with_a_broken_slice_is_quarantined_and_the_other_trains(tmp_path: Path) -> None:
    site, _ = two_series(tmp_path)
    plan = a_plan(transforms=VOLUMES, data={"modalities": ("CT",)})
    dataset = pydicom.dcmread(site.dicom / "1-2")
    dataset.PixelData = dataset.PixelData[:-10]
    dataset.save_as(site.dicom / "1-2")

    splits = open_dicom_folder(plan, site)

    assert splits.train.labels.tolist() == [0]
    assert open_dicom_folder(plan, site).train.labels.tolist() == [0]


def test_volumes_in_one_file_each_come_out_as_their_slices_do(tmp_path: Path) -> None:
    truth = quantised(a_truth(seed=4, num_slices=6, size=(12, 10)))
    plan = a_plan(transforms=VOLUMES, data={"modalities": ("CT",)})
    found = []
    single = {f"{place}": encode(each) for place, each in enumerate(slices_of(truth, name="s"))}
    multi = {"m": encode(a_multiframe([truth], reverse=True))}
    for name, files in {"single": single, "multi": multi}.items():
        uid = pydicom.dcmread(io.BytesIO(next(iter(files.values())))).SeriesInstanceUID
        site = a_site_of(
            tmp_path / name, files, [[uid, 1, "train"]], 'unit = "volume"\n', "SeriesInstanceUID"
        )
        found.append(tensor(open_dicom_folder(plan, site).train.images))

    assert (found[0] - found[1]).abs().max() <= 2.1 / 32767


def test_what_the_site_has_and_what_the_plan_wants_must_fit(tmp_path: Path) -> None:
    site, _ = two_series(tmp_path / "a")
    with pytest.raises(CohortError, match=r"2 numbers.*one volume"):
        open_dicom_folder(a_plan(data={"modalities": ("CT",)}), site)
    with pytest.raises(CohortError, match=r"3 numbers.*one image"):
        open_dicom_folder(a_plan(transforms=VOLUMES), a_site(tmp_path / "b"))


def colour_pixels() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def an_ultrasound(pixels: NDArray[np.uint8], **elements: Any) -> bytes:
    """Colour picture with one declared region: rows 4 to 15, columns 2 to 13."""
    dataset = a_dataset(pixels[..., 0], Modality="US", **elements)
    dataset.SOPClassUID = UltrasoundImageStorage
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 3, "RGB"
    dataset.PlanarConfiguration, dataset.PixelData = 0, pixels.tobytes()
    region = Dataset()
    region.RegionLocationMinX0, region.RegionLocationMaxX1 = 2, 13
    region.RegionLocationMinY0, region.RegionLocationMaxY1 = 4, 15
    region.RegionSpatialFormat, region.RegionDataType, region.RegionFlags = 1, 1, 0
    region.PhysicalUnitsXDirection = region.PhysicalUnitsYDirection = 3
    region.PhysicalDeltaX = region.PhysicalDeltaY = 0.1
    dataset.SequenceOfUltrasoundRegions = [region]
    dataset.BurnedInAnnotation = "NO"
    return encode(dataset)


@pytest.mark.parametrize("name", ["image", "colour_image"])
def test_colour_is_grey_or_three_channels_and_only_the_regions_of_ultrasound_stay(
    tmp_path: Path, name: str
) -> None:
    pixels = colour_pixels()
    uid = a_uid("us")
    site = a_site_of(
        tmp_path,
        {"a": an_ultrasound(pixels, SOPInstanceUID=uid)},
        [[uid, 1, "train"]],
        'modalities = ["US"]\n',
        "SOPInstanceUID",
    )
    plan = a_plan(transforms={"name": name, "size": (16, 16)}, data={"modalities": ("US",)})

    (image,) = tensor(open_dicom_folder(plan, site).train.images)

    kept = np.zeros((16, 16), dtype=bool)
    kept[4:16, 2:14] = True
    shown = np.where(kept[..., None], pixels / 255, 0.0)
    if name == "image":
        expected = (shown @ np.array([0.299, 0.587, 0.114]))[None]
    else:
        expected = shown.transpose(2, 0, 1)
    np.testing.assert_allclose(image.numpy(), expected * 2 - 1, atol=1e-5)


@pytest.mark.parametrize("window", ["percentiles", (20.0, 200.0)])
def test_the_plan_chooses_the_window_of_radiographs_too(
    tmp_path: Path, window: str | tuple[float, float]
) -> None:
    site = a_site(tmp_path, num_patients=1, images_per_patient=1, split=lambda _: "train")
    plan = a_plan(transforms={"size": (16, 16), "window": window, "percentiles": (10.0, 90.0)})
    stored = pydicom.dcmread(site.dicom / "0-0.dcm").pixel_array.astype(np.float64)
    low, high = window if isinstance(window, tuple) else np.percentile(stored, [10, 90])

    (image,) = tensor(open_dicom_folder(plan, site).train.images)

    shown = np.clip((stored - float(low)) / (float(high) - float(low)), 0, 1)
    np.testing.assert_allclose(image[0].numpy(), shown * 2 - 1, atol=1e-5)


def test_nothing_of_a_header_or_a_name_is_in_what_comes_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    site = SiteData(tmp_path / "home", tmp_path / "CNRYROOT", tmp_path / "CNRY.csv")
    site.home.mkdir()
    site.dicom.mkdir()
    canaries = canary_elements()
    uids = []
    for number in range(6):
        dataset = a_dataset(np.arange(number, number + 256, dtype=np.uint16).reshape(16, 16), **canaries)
        del dataset.RescaleType
        uids.append(dataset.SOPInstanceUID)
        (site.dicom / f"CNRYFILE{number}").write_bytes(encode(dataset, preamble=b"CNRYPREAMBLE"))
    write_labels(site.labels, [[uid, 1, "train"] for uid in uids], ("SOPInstanceUID", "label", "split"))
    del caplog.records[:]  # what writing the files logged

    splits = open_dicom_folder(a_plan(), site)

    saved = io.BytesIO()
    np.save(saved, tensor(splits.train.images).numpy())
    out = repr(splits).encode() + saved.getvalue()
    for path in cached(site):
        out += path.name.encode() + path.read_bytes()
    assert len(splits.train) == 6
    for needle in ("CNRY", *uids, dataset.StudyInstanceUID, dataset.SeriesInstanceUID):
        assert needle.encode() not in out
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
