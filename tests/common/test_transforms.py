from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage

from fedward_common.errors import PlanError
from fedward_common.plan import TrainingPlan
from fedward_common.registry import TRANSFORMS
from fedward_common.transforms import chest_xray
from tests.training_builders import a_training_plan

ALL_ON: dict[str, Any] = {"rotate_degrees": 15.0, "flip": True, "zoom": 0.2, "intensity": 0.2}


def a_plan(size: tuple[int, ...] = (12, 12), **augmentation: Any) -> TrainingPlan:
    return a_training_plan(transforms={"size": size, "augmentation": augmentation})


def an_image(height: int, width: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(0, 1, (height, width)).astype(np.float32)


def varied(plan: TrainingPlan, batch: torch.Tensor, seed: int = 0) -> torch.Tensor:
    augment = TRANSFORMS.load("chest_xray").augment(plan)
    return augment(batch, torch.Generator().manual_seed(seed))  # type: ignore[no-any-return]


def preprocessed(plan: TrainingPlan, image: NDArray[np.float32]) -> torch.Tensor:
    return TRANSFORMS.load("chest_xray").preprocess(plan)(image)  # type: ignore[no-any-return]


def test_image_of_the_right_size_keeps_its_pixels_on_a_scale_from_minus_one_to_one() -> None:
    image = an_image(12, 12)
    result = preprocessed(a_plan(), image)
    assert result.shape == (1, 12, 12)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result[0].numpy(), (image - 0.5) / 0.5, atol=1e-6)


def test_shrinking_averages_every_pixel() -> None:
    image = an_image(36, 24)
    means = image.reshape(12, 3, 12, 2).mean(axis=(1, 3))
    np.testing.assert_allclose(preprocessed(a_plan(), image)[0].numpy(), means * 2 - 1, atol=1e-5)


def test_growing_interpolates_between_pixels() -> None:
    ramp = np.tile(np.linspace(0, 1, 4, dtype=np.float32), (4, 1))
    result = preprocessed(a_plan((8, 8)), ramp)[0].numpy()
    # pixel centres: 8 columns at (i + 0.5) / 2 - 0.5 of the old, held at the border
    columns = np.clip((np.arange(8) + 0.5) / 2 - 0.5, 0, 3)
    np.testing.assert_allclose(result, np.tile(columns / 3 * 2 - 1, (8, 1)), atol=1e-5)


def test_preprocessing_leaves_the_decoded_image_alone() -> None:
    image = an_image(12, 12)
    before = image.copy()
    preprocessed(a_plan(), image)
    np.testing.assert_array_equal(image, before)


def test_volume_is_refused() -> None:
    with pytest.raises(PlanError, match="chest_xray"):
        TRANSFORMS.load("chest_xray").preprocess(a_plan((8, 8, 8)))


def test_no_augmentation_is_none() -> None:
    assert TRANSFORMS.load("chest_xray").augment(a_plan()) is None


def test_monai_is_not_imported_when_nothing_is_resized_or_varied() -> None:
    script = (
        "import sys, numpy\n"
        "from fedward_common.registry import TRANSFORMS\n"
        "from tests.training_builders import a_training_plan\n"
        "plan, transform = a_training_plan(), TRANSFORMS.load('chest_xray')\n"
        "transform.preprocess(plan)(numpy.ones((16, 16), numpy.float32))\n"
        "assert transform.augment(plan) is None\n"
        "sys.exit('monai' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_augmentation_is_the_same_bits_for_the_same_generator_only() -> None:
    plan, batch = a_plan(**ALL_ON), torch.rand(6, 1, 12, 12)
    assert torch.equal(varied(plan, batch, seed=4), varied(plan, batch, seed=4))
    assert not torch.equal(varied(plan, batch, seed=4), varied(plan, batch, seed=5))


def test_augmentation_leaves_batch_and_global_random_state_alone() -> None:
    batch = torch.rand(6, 1, 12, 12)
    before, state = batch.clone(), torch.get_rng_state()
    result = varied(a_plan(**ALL_ON), batch)
    assert torch.equal(batch, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert result.shape == batch.shape


def test_flip_mirrors_left_and_right() -> None:
    batch = torch.rand(3, 1, 9, 12)
    torch.testing.assert_close(varied(a_plan((9, 12), flip=True, probability=1.0), batch), batch.flip(-1))


def test_share_of_changed_images_is_the_plans_probability() -> None:
    batch = torch.rand(2000, 1, 4, 4)
    changed = (varied(a_plan((4, 4), flip=True, probability=0.3), batch) - batch).abs().amax((1, 2, 3)) > 1e-3
    assert 0.3 - 0.04 < changed.float().mean().item() < 0.3 + 0.04  # four standard deviations


@pytest.mark.parametrize("size", [(24, 24), (20, 32)], ids=["square", "oblong"])
@pytest.mark.parametrize("setting", ["rotate_degrees", "zoom"])
def test_rotation_and_zoom_equal_scipys(setting: str, size: tuple[int, int]) -> None:
    amount = {"rotate_degrees": 30.0, "zoom": 0.3}[setting]
    batch = torch.rand(4, 1, *size, generator=torch.Generator().manual_seed(1))
    result = varied(a_plan(size, **{setting: amount, "probability": 1.0}), batch, seed=9)
    # documented: the first draws of the generator, in order rotation, flip, zoom, contrast, brightness
    drawn = torch.rand((4, 5), generator=torch.Generator().manual_seed(9)).double() * 2 - 1
    for image, moved, draw in zip(batch, result, drawn, strict=True):
        angle = math.radians(amount) * draw[0].item() if setting == "rotate_degrees" else 0.0
        scale = 1 / (1 + amount * draw[2].item()) if setting == "zoom" else 1.0
        cosine, sine = math.cos(angle) * scale, math.sin(angle) * scale
        to_old = np.array([[cosine, sine], [-sine, cosine]])  # (row, column) of the new -> of the old
        centre = (np.array(size) - 1) / 2
        expected = ndimage.affine_transform(
            image[0].numpy(), to_old, offset=centre - to_old @ centre, order=1, mode="nearest"
        )
        np.testing.assert_allclose(moved[0].numpy(), expected, atol=2e-4)


def test_intensity_changes_contrast_and_brightness_within_bounds() -> None:
    batch = torch.rand(500, 1, 4, 4) * 2 - 1
    result = varied(a_plan((4, 4), intensity=0.2, probability=1.0), batch)
    assert result.amin() >= -1
    assert result.amax() <= 1
    assert (result - batch).abs().amax() <= 0.4 + 1e-6  # 0.2 of at most 1, and 0.2
    inside = (result.amin((1, 2, 3)) > -1) & (result.amax((1, 2, 3)) < 1)
    old, new = batch[inside], result[inside]
    contrast = new.std((1, 2, 3)) / old.std((1, 2, 3))
    assert contrast.min() < 0.85
    assert contrast.max() > 1.0
    assert ((contrast > 0.8 - 1e-4) & (contrast < 1.2 + 1e-4)).all()


def test_whole_number_blocks_are_averaged_as_monai_does_to_the_last_bit() -> None:
    from monai.transforms.spatial.array import Resize

    for height, width in ((24, 24), (36, 24), (48, 48), (60, 24), (30, 31), (9, 20)):
        image = an_image(height, width)[None]
        shrinks = height >= 12 and width >= 12
        mode, corners = ("area", None) if shrinks else ("bilinear", False)
        expected = Resize((12, 12), mode=mode, align_corners=corners)(torch.tensor(image))
        assert np.array_equal(chest_xray.resized(image, (12, 12)), np.asarray(expected))


def test_a_picture_in_grey_is_treated_as_a_radiograph() -> None:
    image = an_image(30, 20)
    found = TRANSFORMS.load("image").preprocess(a_plan())(image)
    assert torch.equal(found, preprocessed(a_plan(), image))


def test_colour_image_treats_each_channel_as_a_picture_of_its_own() -> None:
    channels = np.stack([an_image(30, 20, seed) for seed in range(3)])
    found = TRANSFORMS.load("colour_image").preprocess(a_plan())(channels)
    assert torch.equal(found, torch.cat([preprocessed(a_plan(), channel) for channel in channels]))
    with pytest.raises(PlanError, match="height and width"):
        TRANSFORMS.load("colour_image").preprocess(a_plan((4, 4, 4)))


def test_volume_keeps_its_voxels_on_a_scale_from_minus_one_to_one() -> None:
    volume = np.random.default_rng(0).uniform(0, 1, (4, 5, 6)).astype(np.float32)
    transform = TRANSFORMS.load("volume")

    found = transform.preprocess(a_plan((4, 5, 6)))(volume)

    np.testing.assert_allclose(found[0].numpy(), volume * 2 - 1, atol=1e-6)
    with pytest.raises(ValueError, match="expected"):
        transform.preprocess(a_plan((4, 5, 7)))(volume)
    with pytest.raises(PlanError, match="slices, rows and columns"):
        transform.preprocess(a_plan((5, 6)))


def test_volume_varies_all_slices_alike() -> None:
    picture = torch.rand(2, 1, 1, 12, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1
    batch = picture.expand(2, 1, 5, 12, 12).contiguous()
    plan = a_plan((5, 12, 12), **ALL_ON)
    augment = TRANSFORMS.load("volume").augment(plan)

    found = augment(batch, torch.Generator().manual_seed(0))

    assert found.shape == batch.shape
    assert not torch.equal(found, batch)
    for place in range(5):
        torch.testing.assert_close(found[:, :, place], varied(a_plan(**ALL_ON), picture[:, :, 0]))
    assert TRANSFORMS.load("volume").augment(a_plan((5, 12, 12))) is None
