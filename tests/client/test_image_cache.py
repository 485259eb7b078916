"""The cache of prepared images: nothing twice, nothing damaged, and a full disk is an error."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedward_client.image_cache import Images, cached_images
from fedward_common.errors import CohortError
from tests.builders import a_disk_of

RECIPE = "ab" * 32
CONTENTS = tuple(hashlib.sha256(bytes([number])).hexdigest() for number in range(12))


def image_of(content: str) -> Images:
    return np.full((1, 4, 4), int(content[:6], 16), dtype=np.float32)


def a_preparation(refused: tuple[str, ...] = ()) -> tuple[Callable[[str], Images | None], list[str]]:
    """A prepare function, and the contents it was asked for."""
    asked: list[str] = []

    def prepare(content: str) -> Images | None:
        asked.append(content)
        return None if content in refused else image_of(content)

    return prepare, asked


def expected(contents: tuple[str, ...]) -> Images:
    return np.stack([image_of(content) for content in contents])


def test_a_second_call_prepares_nothing(tmp_path: Path) -> None:
    prepare, asked = a_preparation()
    cached_images(tmp_path / "c", RECIPE, CONTENTS, prepare)
    assert asked == list(CONTENTS)

    images, kept = cached_images(tmp_path / "c", RECIPE, CONTENTS, prepare)

    assert len(asked) == 12
    assert kept == CONTENTS
    np.testing.assert_array_equal(images, expected(CONTENTS))


def test_a_changed_cohort_prepares_only_what_is_new_and_leaves_one_file(tmp_path: Path) -> None:
    prepare, asked = a_preparation()
    cached_images(tmp_path, RECIPE, CONTENTS[:8], prepare)
    asked.clear()

    images, _ = cached_images(tmp_path, RECIPE, CONTENTS[::-1], prepare)

    assert asked == list(CONTENTS[:7:-1])
    np.testing.assert_array_equal(images, expected(CONTENTS[::-1]))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".npy"]


def test_another_recipe_shares_nothing(tmp_path: Path) -> None:
    prepare, asked = a_preparation()
    cached_images(tmp_path, RECIPE, CONTENTS, prepare)
    cached_images(tmp_path, "cd" * 32, CONTENTS, prepare)
    cached_images(tmp_path, RECIPE, CONTENTS, prepare)

    assert len(asked) == 24


def test_refused_images_leave_no_row_and_no_gap(tmp_path: Path) -> None:
    refused = (CONTENTS[0], CONTENTS[5], CONTENTS[11])
    prepare, asked = a_preparation(refused)
    rest = tuple(content for content in CONTENTS if content not in refused)

    images, kept = cached_images(tmp_path, RECIPE, CONTENTS, prepare)
    np.testing.assert_array_equal(images, expected(rest))
    assert kept == rest

    asked.clear()
    cached_images(tmp_path, RECIPE, rest, prepare)
    assert asked == []


def test_nothing_usable_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    prepare, _ = a_preparation(CONTENTS)

    with pytest.raises(CohortError, match="no image can be decoded"):
        cached_images(tmp_path, RECIPE, CONTENTS, prepare)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "garbage", "absent", "listing"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, damage: str) -> None:
    prepare, asked = a_preparation()
    cached_images(tmp_path, RECIPE, CONTENTS, prepare)
    (file,) = tmp_path.glob("*.npy")
    (listing,) = tmp_path.glob("*.json")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "garbage":
        file.write_bytes(b"\x80\x04." * 100)
    elif damage == "absent":
        file.unlink()
    else:
        listing.write_text("{")
    asked.clear()

    images, _ = cached_images(tmp_path, RECIPE, CONTENTS, prepare)

    assert asked == list(CONTENTS)
    np.testing.assert_array_equal(images, expected(CONTENTS))


def test_writing_into_the_images_changes_no_file(tmp_path: Path) -> None:
    prepare, _ = a_preparation()
    images, _ = cached_images(tmp_path, RECIPE, CONTENTS, prepare)

    images[:] = -1.0

    again, _ = cached_images(tmp_path, RECIPE, CONTENTS, prepare)
    np.testing.assert_array_equal(again, expected(CONTENTS))


def test_files_are_the_sites_alone(tmp_path: Path) -> None:
    prepare, _ = a_preparation()
    cached_images(tmp_path / "cache", RECIPE, CONTENTS, prepare)

    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "cache").iterdir()} == {0o600}


def test_a_full_disk_is_a_clear_error_and_the_old_cache_stays(tmp_path: Path) -> None:
    prepare, _ = a_preparation()
    cached_images(tmp_path, RECIPE, CONTENTS[:6], prepare)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    with a_disk_of(600), pytest.raises(CohortError, match="cannot be written") as caught:
        cached_images(tmp_path, RECIPE, CONTENTS, prepare)

    assert "disk space" in caught.value.remedy
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_images_of_different_shapes_are_a_fault_of_the_transform(tmp_path: Path) -> None:
    shapes = iter([(1, 4, 4), (1, 4, 5)])

    with pytest.raises(ValueError, match="expected float32"):
        cached_images(tmp_path, RECIPE, CONTENTS[:2], lambda _: np.zeros(next(shapes), dtype=np.float32))

    assert list(tmp_path.iterdir()) == []
