"""Arithmetic on named arrays, and their fixed layout on the wire.

A `Layout` lists every tensor that travels: name, shape, order. It is part of the signed plan, so both
sides know before a message arrives how many bytes it has and where each tensor begins; a message has
no room for anything else. All tensors that travel are float32; integer buffers stay where they are.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from fedward_common.errors import PayloadError

Weights = dict[str, NDArray[np.float32]]


class TensorSpec(BaseModel, frozen=True, extra="forbid"):
    """One tensor that travels: its name in the model, its shape, and what it is to the optimiser."""

    name: str = Field(min_length=1, max_length=256)
    shape: tuple[int, ...]
    kind: Literal["parameter", "buffer"]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


Layout = tuple[TensorSpec, ...]


def layout_digest(layout: Layout) -> str:
    """SHA-256 (hex) of names, shapes, kinds and order."""
    listing = [[spec.name, list(spec.shape), spec.kind] for spec in layout]
    return hashlib.sha256(json.dumps(listing, separators=(",", ":")).encode()).hexdigest()


def num_bytes(layout: Layout) -> int:
    """Bytes of the packed tensors."""
    return 4 * sum(spec.size for spec in layout)


def pack(weights: Mapping[str, NDArray[np.float32]], layout: Layout) -> bytes:
    """Lay the tensors end to end as little-endian float32, in the layout's order.

    Raises:
        PayloadError: names or shapes differ from the layout.
    """
    check(weights, layout)
    return b"".join(np.ascontiguousarray(weights[spec.name], dtype="<f4").tobytes() for spec in layout)


def unpack(payload: bytes | memoryview, layout: Layout) -> Weights:
    """Read tensors laid end to end; the arrays are read-only views of `payload`.

    Raises:
        PayloadError: the number of bytes differs from the layout's.
    """
    if len(payload) != num_bytes(layout):
        raise PayloadError(
            f"payload has {len(payload)} bytes, the plan's layout has {num_bytes(layout)}",
            remedy="Both sides must run the same plan; check the plan digest on both.",
        )
    flat = np.frombuffer(payload, dtype="<f4")
    weights: Weights = {}
    start = 0
    for spec in layout:
        weights[spec.name] = flat[start : start + spec.size].reshape(spec.shape)
        start += spec.size
    return weights


def check(weights: Mapping[str, NDArray[np.float32]], layout: Layout) -> None:
    """Raise PayloadError unless names, shapes and dtype are exactly the layout's."""
    expected = {spec.name: spec.shape for spec in layout}
    if weights.keys() != expected.keys():
        odd = sorted(weights.keys() ^ expected.keys())[:3]
        raise PayloadError(
            f"{len(weights)} tensors, {len(expected)} expected; names that differ: {odd}",
            remedy="Use the model that the plan names.",
        )
    for name, array in weights.items():
        if array.shape != expected[name] or array.dtype != np.float32:
            raise PayloadError(
                f"tensor {name}: {array.dtype} {array.shape}, expected float32 {expected[name]}",
                remedy="Use the model that the plan names.",
            )


def digest(payload: bytes | memoryview) -> str:
    """SHA-256 (hex) of packed tensors."""
    return hashlib.sha256(payload).hexdigest()


def l2_norm(weights: Mapping[str, NDArray[np.float32]]) -> float:
    """Global L2 norm over all tensors together, accumulated in float64."""
    return math.sqrt(sum(float(np.square(array, dtype=np.float64).sum()) for array in weights.values()))


def all_finite(weights: Mapping[str, NDArray[np.float32]]) -> bool:
    """Whether every element of every tensor is finite."""
    return all(bool(np.isfinite(array).all()) for array in weights.values())
