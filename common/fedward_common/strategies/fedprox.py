"""FedProx: FedAvg with a pull of each site's parameters towards the global model.

The site minimises its loss plus mu/2 * |w - w_global|**2, whose gradient is mu * (w - w_global): that
is added to the gradients before each optimiser step, which is cheaper than a second term in the loss
and independent of how the loss is computed. The server half is FedAvg's.

Source: Li et al. 2020, "Federated Optimization in Heterogeneous Networks", equation 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from fedward_common.strategies import GradientRule, Strategy, StrategyOptions
from fedward_common.strategies.fedavg import add_mean


class FedProxOptions(StrategyOptions):
    """How strongly a site is held to the global model; 0 is FedAvg."""

    mu: float = Field(default=0.01, ge=0, le=100)


def _proximal_rule(options: FedProxOptions) -> GradientRule | None:
    if options.mu == 0:
        return None

    def pull_to_anchors(parameters: Sequence[Any], anchors: Sequence[Any]) -> None:
        for parameter, anchor in zip(parameters, anchors, strict=True):
            if parameter.grad is not None:  # a frozen or unused parameter has none
                parameter.grad.add_(parameter.detach() - anchor, alpha=options.mu)

    return pull_to_anchors


STRATEGY = Strategy(name="fedprox", options=FedProxOptions, step=add_mean, gradient_rule=_proximal_rule)
