"""Does the loader keep the trainer busy: images mapped from the cache against tensors in memory.

`cnn2d` is trained for one local epoch by the product's own trainer, on random images of one size that lie
in memory as one tensor (`memory`), that are mapped as float32 (`mapped`), and that are mapped as int16 and
converted batch by batch (`int16`): by turns, in the same run. The files lie in the system's cache.

`lost` is the part of the images per second that the mapped ones cost: the median over many short laps,
each compared with the one beside it. Processor seconds are of this process, all threads.

`waited` is the part of the time in which the trainer had no batch, as it waited for the next one. Training
takes the same arithmetic from the same values on either side, so what waits more is all that the loader can
lose; on a machine that does other work at the same time, this says more than the difference of two clocks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.surroundings import machine, versions  # noqa: E402


def case_sets(folder: Path, num_images: int, size: int) -> dict[str, Any]:
    """The same images in three places."""
    import torch

    from fedward_client.array_cache import open_arrays
    from fedward_client.array_shard import STEP, Row
    from fedward_client.case_set import CaseSet, StoredImages

    steps = np.random.default_rng(0).integers(-32767, 32768, (num_images, 1, size, size))
    images = steps.astype(np.float32) * STEP  # what int16 holds exactly
    rows = [Row(f"{number:064x}", (f"{number:064x}",)) for number in range(num_images)]
    labels = torch.arange(num_images) % 2
    ids = tuple(row.key for row in rows)
    numbers = range(num_images)
    mapped = open_arrays(folder, "a" * 64, rows, lambda rows: iter(images))
    halved = open_arrays(folder, "a" * 64, rows, lambda rows: iter(images), kind="int16")
    return {
        "memory": CaseSet(torch.from_numpy(images), labels, ids),
        "mapped": CaseSet(StoredImages(mapped, numbers), labels, ids),
        "int16": CaseSet(StoredImages(halved, numbers), labels, ids),
    }


def train_once(cases: Any, plan: Any, threads: int) -> tuple[dict[str, float], bytes]:
    """Seconds by the clock, of the processor, and without a batch; and the trained weights."""
    import torch

    from fedward_client import trainer
    from fedward_common.models import build_model

    waited_s = 0.0
    batches = trainer._batches

    def timed(*given: Any) -> Iterator[Any]:
        nonlocal waited_s
        coming = batches(*given)
        while True:
            start = time.perf_counter()
            batch = next(coming, None)
            waited_s += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    torch.manual_seed(0)
    model = build_model(plan)
    job = trainer.TrainingJob(plan=plan, round_index=1, seed=1, threads=threads)
    trainer._batches = timed  # type: ignore[assignment]
    clock, processor = time.perf_counter(), time.process_time()
    try:
        trainer.train(model, cases, job)
    finally:
        trainer._batches = batches
    took = {
        "clock": time.perf_counter() - clock,
        "processor": time.process_time() - processor,
        "waited": waited_s,
    }
    return took, b"".join(value.numpy().tobytes() for value in model.state_dict().values())


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All laps, and what comes of them."""
    from tests.builders import a_plan

    plan = a_plan(
        transforms={"name": "chest_xray", "size": (args.size, args.size)},
        training={"learning_rate": 0.01, "batch_size": args.batch},
    )
    sets = case_sets(folder, args.images, args.size)
    seconds: dict[str, dict[str, list[float]]] = {
        kind: {name: [] for name in sets} for kind in ("clock", "processor", "waited")
    }
    weights: dict[str, bytes] = {}
    for lap in range(args.laps + 1):
        for name in sorted(sets, reverse=bool(lap % 2)):
            took, weights[name] = train_once(sets[name], plan, args.threads)
            for kind in took if lap else ():  # the first warms up
                seconds[kind][name].append(took[kind])
    rates = {name: args.images / statistics.median(took) for name, took in seconds["clock"].items()}
    return {
        "seconds": seconds,
        "images_per_s": rates,
        "lost": {name: _lost(seconds["clock"], name) for name in ("mapped", "int16")},
        "lost_processor": {name: _lost(seconds["processor"], name) for name in ("mapped", "int16")},
        "waited": {name: sum(seconds["waited"][name]) / sum(seconds["clock"][name]) for name in sets},
        "same_weights": weights["mapped"] == weights["memory"],
    }


def _lost(seconds: dict[str, list[float]], name: str) -> float:
    """Median over the laps of what a lap costs more than the one beside it in memory."""
    pairs = zip(seconds["memory"], seconds[name], strict=True)
    return 1 - statistics.median(memory / mapped for memory, mapped in pairs)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--laps", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loader") as folder:
        document = measure(args, Path(folder))
    document = {"machine": machine(), "versions": versions(), "options": vars(args), **document}
    if args.json:
        print(json.dumps(document, indent=2))
        return
    for name, rate in document["images_per_s"].items():
        print(f"{name:8} {rate:8.1f} images/s")
    for name, lost in document["lost"].items():
        print(
            f"{name:8} loses {lost:.1%} by the clock, {document['lost_processor'][name]:.1%} of the processor"
        )
    for name, waited in document["waited"].items():
        print(f"{name:8} waits {waited:.2%} of the time for images")
    print("same weights" if document["same_weights"] else "OTHER WEIGHTS")


if __name__ == "__main__":
    main()
