"""Layers shared by the networks."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class Float32Linear(nn.Linear):
    """Last layer of a classifier, computed in float32 also where the rest runs in bfloat16.

    Bfloat16 has 8 significant bits: logits in it would tie thousands of cases with each other, and
    AUROC counts ties as half. The layer is small, so the exact one costs nothing.
    """

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Give logits `(batch, classes)` for features `(batch, width)`."""
        with torch.autocast(features.device.type, enabled=False):
            return functional.linear(features.float(), self.weight, self.bias)
