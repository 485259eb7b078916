"""Chest radiographs: one channel, resized to the plan's size, intensity from -1 to 1.

What comes in is what a viewer would show, from 0 (black) to 1, so neither a detector's bit depth nor its
exposure tells the sites apart. The scale is the same for all images: stretching each to its own minimum and
maximum lost 0.013 of AUROC on PneumoniaMNIST, for how grey a lung is says something. Aspect ratio is not
kept: padding would mark a site by its borders.

Augmentation works on a whole batch at once. MONAI's random transforms work on one image at a time, which
takes longer than training a small network on it; MONAI's batched `AffineTransform` with matrices drawn
here does rotation, flip and zoom in one resampling, on the device where the batch lies.

MONAI takes seconds to import, so this is left until a batch is varied; images are resized without it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedward_common.errors import PlanError
from fedward_common.plan import Augmentation, TrainingPlan
from fedward_common.transforms import Transform

if TYPE_CHECKING:
    import torch

    from fedward_common.transforms import Augment, Preprocess


def preprocess(plan: TrainingPlan) -> Preprocess:
    """Give a function from one image `(height, width)` in [0, 1] to float32 `(1, *size)` in [-1, 1].

    Raises:
        PlanError: the plan's size is not 2-D.
    """
    size = plane_size(plan)

    def to_tensor(image: NDArray[np.float32]) -> torch.Tensor:
        return rescaled(resized(image[None], size))

    return to_tensor


def plane_size(plan: TrainingPlan) -> tuple[int, int]:
    """Height and width that the plan wants, in pixels.

    Raises:
        PlanError: the plan's size is not 2-D.
    """
    size = plan.transforms.size
    if len(size) != 2:
        raise PlanError(
            f"transform {plan.transforms.name}: size {list(size)} has {len(size)} numbers, "
            "expected height and width",
            remedy='Set transforms.size to two numbers; volumes need transforms.name = "volume".',
        )
    return size


def augment(plan: TrainingPlan) -> Augment | None:
    """Give a function that varies a training batch, or None when the plan varies nothing.

    All draws come from the generator, in a fixed number per image and order: what one image gets does not
    depend on which changes the plan has switched on.
    """
    settings = plan.transforms.augmentation
    moves = settings.rotate_degrees > 0 or settings.flip or settings.zoom > 0
    if not moves and settings.intensity == 0:
        return None

    def vary(batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        import torch

        count = batch.shape[0]
        drawn = torch.rand((count, _NUM_DRAWS), generator=generator)
        chosen = torch.rand((count, _NUM_DRAWS), generator=generator) < settings.probability
        if moves:
            matrices = _matrices(drawn, chosen, settings, batch.shape[-2] / batch.shape[-1])
            batch = _resampled(batch, matrices.to(batch.device))
        if settings.intensity > 0:
            batch = _relit(batch, drawn, chosen, settings.intensity)
        return batch

    return vary


_ROTATE, _FLIP, _ZOOM, _CONTRAST, _BRIGHTNESS = range(5)
_NUM_DRAWS = 5
_MAX_BLOCK = 4


def resized(image: NDArray[np.float32], size: tuple[int, ...]) -> NDArray[np.float32]:
    """Resize `(channels, height, width)` to a new array `(channels, *size)`.

    The arithmetic is that of MONAI's `Resize`, to the last bit: "area" where both sides shrink, because
    shrinking without averaging every pixel that falls into a new one invents texture, else "bilinear".
    """
    image = np.asarray(image, dtype=np.float32)
    sides = image.shape[1:]
    if sides == size:
        return image.copy()
    shrinks = all(old >= new for old, new in zip(sides, size, strict=True))
    if shrinks and all(
        old % new == 0 and old // new <= _MAX_BLOCK for old, new in zip(sides, size, strict=True)
    ):
        return _block_means(image, sides[0] // size[0], sides[1] // size[1])
    import torch
    from torch.nn.functional import interpolate

    mode, align_corners = ("area", None) if shrinks else ("bilinear", False)
    pixels = torch.from_numpy(image if image.flags.writeable else image.copy())
    result: NDArray[np.float32] = interpolate(
        pixels[None], size, mode=mode, align_corners=align_corners
    ).numpy()[0]
    return result


def rescaled(image: NDArray[np.float32]) -> torch.Tensor:
    """Bring an array of ours from [0, 1] to [-1, 1], in place and without PyTorch's threads."""
    import torch

    image *= 2
    image -= 1
    return torch.from_numpy(np.clip(image, -1, 1, out=image))


def _block_means(image: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Means of blocks, added up in PyTorch's order but all blocks at once, in a third of the time."""
    total = image[:, ::height, ::width].copy()
    for number in range(1, height * width):
        total += image[:, number // width :: height, number % width :: width]
    total /= np.float32(height)
    total /= np.float32(width)
    return total


def _matrices(
    drawn: torch.Tensor, chosen: torch.Tensor, settings: Augmentation, aspect: float
) -> torch.Tensor:
    """Build `(batch, 2, 3)` maps from new to old positions, both from -1 to 1 as (x, y) about the centre.

    Args:
        drawn: `(batch, draws)` uniform in [0, 1).
        chosen: `(batch, draws)` whether that change happens to that image.
        settings: how far each change may go.
        aspect: height over width in pixels, so that a rotation stays one in images that are not square.
    """
    import torch

    centred = (2 * drawn - 1) * chosen
    angle = centred[:, _ROTATE] * math.radians(settings.rotate_degrees)
    scale = 1 / (1 + centred[:, _ZOOM] * settings.zoom)
    mirror = 1 - 2 * (chosen[:, _FLIP] & settings.flip).float()
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    matrices = torch.zeros(drawn.shape[0], 2, 3)
    matrices[:, 0, 0] = cosine * mirror
    matrices[:, 0, 1] = -sine * aspect * mirror
    matrices[:, 1, 0] = sine / aspect
    matrices[:, 1, 1] = cosine
    return matrices


def _resampled(batch: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Resample once, bilinear; what comes from outside an image repeats its border."""
    from monai.networks.layers.spatial_transforms import AffineTransform

    layer = AffineTransform(
        normalized=True, padding_mode="border", align_corners=False, reverse_indexing=False
    )
    moved: torch.Tensor = layer(batch, matrices)
    return moved


def _relit(batch: torch.Tensor, drawn: torch.Tensor, chosen: torch.Tensor, intensity: float) -> torch.Tensor:
    """Change contrast by up to `intensity` of itself and brightness by up to `intensity`, within [-1, 1]."""
    change = ((2 * drawn - 1) * chosen).to(batch.device) * intensity
    contrast = (1 + change[:, _CONTRAST]).view(-1, 1, 1, 1)
    brightness = change[:, _BRIGHTNESS].view(-1, 1, 1, 1)
    return (batch * contrast + brightness).clamp_(-1, 1)


TRANSFORM = Transform(name="chest_xray", channels=1, preprocess=preprocess, augment=augment)
