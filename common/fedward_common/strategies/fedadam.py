"""FedAdam: Adam at the server, with the mean of the sites' changes in place of a gradient.

With d the mean delta, step t = 1, 2, ... and x the parameters:

    m = beta_1 * m + (1 - beta_1) * d          v = beta_2 * v + (1 - beta_2) * d**2
    x = x + rate * sqrt(1 - beta_2**(t+1)) / (1 - beta_1**(t+1)) * m / (sqrt(v) + tau)

m and v begin at zero. The paper's algorithm 2 has no correction for that beginning and starts v at
tau**2; this follows Flower 1.41, whose correction counts the first step as 2, so that the same plan
gives the same model here and there. Only parameters are stepped: running statistics of batch
normalisation are averages already, a variance could even turn negative, and they take the plain mean
(Flower steps them too). tau stands outside the square root, as in the paper.

Source: Reddi et al. 2021, "Adaptive Federated Optimization", algorithm 2; flwr.serverapp.strategy.FedAdam.
"""

from __future__ import annotations

import math

import numpy as np
from pydantic import Field

from fedward_common.strategies import State, Strategy, StrategyOptions
from fedward_common.weights import Layout, Weights

_STEP = "step"


class FedAdamOptions(StrategyOptions):
    """Server optimiser.

    Attributes:
        learning_rate: eta of the paper.
        beta_1: decay of the mean of the changes.
        beta_2: decay of the mean of their squares.
        tau: least denominator: how little the step adapts. Small changes need a small tau.
    """

    learning_rate: float = Field(default=0.1, gt=0, le=10)
    beta_1: float = Field(default=0.9, ge=0, lt=1)
    beta_2: float = Field(default=0.99, ge=0, lt=1)
    tau: float = Field(default=1e-3, gt=0, le=1)


def _initial_state(layout: Layout) -> State:
    state: State = {_STEP: np.zeros(1, dtype=np.float32)}  # a count; exact far beyond 10,000 rounds
    for spec in layout:
        if spec.kind == "parameter":
            state[f"m/{spec.name}"] = np.zeros(spec.shape, dtype=np.float32)
            state[f"v/{spec.name}"] = np.zeros(spec.shape, dtype=np.float32)
    return state


def _adam_step(
    weights: Weights, mean_delta: Weights, state: State, options: FedAdamOptions, layout: Layout
) -> tuple[Weights, State]:
    count = int(state[_STEP][0]) + 1
    correction = math.sqrt(1 - options.beta_2 ** (count + 1)) / (1 - options.beta_1 ** (count + 1))
    rate = options.learning_rate * correction
    stepped: Weights = {}
    following: State = {_STEP: np.full(1, count, dtype=np.float32)}
    for spec in layout:
        name, delta = spec.name, mean_delta[spec.name]
        if spec.kind == "buffer":
            stepped[name] = np.asarray(weights[name] + delta)
            continue
        mean = options.beta_1 * state[f"m/{name}"] + (1 - options.beta_1) * delta
        square = options.beta_2 * state[f"v/{name}"] + (1 - options.beta_2) * delta**2
        step = rate * mean / (np.sqrt(square) + options.tau)
        stepped[name] = np.asarray(weights[name] + step, dtype=np.float32)
        following[f"m/{name}"] = np.asarray(mean, dtype=np.float32)
        following[f"v/{name}"] = np.asarray(square, dtype=np.float32)
    return stepped, following


STRATEGY = Strategy(name="fedadam", options=FedAdamOptions, step=_adam_step, initial_state=_initial_state)
