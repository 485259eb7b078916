"""Every strategy against Flower's own on the same inputs, a hand-computed step, and one site alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedProx
from flwr.supercore.task_identity import TaskIdentity
from torch import nn

from fedward_common.aggregation import RunningSum
from fedward_common.errors import PlanError
from fedward_common.plan import Options
from fedward_common.registry import STRATEGIES
from fedward_common.strategies import State, Strategy
from fedward_common.weights import Layout, TensorSpec, Weights

LAYOUT: Layout = (
    TensorSpec(name="conv.weight", shape=(4, 3, 3), kind="parameter"),
    TensorSpec(name="conv.bias", shape=(4,), kind="parameter"),
    TensorSpec(name="temperature", shape=(), kind="parameter"),
)
SCALAR: Layout = (
    TensorSpec(name="w", shape=(1,), kind="parameter"),
    TensorSpec(name="running_var", shape=(1,), kind="buffer"),
)
CASES = (1452, 545, 2711)
FLOWERS: dict[str, Callable[[], FedAvg]] = {
    "fedavg": FedAvg,
    "fedprox": lambda: FedProx(proximal_mu=0.01),
    "fedadam": lambda: FedAdam(eta=0.05, beta_1=0.8, beta_2=0.95, tau=1e-3),
}
OPTIONS: dict[str, Options] = {
    "fedavg": {},
    "fedprox": {"mu": 0.01},
    "fedadam": {"learning_rate": 0.05, "beta_1": 0.8, "beta_2": 0.95, "tau": 1e-3},
}


def load(name: str) -> Strategy:
    strategy: Strategy = STRATEGIES.load(name)
    return strategy


def random_weights(layout: Layout, seed: int, scale: float) -> Weights:
    rng = np.random.default_rng(seed)
    return {
        spec.name: np.asarray(rng.standard_normal(spec.shape) * scale, dtype=np.float32) for spec in layout
    }


def a_pair(w: float, running_var: float) -> Weights:
    return {"w": np.full(1, w, np.float32), "running_var": np.full(1, running_var, np.float32)}


def mean_of(deltas: list[tuple[Weights, int]], layout: Layout) -> Weights:
    total = RunningSum(layout, max_abs=64.0, max_cases=1_000_000)
    for delta, num_cases in deltas:
        total.add(delta, num_cases)
    return total.mean()


def a_reply(trained: Weights, num_cases: int, site: int) -> Message:
    content = RecordDict(
        {
            "arrays": ArrayRecord({name: Array(np.asarray(array)) for name, array in trained.items()}),
            "metrics": MetricRecord({"num-examples": num_cases}),
        }
    )
    return Message(content, dst_node_id=site, message_type="train")


def ours(name: str, rounds: list[list[tuple[Weights, int]]], start: Weights, layout: Layout) -> Weights:
    strategy, weights = load(name), start
    state = strategy.initial_state(layout)
    for deltas in rounds:
        mean = mean_of(deltas, layout)
        weights, state = strategy.server_step(weights, mean, state, OPTIONS[name], layout)
    return weights


def flowers(name: str, rounds: list[list[tuple[Weights, int]]], start: Weights) -> Weights:
    """The same rounds through Flower's strategy, which averages models instead of changes."""
    strategy, weights = FLOWERS[name](), start
    for index, deltas in enumerate(rounds, start=1):
        if isinstance(strategy, FedAdam):  # configure_train, which needs connected nodes, does only this
            strategy.current_arrays = weights
        replies = [
            a_reply({key: weights[key] + delta[key] for key in weights}, cases, site)
            for site, (delta, cases) in enumerate(deltas, start=1)
        ]
        arrays, _ = strategy.aggregate_train(index, replies)
        assert arrays is not None
        weights = {key: np.asarray(array.numpy(), dtype=np.float32) for key, array in arrays.items()}
    return weights


@pytest.fixture
def _flower_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's messages ask which run and node the process belongs to."""
    for attribute in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, attribute, 1)


@pytest.mark.usefixtures("_flower_task")
@pytest.mark.parametrize("name", sorted(FLOWERS))
def test_strategy_equals_flowers_over_four_rounds(name: str) -> None:
    start = random_weights(LAYOUT, seed=0, scale=0.1)
    rounds = [
        [(random_weights(LAYOUT, 100 * index + site, 1e-2), cases) for site, cases in enumerate(CASES)]
        for index in range(1, 5)
    ]
    result, reference = ours(name, rounds, start, LAYOUT), flowers(name, rounds, start)
    moved = max(float(np.abs(result[key] - start[key]).max()) for key in result)
    assert moved > 5e-3
    for key, array in result.items():
        # Flower subtracts float32 models to get the change, which costs it about 1e-8 of 1e-2 a round.
        np.testing.assert_allclose(array, reference[key], rtol=0, atol=5e-7 if name == "fedadam" else 5e-8)


def test_fedavg_makes_the_hand_computed_two_site_step() -> None:
    deltas = [
        (a_pair(1.0, 0.5), 30),
        (a_pair(-1.0, 1.5), 10),
    ]
    start = a_pair(2.0, 1.0)
    # (30 * 1 - 10 * 1) / 40 = 0.5; (30 * 0.5 + 10 * 1.5) / 40 = 0.75
    assert ours("fedavg", [deltas], start, SCALAR) == {"w": [2.5], "running_var": [1.75]}


def test_fedadam_makes_the_hand_computed_two_site_steps() -> None:
    delta = a_pair(0.2, 0.5)
    other = a_pair(-0.2, 1.5)
    start = a_pair(2.0, 1.0)
    result = ours("fedadam", [[(delta, 30), (other, 10)]] * 2, start, SCALAR)
    d = 0.1  # (30 * 0.2 - 10 * 0.2) / 40
    m1, v1 = 0.2 * d, 0.05 * d**2
    first = 0.05 * math.sqrt(1 - 0.95**2) / (1 - 0.8**2) * m1 / (math.sqrt(v1) + 1e-3)
    m2, v2 = 0.8 * m1 + 0.2 * d, 0.95 * v1 + 0.05 * d**2
    second = 0.05 * math.sqrt(1 - 0.95**3) / (1 - 0.8**3) * m2 / (math.sqrt(v2) + 1e-3)
    np.testing.assert_allclose(result["w"], [2 + first + second], rtol=2e-7)
    np.testing.assert_array_equal(result["running_var"], [2.5])  # the plain mean, twice


@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
def test_one_site_alone_becomes_the_global_model(name: str) -> None:
    start = random_weights(LAYOUT, seed=0, scale=0.1)
    delta = random_weights(LAYOUT, seed=1, scale=1e-2)
    result = ours(name, [[(delta, 1570)]], start, LAYOUT)
    for key, array in result.items():
        np.testing.assert_allclose(array, start[key] + delta[key], rtol=0, atol=1e-8)


def test_fedadam_moves_one_site_along_its_own_change() -> None:
    start = random_weights(LAYOUT, seed=0, scale=0.1)
    delta = random_weights(LAYOUT, seed=1, scale=1e-2)
    result = ours("fedadam", [[(delta, 1570)]], start, LAYOUT)
    for key, array in result.items():
        clear = np.abs(delta[key]) > 1e-5
        np.testing.assert_array_equal(np.sign(array - start[key])[clear], np.sign(delta[key])[clear])


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_order_of_the_sites_changes_no_bit(name: str) -> None:
    start = random_weights(LAYOUT, seed=0, scale=0.1)
    deltas = [(random_weights(LAYOUT, site, 1e-2), cases) for site, cases in enumerate(CASES)]
    forward = ours(name, [deltas, deltas], start, LAYOUT)
    backward = ours(name, [deltas[::-1], deltas[::-1]], start, LAYOUT)
    assert {key: array.tobytes() for key, array in forward.items()} == {
        key: array.tobytes() for key, array in backward.items()
    }


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_step_keeps_layout_and_dtype_and_changes_no_argument(name: str) -> None:
    strategy = load(name)
    weights, delta = random_weights(LAYOUT, 0, 0.1), random_weights(LAYOUT, 1, 1e-2)
    state = strategy.initial_state(LAYOUT)
    before = copy.deepcopy((weights, delta, state))
    stepped, following = strategy.server_step(weights, delta, state, OPTIONS[name], LAYOUT)
    for old, new in zip(before, (weights, delta, state), strict=True):
        assert old.keys() == new.keys()
        assert all(np.array_equal(old[key], new[key]) for key in old)
    assert [(key, a.shape, a.dtype) for key, a in stepped.items()] == [
        (spec.name, spec.shape, np.dtype(np.float32)) for spec in LAYOUT
    ]
    assert {key: (a.shape, a.dtype) for key, a in following.items()} == {
        key: (a.shape, a.dtype) for key, a in state.items()
    }
    assert all(isinstance(array, np.ndarray) for array in (*stepped.values(), *following.values()))


def test_fedadam_continues_bit_for_bit_from_a_stored_state() -> None:
    strategy, options = load("fedadam"), OPTIONS["fedadam"]
    delta = random_weights(LAYOUT, 1, 1e-2)

    def step(weights: Weights, state: State) -> tuple[Weights, State]:
        return strategy.server_step(weights, delta, state, options, LAYOUT)

    weights, state = step(random_weights(LAYOUT, 0, 0.1), strategy.initial_state(LAYOUT))
    stored = {key: (array.tobytes(), array.shape) for key, array in state.items()}
    restored = {key: np.frombuffer(data, np.float32).reshape(shape) for key, (data, shape) in stored.items()}
    straight, resumed = step(weights, state), step(weights, restored)
    for left, right in zip(straight, resumed, strict=True):
        assert {key: array.tobytes() for key, array in left.items()} == {
            key: array.tobytes() for key, array in right.items()
        }
    assert straight[1]["step"].tolist() == [2.0]


def test_fedprox_gradient_equals_autograd_of_the_proximal_loss() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    images, labels = torch.randn(8, 5), torch.randint(0, 2, (8,))
    parameters = list(model.parameters())
    anchors = [parameter.detach() + 0.1 * torch.randn_like(parameter) for parameter in parameters]
    mu = 0.3

    loss = nn.functional.cross_entropy(model(images), labels)
    pull = sum(((w - w_global) ** 2).sum() for w, w_global in zip(parameters, anchors, strict=True))
    expected = torch.autograd.grad(loss + mu / 2 * pull, parameters)

    nn.functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
    rule = load("fedprox").adjust_gradients({"mu": mu})
    assert rule is not None
    rule(parameters, anchors)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_fedprox_leaves_parameters_without_a_gradient_alone() -> None:
    rule = load("fedprox").adjust_gradients({"mu": 1.0})
    assert rule is not None
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    rule([frozen], [torch.zeros(3)])
    assert frozen.grad is None


@pytest.mark.parametrize(("name", "options"), [("fedavg", {}), ("fedadam", {}), ("fedprox", {"mu": 0.0})])
def test_strategy_without_a_site_half_says_so(name: str, options: Options) -> None:
    assert load(name).adjust_gradients(options) is None


@pytest.mark.parametrize(
    ("name", "options", "fault"),
    [
        ("fedavg", {"momentum": 0.9}, "momentum: Extra inputs"),
        ("fedprox", {"mu": -0.1}, "mu: Input should be greater than or equal to 0"),
        ("fedprox", {"mu": "0.1"}, "mu: Input should be a valid number"),
        ("fedprox", {"mu": True}, "mu: Input should be a valid number"),
        ("fedadam", {"tau": 0.0}, "tau: Input should be greater than 0"),
        ("fedadam", {"beta_1": 1.0, "eta": 0.1}, "eta: Extra inputs"),
        ("fedadam", {"learning_rate": math.nan}, "learning_rate"),
    ],
)
def test_options_out_of_bounds_are_refused_by_name(name: str, options: Options, fault: str) -> None:
    strategy = load(name)
    with pytest.raises(PlanError, match=fault) as refusal:
        strategy.check(options)
    assert f"strategy {name}" in refusal.value.message
    assert "strategy.options" in refusal.value.remedy
    with pytest.raises(PlanError, match=fault):
        strategy.server_step({}, {}, {}, options, ())
    with pytest.raises(PlanError, match=fault):
        strategy.adjust_gradients(options)


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_options_may_be_whole_numbers_or_left_out(name: str) -> None:
    load(name).check({})
    load("fedprox").check({"mu": 1})
