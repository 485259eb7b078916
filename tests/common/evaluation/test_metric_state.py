"""Metrics of a federation, from added counts, beside scikit-learn on the pooled predictions."""

from __future__ import annotations

import doctest
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn import metrics as reference

from fedward_common.errors import EvaluationError, PayloadError
from fedward_common.evaluation import grid
from fedward_common.evaluation.grid import cells_of
from fedward_common.evaluation.state import (
    MetricSummary,
    State,
    check_state,
    empty_state,
    merge,
    state_layout,
    state_of,
    summarise,
    suppress,
    suppressed,
)
from fedward_common.plan import TrainingPlan, parse_plan

Scores = NDArray[np.float64]
Labels = NDArray[np.int64]


def a_plan(
    num_labels: int = 2, *, bins: int = 4096, threshold: float = 0.5, positive: int = 1
) -> TrainingPlan:
    labels = [f"label{index}" for index in range(num_labels)]
    return parse_plan(
        {
            "name": "a-plan",
            "rounds": 1,
            "participation": {"quorum": 1},
            "task": {"labels": labels, "positive": labels[positive]},
            "model": {"name": "cnn2d"},
            "training": {"learning_rate": 0.1},
            "evaluation": {"score_bins": bins, "threshold": threshold},
        }
    )


@dataclass(frozen=True)
class Federation:
    plan: TrainingPlan
    sites: list[tuple[Scores, Labels]]

    @property
    def scores(self) -> Scores:
        return np.concatenate([scores for scores, _ in self.sites])

    @property
    def labels(self) -> Labels:
        return np.concatenate([labels for _, labels in self.sites])

    @property
    def states(self) -> list[State]:
        return [state_of(scores, labels, self.plan) for scores, labels in self.sites]

    def summary(self) -> MetricSummary:
        return summarise(merge(self.states), self.plan)


@st.composite
def federations(draw: st.DrawFn, *, gridded: bool = False) -> Federation:
    """One to five sites of 0 to 60 cases; a site may lack any label; scores from vague to overconfident."""
    num_labels = draw(st.sampled_from([2, 2, 3, 5]))
    plan = a_plan(
        num_labels,
        bins=4096 if gridded else draw(st.sampled_from([16, 255, 4096])),
        threshold=draw(st.sampled_from([0.5, 0.25, 0.9])),
        positive=draw(st.integers(0, num_labels - 1)),
    )
    sites = []
    for _ in range(draw(st.integers(1, 5))):
        random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        present = draw(st.lists(st.integers(0, num_labels - 1), min_size=1, unique=True))
        labels = random.choice(present, size=draw(st.integers(0, 60))).astype(np.int64)
        logits = random.normal(size=(len(labels), num_labels)) * draw(st.sampled_from([0.01, 1, 8, 40]))
        sharp = np.exp(logits + np.eye(num_labels)[labels] - logits.max(axis=1, keepdims=True, initial=0))
        scores = sharp / sharp.sum(axis=1, keepdims=True)
        sites.append((on_grid(scores) if gridded else scores, labels))
    return Federation(plan, sites)


def on_grid(scores: Scores) -> Scores:
    """Round to 1/64, rows still adding to one (the last column takes the rest)."""
    rounded = np.floor(scores * 64) / 64
    rounded[:, -1] = 1 - rounded[:, :-1].sum(axis=1)
    return rounded


def predicted(federation: Federation) -> Labels:
    plan = federation.plan
    if len(plan.task.labels) > 2:
        return np.asarray(federation.scores.argmax(axis=1))
    positive = plan.task.positive_index
    called = federation.scores[:, positive] >= plan.evaluation.threshold
    return np.where(called, positive, 1 - positive)


def measured(plan: TrainingPlan) -> list[int]:
    count = len(plan.task.labels)
    return [plan.task.positive_index] if count == 2 else list(range(count))


@settings(max_examples=100, deadline=None)
@given(federations())
def test_global_counts_equal_scikit_learn_on_pooled_predictions(federation: Federation) -> None:
    summary, labels, called = federation.summary(), federation.labels, predicted(federation)
    count = len(federation.plan.task.labels)
    confusion = np.array(summary.confusion)

    assert summary.num_cases == len(labels)
    if not len(labels):
        assert confusion.sum() == 0
        assert summary.accuracy is summary.log_loss is summary.brier is None
        return
    np.testing.assert_array_equal(
        confusion, reference.confusion_matrix(labels, called, labels=list(range(count)))
    )
    assert summary.accuracy == pytest.approx(reference.accuracy_score(labels, called), rel=1e-14)
    if len(set(labels)) == count:
        assert summary.balanced_accuracy == pytest.approx(
            np.mean(reference.recall_score(labels, called, average=None, labels=list(range(count)))),
            rel=1e-14,
        )
    else:
        assert summary.balanced_accuracy is None
    for row, label in enumerate(measured(federation.plan)):
        check_label(summary.labels[row].model_dump(), labels == label, called == label)


def check_label(figures: dict[str, Any], truth: NDArray[np.bool_], called: NDArray[np.bool_]) -> None:
    assert figures["num_positives"] == truth.sum()
    cases: list[tuple[str, bool, Any]] = [
        ("recall", bool(truth.any()), lambda: reference.recall_score(truth, called)),
        ("specificity", not truth.all(), lambda: reference.recall_score(~truth, ~called)),
        ("precision", bool(called.any()), lambda: reference.precision_score(truth, called)),
        ("f1", bool(truth.any() or called.any()), lambda: reference.f1_score(truth, called)),
    ]
    for name, defined, value in cases:
        if defined:
            assert figures[name] == pytest.approx(value(), rel=1e-14), name
        else:
            assert figures[name] is None, name


@settings(max_examples=100, deadline=None)
@given(federations())
def test_global_auroc_is_within_the_printed_bound_of_scikit_learn(federation: Federation) -> None:
    summary = federation.summary()
    for row, label in enumerate(measured(federation.plan)):
        truth, figures = federation.labels == label, summary.labels[row]
        if len(set(truth)) < 2:
            assert figures.auroc is None
            assert figures.auroc_error_bound is None
            assert figures.roc == ()
            continue
        assert figures.auroc is not None
        assert figures.auroc_error_bound is not None
        exact = reference.roc_auc_score(truth, federation.scores[:, label])
        assert abs(figures.auroc - exact) <= figures.auroc_error_bound + 1e-12
    if all(figures.auroc is not None for figures in summary.labels):
        exact = macro_auroc(federation)
        assert abs((summary.auroc or 0) - exact) <= (summary.auroc_error_bound or 0) + 1e-12
    else:
        assert summary.auroc is None


def macro_auroc(federation: Federation) -> float:
    if len(federation.plan.task.labels) == 2:
        positive = federation.plan.task.positive_index
        return float(reference.roc_auc_score(federation.labels == positive, federation.scores[:, positive]))
    return float(reference.roc_auc_score(federation.labels, federation.scores, multi_class="ovr"))


@settings(max_examples=100, deadline=None)
@given(federations(gridded=True))
def test_ranking_metrics_are_exact_when_scores_are_gridded(federation: Federation) -> None:
    summary = federation.summary()
    for row, label in enumerate(measured(federation.plan)):
        truth, scores = federation.labels == label, federation.scores[:, label]
        if len(set(truth)) < 2:
            continue
        figures = summary.labels[row]
        assert figures.auroc == pytest.approx(reference.roc_auc_score(truth, scores), abs=1e-12)
        average = reference.average_precision_score(truth, scores)
        assert figures.average_precision == pytest.approx(average, abs=1e-12)
        false_rate, true_rate, _ = reference.roc_curve(truth, scores, drop_intermediate=False)
        np.testing.assert_allclose(figures.roc, np.stack([false_rate, true_rate], axis=1), atol=6e-6)


@settings(max_examples=100, deadline=None)
@given(federations())
def test_log_loss_and_brier_equal_scikit_learn_to_the_fixed_point(federation: Federation) -> None:
    labels, scores, plan = federation.labels, federation.scores, federation.plan
    if not len(labels):
        return
    summary, count = federation.summary(), len(plan.task.labels)
    unit = 1 / grid.FIXED_POINT
    expected = reference.log_loss(labels, scores, labels=list(range(count)))
    assert summary.log_loss == pytest.approx(expected, abs=unit)
    if count == 2:
        positive = plan.task.positive_index
        brier = np.mean((scores[:, positive] - (labels == positive)) ** 2)
    else:
        brier = reference.brier_score_loss(labels, scores, labels=list(range(count)), scale_by_half=False)
    assert summary.brier == pytest.approx(brier, abs=unit)


@settings(max_examples=80, deadline=None)
@given(federations(), st.randoms(use_true_random=False))
def test_order_of_sites_and_of_cases_is_irrelevant(federation: Federation, random: Any) -> None:
    states = federation.states
    expected = merge(states)
    random.shuffle(states)
    order = np.random.default_rng(random.getrandbits(32)).permutation(len(federation.labels))
    pooled = state_of(federation.scores[order], federation.labels[order], federation.plan)

    for other in (merge(states), pooled, merge([empty_state(federation.plan), pooled])):
        for name, array in expected.items():
            np.testing.assert_array_equal(other[name], array)


@settings(max_examples=80, deadline=None)
@given(federations())
def test_every_counted_state_passes_the_check_and_so_does_their_sum(federation: Federation) -> None:
    for state in [*federation.states, merge(federation.states), empty_state(federation.plan)]:
        check_state(state, federation.plan, max_cases=300)
        assert {name: array.shape for name, array in state.items()} == state_layout(federation.plan)


@given(st.lists(st.floats(0, 1), min_size=2), st.integers(2, 70000))
def test_a_higher_score_never_lands_in_a_lower_cell(values: list[float], num_cells: int) -> None:
    neighbours = [float(np.nextafter(value, 0)) for value in values if value > 0]
    cells = cells_of(np.sort(np.array([*values, *neighbours])), num_cells)
    assert (np.diff(cells) >= 0).all()
    assert 0 <= cells[0] <= cells[-1] < num_cells


def test_the_grid_separates_scores_of_a_confident_network() -> None:
    scores = (1 - 0.5 ** np.arange(1, 25)).astype(np.float32).astype(np.float64)
    assert len(set(cells_of(scores, 4096))) == 24
    assert list(cells_of(np.array([0.0, 0.5, 1.0]), 4097)) == [0, 2048, 4096]
    assert doctest.testmod(grid).failed == 0


def test_metrics_follow_a_hand_calculation() -> None:
    # Positives score 0.9, 0.6, 0.2; negatives 0.7, 0.1: 4 of 6 pairs are in order (0.9 beats both,
    # 0.6 and 0.2 beat 0.1); at 0.5, two of three positives and one of two negatives are right.
    positive = np.array([0.9, 0.6, 0.2, 0.7, 0.1])
    plan = a_plan()
    state = state_of(np.stack([1 - positive, positive], axis=1), np.array([1, 1, 1, 0, 0]), plan)
    summary = summarise(state, plan)

    assert summary.confusion == ((1, 1), (1, 2))
    assert summary.num_positives == 3
    assert summary.accuracy == 3 / 5
    assert summary.recall == 2 / 3
    assert summary.specificity == 1 / 2
    assert summary.precision == 2 / 3
    assert summary.f1 == 2 / 3
    assert summary.auroc == 4 / 6
    assert summary.auroc_error_bound == 0
    assert summary.brier == pytest.approx((0.01 + 0.16 + 0.64 + 0.49 + 0.01) / 5, abs=1e-6)
    assert summary.roc == ((0, 0), (0, 0.33333), (0.5, 0.33333), (0.5, 0.66667), (0.5, 1), (1, 1))


def test_a_site_without_positives_has_specificity_but_neither_sensitivity_nor_auroc() -> None:
    plan = a_plan()
    summary = summarise(state_of(np.full((8, 2), 0.5), np.zeros(8, dtype=np.int64), plan), plan)
    assert summary.specificity == 0
    assert summary.recall is summary.auroc is summary.balanced_accuracy is summary.average_precision is None
    assert MetricSummary.model_validate_json(summary.model_dump_json()) == summary
    assert "NaN" not in summary.model_dump_json()


def test_roc_curve_is_thinned_along_its_length_and_keeps_both_ends() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 3000)
    positive = np.clip(random.normal(0.4 + 0.2 * labels, 0.2), 0, 1)
    plan = a_plan()
    state = state_of(np.stack([1 - positive, positive], axis=1), labels, plan)

    roc = np.array(summarise(state, plan).roc)
    assert 60 < len(roc) <= 101
    assert roc[0].tolist() == [0, 0]
    assert roc[-1].tolist() == [1, 1]
    assert (np.diff(roc, axis=0) >= 0).all()
    assert np.diff(roc.sum(axis=1)).max() < 0.06
    assert np.trapezoid(roc[:, 1], roc[:, 0]) == pytest.approx(summarise(state, plan).auroc, abs=2e-3)
    assert summarise(state, plan, num_roc_points=0).roc == ()


@pytest.mark.parametrize(
    ("name", "index", "value"),
    [
        ("num_cases", (0,), -1),
        ("num_cases", (0,), 41),
        ("num_cases", (0,), 39),
        ("num_cases", (0,), 2**62),
        ("confusion", (0, 0), -5),
        ("confusion", (1, 1), 2**62),
        ("positives", (0, 7), 1),
        ("positives", (0, 7), -1),
        ("negatives", (0, 7), 2**63 - 1),
        ("log_loss", (0,), -1),
        ("log_loss", (0,), 41 * 37 * 2**20),
        ("brier", (0,), 41 * 2**20),
    ],
)
def test_check_refuses_a_number_that_counting_cannot_give(
    name: str, index: tuple[int, ...], value: int
) -> None:
    plan, state = a_plan(bins=64), a_state(a_plan(bins=64))
    check_state(state, plan, max_cases=40)
    state[name][index] = value
    with pytest.raises(PayloadError):
        check_state(state, plan, max_cases=40)


def a_state(plan: TrainingPlan) -> State:
    random = np.random.default_rng(1)
    positive = random.uniform(size=40)
    return state_of(np.stack([1 - positive, positive], axis=1), random.integers(0, 2, 40), plan)


def test_check_refuses_positives_moved_to_the_other_side_of_the_threshold() -> None:
    plan = a_plan(bins=64)
    state = a_state(plan)
    state["positives"] = state["positives"][:, ::-1].copy()
    with pytest.raises(PayloadError, match="threshold"):
        check_state(state, plan, max_cases=40)


def test_check_refuses_labels_swapped_in_one_array_only() -> None:
    plan = a_plan(bins=64)
    state = a_state(plan)
    state["confusion"] = state["confusion"][::-1].copy()
    with pytest.raises(PayloadError):
        check_state(state, plan, max_cases=40)


def test_check_refuses_other_names_shapes_and_types() -> None:
    plan = a_plan(bins=64)
    state = a_state(plan)
    for broken in (
        {**state, "extra": np.zeros(1, dtype=np.int64)},
        {name: array for name, array in state.items() if name != "brier"},
        {**state, "confusion": state["confusion"].astype(np.int32)},
        {**state, "confusion": state["confusion"].astype(np.float64)},
        {**state, "positives": state["positives"][:, :-1]},
    ):
        with pytest.raises(PayloadError):
            check_state(broken, plan, max_cases=40)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_negatives", "num_positives", "held_back"),
    [(0, 0, False), (4, 0, True), (5, 0, False), (5, 4, True), (4, 5, True), (5, 5, False), (0, 1, True)],
)
def test_small_groups_stay_at_the_site(num_negatives: int, num_positives: int, held_back: bool) -> None:
    plan = a_plan()  # min_cases = 5
    labels = np.repeat([0, 1], [num_negatives, num_positives])
    state = state_of(np.full((len(labels), 2), 0.5), labels, plan)
    assert suppressed(state, plan) is held_back
    assert (suppress(state, plan) is None) is held_back
    assert suppressed(state, plan, min_cases=1) is held_back  # a site may only raise the plan's floor
    assert suppressed(state, plan, min_cases=6) is bool(len(labels))


@pytest.mark.parametrize(
    ("scores", "labels"),
    [
        ([[0.5, 0.5]], [2]),
        ([[0.5, 0.5]], [-1]),
        ([[float("nan"), 0.5]], [0]),
        ([[1.5, -0.5]], [0]),
        ([[0.5, 0.2, 0.3]], [0]),
        ([[0.5, 0.5]], [0, 1]),
    ],
)
def test_predictions_that_cannot_be_counted_are_refused(scores: list[list[float]], labels: list[int]) -> None:
    with pytest.raises(EvaluationError) as refusal:
        state_of(np.array(scores), np.array(labels), a_plan())
    assert refusal.value.remedy


def test_states_of_different_plans_are_not_added() -> None:
    with pytest.raises(EvaluationError, match="different plans"):
        merge([empty_state(a_plan(bins=16)), empty_state(a_plan(bins=32))])
    with pytest.raises(EvaluationError, match="no metric state"):
        merge([])


def test_counting_needs_neither_torch_nor_scikit_learn() -> None:
    probe = (
        "import sys, fedward_common.evaluation.state;"
        "print(sorted({'torch', 'sklearn', 'scipy', 'monai', 'jinja2'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
