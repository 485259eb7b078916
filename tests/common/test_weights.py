"""Packing, unpacking and the arithmetic on named arrays."""

from __future__ import annotations

import hashlib
import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError

from fedward_common.errors import PayloadError
from fedward_common.weights import (
    Layout,
    TensorSpec,
    Weights,
    all_finite,
    check,
    digest,
    l2_norm,
    layout_digest,
    num_bytes,
    pack,
    unpack,
)

LAYOUT: Layout = (
    TensorSpec(name="b", shape=(2, 2), kind="parameter"),
    TensorSpec(name="a", shape=(3,), kind="buffer"),
)
shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)


@st.composite
def layouts_with_weights(draw: st.DrawFn) -> tuple[Layout, Weights]:
    names = draw(st.lists(st.text(min_size=1, max_size=20), unique=True, max_size=5))
    layout: list[TensorSpec] = []
    weights: Weights = {}
    for name in names:
        shape = draw(shapes)
        layout.append(TensorSpec(name=name, shape=shape, kind=draw(st.sampled_from(["parameter", "buffer"]))))
        weights[name] = draw(hnp.arrays(np.float32, shape, elements=st.floats(width=32)))
    return tuple(layout), weights


def some_weights() -> Weights:
    return {
        "a": np.array([5, 6, 7], dtype=np.float32),
        "b": np.array([[1, 2], [3, 4]], dtype=np.float32),
    }


@given(layouts_with_weights())
def test_unpack_gives_back_every_bit_that_pack_took(case: tuple[Layout, Weights]) -> None:
    layout, weights = case
    payload = pack(weights, layout)
    assert len(payload) == num_bytes(layout)
    back = unpack(payload, layout)
    assert list(back) == [spec.name for spec in layout]
    for spec in layout:
        assert back[spec.name].shape == spec.shape
        assert back[spec.name].tobytes() == weights[spec.name].tobytes()


def test_pack_writes_little_endian_floats_in_the_layouts_order() -> None:
    assert pack(some_weights(), LAYOUT) == struct.pack("<7f", 1, 2, 3, 4, 5, 6, 7)


def test_pack_does_not_depend_on_how_the_array_lies_in_memory() -> None:
    weights = some_weights()
    turned = {**weights, "b": np.asfortranarray(weights["b"]), "a": np.repeat(weights["a"], 2)[::2]}
    assert pack(turned, LAYOUT) == pack(weights, LAYOUT)


def test_unpacked_arrays_are_read_only_views_of_the_payload() -> None:
    payload = pack(some_weights(), LAYOUT)
    arrays = unpack(payload, LAYOUT)
    whole = np.frombuffer(payload, dtype=np.uint8)
    for array in arrays.values():
        assert np.shares_memory(array, whole)
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


@pytest.mark.parametrize("change", [-4, -1, 1, 4])
def test_unpack_refuses_another_number_of_bytes(change: int) -> None:
    payload = pack(some_weights(), LAYOUT)
    other = payload[:change] if change < 0 else payload + b"\0" * change
    with pytest.raises(PayloadError, match=rf"{28 + change} bytes, the plan's layout has 28"):
        unpack(other, LAYOUT)


@pytest.mark.parametrize(
    ("weights", "fault"),
    [
        ({"b": np.zeros((2, 2), np.float32)}, r"1 tensors, 2 expected; names that differ: \['a'\]"),
        ({**some_weights(), "c": np.zeros(1, np.float32)}, r"names that differ: \['c'\]"),
        ({**some_weights(), "b": np.zeros((4,), np.float32)}, r"tensor b: float32 \(4,\)"),
        ({**some_weights(), "b": np.zeros((2, 2), np.float64)}, "tensor b: float64"),
        ({**some_weights(), "b": np.zeros((2, 2), ">f4")}, "tensor b: >f4"),
    ],
)
def test_pack_refuses_what_the_layout_does_not_list(weights: Weights, fault: str) -> None:
    with pytest.raises(PayloadError, match=fault):
        pack(weights, LAYOUT)
    with pytest.raises(PayloadError, match=fault):
        check(weights, LAYOUT)


def test_layout_digest_depends_on_name_shape_kind_and_order() -> None:
    first, second = LAYOUT
    variants: list[Layout] = [
        LAYOUT,
        (second, first),
        (first.model_copy(update={"name": "c"}), second),
        (first.model_copy(update={"shape": (4,)}), second),
        (first.model_copy(update={"kind": "buffer"}), second),
        (first,),
    ]
    assert len({layout_digest(layout) for layout in variants}) == len(variants)
    listing = b'[["b",[2,2],"parameter"],["a",[3],"buffer"]]'
    assert layout_digest(LAYOUT) == hashlib.sha256(listing).hexdigest()


def test_tensor_spec_forbids_unknown_keys_and_other_kinds() -> None:
    with pytest.raises(ValidationError):
        TensorSpec.model_validate({"name": "a", "shape": [1], "kind": "parameter", "dtype": "float32"})
    with pytest.raises(ValidationError):
        TensorSpec.model_validate({"name": "a", "shape": [1], "kind": "gradient"})


def test_size_of_a_tensor_without_dimensions_is_one() -> None:
    assert TensorSpec(name="a", shape=(), kind="parameter").size == 1
    assert TensorSpec(name="a", shape=(3, 0), kind="parameter").size == 0


def test_digest_is_sha256_of_the_bytes() -> None:
    payload = pack(some_weights(), LAYOUT)
    assert digest(payload) == digest(memoryview(payload)) == hashlib.sha256(payload).hexdigest()


@given(layouts_with_weights())
def test_norm_equals_an_exact_sum_of_squares(case: tuple[Layout, Weights]) -> None:
    _, weights = case
    finite: Weights = {name: np.nan_to_num(array) for name, array in weights.items()}
    exact = math.fsum(float(x) ** 2 for array in finite.values() for x in array.reshape(-1))
    assert l2_norm(finite) == pytest.approx(math.sqrt(exact), rel=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_is_found(value: float) -> None:
    weights = some_weights()
    assert all_finite(weights)
    weights["b"][1, 1] = value
    assert not all_finite(weights)
