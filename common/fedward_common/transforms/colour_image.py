"""Pictures in colour: red, green and blue, each resized to the plan's size, intensity from -1 to 1.

The pipeline of `image.py`, channel by channel; a grey picture has three equal channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedward_common.plan import TrainingPlan
from fedward_common.transforms import Transform, chest_xray

if TYPE_CHECKING:
    import torch

    from fedward_common.transforms import Preprocess


def preprocess(plan: TrainingPlan) -> Preprocess:
    """Give a function from one image `(3, height, width)` in [0, 1] to float32 `(3, *size)` in [-1, 1].

    Raises:
        PlanError: the plan's size is not 2-D.
    """
    size = chest_xray.plane_size(plan)

    def to_tensor(image: NDArray[np.float32]) -> torch.Tensor:
        return chest_xray.rescaled(chest_xray.resized(image, size))

    return to_tensor


TRANSFORM = Transform(name="colour_image", channels=3, preprocess=preprocess, augment=chest_xray.augment)
