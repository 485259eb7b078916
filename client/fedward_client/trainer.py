"""Train the global model on a site's own cases for one round (hop 5).

The loop is the textbook one: shuffle, augment, forward, loss, backward, step. What it promises beyond
that: everything random comes from `job.seed`, so that a simulated site and a real one give the same bits
on the same kind of CPU with the same threads; no step waits for data; numbers that are not finite
and exhausted memory end as an error with a code, never as an update.

The random state of PyTorch belongs to the process (dropout draws from it): one training at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from fedward_client.case_set import CaseSet
from fedward_client.compute import Compute, choose, memory_errors_named, threads
from fedward_common.errors import RefusalCode, TrainingError
from fedward_common.plan import TrainingPart, TrainingPlan
from fedward_common.registry import TASKS, TRANSFORMS
from fedward_common.tasks import Task

if TYPE_CHECKING:
    from fedward_common.transforms import Augment

# so that augmentation and batch order, which are drawn side by side, have streams of their own
_AUGMENTATION = 0x5EED_0A06
# a check waits for the device, so it is not made at every step
_STEPS_BETWEEN_CHECKS = 50

GradientHook = Callable[[list[Parameter], list[Tensor]], None]


@dataclass(frozen=True)
class TrainingJob:
    """One site's work in one round.

    Attributes:
        plan: the signed plan.
        round_index: 1 for the first round.
        seed: everything random in this job follows from it.
        device: "auto", or a PyTorch device.
        threads: CPU threads; 0 leaves PyTorch's setting.
        adjust_gradients: the strategy's site half: called before every step with the trainable parameters
            (gradients filled in) and their values at the start of the round, in the same order.
        site: the site's name, for trainers that keep a file per site.
    """

    plan: TrainingPlan
    round_index: int
    seed: int
    device: str = "auto"
    threads: int = 0
    adjust_gradients: GradientHook | None = None
    site: str = ""


@dataclass(frozen=True)
class TrainingResult:
    """What one round's training was: `mean_loss` is over every case seen, in nats."""

    num_cases: int
    mean_loss: float
    num_steps: int
    seconds: float


def train(model: nn.Module, cases: CaseSet, job: TrainingJob) -> TrainingResult:
    """Train `model` in place for the plan's local epochs.

    Args:
        model: holds the global weights; moved to the job's device.
        cases: the site's training split.
        job: what to do; see `TrainingJob`.

    Raises:
        TrainingError: no cases, loss or weights not finite (code TRAINING_DIVERGED), or no memory left
            (code OUT_OF_MEMORY). The model's weights are then of no use.
    """
    if len(cases) == 0:
        raise TrainingError(
            "no training cases at this site",
            remedy="Check the cohort with: fedward-site cohort index",
            code=RefusalCode.COHORT_TOO_SMALL,
        )
    started = time.monotonic()
    compute = choose(job.device, job.plan.training.precision)
    with threads(job.threads), memory_errors_named(), _randomness_from(job.seed, compute.device):
        compute.place_model(model, cases.images.dim())
        total_loss, num_steps = _run_epochs(model, cases, job, compute)
    num_cases = len(cases)
    return TrainingResult(
        num_cases=num_cases,
        mean_loss=total_loss / (num_cases * job.plan.training.local_epochs),
        num_steps=num_steps,
        seconds=time.monotonic() - started,
    )


def learning_rate_at(training: TrainingPart, rounds: int, round_index: int, progress: float) -> float:
    """Give the learning rate at a moment of the whole run.

    Args:
        training: gives the first rate and the schedule; "cosine" falls to 0 at the end of the last round.
        rounds: rounds of the run.
        round_index: 1 for the first round.
        progress: fraction of this round's steps that are done.

    Source of "cosine": Loshchilov and Hutter 2017, "SGDR", without restarts.
    """
    if training.schedule == "constant":
        return training.learning_rate
    done = (round_index - 1 + progress) / rounds
    cosine = torch.tensor(done * torch.pi, dtype=torch.float64).cos().item()
    return training.learning_rate * (1 + cosine) / 2


def batch_indices(num_cases: int, batch_size: int, generator: torch.Generator) -> list[Tensor]:
    """Shuffle the cases and cut them into batches.

    A last batch of one case joins the one before it: BatchNorm has no variance over a single case.
    """
    batches = list(torch.randperm(num_cases, generator=generator).split(batch_size))  # type: ignore[no-untyped-call]
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def make_optimizer(parameters: list[Parameter], training: TrainingPart) -> torch.optim.Optimizer:
    """Make the plan's optimiser; its state lives for one round: a site keeps nothing between rounds."""
    rate, decay = training.learning_rate, training.weight_decay
    fused = parameters[0].device.type in ("cpu", "cuda")  # Adam's step takes an eighth of the time, fused
    if training.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=rate, weight_decay=decay, fused=fused)
    if training.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=fused)
    return torch.optim.SGD(parameters, lr=rate, momentum=training.momentum, weight_decay=decay)


def _run_epochs(model: nn.Module, cases: CaseSet, job: TrainingJob, compute: Compute) -> tuple[float, int]:
    """Train for all local epochs; give the sum of the losses of all cases seen, and the number of steps."""
    task: Task = TASKS.load(job.plan.task.name)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    anchors = [parameter.detach().clone() for parameter in parameters] if job.adjust_gradients else []
    optimizer = make_optimizer(parameters, job.plan.training)
    model.train()
    total_loss = torch.zeros((), device=compute.device)
    num_steps = 0
    for rate, images, labels in _batches(cases, job, compute):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        with compute.autocast():
            logits = model(images)
        loss = task.loss(logits, labels, job.plan)
        loss.backward()  # type: ignore[no-untyped-call]
        if job.adjust_gradients is not None:
            job.adjust_gradients(parameters, anchors)
        optimizer.step()
        total_loss += loss.detach() * len(labels)
        num_steps += 1
        if num_steps % _STEPS_BETWEEN_CHECKS == 0:
            _require_finite(total_loss)
    _require_finite(total_loss, *model.state_dict().values())
    return float(total_loss), num_steps


def _batches(cases: CaseSet, job: TrainingJob, compute: Compute) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Give the learning rate, the augmented images and the labels of every step of the round."""
    training = job.plan.training
    augment: Augment | None = TRANSFORMS.load(job.plan.transforms.name).augment(job.plan)
    order = torch.Generator().manual_seed(job.seed)
    changes = torch.Generator().manual_seed(job.seed ^ _AUGMENTATION)
    for epoch in range(training.local_epochs):
        batches = batch_indices(len(cases), training.batch_size, order)
        for position, indices in enumerate(batches):
            progress = (epoch + position / len(batches)) / training.local_epochs
            rate = learning_rate_at(training, job.plan.rounds, job.round_index, progress)
            images = cases.images[indices].to(compute.device)
            if position + 1 < len(batches):
                cases.will_need(batches[position + 1])
            if augment is not None:
                images = augment(images, changes)
            yield rate, compute.place_batch(images), cases.labels[indices].to(compute.device)


def _require_finite(*tensors: Tensor) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise TrainingError(
            "training produced numbers that are not finite",
            remedy="Ask the coordinator for a plan with a lower learning_rate.",
            code=RefusalCode.TRAINING_DIVERGED,
        )


@contextmanager
def _randomness_from(seed: int, device: torch.device) -> Iterator[None]:
    """Seed PyTorch for the job and put its state back afterwards."""
    devices = [device.index or 0] if device.type == "cuda" else []
    reproducible = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
    with torch.random.fork_rng(devices=devices), reproducible:
        torch.manual_seed(seed)
        yield
