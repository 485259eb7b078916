"""What makes an aggregation algorithm: its half at the site and its half at the server, in one file.

A strategy takes part twice in a round. At the site (hop 5) it may change the gradients of a training
step; at the server (hop 9) it turns the mean of the sites' deltas into the next global model. Between
rounds it keeps nothing but `State`, named float32 arrays that go into the checkpoint, so a resumed run
continues exactly. The round loop knows none of the strategies by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from fedward_common.errors import PlanError
from fedward_common.weights import Layout, Weights

State = Weights
# Parameters with their gradients, and the global weights they started the round with: torch tensors,
# which this module does not import so that a server can aggregate without torch.
GradientRule = Callable[[Sequence[Any], Sequence[Any]], None]


class StrategyOptions(BaseModel):
    """Base of every strategy's options: unknown names and text for a number are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def no_state(layout: Layout) -> State:  # noqa: ARG001 - the signature is the strategies'
    """State of a strategy that remembers nothing between rounds."""
    return {}


def no_gradient_rule(options: Any) -> GradientRule | None:  # noqa: ARG001 - the signature is the strategies'
    """Site half of a strategy that leaves local training as it is."""
    return None


@dataclass(frozen=True)
class Strategy:
    """One aggregation algorithm; a plan's options are checked before either half sees them.

    Args:
        name: the name in the registry.
        options: model of the options that a plan may give.
        step: server half: (weights, mean delta, state, options, layout) to (new weights, new state).
            It changes none of its arguments.
        initial_state: state before the first round, from the layout.
        gradient_rule: site half: options to a function that changes gradients in place, or None.
    """

    name: str
    options: type[StrategyOptions]
    step: Callable[[Weights, Weights, State, Any, Layout], tuple[Weights, State]]
    initial_state: Callable[[Layout], State] = no_state
    gradient_rule: Callable[[Any], GradientRule | None] = no_gradient_rule

    def check(self, options: Mapping[str, Any]) -> None:
        """Raise PlanError, naming every fault, unless the strategy accepts the plan's options."""
        self._parse(options)

    def server_step(
        self,
        weights: Weights,
        mean_delta: Weights,
        state: State,
        options: Mapping[str, Any],
        layout: Layout,
    ) -> tuple[Weights, State]:
        """Make the next global model.

        Args:
            weights: the global model that the sites started from.
            mean_delta: mean of the sites' changes, weighted by cases.
            state: what the previous step returned, or `initial_state(layout)`.
            options: `plan.strategy.options`.
            layout: which tensors are parameters and which are buffers.

        Raises:
            PlanError: the options are not valid.
        """
        return self.step(weights, mean_delta, state, self._parse(options), layout)

    def adjust_gradients(self, options: Mapping[str, Any]) -> GradientRule | None:
        """Give the function a trainer calls between backward and optimiser step; None when there is none.

        The function takes the parameters and, in the same order, the global weights of this round.
        """
        return self.gradient_rule(self._parse(options))

    def _parse(self, options: Mapping[str, Any]) -> StrategyOptions:
        try:
            return self.options.model_validate(dict(options))
        except ValidationError as error:
            faults = "; ".join(
                f"{'.'.join(str(step) for step in fault['loc'])}: {fault['msg']}"
                for fault in error.errors(include_url=False)
            )
            known = ", ".join(self.options.model_fields) or "none"
            raise PlanError(
                f"options of strategy {self.name}: {faults}",
                remedy=f"Correct strategy.options in the plan; known here: {known}.",
            ) from error
