from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedward_common.registry import TASKS
from tests.training_builders import a_training_plan


def test_classification_needs_one_output_a_label() -> None:
    plan = a_training_plan(task={"labels": ["a", "b", "c"]})
    assert TASKS.load("classification").num_outputs(plan) == 3


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_mean_cross_entropy_computed_by_hand(smoothing: float) -> None:
    plan = a_training_plan(training={"label_smoothing": smoothing})
    logits, labels = torch.tensor([[2.0, -1.0], [0.5, 0.25]]), torch.tensor([0, 1])
    expected = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        normaliser = math.log(sum(math.exp(value) for value in row))
        target = [smoothing / 2, smoothing / 2]
        target[label] += 1 - smoothing
        expected += sum(share * (normaliser - value) for share, value in zip(target, row, strict=True)) / 2
    assert TASKS.load("classification").loss(logits, labels, plan).item() == pytest.approx(expected, abs=1e-6)


def test_scores_are_float32_probabilities_also_for_bfloat16_logits() -> None:
    logits = torch.tensor([[1.0, 3.0, -2.0], [200.0, -200.0, 0.0]], dtype=torch.bfloat16)
    scores = TASKS.load("classification").scores(logits)
    exact = np.exp(logits.double().numpy() - logits.double().numpy().max(axis=1, keepdims=True))
    assert scores.dtype == torch.float32
    np.testing.assert_allclose(scores.numpy(), exact / exact.sum(axis=1, keepdims=True), atol=1e-6)
