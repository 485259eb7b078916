"""Aggregation of ten updates of 100 MB as they arrive, beside torch's float32 `add_` and Flower's.

Every method runs in a process of its own, in turn, several times; figures are medians over all laps. An
update is made in memory when it "arrives" (not timed) and dropped after it was added, so that each method
that can stream holds its sum and one update. Flower's function needs all updates at once.

The reference, `acc.add_(x, alpha=w)`, sums in float32; its result depends on the order of arrival, ours
does not. Both move 12 bytes an element between memory and processor, and both hold one model and one
update. Ours is told the largest value of each tensor, which admission measures when it looks for values
that are not finite or out of bounds; a server that checks nothing would save that: `admission_s`.

Ratios compare equal numbers of threads. Torch's threads wait for each other in a busy loop: whatever else
runs on the machine slows them far more than ours, so the ratio means something on a quiet machine only,
and the best laps mean more than the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run as a script, from anywhere

from fedward_common.weights import Layout, TensorSpec, Weights, unpack  # noqa: E402
from tests.benchmarks.surroundings import machine, versions  # noqa: E402

LAYER_MB = 4
METHODS = ("fedward_2_threads", "fedward_1_thread", "torch_2_threads", "torch_1_thread", "flower")


def a_layout(megabytes: int) -> Layout:
    shape = (LAYER_MB * 2**20 // 4,)
    return tuple(
        TensorSpec(name=f"layer{index}", shape=shape, kind="parameter")
        for index in range(megabytes // LAYER_MB)
    )


def arriving(layout: Layout, num_updates: int) -> Iterator[tuple[Weights, int]]:
    """Each update freshly in memory, as its bytes would be after they were received."""
    rng = np.random.default_rng(0)
    layer = rng.standard_normal(layout[0].size, dtype=np.float32) * np.float32(1e-2)
    for index in range(num_updates):
        payload = np.empty((len(layout), layer.size), dtype=np.float32)
        for number, row in enumerate(payload):
            np.multiply(layer, np.float32(1 + index / 8 + number / 64), out=row)
        update = unpack(payload.data.cast("B"), layout)
        del payload, row
        yield update, 1000 + index
        del update


def fedward(layout: Layout, num_updates: int, threads: int) -> dict[str, float]:
    from fedward_common.aggregation import RunningSum, largest_of

    start = time.perf_counter()
    total = RunningSum(layout, max_abs=64.0, max_cases=1_000_000, threads=threads)
    adding, admitting = time.perf_counter() - start, 0.0
    for delta, num_cases in arriving(layout, num_updates):
        start = time.perf_counter()
        largest = largest_of(delta)  # part of admission, which every update passes before it is added
        admitting += time.perf_counter() - start
        start = time.perf_counter()
        total.add(delta, num_cases, largest)
        adding += time.perf_counter() - start
        del delta  # or it would live on while the next one is made
    start = time.perf_counter()
    mean = total.mean()
    return {
        "add_s": adding,
        "finish_s": time.perf_counter() - start,
        "admission_s": admitting,
        "check": float(mean["layer0"][0]),
    }


def torch_add(layout: Layout, num_updates: int, threads: int) -> dict[str, float]:
    import torch

    torch.set_num_threads(threads)
    num_cases = sum(1000 + index for index in range(num_updates))
    start = time.perf_counter()
    total = {spec.name: torch.zeros(spec.shape) for spec in layout}
    adding = time.perf_counter() - start
    for delta, cases in arriving(layout, num_updates):
        start = time.perf_counter()
        for name, array in delta.items():
            total[name].add_(torch.from_numpy(array), alpha=cases / num_cases)
        adding += time.perf_counter() - start
        del delta, array
    return {"add_s": adding, "finish_s": 0.0, "check": float(total["layer0"][0])}


def flower(layout: Layout, num_updates: int) -> dict[str, float]:
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    records = [
        RecordDict(
            {
                "arrays": ArrayRecord({name: Array(array) for name, array in delta.items()}),
                "metrics": MetricRecord({"num-examples": cases}),
            }
        )
        for delta, cases in arriving(layout, num_updates)
    ]
    start = time.perf_counter()
    mean = aggregate_arrayrecords(records, "num-examples")
    return {
        "add_s": time.perf_counter() - start,
        "finish_s": 0.0,
        "check": float(mean["layer0"].numpy()[0]),
    }


def lap_of(method: str) -> Callable[[Layout, int], dict[str, float]]:
    name, _, threads = method.partition("_")
    if name == "flower":
        return flower
    count = int(threads[0])
    if name == "torch":
        return lambda layout, num_updates: torch_add(layout, num_updates, count)
    return lambda layout, num_updates: fedward(layout, num_updates, count)


def memory_kib(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{field}:"))


def child(method: str, num_updates: int, megabytes: int, laps: int) -> dict[str, Any]:
    """Laps of one method in this process, and the memory it needed beyond an idle one."""
    layout, lap = a_layout(megabytes), lap_of(method)
    lap(layout[:1], 1)  # imports and thread pools
    idle = memory_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    timings = [lap(layout, num_updates) for _ in range(laps)]
    return {"timings": timings, "extra_mb": (memory_kib("VmHWM") - idle) / 1024}


def run_child(method: str, options: argparse.Namespace) -> dict[str, Any]:
    sizes = [f"--updates={options.updates}", f"--mb={options.mb}", f"--laps={options.laps}"]
    done = subprocess.run(
        [sys.executable, __file__, "--child", method, *sizes],
        stdout=subprocess.PIPE,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def measure(options: argparse.Namespace) -> dict[str, Any]:
    timings: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    memory: dict[str, float] = {}
    for _ in range(options.turns):
        for method in METHODS:
            result = run_child(method, options)
            timings[method] += result["timings"]
            memory[method] = max(memory.get(method, 0.0), result["extra_mb"])
    checks = [lap["check"] for laps in timings.values() for lap in laps]
    if not np.allclose(checks, checks[0], rtol=1e-5):
        raise SystemExit("the methods disagree about the mean")
    figures = {method: _figures(laps, memory[method], options.mb) for method, laps in timings.items()}
    reference = {method: figures.pop(method) for method in METHODS if not method.startswith("fedward")}
    return {"figures": figures, "reference": reference, "ratio": _ratios({**figures, **reference})}


def _ratios(figures: dict[str, dict[str, float]]) -> dict[str, float]:
    """Ours over the others', medians and best laps."""
    pairs = {
        "two_threads_to_torch_two_threads": ("fedward_2_threads", "torch_2_threads"),
        "one_thread_to_torch_one_thread": ("fedward_1_thread", "torch_1_thread"),
        "two_threads_to_flower": ("fedward_2_threads", "flower"),
    }
    ratios = {}
    for name, (ours, theirs) in pairs.items():
        ratios[name] = round(figures[ours]["total_s"] / figures[theirs]["total_s"], 2)
        ratios[f"{name}_best_laps"] = round(figures[ours]["best_s"] / figures[theirs]["best_s"], 2)
    return ratios


def _figures(laps: list[dict[str, float]], extra_mb: float, megabytes: int) -> dict[str, float]:
    totals = [lap["add_s"] + lap["finish_s"] for lap in laps]
    admission = [lap["admission_s"] for lap in laps if "admission_s" in lap]
    return {
        "total_s": round(statistics.median(totals), 4),
        "best_s": round(min(totals), 4),
        "add_s": round(statistics.median(lap["add_s"] for lap in laps), 4),
        "finish_s": round(statistics.median(lap["finish_s"] for lap in laps), 4),
        **({"admission_s": round(statistics.median(admission), 4)} if admission else {}),
        "peak_mb_with_updates": round(extra_mb),
        "peak_in_models": round(extra_mb / megabytes, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="kept for uniformity: JSON is all there is")
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--mb", type=int, default=100, help="size of one update, a multiple of 4")
    parser.add_argument("--laps", type=int, default=3, help="laps of a method each time it has its turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--child", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child, options.updates, options.mb, options.laps)))
        return
    job = {"updates": options.updates, "mb_each": options.mb, "laps": options.laps * options.turns}
    print(
        json.dumps(
            {
                "benchmark": "aggregation",
                "job": job,
                **measure(options),
                "versions": versions(),
                "machine": machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
