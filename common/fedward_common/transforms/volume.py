"""Volumes: one channel, intensity from -1 to 1; their size and spacing are the plan's already.

Resampling needs to know where the voxels lie in the patient, so it is done where the volume is read, at
the site. Augmentation changes all slices of a volume alike, within the plane of the slices, because the
distance between slices is usually another than that within them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedward_common.errors import PlanError
from fedward_common.plan import TrainingPlan
from fedward_common.transforms import Transform, chest_xray

if TYPE_CHECKING:
    import torch

    from fedward_common.transforms import Augment, Preprocess


def preprocess(plan: TrainingPlan) -> Preprocess:
    """Give a function from one volume `size` in [0, 1] to float32 `(1, *size)` in [-1, 1].

    Raises:
        PlanError: the plan's size is not 3-D.
    """
    size = plan.transforms.size
    if len(size) != 3:
        raise PlanError(
            f"transform volume: size {list(size)} has {len(size)} numbers, expected slices, rows and columns",
            remedy="Set transforms.size to three numbers.",
        )

    def to_tensor(volume: NDArray[np.float32]) -> torch.Tensor:
        if volume.shape != size:
            raise ValueError(f"volume {volume.shape}, expected {size}")
        return chest_xray.rescaled(np.array(volume[None], dtype=np.float32))

    return to_tensor


def augment(plan: TrainingPlan) -> Augment | None:
    """Give a function that varies a training batch, or None when the plan varies nothing."""
    vary = chest_xray.augment(plan)
    if vary is None:
        return None

    def vary_slices(batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        # Slices become channels, which are all changed alike.
        return vary(batch.flatten(1, 2), generator).view(batch.shape)

    return vary_slices


TRANSFORM = Transform(name="volume", channels=1, preprocess=preprocess, augment=augment)
