"""Build the network that a plan names, and carry its weights to and from the plan's layout.

Both sides use this: the coordinator to sign the layout and to make the first global model, a site to
train. The layout lists parameters and floating-point buffers in the order of the model's `state_dict`;
integer buffers (counters of BatchNorm) stay where they are, for they carry nothing that averages.

PyTorch is imported only when a model is built: checking a plan's options needs none of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from fedward_common import weights as named_arrays
from fedward_common.errors import PlanError
from fedward_common.plan import TrainingPlan
from fedward_common.registry import MODELS, TASKS, TRANSFORMS
from fedward_common.weights import Layout, TensorSpec, Weights

if TYPE_CHECKING:
    from torch import nn

# build(options, input_shape=(channels, *size), num_outputs=classes)
Build = Callable[..., "nn.Module"]


@dataclass(frozen=True)
class ModelKind:
    """A network by name: its options, and how it is built.

    Args:
        name: what a plan calls it.
        options: pydantic model of `plan.model.options`; unknown keys must be forbidden.
        build: `(options, *, input_shape, num_outputs) -> nn.Module`; `input_shape` is `(channels, *size)`.
            The network gives logits `(batch, num_outputs)`, without softmax.
    """

    name: str
    options: type[BaseModel]
    build: Build

    def check(self, options: dict[str, Any]) -> BaseModel:
        """Parse a plan's options.

        Raises:
            PlanError: an unknown option or a value out of bounds; every fault is named.
        """
        try:
            return self.options.model_validate(dict(options))
        except ValidationError as error:
            faults = "; ".join(
                f"{'.'.join(str(step) for step in fault['loc']) or 'options'}: {fault['msg']}"
                for fault in error.errors(include_url=False)
            )
            raise PlanError(
                f"model {self.name}: {faults}",
                remedy=f"Correct [model.options]; known: {', '.join(sorted(self.options.model_fields))}.",
            ) from error


def build_model(plan: TrainingPlan) -> nn.Module:
    """Build the plan's network with initial weights drawn from `plan.seed` alone, on the CPU.

    The caller's random state is left as it was. Every machine with the same PyTorch gets the same bits.

    Raises:
        PlanError: unknown model, bad options, or a size that the network cannot take.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(plan.seed)
        return _build(plan)


def layout_of(plan: TrainingPlan) -> Layout:
    """List the tensors of the plan's network without allocating them; see `build_model` for the errors."""
    import torch

    with torch.device("meta"):
        return _layout(_build(plan))


def initial_weights(plan: TrainingPlan) -> Weights:
    """Give the weights that round 1 starts from: a function of the plan alone."""
    model = build_model(plan)
    return extract_weights(model, _layout(model))


def load_weights(model: nn.Module, weights: Weights) -> None:
    """Copy named arrays into the model in place, whatever its device or memory format.

    Raises:
        PayloadError: names or shapes differ from the model's; the model is then unchanged.
    """
    import torch

    named_arrays.check(weights, _layout(model))
    tensors = model.state_dict()
    with torch.no_grad():
        for name, array in weights.items():
            tensors[name].copy_(torch.tensor(array))


def extract_weights(model: nn.Module, layout: Layout) -> Weights:
    """Copy the model's tensors out, in the layout's order.

    Raises:
        PayloadError: names or shapes differ from the layout.
    """
    tensors = model.state_dict()
    weights: Weights = {
        spec.name: tensors[spec.name].detach().cpu().contiguous().clone().numpy()
        for spec in layout
        if spec.name in tensors
    }
    named_arrays.check(weights, layout)
    return weights


def _build(plan: TrainingPlan) -> nn.Module:
    kind: ModelKind = MODELS.load(plan.model.name)
    channels: int = TRANSFORMS.load(plan.transforms.name).channels
    num_outputs: int = TASKS.load(plan.task.name).num_outputs(plan)
    options = kind.check(plan.model.options)
    return kind.build(options, input_shape=(channels, *plan.transforms.size), num_outputs=num_outputs)


def _layout(model: nn.Module) -> Layout:
    parameters = {name for name, _ in model.named_parameters()}
    return tuple(
        TensorSpec(name=name, shape=tuple(tensor.shape), kind="parameter" if name in parameters else "buffer")
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point()
    )
