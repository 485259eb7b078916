"""Simulated sites: valid DICOM, the same pixels, patients on one side, and the same bytes each time."""

from __future__ import annotations

import csv
import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.uid import UID

from fedward_client.cohort import open_cohort
from fedward_client.dicom.decode import decode_image
from fedward_client.dicom.synthetic import SyntheticSites, write_npz_sites, write_phantom_sites
from fedward_client.index import index_folder
from fedward_client.site_data import SiteData
from fedward_common.errors import UsageError

SITES = ("north", "south", "west")


def an_npz(folder: Path, num_train: int = 120, rows: int = 9, columns: int = 11) -> Path:
    """Random images whose sizes make odd pixel counts."""
    random = np.random.default_rng(3)
    arrays: dict[str, NDArray[np.uint8]] = {}
    for part, count in (("train", num_train), ("val", 30), ("test", 45)):
        arrays[f"{part}_images"] = random.integers(0, 256, (count, rows, columns), dtype=np.uint8)
        arrays[f"{part}_labels"] = (np.arange(count) % 3 > 0).astype(np.uint8)[:, None]
    np.savez(folder / "images.npz", **arrays)  # type: ignore[arg-type]
    return folder / "images.npz"


def label_rows(folder: Path) -> dict[str, tuple[int, str]]:
    """SOPInstanceUID -> label and split."""
    with (folder / "labels.csv").open(newline="") as file:
        return {row["SOPInstanceUID"]: (int(row["label"]), row["split"]) for row in csv.DictReader(file)}


def fingerprint(out: Path) -> dict[str, str]:
    files = [path for path in out.rglob("*") if path.is_file()]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def check_summary(written: SyntheticSites, out: Path) -> None:
    """What the summary says is what the label files and folders hold."""
    for site in written.sites:
        rows = label_rows(out / site.name)
        assert len(list((out / site.name / "dicom").iterdir())) == site.num_images == len(rows)
        counted = Counter((split, label) for label, split in rows.values())
        said = {
            (split, label): n for split, labels in site.counts.items() for label, n in labels.items() if n
        }
        assert counted == said


def test_every_image_arrives_once_with_its_pixels_label_and_side(tmp_path: Path) -> None:
    npz = an_npz(tmp_path)
    written = write_npz_sites(npz, tmp_path / "out", SITES, seed=5)
    check_summary(written, tmp_path / "out")

    arrived: Counter[tuple[str, int, bytes]] = Counter()
    for name in SITES:
        rows = label_rows(tmp_path / "out" / name)
        for path in (tmp_path / "out" / name / "dicom").iterdir():
            label, split = rows[dcmread(path).SOPInstanceUID]
            pixels = np.rint(decode_image(path.read_bytes()) * 255).astype(np.uint8)
            arrived[split, label, pixels.tobytes()] += 1

    source = np.load(npz)
    sent = Counter(
        (split, int(label), image.tobytes())
        for part, split in (("train", "train"), ("val", "validation"), ("test", "test"))
        for image, label in zip(source[f"{part}_images"], source[f"{part}_labels"].ravel(), strict=True)
    )
    assert arrived == sent


def test_decoded_pixels_are_the_grey_values_over_255(tmp_path: Path) -> None:
    write_npz_sites(an_npz(tmp_path), tmp_path / "out", SITES[:1])
    path = next((tmp_path / "out" / "north" / "dicom").iterdir())

    np.testing.assert_allclose(decode_image(path.read_bytes()), dcmread(path).pixel_array / 255, atol=1e-7)


@pytest.mark.parametrize("kind", ["npz", "phantom"])
def test_files_are_valid_and_patients_stay_together(tmp_path: Path, kind: str) -> None:
    if kind == "npz":
        write_npz_sites(an_npz(tmp_path), tmp_path / "out", SITES)
    else:
        write_phantom_sites(tmp_path / "out", SITES, cases_per_site=40, size=32)

    uids: list[str] = []
    sides: dict[str, set[tuple[str, int, str]]] = defaultdict(set)
    images_of: Counter[str] = Counter()
    for name in SITES:
        rows = label_rows(tmp_path / "out" / name)
        for path in (tmp_path / "out" / name / "dicom").iterdir():
            dataset = dcmread(path)
            dataset.decode()
            list(dataset.iterall())  # converts every value; a bad one is a warning, and so an error
            assert dataset.file_meta.MediaStorageSOPInstanceUID == dataset.SOPInstanceUID
            assert dataset.file_meta.MediaStorageSOPClassUID == dataset.SOPClassUID
            assert dataset.BurnedInAnnotation == "NO"
            assert str(dataset.PatientName).startswith("SYNTHETIC^")
            assert len(dataset.StudyDate) == 8
            assert len(dataset.PatientAge) == 4
            assert all(UID(dataset[key].value).is_valid for key in ("SOPInstanceUID", "StudyInstanceUID"))
            uids.append(dataset.SOPInstanceUID)
            label, split = rows[dataset.SOPInstanceUID]
            sides[dataset.PatientID].add((split, label, dataset.StudyInstanceUID))
            images_of[dataset.PatientID] += 1
    assert len(set(uids)) == len(uids)
    assert all(len(found) == 1 for found in sides.values())
    assert set(images_of.values()) == {1, 2, 3, 4}


def test_sites_are_indexed_and_opened_as_they_are(tmp_path: Path) -> None:
    written = write_phantom_sites(tmp_path, SITES[:2], cases_per_site=48, size=32)
    for each in written.sites:
        site = SiteData(
            tmp_path / each.name / "home", tmp_path / each.name / "dicom", tmp_path / each.name / "labels.csv"
        )
        site.home.mkdir()

        summary = index_folder(site)
        cohort = open_cohort(site, None, written.label_names)

        assert (summary.num_images, summary.num_quarantined) == (48, 0)
        for split, labels in each.counts.items():
            found = Counter(case.label for case in cohort.cases if case.split == split)
            assert found == dict(labels)
            assert min(labels.values()) > 0


def test_the_same_seed_writes_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    npz = an_npz(tmp_path)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_npz_sites(npz, tmp_path / name / "npz", SITES, seed=seed)
        write_phantom_sites(tmp_path / name / "phantom", SITES[:1], cases_per_site=40, size=16, seed=seed)

    one, same, other = (fingerprint(tmp_path / name) for name in "abc")

    assert one == same
    assert not set(one.values()) & set(other.values())


def test_dirichlet_division_skews_labels_and_loses_nothing(tmp_path: Path) -> None:
    npz = an_npz(tmp_path, num_train=600)
    even = write_npz_sites(npz, tmp_path / "even", SITES, seed=1)
    skewed = write_npz_sites(npz, tmp_path / "skewed", SITES, seed=1, alpha=0.3)

    def spread(written: SyntheticSites) -> float:
        shares = [site.counts["train"][1] / sum(site.counts["train"].values()) for site in written.sites]
        return max(shares) - min(shares)

    assert sum(site.num_images for site in skewed.sites) == 675
    assert spread(even) < 0.15 < spread(skewed)
    check_summary(skewed, tmp_path / "skewed")


def test_limit_keeps_the_proportions(tmp_path: Path) -> None:
    written = write_npz_sites(an_npz(tmp_path), tmp_path / "out", SITES[:2], limit=65)

    totals = {
        split: sum(sum(s.counts[split].values()) for s in written.sites)
        for split in ("train", "validation", "test")
    }
    assert totals == {"train": 40, "validation": 10, "test": 15}


def test_bad_requests_are_refused_with_a_remedy(tmp_path: Path) -> None:
    npz = an_npz(tmp_path)
    (tmp_path / "not.npz").write_bytes(b"PK\x03\x04 no")
    np.savez(tmp_path / "wrong.npz", train_images=np.zeros((3, 4, 4)), train_labels=np.zeros(3))
    (tmp_path / "full" / "north" / "dicom").mkdir(parents=True)
    (tmp_path / "full" / "north" / "dicom" / "kept.dcm").write_bytes(b"x")

    requests: list[Callable[[], object]] = [
        lambda: write_npz_sites(tmp_path / "not.npz", tmp_path / "o", SITES),
        lambda: write_npz_sites(tmp_path / "wrong.npz", tmp_path / "o", SITES),
        lambda: write_npz_sites(tmp_path / "absent.npz", tmp_path / "o", SITES),
        lambda: write_npz_sites(npz, tmp_path / "o", [f"s{number}" for number in range(9)]),
        lambda: write_npz_sites(npz, tmp_path / "o", []),
        lambda: write_npz_sites(npz, tmp_path / "o", ["../outside"]),
        lambda: write_npz_sites(npz, tmp_path / "full", SITES),
        lambda: write_npz_sites(npz, tmp_path / "o", SITES, alpha=1e-4),
        lambda: write_phantom_sites(tmp_path / "o", SITES, cases_per_site=4),
        lambda: write_phantom_sites(tmp_path / "full", SITES),
    ]
    for request in requests:
        with pytest.raises(UsageError) as caught:
            request()
        assert caught.value.remedy
    assert not (tmp_path.parent / "outside").exists()


def test_phantoms_look_alike_in_both_conventions_and_the_lesion_can_be_found(tmp_path: Path) -> None:
    write_phantom_sites(tmp_path, SITES[:1], cases_per_site=120, size=32, seed=4)
    rows = label_rows(tmp_path / "north")
    darkness: dict[str, list[float]] = defaultdict(list)
    asymmetry: dict[int, list[float]] = defaultdict(list)
    for path in (tmp_path / "north" / "dicom").iterdir():
        dataset, image = dcmread(path), decode_image(path.read_bytes())
        inverse = dataset.PhotometricInterpretation == "MONOCHROME1"
        dense = 4095.0 - dataset.pixel_array if inverse else dataset.pixel_array.astype(float)
        np.testing.assert_allclose(image, np.clip((dense - 1799.5) / 2999 + 0.5, 0, 1), atol=1e-6)
        darkness[dataset.PhotometricInterpretation].append(float(image[:3, :3].mean()))
        left, right = image[5:17, 6:13], image[5:17, 19:26][:, ::-1]
        blurred = (left - right).reshape(3, 4, 7).mean(axis=1)
        asymmetry[rows[dataset.SOPInstanceUID][0]].append(float(np.abs(blurred).max()))

    assert set(darkness) == {"MONOCHROME1", "MONOCHROME2"}
    assert max(max(values) for values in darkness.values()) < 0.2
    pairs = [(sick, well) for sick in asymmetry[1] for well in asymmetry[0]]
    assert sum(sick > well for sick, well in pairs) / len(pairs) > 0.65


@pytest.mark.data
def test_the_real_radiographs_keep_their_official_counts(shared_data: Path, tmp_path: Path) -> None:
    npz = shared_data / "pneumoniamnist" / "pneumoniamnist.npz"

    written = write_npz_sites(npz, tmp_path, SITES)

    totals = {
        (split, label): sum(site.counts[split][label] for site in written.sites)
        for split in ("train", "validation", "test")
        for label in (0, 1)
    }
    # SOURCE: MedMNIST v2, PneumoniaMNIST: 4708 / 524 / 624, of which 1214 / 135 / 234 normal.
    assert totals == {
        ("train", 0): 1214,
        ("train", 1): 3494,
        ("validation", 0): 135,
        ("validation", 1): 389,
        ("test", 0): 234,
        ("test", 1): 390,
    }
    assert "pneumoniamnist.npz" in written.kind
