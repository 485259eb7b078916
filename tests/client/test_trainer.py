from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from fedward_client import compute
from fedward_client.case_set import CaseSet
from fedward_client.compute import choose, multiplies_bfloat16
from fedward_client.evaluator import predict
from fedward_client.trainer import GradientHook, TrainingJob, batch_indices, learning_rate_at, train
from fedward_common.errors import RefusalCode, TrainingError
from fedward_common.models import build_model, extract_weights, layout_of
from fedward_common.plan import TrainingPlan
from fedward_common.weights import pack
from tests.training_builders import a_training_plan, some_cases

EVERYTHING_RANDOM: dict[str, Any] = {
    "model": {
        "options": {"channels": (4, 8), "dense": 16, "normalization": "batch", "dropout": 0.5},
        "name": "cnn2d",
    },
    "transforms": {
        "size": (16, 16),
        "augmentation": {"rotate_degrees": 10, "flip": True, "zoom": 0.1, "intensity": 0.1},
    },
}


def a_job(
    plan: TrainingPlan, *, seed: int = 3, round_index: int = 1, hook: GradientHook | None = None
) -> TrainingJob:
    return TrainingJob(
        plan=plan, round_index=round_index, seed=seed, device="cpu", threads=1, adjust_gradients=hook
    )


def bits(model: nn.Module, plan: TrainingPlan) -> bytes:
    layout = layout_of(plan)
    return pack(extract_weights(model, layout), layout)


def trained_bits(plan: TrainingPlan, cases: CaseSet, seed: int = 3) -> bytes:
    model = build_model(plan)
    train(model, cases, a_job(plan, seed=seed))
    return bits(model, plan)


def test_sgd_equals_a_textbook_loop_bit_for_bit() -> None:
    plan = a_training_plan(training={"momentum": 0.9, "weight_decay": 0.01, "local_epochs": 2})
    cases, model, reference = some_cases(20), build_model(plan), build_model(plan)
    result = train(model, cases, a_job(plan, seed=11))

    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    generator = torch.Generator().manual_seed(11)
    losses = 0.0
    for _ in range(2):
        for chosen in torch.randperm(20, generator=generator).split(8):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(reference(cases.images[chosen]), cases.labels[chosen])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses += loss.item() * len(chosen)
    assert bits(model, plan) == bits(reference, plan)
    assert (result.num_cases, result.num_steps) == (20, 6)
    assert result.mean_loss == pytest.approx(losses / 40, rel=1e-5)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_with_cosine_schedule_equals_a_textbook_loop(name: str) -> None:
    training = {
        "optimizer": name, "learning_rate": 0.01, "weight_decay": 0.1, "schedule": "cosine",
        "label_smoothing": 0.1,
    }  # fmt: skip
    plan = a_training_plan(training=training)
    cases, model, reference = some_cases(24), build_model(plan), build_model(plan)
    train(model, cases, a_job(plan, round_index=2))

    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    optimizer = kind(reference.parameters(), lr=0.01, weight_decay=0.1, foreach=False)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    for step in range(3):
        chosen = order[step * 8 : step * 8 + 8]
        # round 2 of 4: a quarter of the run is done before it
        optimizer.param_groups[0]["lr"] = 0.01 * (1 + math.cos(math.pi * (1 + step / 3) / 4)) / 2
        optimizer.zero_grad()
        logits = reference(cases.images[chosen])
        nn.functional.cross_entropy(logits, cases.labels[chosen], label_smoothing=0.1).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "auto", "bfloat16"])
def test_same_seed_gives_the_same_bits_and_another_seed_others(precision: str) -> None:
    plan = a_training_plan(training={"precision": precision}, **EVERYTHING_RANDOM)
    cases = some_cases(24)
    first = trained_bits(plan, cases)
    assert trained_bits(plan, cases) == first
    assert trained_bits(plan, cases, seed=4) != first


def test_dropout_follows_the_jobs_seed_alone_and_leaves_the_callers_state() -> None:
    plan = a_training_plan(**EVERYTHING_RANDOM)
    cases = some_cases(16)
    torch.manual_seed(1)
    first = trained_bits(plan, cases)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert trained_bits(plan, cases) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_threads_are_put_back_after_training() -> None:
    before = torch.get_num_threads()
    plan = a_training_plan()
    train(build_model(plan), some_cases(8), TrainingJob(plan, 1, 0, "cpu", threads=before + 1))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("bfloat16", [False, True])
def test_training_after_an_evaluation_is_possible_and_gives_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, bfloat16: bool
) -> None:
    monkeypatch.setattr(compute, "multiplies_bfloat16", lambda _: bfloat16)  # as on another processor
    plan = a_training_plan(training={"precision": "auto"})
    cases, model = some_cases(16), build_model(plan)
    predict(model, cases, plan, "cpu")
    train(model, cases, a_job(plan))
    assert bits(model, plan) == trained_bits(plan, cases)


def test_strategy_hook_gets_the_rounds_first_weights_as_anchors_at_every_step() -> None:
    plan = a_training_plan()
    cases, model, reference = some_cases(24), build_model(plan), build_model(plan)
    start = [parameter.detach().clone() for parameter in model.parameters()]
    calls = 0

    def fedprox(parameters: list[Parameter], anchors: list[Tensor]) -> None:
        nonlocal calls
        calls += 1
        for parameter, anchor, first in zip(parameters, anchors, start, strict=True):
            assert torch.equal(anchor, first)
            assert parameter.grad is not None
            parameter.grad.add_(parameter.detach() - anchor, alpha=0.5)

    train(model, cases, a_job(plan, hook=fedprox))
    # independent: FedProx as its paper has it, a proximal term (mu / 2) |w - w0|^2 in the loss
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9)
    for chosen in torch.randperm(24, generator=torch.Generator().manual_seed(3)).split(8):  # type: ignore[no-untyped-call]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(reference(cases.images[chosen]), cases.labels[chosen])
        pairs = zip(reference.parameters(), start, strict=True)
        (loss + 0.25 * sum(((w - first) ** 2).sum() for w, first in pairs)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert calls == 3
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_frozen_parameters_stay_and_are_not_shown_to_the_hook() -> None:
    plan = a_training_plan()
    model = build_model(plan)
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    before = frozen.clone()
    seen: list[int] = []
    train(model, some_cases(8), a_job(plan, hook=lambda parameters, _: seen.append(len(parameters))))
    assert torch.equal(frozen, before)
    assert seen == [len(list(model.parameters())) - 1]


def test_batchnorm_statistics_are_those_of_the_batches_seen() -> None:
    options = {"channels": (4,), "normalization": "batch", "dense": 0}
    plan = a_training_plan(
        model={"name": "cnn2d", "options": options}, training={"batch_size": 16, "learning_rate": 1e-9}
    )
    cases, model = some_cases(16), build_model(plan)
    with torch.no_grad():
        activations = model.get_submodule("0")(cases.images)
    train(model, cases, a_job(plan))
    norm = model.get_submodule("1")
    torch.testing.assert_close(norm.get_buffer("running_mean"), 0.1 * activations.mean((0, 2, 3)))
    torch.testing.assert_close(norm.get_buffer("running_var"), 0.9 + 0.1 * activations.var((0, 2, 3)))


def test_no_batch_has_one_case_unless_there_is_only_one() -> None:
    batches = batch_indices(17, 8, torch.Generator().manual_seed(0))
    assert [len(batch) for batch in batches] == [8, 9]
    assert sorted(torch.cat(batches).tolist()) == list(range(17))
    assert [len(batch) for batch in batch_indices(1, 8, torch.Generator())] == [1]


def test_cosine_schedule_runs_over_the_whole_run_and_constant_does_not_move() -> None:
    plan = a_training_plan(training={"learning_rate": 0.2, "schedule": "cosine"})
    rates = [learning_rate_at(plan.training, 4, *moment) for moment in [(1, 0), (3, 0), (4, 1), (2, 0.5)]]
    assert rates == pytest.approx([0.2, 0.1, 0.0, 0.1 * (1 + math.cos(math.pi * 1.5 / 4))])
    constant = a_training_plan(training={"learning_rate": 0.2}).training
    assert learning_rate_at(constant, 4, 4, 0.9) == 0.2


def test_training_learns_what_separates_the_cases() -> None:
    plan = a_training_plan(training={"local_epochs": 5, "precision": "auto"})
    model, unseen = build_model(plan), some_cases(64, seed=1)
    train(model, some_cases(64), a_job(plan))
    predicted = predict(model, unseen, plan, "cpu").argmax(axis=1)
    assert (predicted == unseen.labels.numpy()).mean() > 0.95


def test_numbers_that_are_not_finite_end_training_with_their_code() -> None:
    plan = a_training_plan(training={"learning_rate": 10, "local_epochs": 20})
    cases = some_cases(32)
    wild = CaseSet(cases.images[:] * 1e20, cases.labels, cases.case_ids)
    with pytest.raises(TrainingError) as caught:
        train(build_model(plan), wild, a_job(plan))
    assert caught.value.code is RefusalCode.TRAINING_DIVERGED


def test_weights_that_overflow_in_the_last_step_do_not_pass() -> None:
    plan = a_training_plan()
    model = build_model(plan)

    def overflow(parameters: list[Parameter], _: list[Tensor]) -> None:
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, math.inf)

    with pytest.raises(TrainingError) as caught:
        train(model, some_cases(8), a_job(plan, hook=overflow))
    assert caught.value.code is RefusalCode.TRAINING_DIVERGED


class Hungry(nn.Linear):
    """Asks for a petabyte in its forward pass."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.empty(2**50) + super().forward(images)


def test_exhausted_memory_ends_training_with_its_code() -> None:
    with pytest.raises(TrainingError) as caught:
        train(Hungry(16, 2), some_cases(8), a_job(a_training_plan()))
    assert caught.value.code is RefusalCode.OUT_OF_MEMORY


def test_site_without_training_cases_says_so() -> None:
    plan = a_training_plan()
    with pytest.raises(TrainingError) as caught:
        train(build_model(plan), some_cases(0), a_job(plan))
    assert caught.value.code is RefusalCode.COHORT_TOO_SMALL


def test_absent_device_is_named_with_a_remedy() -> None:
    absent = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(TrainingError, match=absent) as caught:
        choose(absent, "auto")
    assert "site.toml" in caught.value.remedy


def test_automatic_precision_follows_the_processor_and_float32_is_never_overruled() -> None:
    plain = choose("cpu", "float32")
    assert (plain.bfloat16, plain.channels_last) == (False, False)
    assert choose("cpu", "auto").bfloat16 is multiplies_bfloat16("cpu")
    assert choose("cpu", "auto").channels_last
    assert choose("cpu", "bfloat16").bfloat16
    assert not multiplies_bfloat16("mps")


def test_bfloat16_is_recognised_as_pytorch_recognises_it() -> None:
    ask = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    if ask is None or not ask():
        pytest.skip("this processor, or this PyTorch, gives no second opinion")
    assert multiplies_bfloat16("cpu")
