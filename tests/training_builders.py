"""Small plans and synthetic cases for tests of models, transforms, trainer and evaluator."""

from __future__ import annotations

from typing import Any

import torch

from fedward_client.case_set import CaseSet
from fedward_common.plan import TrainingPlan, parse_plan


def a_training_plan(**parts: Any) -> TrainingPlan:
    """Build a valid plan of a tiny network; `parts` replace whole sections or are added to them."""
    document: dict[str, Any] = {
        "name": "test",
        "rounds": 4,
        "participation": {"quorum": 1},
        "task": {"labels": ["normal", "pneumonia"]},
        "transforms": {"size": (16, 16)},
        "model": {"name": "cnn2d", "options": {"channels": (4, 8), "dense": 16}},
        "training": {"learning_rate": 0.05, "batch_size": 8, "precision": "float32"},
    }
    for name, part in parts.items():
        section = document.get(name)
        document[name] = {**section, **part} if isinstance(section, dict) else part
    return parse_plan(document)


def some_cases(count: int, *, side: int = 16, seed: int = 0, signal: float = 1.0) -> CaseSet:
    """Make noise images in [-1, 1]; those with label 1 are brighter by `signal` in one quarter."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (count,), generator=generator)
    images = torch.randn((count, 1, side, side), generator=generator) * 0.3
    images[:, :, : side // 2, : side // 2] += signal * labels.view(-1, 1, 1, 1)
    return CaseSet(images.clamp(-1, 1), labels, tuple(f"case-{index}" for index in range(count)))
