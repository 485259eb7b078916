"""A site's cases as tensors in memory: what the dataset hands to the trainer and the evaluator (hop 4).

Everything is in RAM after the deterministic transforms, so no training step waits for a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class CaseSet:
    """Cases of one split, in an order that does not depend on the site's secret key.

    Attributes:
        images: float32 `(cases, channels, *size)`.
        labels: int64 `(cases,)`, indices into the plan's labels.
        case_ids: pseudonyms, one a case; they never leave the site.
    """

    images: torch.Tensor
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


@dataclass(frozen=True)
class Splits:
    """A site's cases divided by patient."""

    train: CaseSet
    validation: CaseSet
    test: CaseSet
