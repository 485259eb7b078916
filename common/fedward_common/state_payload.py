"""Additive counts on the wire, of metrics or of a survey: int64, end to end, in the plan's layout."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedward_common.errors import PayloadError
from fedward_common.evaluation.state import state_layout
from fedward_common.plan import ReadinessPlan, TrainingPlan
from fedward_common.readiness_state import survey_layout

Plan = TrainingPlan | ReadinessPlan


def state_bytes(plan: Plan) -> int:
    """Bytes of one packed state."""
    return 8 * sum(math.prod(shape) for shape in _layout(plan).values())


def pack_state(state: Mapping[str, NDArray[np.int64]], plan: Plan) -> bytes:
    """Lay the counts end to end as little-endian int64, in the plan's order.

    Raises:
        PayloadError: names, shapes or dtype differ from the plan's.
    """
    layout = _layout(plan)
    fits = {name: array.shape for name, array in state.items()} == layout
    if not fits or any(array.dtype != np.int64 for array in state.values()):
        raise PayloadError("state does not have the plan's layout", remedy="Report this as a fault.")
    return b"".join(np.ascontiguousarray(state[name], dtype="<i8").tobytes() for name in layout)


def unpack_state(payload: bytes | bytearray | memoryview, plan: Plan) -> dict[str, NDArray[np.int64]]:
    """Read packed counts; the arrays are views of `payload`.

    Raises:
        PayloadError: the number of bytes differs.
    """
    if len(payload) != state_bytes(plan):
        raise PayloadError(
            f"state has {len(payload)} bytes, expected {state_bytes(plan)}",
            remedy="Both sides must run the same plan and the same version of fedward.",
        )
    flat = np.frombuffer(payload, dtype="<i8")
    state: dict[str, NDArray[np.int64]] = {}
    start = 0
    for name, shape in _layout(plan).items():
        size = math.prod(shape)
        state[name] = flat[start : start + size].reshape(shape)
        start += size
    return state


def _layout(plan: Plan) -> dict[str, tuple[int, ...]]:
    return survey_layout(plan) if isinstance(plan, ReadinessPlan) else state_layout(plan)
