"""The textbook image classifier: blocks of convolution, activation and pooling, then a dense layer.

Each block is `convolutions` x (Conv - normalisation - ReLU) and a 2x2 max pooling; all convolutions keep
the image's size. With `dense = 0` the last block is averaged over the image (any size fits, far fewer
weights travel); else its pixels feed a dense layer, which ties the weights to the plan's image size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from fedward_common.errors import PlanError
from fedward_common.models import ModelKind

if TYPE_CHECKING:
    from torch import nn

Width = Annotated[int, Field(ge=1, le=2048)]
Normalization = Literal["none", "batch", "group"]


class Cnn2dOptions(BaseModel):
    """Shape of the network.

    Attributes:
        channels: output channels of each block; their number is the number of blocks.
        kernel: side of the convolutions in pixels, odd.
        convolutions: convolutions a block.
        normalization: "batch" averages running statistics over sites; "group" has none, which is safer
            when sites differ much; "none" is the plain textbook network.
        dense: width of the dense layer; 0 averages over the image instead.
        dropout: fraction dropped before the last layer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    channels: tuple[Width, ...] = Field(default=(32, 64), min_length=1, max_length=8)
    kernel: Literal[1, 3, 5, 7] = 3
    convolutions: int = Field(default=1, ge=1, le=4)
    normalization: Normalization = "none"
    dense: int = Field(default=128, ge=0, le=8192)
    dropout: float = Field(default=0, ge=0, lt=1)


def build(options: Cnn2dOptions, *, input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Build the network for images `(channels, height, width)`; it gives logits `(batch, num_outputs)`.

    Raises:
        PlanError: the image is not 2-D, or too small for the number of blocks.
    """
    from torch import nn

    from fedward_common.models.layers import Float32Linear

    height, width = _pooled_size(options, input_shape)
    incoming = input_shape[0]
    layers: list[nn.Module] = []
    for channels in options.channels:
        layers.extend(_block(options, incoming, channels))
        incoming = channels
    if options.dense == 0:
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        features = incoming
    else:
        layers += [nn.Flatten(), nn.Linear(incoming * height * width, options.dense), nn.ReLU()]
        features = options.dense
    if options.dropout > 0:
        layers.append(nn.Dropout(options.dropout))
    layers.append(Float32Linear(features, num_outputs))
    return nn.Sequential(*layers)


def _block(options: Cnn2dOptions, incoming: int, channels: int) -> list[nn.Module]:
    from torch import nn

    layers: list[nn.Module] = []
    for _ in range(options.convolutions):
        normalized = options.normalization != "none"  # its own shift makes the convolution's bias idle
        layers.append(
            nn.Conv2d(incoming, channels, options.kernel, padding=options.kernel // 2, bias=not normalized)
        )
        if options.normalization == "batch":
            layers.append(nn.BatchNorm2d(channels))
        elif options.normalization == "group":
            layers.append(nn.GroupNorm(_num_groups(channels), channels))
        layers.append(nn.ReLU())
        incoming = channels
    layers.append(nn.MaxPool2d(2))
    return layers


def _num_groups(channels: int) -> int:
    """Give the largest divisor of `channels` up to 8."""
    return next(groups for groups in range(8, 0, -1) if channels % groups == 0)


def _pooled_size(options: Cnn2dOptions, input_shape: tuple[int, ...]) -> tuple[int, int]:
    shrink = 2 ** len(options.channels)
    if len(input_shape) != 3:
        raise PlanError(
            f"model cnn2d takes images, and the plan's transforms.size has {len(input_shape) - 1} numbers",
            remedy="Give two numbers in transforms.size, or a model for volumes.",
        )
    if min(input_shape[1:]) < shrink:
        raise PlanError(
            f"model cnn2d: {len(options.channels)} blocks need 2-D images of {shrink} pixels a side or more,"
            f" the plan has size {list(input_shape[1:])}",
            remedy="Use fewer entries in model.options.channels, or a larger transforms.size.",
        )
    return input_shape[1] // shrink, input_shape[2] // shrink


MODEL = ModelKind(name="cnn2d", options=Cnn2dOptions, build=build)
