"""Measure a model on a site's own held-out cases (hop 10): counts that add up over sites, no scores."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedward_client.case_set import CaseSet
from fedward_client.compute import choose, memory_errors_named
from fedward_common.evaluation.state import state_of
from fedward_common.plan import TrainingPlan
from fedward_common.registry import TASKS
from fedward_common.tasks import Task


def evaluate(
    model: nn.Module, cases: CaseSet, plan: TrainingPlan, device: str
) -> dict[str, NDArray[np.int64]]:
    """Score every case and return the additive metric state of `fedward_common.evaluation.state`.

    Args:
        model: moved to the device; left in evaluation mode.
        cases: one split; none at all gives a state of zeros.
        plan: gives the arithmetic (the same as in training), the task and the metrics.
        device: "auto", or a PyTorch device.

    Raises:
        TrainingError: the device is not there, or its memory is not enough.
    """
    return state_of(predict(model, cases, plan, device), cases.labels.numpy(), plan)


def predict(model: nn.Module, cases: CaseSet, plan: TrainingPlan, device: str) -> NDArray[np.float32]:
    """Give the probabilities `(cases, classes)`; they stay at the site. See `evaluate` for the rest."""
    task: Task = TASKS.load(plan.task.name)
    compute = choose(device, plan.training.precision)
    model.eval()
    scores = [torch.zeros(0, task.num_outputs(plan))]
    with memory_errors_named():
        # outside inference mode: tensors made within it could never be trained again
        compute.place_model(model, cases.images.dim())
    with memory_errors_named(), torch.inference_mode():
        # what fits in training fits here: the same batch size
        for images in cases.images.split(plan.training.batch_size):
            with compute.autocast():
                logits = model(compute.place_batch(images))
            scores.append(task.scores(logits).cpu())
    probabilities: NDArray[np.float32] = torch.cat(scores).numpy()
    return probabilities
