"""Local training with our defaults (precision "auto") beside float32: speed-up and effect on AUC.

The common job of all frameworks (PneumoniaMNIST, three sites, five rounds of FedAvg, one thread), with the
same first weights, the same order of cases and our own trainer, in one process: only training is timed, in
seconds of the processor, which on an idle machine is the time on the clock. The settings take turns site by
site, so that a busy machine slows all alike. With the first seed two bare PyTorch loops run as well:
`job.fit` as it is, and the fastest setting known, bfloat16 and channels-last.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from fedward_client.case_set import CaseSet  # noqa: E402
from fedward_client.compute import choose  # noqa: E402
from fedward_client.evaluator import predict  # noqa: E402
from fedward_client.trainer import TrainingJob, train  # noqa: E402
from fedward_common.models import build_model, extract_weights, layout_of, load_weights  # noqa: E402
from fedward_common.plan import TrainingPlan, parse_plan  # noqa: E402
from fedward_common.weights import Weights  # noqa: E402
from tests.benchmarks.surroundings import (  # noqa: E402
    bench_folder,
    machine,
    pneumoniamnist,
    require_shared,
    versions,
)

ROUNDS, SITES = 5, 3
Fit = Callable[[torch.nn.Module, CaseSet, int, int], None]


def the_plan(precision: str, seed: int) -> TrainingPlan:
    return parse_plan(
        {
            "name": "training-defaults",
            "rounds": ROUNDS,
            "seed": seed,
            "participation": {"quorum": SITES},
            "task": {"labels": ["normal", "pneumonia"]},
            "transforms": {"size": (28, 28)},
            "model": {"name": "cnn2d", "options": {"channels": (32, 64), "dense": 128}},
            "training": {"learning_rate": 0.01, "momentum": 0.9, "batch_size": 64, "precision": precision},
        }
    )


def ours(precision: str, seed: int) -> Fit:
    plan = the_plan(precision, seed)

    def fit(model: torch.nn.Module, cases: CaseSet, round_index: int, job_seed: int) -> None:
        train(model, cases, TrainingJob(plan, round_index, job_seed, device="cpu", threads=1))

    return fit


def bare_float32(job: Any) -> Fit:
    def fit(model: torch.nn.Module, cases: CaseSet, round_index: int, job_seed: int) -> None:
        job.fit(model, cases.images, cases.labels, job_seed)

    return fit


def bare_bfloat16(model: torch.nn.Module, cases: CaseSet, round_index: int, job_seed: int) -> None:
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    order = torch.randperm(len(cases), generator=torch.Generator().manual_seed(job_seed))
    for batch in order.split(64):  # type: ignore[no-untyped-call]
        optimizer.zero_grad(set_to_none=True)
        images = cases.images[batch].contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(images), cases.labels[batch])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def federate(fits: dict[str, Fit], sites: list[CaseSet], test: CaseSet, seed: int) -> dict[str, Any]:
    """Run FedAvg once per setting, side by side; give seconds of training and AUC a round."""
    from sklearn.metrics import roc_auc_score

    plan = the_plan("float32", seed)
    model, layout = build_model(plan), layout_of(plan)
    weights: dict[str, Weights] = {name: extract_weights(model, layout) for name in fits}
    figures: dict[str, Any] = {name: {"seconds": 0.0, "auc": []} for name in fits}
    total = sum(len(site) for site in sites)
    for round_index in range(1, ROUNDS + 1):
        sums = {name: {spec.name: np.zeros(spec.shape) for spec in layout} for name in fits}
        for number, site in enumerate(sites):
            for name, fit in fits.items():
                load_weights(model, weights[name])
                started = time.process_time()
                fit(model, site, round_index, 1000 * (round_index - 1) + number + 77_777 * seed)
                figures[name]["seconds"] += time.process_time() - started
                for tensor, array in extract_weights(model, layout).items():
                    sums[name][tensor] += array.astype(np.float64) * (len(site) / total)
        for name in fits:
            weights[name] = {tensor: array.astype(np.float32) for tensor, array in sums[name].items()}
            load_weights(model, weights[name])
            scores = predict(model, test, plan, "cpu")[:, 1]
            figures[name]["auc"].append(float(roc_auc_score(test.labels.numpy(), scores)))
    return figures


def measure(job: Any, data: Path, seeds: list[int]) -> dict[str, Any]:
    torch.set_num_threads(1)
    splits = job.load(data)
    images, labels = splits["train"]
    sites = [a_case_set(images[part], labels[part]) for part in job.split(labels, SITES)]
    test = a_case_set(*splits["test"])
    for fit in (ours("float32", 0), ours("auto", 0)):  # the first step of a process prepares its kernels
        fit(build_model(the_plan("float32", 0)), a_case_set(images[:64], labels[:64]), 1, 0)
    by_seed = []
    for seed in seeds:
        fits = {"float32": ours("float32", seed), "auto": ours("auto", seed)}
        if seed == seeds[0]:
            fits |= {"bare_float32": bare_float32(job), "bare_bfloat16": bare_bfloat16}
        by_seed.append(federate(fits, sites, test, seed))
    return summary(by_seed, len(images) * ROUNDS)


def summary(by_seed: list[dict[str, Any]], num_images: int) -> dict[str, Any]:
    rates = {
        name: mean(num_images / run[name]["seconds"] for run in by_seed if name in run) for name in by_seed[0]
    }
    last = {name: [run[name]["auc"][-1] for run in by_seed] for name in ("float32", "auto")}
    first = {name: num_images / figures["seconds"] for name, figures in by_seed[0].items()}
    compute = choose("cpu", "auto")
    return {
        "figures": {
            "chosen": {"bfloat16": compute.bfloat16, "channels_last": compute.channels_last},
            "images_per_s": {name: round(rates[name], 1) for name in ("float32", "auto")},
            "auc_last_round": {name: [round(auc, 4) for auc in values] for name, values in last.items()},
            "auc_difference_mean": round(mean(last["auto"]) - mean(last["float32"]), 4),
            "auc_by_round_first_seed": {
                name: [round(auc, 4) for auc in figures["auc"]] for name, figures in by_seed[0].items()
            },
        },
        "reference": {
            "images_per_s_first_seed": {
                name: round(first[name], 1) for name in ("bare_float32", "bare_bfloat16")
            },
        },
        "ratio": {
            "auto_over_float32": round(rates["auto"] / rates["float32"], 3),
            "auto_over_fastest_bare_loop": round(
                first["auto"] / max(first["bare_float32"], first["bare_bfloat16"]), 3
            ),
        },
    }


def a_case_set(images: torch.Tensor, labels: torch.Tensor) -> CaseSet:
    return CaseSet(images, labels, tuple(str(number) for number in range(len(labels))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="kept for uniformity: JSON is all there is")
    parser.add_argument("--bench", type=Path, default=bench_folder(), help="folder with job.py")
    parser.add_argument("--data", type=Path, default=pneumoniamnist(), help="pneumoniamnist.npz")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    require_shared(bench=arguments.bench, data=arguments.data)
    sys.path.insert(0, str(arguments.bench))
    import job  # type: ignore[import-not-found]  # not part of the project

    figures = measure(job, arguments.data, arguments.seeds)
    print(
        json.dumps(
            {"benchmark": "training_defaults", **figures, "versions": versions(), "machine": machine()}
        )
    )


if __name__ == "__main__":
    main()
