"""What a site says about a model's predictions: whole numbers of fixed shape that add (hop 10).

For one split, a site counts its predictions into a state: the confusion matrix at the plan's threshold,
one histogram of scores for cases of a class and one for all others, the number of cases, and two sums
in fixed point. Adding states of sites gives, number for number, the state of their pooled predictions;
every metric is computed from a state afterwards (`summarise`), for one site and for all alike.

A state is still about patients: with more cells than cases, the histograms are nearly a list of scores
by class. So `suppressed` keeps small groups at the site, and `check_state` lets nothing through that
could not have come from counting.

Names and shapes for a plan with C labels, B cells and K scores (1 when C is 2: the positive label's;
else C, one a label):

    num_cases   (1,)    cases counted
    confusion   (C, C)  row: true label, column: predicted label
    positives   (K, B)  cases of the scored label, by cell of their score
    negatives   (K, B)  all other cases, by cell of the same score
    log_loss    (1,)    sum of -ln(score of the true label), in 1 / 2**20
    brier       (1,)    sum of squared distances to the truth, in 1 / 2**20
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward_common.errors import EvaluationError, PayloadError
from fedward_common.evaluation.grid import FIXED_POINT, SMALLEST_SCORE, cells_of, fixed_point_sum
from fedward_common.evaluation.summary import MetricSummary, State, scored_labels, summarise
from fedward_common.plan import TrainingPlan

__all__ = [
    "MetricSummary",
    "State",
    "check_state",
    "empty_state",
    "merge",
    "state_layout",
    "state_of",
    "summarise",
    "suppress",
    "suppressed",
]


def state_layout(plan: TrainingPlan) -> dict[str, tuple[int, ...]]:
    """List the arrays of a state, in the order in which they travel: name -> shape, all int64."""
    num_labels, num_scores = len(plan.task.labels), len(scored_labels(plan))
    histograms = (num_scores, plan.evaluation.score_bins)
    return {
        "num_cases": (1,),
        "confusion": (num_labels, num_labels),
        "positives": histograms,
        "negatives": histograms,
        "log_loss": (1,),
        "brier": (1,),
    }


def empty_state(plan: TrainingPlan) -> State:
    """Give the state of no cases: zero everywhere, and neutral in `merge`."""
    return {name: np.zeros(shape, dtype=np.int64) for name, shape in state_layout(plan).items()}


def state_of(
    scores: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]], plan: TrainingPlan
) -> State:
    """Count predictions.

    Args:
        scores: probabilities `(cases, classes)`, each in [0, 1], columns in the order of the plan's labels.
        labels: true classes `(cases,)`, in [0, classes).
        plan: gives labels, positive label, threshold and grid.

    Raises:
        EvaluationError: shapes do not fit, a score is not a probability (or NaN), or a label is unknown.
    """
    _check_predictions(scores, labels, len(plan.task.labels))
    exact = scores.astype(np.float64)
    state = empty_state(plan)
    state["num_cases"][0] = len(labels)
    np.add.at(state["confusion"], (labels, _predicted(exact, plan)), 1)
    cells = cells_of(exact, plan.evaluation.score_bins)
    for row, label in enumerate(scored_labels(plan)):
        of_label = labels == label
        for name, chosen in (("positives", of_label), ("negatives", ~of_label)):
            state[name][row] = np.bincount(cells[chosen, label], minlength=plan.evaluation.score_bins)
    true_score = exact[np.arange(len(labels)), labels]
    state["log_loss"][0] = fixed_point_sum(-np.log(np.maximum(true_score, SMALLEST_SCORE)))
    state["brier"][0] = fixed_point_sum(_squared_distance(exact, labels, plan))
    return state


def merge(states: Iterable[Mapping[str, NDArray[np.int64]]]) -> State:
    """Add states, in any order.

    Raises:
        EvaluationError: there is none, or they come from different plans.
    """
    total: State = {}
    for state in states:
        if not total:
            total = {name: array.copy() for name, array in state.items()}
        elif _shapes(total) != _shapes(state):
            raise EvaluationError(
                "metric states of different plans cannot be added",
                remedy="Merge only states of one run; check the plan digest of each.",
            )
        else:
            for name, array in state.items():
                total[name] += array
    if not total:
        raise EvaluationError("no metric state to add", remedy="Start from empty_state(plan).")
    return total


def check_state(state: Mapping[str, NDArray[np.int64]], plan: TrainingPlan, max_cases: int) -> None:
    """Insist that a state could have come from counting at most `max_cases` predictions.

    Runs at the site's door before a state leaves, and at the server before it is added. Elements are
    bounded before anything is summed, so no sum here can overflow.

    Raises:
        PayloadError: wrong names, shapes or dtype, a negative or too large number, or numbers that
            contradict each other.
    """
    if _shapes(state) != state_layout(plan) or any(array.dtype != np.int64 for array in state.values()):
        raise _impossible("names, shapes or types differ from the plan's")
    num_cases = int(state["num_cases"][0])
    if not 0 <= num_cases <= max_cases:
        raise _impossible(f"{num_cases} cases, expected 0 to {max_cases}")
    for name in ("confusion", "positives", "negatives"):
        if state[name].min() < 0 or state[name].max() > num_cases:
            raise _impossible(f"{name} has an element below 0 or above the {num_cases} cases")
    largest = {"log_loss": -math.log(SMALLEST_SCORE), "brier": 1 if len(plan.task.labels) == 2 else 2}
    for name, bound in largest.items():
        if not 0 <= int(state[name][0]) <= num_cases * math.ceil(bound * FIXED_POINT):
            raise _impossible(f"{name} is outside what {num_cases} cases can add up to")
    _check_histograms(state, plan)


def suppressed(
    state: Mapping[str, NDArray[np.int64]], plan: TrainingPlan, *, min_cases: int | None = None
) -> bool:
    """Tell whether a state rests on too few patients to be released.

    So it is when the number of cases, or of cases of any one label, is above 0 and below the floor. A
    label without cases is released: that says only that the site has none. Nothing is released in part;
    a state that is held back is missing from the global sum too, so it cannot be found by subtraction.

    Args:
        state: a state that passed `check_state`.
        plan: its plan.
        min_cases: the floor; the plan's own when not given. A site's policy may only raise it.
    """
    floor = max(plan.privacy.min_cases, min_cases or 0)
    counts = [int(state["num_cases"][0]), *(int(count) for count in state["confusion"].sum(axis=1))]
    return any(0 < count < floor for count in counts)


def suppress(state: State, plan: TrainingPlan) -> State | None:
    """Pass a state on, or None when it is `suppressed`."""
    return None if suppressed(state, plan) else state


def _predicted(scores: NDArray[np.float64], plan: TrainingPlan) -> NDArray[np.int64]:
    predicted: NDArray[np.int64] = scores.argmax(axis=1)
    if len(plan.task.labels) == 2:
        positive = plan.task.positive_index
        predicted = np.where(scores[:, positive] >= plan.evaluation.threshold, positive, 1 - positive)
    return predicted


def _squared_distance(
    scores: NDArray[np.float64], labels: NDArray[np.integer[Any]], plan: TrainingPlan
) -> NDArray[np.float64]:
    """Brier's distance of each case: the positive score's alone (0 to 1) or over all labels (0 to 2)."""
    truth = np.eye(len(plan.task.labels))[labels]
    columns = list(scored_labels(plan))
    distance: NDArray[np.float64] = np.square(scores[:, columns] - truth[:, columns]).sum(axis=1)
    return distance


def _check_predictions(
    scores: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]], num_labels: int
) -> None:
    if labels.ndim != 1 or scores.shape != (len(labels), num_labels):
        raise EvaluationError(
            f"scores {scores.shape} and labels {labels.shape}, expected (cases, {num_labels}) and (cases,)",
            remedy="Give one row of scores a case and one column a label of the plan.",
        )
    if not ((scores >= 0) & (scores <= 1)).all():
        raise EvaluationError(
            "a score is not a probability between 0 and 1",
            remedy="Training probably diverged: lower training.learning_rate in the plan.",
        )
    if not ((labels >= 0) & (labels < num_labels)).all():
        raise EvaluationError(
            f"a label is outside 0 to {num_labels - 1}",
            remedy="Give the label file the labels that the plan names.",
        )


def _check_histograms(state: Mapping[str, NDArray[np.int64]], plan: TrainingPlan) -> None:
    """Compare confusion matrix, histograms and number of cases with each other."""
    num_cases, labels = int(state["num_cases"][0]), list(scored_labels(plan))
    of_label = state["confusion"].sum(axis=1)
    if of_label.sum() != num_cases:
        raise _impossible(f"confusion matrix does not add up to {num_cases} cases")
    if (state["positives"].sum(axis=1) != of_label[labels]).any():
        raise _impossible("positives differ from the confusion matrix")
    if (state["negatives"].sum(axis=1) != num_cases - of_label[labels]).any():
        raise _impossible("negatives differ from the confusion matrix")
    if len(labels) > 1:
        return
    positive = labels[0]
    cell = int(cells_of(np.array([plan.evaluation.threshold]), plan.evaluation.score_bins)[0])
    for name, true_label in (("positives", positive), ("negatives", 1 - positive)):
        called_positive = state["confusion"][true_label, positive]
        if not state[name][0, cell + 1 :].sum() <= called_positive <= state[name][0, cell:].sum():
            raise _impossible(f"{name} by score contradict the confusion matrix at the threshold")


def _shapes(state: Mapping[str, NDArray[np.int64]]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in state.items()}


def _impossible(what: str) -> PayloadError:
    return PayloadError(
        f"metric state: {what}", remedy="Both sides must run the same plan and the same version of fedward."
    )
