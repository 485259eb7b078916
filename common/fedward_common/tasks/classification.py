"""One label a case, two or more classes: softmax and cross-entropy, with the plan's label smoothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedward_common.plan import TrainingPlan
from fedward_common.tasks import Task

if TYPE_CHECKING:
    import torch


def num_outputs(plan: TrainingPlan) -> int:
    """Give one output a label."""
    return len(plan.task.labels)


def loss(logits: torch.Tensor, labels: torch.Tensor, plan: TrainingPlan) -> torch.Tensor:
    """Compute the mean cross-entropy of a batch in nats, in float32.

    Args:
        logits: `(batch, classes)`.
        labels: int64 `(batch,)`.
        plan: gives `training.label_smoothing`.
    """
    from torch.nn import functional

    smoothing = plan.training.label_smoothing
    return functional.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


def scores(logits: torch.Tensor) -> torch.Tensor:
    """Turn logits into probabilities `(batch, classes)` in float32."""
    return logits.float().softmax(dim=1)


TASK = Task(name="classification", num_outputs=num_outputs, loss=loss, scores=scores)
