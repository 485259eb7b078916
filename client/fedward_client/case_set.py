"""A site's cases as tensors: what the dataset hands to the trainer and the evaluator (hop 4).

A cohort that fits comfortably into memory lies there after the deterministic transforms, as one tensor,
so no training step waits for a file. A larger one stays on disk and is mapped: each batch is copied out
of the mapping by a thread while the one before it is trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

    from fedward_client.array_cache import StoredArrays


class StoredImages:
    """Images of one split that stay on disk; the part of a tensor's interface that training needs.

    Attributes:
        shape: `(cases, channels, *size)`.
    """

    def __init__(self, arrays: StoredArrays, numbers: Sequence[int]) -> None:
        self._arrays, self._numbers = arrays, tuple(numbers)
        self._reader: ThreadPoolExecutor | None = None
        self._ahead: tuple[list[int], Future[NDArray[np.float32]]] | None = None
        self.shape: tuple[int, ...] = (len(self._numbers), *arrays.shape[1:])

    def __len__(self) -> int:
        """Number of cases."""
        return len(self._numbers)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Give image after image."""
        return (self[number] for number in range(len(self)))

    def __getitem__(self, which: torch.Tensor | slice | Sequence[int] | int) -> torch.Tensor:
        """Copy images into memory: float32 `(number, channels, *size)`, or one without the first axis."""
        import torch

        if isinstance(which, int):
            return torch.from_numpy(self._arrays.take([self._numbers[which]])[0])
        chosen = self._chosen(which)
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == chosen:
            return torch.from_numpy(ahead[1].result())
        return torch.from_numpy(self._arrays.take(chosen))

    def dim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def split(self, split_size: int) -> Iterator[torch.Tensor]:
        """Give all images in order, so many at a time, reading ahead."""
        for start in range(0, len(self), split_size):
            images = self[start : start + split_size]
            if start + split_size < len(self):
                self.will_need(slice(start + split_size, start + 2 * split_size))
            yield images

    def will_need(self, which: torch.Tensor | slice | Sequence[int]) -> None:
        """Have the images that are asked for next copied into memory in the background."""
        chosen = self._chosen(which)
        self._arrays.will_need(chosen)
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, "images")  # its thread ends when this object goes
        self._ahead = (chosen, self._reader.submit(self._arrays.take, chosen))

    def _chosen(self, which: torch.Tensor | slice | Sequence[int]) -> list[int]:
        if isinstance(which, slice):
            return list(self._numbers[which])
        return [self._numbers[number] for number in _list(which)]


@dataclass(frozen=True)
class CaseSet:
    """Cases of one split, in an order that does not depend on the site's secret key.

    Attributes:
        images: float32 `(cases, channels, *size)`.
        labels: int64 `(cases,)`, indices into the plan's labels.
        case_ids: pseudonyms, one a case; they never leave the site.
    """

    images: torch.Tensor | StoredImages
    labels: torch.Tensor
    case_ids: tuple[str, ...]

    def __len__(self) -> int:
        """Number of cases."""
        return len(self.case_ids)

    def __post_init__(self) -> None:
        """Refuse parts that do not belong together."""
        if not self.images.shape[0] == self.labels.shape[0] == len(self.case_ids):
            raise ValueError(
                f"{self.images.shape[0]} images, {self.labels.shape[0]} labels, {len(self.case_ids)} case ids"
            )

    def will_need(self, which: torch.Tensor) -> None:
        """Say which images will be asked for next, where that is of use."""
        if isinstance(self.images, StoredImages):
            self.images.will_need(which)


@dataclass(frozen=True)
class Splits:
    """A site's cases divided by patient.

    Args:
        num_quarantined: studies of which something is refused.
        num_left_out: usable cases that are on no side, because numbers would tell of few patients.
    """

    train: CaseSet
    validation: CaseSet
    test: CaseSet
    num_quarantined: int = 0
    num_left_out: int = 0


def _list(which: torch.Tensor | Sequence[int]) -> Sequence[int]:
    if isinstance(which, Sequence):
        return which
    numbers: list[int] = which.tolist()
    return numbers
