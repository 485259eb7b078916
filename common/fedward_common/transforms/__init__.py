"""How a decoded image becomes a tensor, and how training images are varied (hop 4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedward_common.plan import TrainingPlan

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    Preprocess = Callable[[NDArray[np.float32]], torch.Tensor]
    Augment = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


@dataclass(frozen=True)
class Transform:
    """A pipeline by name.

    Args:
        name: what a plan calls it.
        channels: channels of every image it gives.
        preprocess: plan -> function of one decoded image `(*size of the file)` that gives float32
            `(channels, *plan.transforms.size)`; deterministic, so its results are kept in memory.
        augment: plan -> function of a training batch `(batch, channels, *size)` and a generator on the CPU
            that gives a new batch of the same shape; None when the plan switches every change off.
    """

    name: str
    channels: int
    preprocess: Callable[[TrainingPlan], Preprocess]
    augment: Callable[[TrainingPlan], Augment | None]
