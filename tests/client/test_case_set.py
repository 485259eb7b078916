"""Images that stay on disk: what is asked for next is copied meanwhile, and nothing else changes."""

from __future__ import annotations

import gc
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedward_client.array_cache import StoredArrays, open_arrays
from fedward_client.array_shard import Row
from fedward_client.case_set import StoredImages

NUM_ROWS = 10


class Watched:
    """Rows on disk, and by whom each was copied."""

    def __init__(self, arrays: StoredArrays) -> None:
        self.shape, self.will_need = arrays.shape, arrays.will_need
        self.taken: list[tuple[list[int], threading.Thread]] = []
        self._arrays = arrays

    def take(self, numbers: Sequence[int]) -> NDArray[np.float32]:
        self.taken.append((list(numbers), threading.current_thread()))
        return self._arrays.take(numbers)


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    rows = [Row(f"{number:064x}", (f"{number:064x}",)) for number in range(NUM_ROWS)]
    values = [np.full((1, 4, 4), number, np.float32) for number in range(NUM_ROWS)]
    return Watched(open_arrays(tmp_path / "cache", "a" * 64, rows, lambda rows: iter(values)))


def images_of(watched: Watched) -> StoredImages:
    return StoredImages(watched, range(NUM_ROWS))  # type: ignore[arg-type]


def firsts(images: torch.Tensor) -> list[float]:
    found: list[float] = images[:, 0, 0, 0].tolist()
    return found


def test_images_that_were_announced_are_copied_by_another_thread_and_once(watched: Watched) -> None:
    images = images_of(watched)

    images.will_need(torch.tensor([3, 1]))

    assert firsts(images[torch.tensor([3, 1])]) == [3, 1]
    ((numbers, thread),) = watched.taken
    assert numbers == [3, 1]
    assert thread is not threading.current_thread()


def test_images_that_were_not_announced_are_the_ones_asked_for(watched: Watched) -> None:
    images = images_of(watched)

    images.will_need([3, 1])

    assert firsts(images[[1, 3]]) == [1, 3]
    assert firsts(images[[3, 1]]) == [3, 1]
    assert images[7][0, 0, 0] == 7


def test_a_split_takes_every_image_once_and_in_order(watched: Watched) -> None:
    parts = list(images_of(watched).split(4))

    assert [firsts(part) for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [numbers for numbers, _ in watched.taken] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_what_goes_wrong_ahead_is_raised_where_the_images_are_asked_for(watched: Watched) -> None:
    images = images_of(watched)
    take = watched.take

    def no_memory(numbers: Sequence[int]) -> NDArray[np.float32]:
        raise MemoryError

    watched.take = no_memory  # type: ignore[method-assign]
    images.will_need([1])
    watched.take = take  # type: ignore[method-assign]

    with pytest.raises(MemoryError):
        images[[1]]
    assert firsts(images[[1]]) == [1]


def test_the_thread_ends_with_the_images(watched: Watched) -> None:
    images = images_of(watched)
    images.will_need([0])
    images[[0]]
    (_, thread) = watched.taken[0]

    del images
    gc.collect()
    thread.join(10)

    assert not thread.is_alive()
