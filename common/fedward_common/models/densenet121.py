"""DenseNet-121 of MONAI, the usual network for chest radiographs at 224 pixels; untrained weights.

Source: Huang et al. 2017, "Densely Connected Convolutional Networks"; Rajpurkar et al. 2017, "CheXNet".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from fedward_common.errors import PlanError
from fedward_common.models import ModelKind

if TYPE_CHECKING:
    from torch import nn

# four pooling steps after a first convolution with stride 2
_SMALLEST_SIDE = 32


class DenseNet121Options(BaseModel):
    """Options of the network.

    Attributes:
        dropout: fraction dropped after each dense layer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dropout: float = Field(default=0, ge=0, lt=1)


def build(options: DenseNet121Options, *, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Build the network for images `(channels, *size)` in 2-D or 3-D; it gives logits `(batch, num_outputs)`.

    Raises:
        PlanError: the image is smaller than the network's five halvings allow.
    """
    if min(input_shape[1:]) < _SMALLEST_SIDE:
        raise PlanError(
            f"model densenet121: {list(input_shape[1:])} pixels, at least {_SMALLEST_SIDE} a side expected",
            remedy="Set transforms.size to 32 or more a side, or use model cnn2d.",
        )
    from monai.networks.nets.densenet import DenseNet121

    from fedward_common.models.layers import Float32Linear

    model: nn.Module = DenseNet121(
        spatial_dims=len(input_shape) - 1,
        in_channels=input_shape[0],
        out_channels=num_outputs,
        dropout_prob=options.dropout,
    )
    head = model.get_submodule("class_layers")
    last = model.get_submodule("class_layers.out")
    outputs, features = last.get_parameter("weight").shape
    exact = Float32Linear(features, outputs)
    exact.load_state_dict(last.state_dict())
    setattr(head, "out", exact)  # noqa: B010  (mypy: nn.Module has no declared attribute `out`)
    return model


MODEL = ModelKind(name="densenet121", options=DenseNet121Options, build=build)
