"""From folder to tensors: every image once, bad ones aside, nothing from a header."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydicom.uid import JPEG2000Lossless

from fedward_client.cohort import open_cohort
from fedward_client.dataset import Splits, open_dicom_folder
from fedward_client.dicom import decode
from fedward_client.dicom.decode import decode_image
from fedward_client.dicom.refusal import Reason
from fedward_client.index import index_folder, list_quarantine
from fedward_client.index_store import CaseIndex
from fedward_client.site_data import SiteData
from fedward_common.errors import CohortError
from fedward_common.registry import DATASETS, TRANSFORMS
from tests.builders import a_dataset, a_plan, a_site, canary_elements, encode, write_labels

SIDES = ("train", "validation", "test")


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Length of each file that is decoded, as it is decoded."""
    lengths: list[int] = []

    def counting(data: bytes) -> NDArray[np.float32]:
        lengths.append(len(data))
        return decode_image(data)

    monkeypatch.setattr(decode, "decode_image", counting)
    return lengths


def by_turns(patient: int) -> str:
    return SIDES[patient % 3]


def equal(one: Splits, other: Splits) -> bool:
    pairs = [(getattr(one, side), getattr(other, side)) for side in SIDES]
    return all(torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in pairs)


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
        assert found.images.dtype == torch.float32
        assert found.labels.dtype == torch.int64
        assert found.case_ids == tuple(case.case_id for case in wanted)
        assert found.labels.tolist() == [case.label for case in wanted]
        for image, case in zip(found.images, wanted, strict=True):
            data = (site.dicom / names[case.content].decode()).read_bytes()
            assert torch.equal(image, preprocess(decode_image(data)))
    assert splits.train.images.shape == (6, 1, 8, 12)
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 16


def test_the_dataset_is_found_by_its_name() -> None:
    assert DATASETS.load("dicom_folder") is open_dicom_folder


def test_a_second_start_decodes_nothing_and_a_new_image_only_itself(
    tmp_path: Path, decoded: list[int]
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
    ("filling", "end", "reason"), [(b"\x55", 8, Reason.DECODE_FAILED), (b"\0", 0, Reason.TRUNCATED)]
)
def test_a_file_that_cannot_be_decoded_is_quarantined_and_the_others_go_on(
    tmp_path: Path, decoded: list[int], filling: bytes, end: int, reason: Reason
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
    site = a_site(tmp_path, split=by_turns)

    def disturb(done: int, total: int) -> None:
        for path in site.dicom.iterdir():
            path.write_bytes(b"other")

    with pytest.raises(CohortError, match="changed or vanished"):
        open_dicom_folder(a_plan(), site, disturb)


def test_sides_may_be_empty_but_not_training(tmp_path: Path) -> None:
    whole = open_dicom_folder(a_plan(), a_site(tmp_path / "a", split=lambda _: "train"))
    assert [len(whole.train), len(whole.validation), len(whole.test)] == [16, 0, 0]
    assert whole.test.images.shape == (0, 1, 16, 16)

    with pytest.raises(CohortError, match="no training case"):
        open_dicom_folder(a_plan(), a_site(tmp_path / "b", split=lambda _: "test"))


def test_a_modality_that_is_not_supported_is_named(tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="modality MG; supported here: CR, DX"):
        open_dicom_folder(a_plan(data={"modalities": ("CR", "MG")}), a_site(tmp_path))


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
    np.save(saved, splits.train.images.numpy())
    out = repr(splits).encode() + saved.getvalue()
    for path in (site.home / "cache").iterdir():
        out += path.name.encode() + path.read_bytes()
    assert len(splits.train) == 6
    for needle in ("CNRY", *uids, dataset.StudyInstanceUID, dataset.SeriesInstanceUID):
        assert needle.encode() not in out
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
