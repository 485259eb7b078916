from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedward_common.errors import PayloadError, PlanError
from fedward_common.models import (
    build_model,
    extract_weights,
    initial_weights,
    layout_of,
    load_weights,
)
from fedward_common.plan import TrainingPlan
from fedward_common.registry import MODELS
from fedward_common.weights import num_bytes, pack, unpack
from tests.training_builders import a_training_plan


def a_plan_with(options: dict[str, Any], side: int = 28, **parts: Any) -> TrainingPlan:
    return a_training_plan(
        model={"name": "cnn2d", "options": options}, transforms={"size": (side, side)}, **parts
    )


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def densenet_plan(side: int = 32) -> TrainingPlan:
    return a_training_plan(model={"name": "densenet121", "options": {}}, transforms={"size": (side, side)})


CNN2D_BY_HAND = [
    # two 3x3 convolutions with bias, 28 -> 14 -> 7 pixels, a dense layer of 128, two outputs
    (
        {"channels": (32, 64), "dense": 128},
        (9 * 32 + 32) + (32 * 9 * 64 + 64) + (64 * 7 * 7 * 128 + 128) + (128 * 2 + 2),
    ),
    # BatchNorm has two numbers a channel and makes the convolution's bias idle; the average has none
    (
        {"channels": (16, 32), "normalization": "batch", "dense": 0},
        (9 * 16 + 2 * 16) + (16 * 9 * 32 + 2 * 32) + (32 * 2 + 2),
    ),
    # two convolutions a block
    (
        {"channels": (8,), "kernel": 5, "convolutions": 2, "normalization": "group", "dense": 0},
        (25 * 8 + 2 * 8) + (8 * 25 * 8 + 2 * 8) + (8 * 2 + 2),
    ),
]


@pytest.mark.parametrize(("options", "expected"), CNN2D_BY_HAND)
def test_cnn2d_has_the_number_of_parameters_counted_by_hand(options: dict[str, Any], expected: int) -> None:
    assert num_parameters(build_model(a_plan_with(options))) == expected


def test_default_cnn2d_is_the_network_of_the_common_job() -> None:
    assert num_parameters(build_model(a_plan_with({}))) == 420_610  # two blocks of 32 and 64, dense 128


@pytest.mark.parametrize("normalization", ["none", "batch", "group"])
@pytest.mark.parametrize("dense", [0, 8])
@pytest.mark.parametrize("convolutions", [1, 2])
def test_cnn2d_gives_one_logit_a_label_for_any_options(
    normalization: str, dense: int, convolutions: int
) -> None:
    options = {
        "channels": (6, 10),
        "normalization": normalization,
        "dense": dense,
        "convolutions": convolutions,
        "dropout": 0.2,
    }
    plan = a_plan_with(options, side=21, task={"labels": ["a", "b", "c"], "positive": None})
    assert build_model(plan)(torch.zeros(5, 1, 21, 21)).shape == (5, 3)


def test_cnn2d_refuses_volumes() -> None:
    plan = a_training_plan(
        model={"name": "cnn2d", "options": {}}, transforms={"name": "volume", "size": (16, 64, 64)}
    )
    with pytest.raises(PlanError, match=r"cnn2d takes images.*3 numbers"):
        layout_of(plan)


def test_cnn2d_refuses_more_blocks_than_the_image_can_be_halved() -> None:
    with pytest.raises(PlanError, match="4 blocks"):
        layout_of(a_plan_with({"channels": (4, 4, 4, 4)}, side=15))


def test_densenet121_equals_monais_own_network_with_the_same_weights() -> None:
    from monai.networks.nets.densenet import DenseNet121

    ours = build_model(densenet_plan()).eval()
    reference = DenseNet121(spatial_dims=2, in_channels=1, out_channels=2)
    reference.load_state_dict(ours.state_dict())
    reference.eval()
    images = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours(images), reference(images))
    assert num_parameters(ours) == 6_949_634
    # 727 tensors, of which the 121 BatchNorms' counters stay at the site
    assert len(layout_of(densenet_plan())) == 727 - 121


def test_densenet121_refuses_images_too_small_for_it() -> None:
    with pytest.raises(PlanError, match="densenet121"):
        layout_of(densenet_plan(28))


@pytest.mark.parametrize(
    "plan",
    [
        a_plan_with({"channels": (8, 16), "dense": 32}),
        a_plan_with({"channels": (8, 16), "normalization": "batch", "dense": 0}),
        a_plan_with({"channels": (8, 16), "normalization": "group", "dense": 0}),
        densenet_plan(),
    ],
    ids=["plain", "batch", "group", "densenet121"],
)
def test_every_network_learns_eight_cases_by_heart(plan: TrainingPlan) -> None:
    model = build_model(plan).train()
    images = torch.randn(8, 1, *plan.transforms.size, generator=torch.Generator().manual_seed(3))
    labels = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        if loss.item() < 0.05:
            break
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert torch.equal(model(images).argmax(1), labels)


@pytest.mark.parametrize("name", ["cnn2d", "densenet121"])
def test_unknown_option_is_refused_by_name(name: str) -> None:
    with pytest.raises(PlanError, match="droput") as caught:
        MODELS.load(name).check({"droput": 0.1})
    assert "dropout" in caught.value.remedy


def test_initial_weights_are_the_same_bits_for_the_same_seed_only() -> None:
    plan, other = a_training_plan(seed=5), a_training_plan(seed=6)
    layout = layout_of(plan)
    first, again = pack(initial_weights(plan), layout), pack(initial_weights(plan), layout)
    assert first == again
    assert first != pack(initial_weights(other), layout)


def test_building_a_model_leaves_the_callers_random_numbers_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    build_model(a_training_plan())
    assert torch.equal(torch.rand(3), expected)


def test_layout_follows_the_state_dict_and_leaves_integer_buffers_out() -> None:
    plan = a_plan_with({"channels": (4,), "normalization": "batch", "dense": 0})
    layout = layout_of(plan)
    model = build_model(plan)
    floats = [(name, tuple(t.shape)) for name, t in model.state_dict().items() if t.is_floating_point()]
    assert [(spec.name, spec.shape) for spec in layout] == floats
    assert len(floats) == len(model.state_dict()) - 1  # num_batches_tracked
    buffers = {name for name, _ in model.named_buffers()}
    assert {spec.name for spec in layout if spec.kind == "buffer"} == {
        name for name in buffers if "running" in name
    }
    assert num_bytes(layout) == 4 * sum(int(np.prod(shape)) for _, shape in floats)


def test_weights_survive_the_way_through_bytes_and_channels_last_memory() -> None:
    plan = a_plan_with({"channels": (4, 6), "normalization": "batch"})
    layout = layout_of(plan)
    generator = np.random.default_rng(2)
    sent = pack({spec.name: generator.normal(size=spec.shape).astype(np.float32) for spec in layout}, layout)
    model = build_model(plan)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    load_weights(model, unpack(sent, layout))
    assert pack(extract_weights(model, layout), layout) == sent


def test_extracted_weights_do_not_change_when_the_model_is_trained_on() -> None:
    plan = a_training_plan()
    model = build_model(plan)
    extracted = extract_weights(model, layout_of(plan))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert pack(extracted, layout_of(plan)) == pack(initial_weights(plan), layout_of(plan))


def test_loading_refuses_another_models_weights_and_changes_nothing() -> None:
    plan = a_training_plan()
    model = build_model(plan)
    wrong = initial_weights(plan)
    first = next(iter(wrong))
    wrong[first] = wrong[first] + 1
    wrong["foreign"] = np.zeros(1, dtype=np.float32)
    with pytest.raises(PayloadError):
        load_weights(model, wrong)
    assert pack(extract_weights(model, layout_of(plan)), layout_of(plan)) == pack(
        initial_weights(plan), layout_of(plan)
    )


def test_logits_are_float32_under_bfloat16_autocast() -> None:
    model = build_model(a_training_plan())
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randn(512, 1, 16, 16))
    assert logits.dtype == torch.float32
    assert len(logits[:, 0].unique()) > 490  # bfloat16 would leave a few hundred distinct values at best


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("MODELS.load('cnn2d').check({}); MODELS.load('densenet121').check({})", "torch"),
        ("MODELS.load('cnn2d').build(MODELS.load('cnn2d').check({}), input_shape=(1, 28, 28), num_outputs=2)",
         "monai"),
    ],
    ids=["options-without-torch", "cnn2d-without-monai"],
)  # fmt: skip
def test_heavy_packages_are_imported_only_when_needed(code: str, absent: str) -> None:
    ending = f"sys.exit({absent!r} in sys.modules)"
    script = f"import sys; from fedward_common.registry import MODELS; {code}; {ending}"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
