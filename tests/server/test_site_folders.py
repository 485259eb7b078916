"""Folders of images for sites on this machine: given, real or drawn; used again only when the same."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from fedward_common.errors import UsageError
from fedward_server.site_folders import default_radiographs, prepare_folders, site_names
from tests.client.site_workers import a_divided_site

NAMES = ["site-1", "site-2"]


@pytest.fixture
def radiographs(tmp_path: Path) -> Path:
    """A small file in MedMNIST's form."""
    random = np.random.default_rng(1)
    arrays = {}
    for split, count in (("train", 40), ("val", 8), ("test", 8)):
        arrays[f"{split}_images"] = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % 2).astype(np.uint8)[:, None]
    path = tmp_path / "tiny.npz"
    np.savez(path, allow_pickle=False, **arrays)
    return path


def listing(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*.dcm")}


def labels_of(folder: Path) -> list[list[str]]:
    with (folder / "labels.csv").open(newline="") as file:
        return list(csv.reader(file))


def test_sites_are_numbered_from_one() -> None:
    assert site_names(3) == ["site-1", "site-2", "site-3"]


def test_real_images_are_divided_among_the_sites_and_named_as_such(radiographs: Path, tmp_path: Path) -> None:
    made = prepare_folders(radiographs, tmp_path / "out", NAMES)
    assert "real radiographs from tiny.npz" in made.kind
    assert sorted(made.folders) == NAMES
    numbers = [len(list((made.folders[name] / "dicom").iterdir())) for name in NAMES]
    assert sum(numbers) == 56
    assert [len(labels_of(made.folders[name])) - 1 for name in NAMES] == numbers


def test_the_same_call_uses_the_files_that_are_there(radiographs: Path, tmp_path: Path) -> None:
    first = prepare_folders(radiographs, tmp_path / "out", NAMES, seed=3)
    before = listing(tmp_path / "out")
    assert prepare_folders(radiographs, tmp_path / "out", NAMES, seed=3) == first
    assert listing(tmp_path / "out") == before


@pytest.mark.parametrize("change", [{"seed": 4}, {"limit": 30}, {"names": ["site-1"]}])
def test_another_call_into_the_same_folder_is_refused_instead_of_mixing_images(
    radiographs: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    prepare_folders(radiographs, tmp_path / "out", NAMES, seed=3)
    before = listing(tmp_path / "out")
    call: dict[str, object] = {"names": NAMES, "seed": 3} | change
    with pytest.raises(UsageError) as caught:
        prepare_folders(radiographs, tmp_path / "out", **call)  # type: ignore[arg-type]
    assert caught.value.remedy
    assert listing(tmp_path / "out") == before


@pytest.mark.parametrize("note", ["", "{", "[]", '{"kind": "x"}', '{"wanted": 5, "kind": "x"}'])
def test_a_note_of_what_was_written_that_cannot_be_read_is_not_believed(
    radiographs: Path, tmp_path: Path, note: str
) -> None:
    prepare_folders(radiographs, tmp_path / "out", NAMES)
    (tmp_path / "out" / "written.json").write_text(note)
    with pytest.raises(UsageError, match="not empty"):
        prepare_folders(radiographs, tmp_path / "out", NAMES)


def test_phantoms_are_drawn_when_there_are_no_real_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDWARD_DATA", str(tmp_path / "nothing"))
    assert default_radiographs() is None
    made = prepare_folders(None, tmp_path / "out", ["site-1"])
    assert made.kind == "synthetic chest phantoms"
    assert len(labels_of(made.folders["site-1"])) == 301


def test_real_images_at_hand_are_found_by_the_environment(
    radiographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared" / "pneumoniamnist"
    shared.mkdir(parents=True)
    radiographs.rename(shared / "pneumoniamnist.npz")
    monkeypatch.setenv("FEDWARD_DATA", str(tmp_path / "shared"))
    assert default_radiographs() == shared / "pneumoniamnist.npz"
    assert "real radiographs" in prepare_folders(None, tmp_path / "out", NAMES).kind


def given_folders(root: Path, *names: str) -> Path:
    for name in names:
        a_divided_site(root / name)
        (root / name / "home").rmdir()
    return root


def test_given_folders_are_shown_and_nothing_is_written_into_them(tmp_path: Path) -> None:
    given = given_folders(tmp_path / "given", "north", "south", "west")
    before = sorted(str(path) for path in given.rglob("*"))
    made = prepare_folders(given, tmp_path / "out", NAMES)
    assert made.kind == "images from the given folder"
    assert sorted(made.folders) == ["north", "south"]  # as many as were asked for, by name
    for name, folder in made.folders.items():
        assert folder == tmp_path / "out" / name
        assert sorted(path.name for path in (folder / "dicom").iterdir()) == sorted(
            path.name for path in (given / name / "dicom").iterdir()
        )
        assert labels_of(folder) == labels_of(given / name)
    assert prepare_folders(given, tmp_path / "out", NAMES) == made
    assert sorted(str(path) for path in given.rglob("*")) == before


def test_a_given_folder_may_declare_its_cohort(tmp_path: Path) -> None:
    given = given_folders(tmp_path / "given", "north", "south")
    (given / "north" / "cohort.toml").write_text('modalities = ["DX"]\n')

    folders = prepare_folders(given, tmp_path / "out", NAMES).folders

    assert (folders["north"] / "home" / "cohort.toml").read_text() == 'modalities = ["DX"]\n'
    assert not (folders["south"] / "home" / "cohort.toml").exists()
    (given / "north" / "cohort.toml").unlink()
    prepare_folders(given, tmp_path / "out", NAMES)
    assert not (folders["north"] / "home" / "cohort.toml").is_symlink()


def test_given_folders_do_not_cover_images_of_an_earlier_simulation(
    radiographs: Path, tmp_path: Path
) -> None:
    prepare_folders(radiographs, tmp_path / "out", NAMES)
    given = given_folders(tmp_path / "given", *NAMES)
    with pytest.raises(UsageError, match="earlier simulation"):
        prepare_folders(given, tmp_path / "out", NAMES)


@pytest.mark.parametrize("name", ["North", "north hospital", "-x", "ä"])
def test_a_given_folder_whose_name_cannot_be_a_sites_is_refused(tmp_path: Path, name: str) -> None:
    given = given_folders(tmp_path / "given", name)
    with pytest.raises(UsageError, match="name"):
        prepare_folders(given, tmp_path / "out", ["site-1"])


def test_too_few_given_folders_are_refused_with_what_is_needed(tmp_path: Path) -> None:
    given = given_folders(tmp_path / "given", "north")
    (given / "readme").mkdir()
    with pytest.raises(UsageError, match="1 folders with a dicom/ inside, 2 sites") as caught:
        prepare_folders(given, tmp_path / "out", NAMES)
    assert "--sites" in caught.value.remedy


def test_data_that_does_not_exist_is_refused_and_not_replaced_by_phantoms(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        prepare_folders(tmp_path / "missing.npz", tmp_path / "out", NAMES)
    assert not (tmp_path / "out").exists()
