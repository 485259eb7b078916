"""FedAvg: the next model is the old one plus the mean of the sites' changes.

With deltas weighted by cases this is the mean of the sites' models.

Source: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized
Data", algorithm 1.
"""

from __future__ import annotations

import numpy as np

from fedward_common.strategies import State, Strategy, StrategyOptions
from fedward_common.weights import Layout, Weights


class FedAvgOptions(StrategyOptions):
    """FedAvg has nothing to choose."""


def add_mean(
    weights: Weights, mean_delta: Weights, state: State, options: StrategyOptions, layout: Layout
) -> tuple[Weights, State]:
    """Add the mean change to every tensor, parameters and buffers alike."""
    del options
    # A sum of arrays without dimensions is a scalar; `asarray` keeps it an array.
    total = {spec.name: np.asarray(weights[spec.name] + mean_delta[spec.name]) for spec in layout}
    return total, state


STRATEGY = Strategy(name="fedavg", options=FedAvgOptions, step=add_mean)
