"""Every figure of one state: what the server computes, the records keep and the report shows.

With two labels, the figures are the positive label's. With more, each label is measured against the
rest and the figure is the plain mean over labels (macro), defined only when it is for every label.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from fedward_common.evaluation.grid import FIXED_POINT
from fedward_common.evaluation.metrics.confusion import accuracy, counts_of, mean, ratio
from fedward_common.evaluation.metrics.ranking import auroc, average_precision, roc_points
from fedward_common.plan import TrainingPlan

State = dict[str, NDArray[np.int64]]
Share = float | None
_SHARE = Field(ge=0, le=1)


class _Figures(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    num_cases: int = Field(ge=0)
    num_positives: int | None = Field(ge=0)
    recall: Share = _SHARE
    specificity: Share = _SHARE
    precision: Share = _SHARE
    f1: Share = _SHARE
    auroc: Share = _SHARE
    auroc_error_bound: Share = _SHARE
    average_precision: Share = _SHARE


class LabelSummary(_Figures):
    """Figures of one label against the rest; None where a figure is not defined.

    Attributes:
        label: the label's name in the plan.
        recall: sensitivity.
        auroc: from the score grid; the exact value is at most `auroc_error_bound` away.
        average_precision: of the scores on the grid.
        roc: points (false positive rate, true positive rate), possibly thinned, or none.
    """

    label: str
    roc: tuple[tuple[float, float], ...] = ()


class MetricSummary(_Figures):
    """All figures of one split at one site, or of all sites together; None where one is not defined.

    Attributes:
        num_positives: cases of the positive label; None with more than two labels.
        balanced_accuracy: mean recall over all labels.
        log_loss: mean of -ln(score of the true label), in nats.
        brier: mean squared distance to the truth; 0 to 1 with two labels, 0 to 2 with more.
        confusion: rows true label, columns predicted label, in the plan's order.
        labels: the positive label alone, or every label.
    """

    accuracy: Share = _SHARE
    balanced_accuracy: Share = _SHARE
    log_loss: float | None = Field(ge=0)
    brier: float | None = Field(ge=0, le=2)
    confusion: tuple[tuple[int, ...], ...]
    labels: tuple[LabelSummary, ...]

    @property
    def roc(self) -> tuple[tuple[float, float], ...]:
        """ROC points of the positive label; empty with more than two labels (see `labels`)."""
        return self.labels[0].roc if len(self.labels) == 1 else ()


def scored_labels(plan: TrainingPlan) -> tuple[int, ...]:
    """Indices of the labels whose scores are counted: the positive one of two, or every one."""
    return (plan.task.positive_index,) if len(plan.task.labels) == 2 else tuple(range(len(plan.task.labels)))


def summarise(
    state: Mapping[str, NDArray[np.int64]], plan: TrainingPlan, *, num_roc_points: int = 101
) -> MetricSummary:
    """Compute every figure of a state.

    Args:
        state: of one site, or a sum of several; must have passed `check_state` when it came from elsewhere.
        plan: the plan it was counted for.
        num_roc_points: at most this many points a ROC curve; 0 leaves the curves out (records of rounds).
    """
    confusion = state["confusion"]
    labels = tuple(
        _summarise_label(state, plan, row, label, num_roc_points)
        for row, label in enumerate(scored_labels(plan))
    )
    binary = len(labels) == 1
    num_cases = int(state["num_cases"][0])
    return MetricSummary(
        num_cases=num_cases,
        num_positives=labels[0].num_positives if binary else None,
        accuracy=accuracy(confusion),
        balanced_accuracy=mean([counts_of(confusion, label).recall for label in range(len(confusion))]),
        recall=mean([label.recall for label in labels]),
        specificity=mean([label.specificity for label in labels]),
        precision=mean([label.precision for label in labels]),
        f1=mean([label.f1 for label in labels]),
        auroc=mean([label.auroc for label in labels]),
        auroc_error_bound=mean([label.auroc_error_bound for label in labels]),
        average_precision=mean([label.average_precision for label in labels]),
        log_loss=ratio(int(state["log_loss"][0]), num_cases * FIXED_POINT),
        brier=ratio(int(state["brier"][0]), num_cases * FIXED_POINT),
        confusion=tuple(tuple(int(count) for count in row) for row in confusion),
        labels=labels,
    )


def _summarise_label(
    state: Mapping[str, NDArray[np.int64]], plan: TrainingPlan, row: int, label: int, num_roc_points: int
) -> LabelSummary:
    counts = counts_of(state["confusion"], label)
    positives, negatives = state["positives"][row], state["negatives"][row]
    area, bound = auroc(positives, negatives) or (None, None)
    return LabelSummary(
        label=plan.task.labels[label],
        num_cases=int(state["num_cases"][0]),
        num_positives=counts.positives,
        recall=counts.recall,
        specificity=counts.specificity,
        precision=counts.precision,
        f1=counts.f1,
        auroc=area,
        auroc_error_bound=bound,
        average_precision=average_precision(positives, negatives),
        roc=roc_points(positives, negatives, num_roc_points),
    )
