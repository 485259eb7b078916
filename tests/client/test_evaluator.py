from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, roc_auc_score
from torch import nn

from fedward_client.case_set import CaseSet
from fedward_client.evaluator import evaluate, predict
from fedward_client.trainer import TrainingJob, train
from fedward_common.evaluation.state import empty_state, merge, summarise
from fedward_common.models import build_model
from tests.training_builders import a_training_plan, some_cases

NOISY = 0.15  # so that the classes overlap and the metrics are not all 1


def a_trained_model(plan_options: dict[str, object] | None = None) -> nn.Module:
    plan = a_training_plan(
        model={"name": "cnn2d", "options": plan_options or {"channels": (4, 8), "dense": 16}}
    )
    model = build_model(plan)
    train(model, some_cases(64, signal=NOISY), TrainingJob(plan, 1, seed=0, device="cpu", threads=1))
    return model


def test_metrics_equal_scikit_learns_on_the_same_scores() -> None:
    plan, model, cases = a_training_plan(), a_trained_model(), some_cases(200, seed=5, signal=NOISY)
    summary = summarise(evaluate(model, cases, plan, "cpu"), plan)
    with torch.no_grad():
        scores = model.eval()(cases.images).softmax(1)[:, 1].numpy()
    labels = cases.labels.numpy()
    assert summary.num_cases == 200
    assert [list(row) for row in summary.confusion] == confusion_matrix(labels, scores >= 0.5).tolist()
    assert summary.auroc is not None
    assert summary.auroc_error_bound is not None
    difference = abs(summary.auroc - float(roc_auc_score(labels, scores)))
    assert difference <= summary.auroc_error_bound + 1e-12


def test_evaluation_in_two_halves_adds_up_to_the_whole() -> None:
    plan, model, cases = a_training_plan(), a_trained_model(), some_cases(48, seed=6)
    halves = [
        CaseSet(cases.images[part], cases.labels[part], cases.case_ids[part])
        for part in (slice(0, 24), slice(24, 48))
    ]
    whole = evaluate(model, cases, plan, "cpu")
    merged = merge([evaluate(model, half, plan, "cpu") for half in halves])
    assert whole.keys() == merged.keys()
    for name, counts in whole.items():
        np.testing.assert_array_equal(merged[name], counts)


def test_evaluation_changes_neither_weights_nor_batchnorm_statistics() -> None:
    model = a_trained_model({"channels": (4, 8), "normalization": "batch", "dropout": 0.5})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan, cases = a_training_plan(), some_cases(20)
    first = predict(model.train(), cases, plan, "cpu")
    np.testing.assert_array_equal(predict(model, cases, plan, "cpu"), first)  # dropout is off
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_no_cases_give_the_state_of_zeros() -> None:
    plan = a_training_plan()
    state = evaluate(build_model(plan), some_cases(0), plan, "cpu")
    for name, zeros in empty_state(plan).items():
        np.testing.assert_array_equal(state[name], zeros)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_scores_are_fine_enough_to_rank_cases_in_either_precision(precision: str) -> None:
    plan = a_training_plan(training={"precision": precision})
    model, cases = a_trained_model(), some_cases(400, seed=7, signal=NOISY)
    scores = predict(model, cases, plan, "cpu")[:, 1]
    assert len(np.unique(scores)) > 390
    exact = predict(model, cases, a_training_plan(), "cpu")[:, 1]
    assert abs(scores - exact).max() < 0.02
