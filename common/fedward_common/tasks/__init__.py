"""What a network is trained to do: how many outputs it needs, its loss, and what its outputs mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedward_common.plan import TrainingPlan

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Task:
    """A task by name, as three functions.

    Args:
        name: what a plan calls it.
        num_outputs: outputs the network must have for a plan.
        loss: `(logits (batch, outputs), labels (batch,), plan) -> scalar`, the mean over the batch.
        scores: logits -> probabilities `(batch, classes)`, float32, rows adding to one.
    """

    name: str
    num_outputs: Callable[[TrainingPlan], int]
    loss: Callable[[torch.Tensor, torch.Tensor, TrainingPlan], torch.Tensor]
    scores: Callable[[torch.Tensor], torch.Tensor]
