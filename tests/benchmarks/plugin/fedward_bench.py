"""The common job as an installed plugin: its network, its data and its training loop, unchanged.

`job.py` is the module that every framework's benchmark runs; here only the framework around it is
fedward's. Found through entry points, as any package that an operator installs. For the same job through
DICOM and our own trainer it adds the trace, and a way to give that trainer the job's order and seeds.

Whichever part of it a plan names, importing it also has the worker's evaluation write the trace.
"""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel

from fedward_client import evaluator, trainer
from fedward_client.case_set import CaseSet, Splits
from fedward_client.dataset import open_dicom_folder
from fedward_client.site_data import SiteData
from fedward_client.trainer import TrainingJob, TrainingResult
from fedward_common.models import ModelKind
from fedward_common.plan import TrainingPlan

sys.path.insert(0, os.environ["FEDWARD_BENCH"])
job: Any = import_module("job")


class _NoOptions(BaseModel, frozen=True, extra="forbid"):
    pass


def _net(options: BaseModel, *, input_shape: tuple[int, ...], num_outputs: int) -> torch.nn.Module:
    del options, input_shape, num_outputs
    network: torch.nn.Module = job.net()
    return network


MODEL = ModelKind(name="common_job", options=_NoOptions, build=_net)


def open_npz(plan: TrainingPlan, site: SiteData) -> Splits:
    """Site i of n: part i of the IID split of train, and every n-th test image to measure on."""
    del plan
    data = job.load(os.environ["FEDWARD_BENCH_DATA"])
    num_sites = int(os.environ.get("FEDWARD_BENCH_SITES", "3"))
    index = _index(site.home.parent.name if site.home.name == "home" else site.home.name)
    images, labels = data["train"]
    part = job.split(labels, num_sites)[index]
    held_out = _cases(*(tensor[index::num_sites] for tensor in data["test"]))
    return Splits(train=_cases(images[part], labels[part]), validation=held_out, test=held_out)


def open_dicom_in_job_order(plan: TrainingPlan, site: SiteData) -> Splits:
    """The site's DICOM images, those for training in the order in which `job.fit` has them.

    A site orders its cases by the digest of their files; the job orders them as they lie in the `.npz`.
    """
    splits = open_dicom_folder(plan, site)
    wanted = open_npz(plan, site).train
    found: dict[tuple[bytes, int], list[int]] = defaultdict(list)
    for row, label in enumerate(splits.train.labels.tolist()):
        found[splits.train.images[row].numpy().tobytes(), label].append(row)
    # pop raises unless every image of the job is there with the same pixels, to the last bit
    order = [
        found[image.numpy().tobytes(), label].pop()
        for image, label in zip(wanted.images, wanted.labels.tolist(), strict=True)
    ]
    return replace(splits, train=_cases(splits.train.images[order], splits.train.labels[order]))


def fit(model: torch.nn.Module, cases: CaseSet, training: TrainingJob) -> TrainingResult:
    """`job.fit` with the seed that every framework uses for this site and round."""
    started = time.time()
    _trace("fit_start", training)
    job.fit(model, cases.images, cases.labels, _job_seed(training))
    seconds = time.time() - started
    _trace("fit_end", training)
    return TrainingResult(num_cases=len(cases), mean_loss=0.0, num_steps=0, seconds=seconds)


def train(model: torch.nn.Module, cases: CaseSet, training: TrainingJob) -> TrainingResult:
    """Our own trainer, with the trace."""
    _trace("fit_start", training)
    result = trainer.train(model, cases, training)
    _trace("fit_end", training)
    return result


def train_with_job_seeds(model: torch.nn.Module, cases: CaseSet, training: TrainingJob) -> TrainingResult:
    """Our own trainer with the seed that `job.fit` has for this site and round."""
    return train(model, cases, replace(training, seed=_job_seed(training)))


def traced_evaluation(
    model: torch.nn.Module, cases: CaseSet, plan: TrainingPlan, device: str
) -> dict[str, NDArray[np.int64]]:
    """The evaluator, with the trace."""
    trace = os.environ.get("FEDWARD_BENCH_TRACE")
    job.trace(trace, ev="eval_start")
    state = _evaluate(model, cases, plan, device)
    job.trace(trace, ev="eval_end")
    return state


# There is no registry of evaluators, so the worker's is replaced; it looks the function up at each call.
_evaluate = evaluator.evaluate
evaluator.evaluate = traced_evaluation


def _trace(event: str, training: TrainingJob) -> None:
    path = os.environ.get("FEDWARD_BENCH_TRACE")
    job.trace(path, ev=event, site=_index(training.site), r=training.round_index - 1)


def _job_seed(training: TrainingJob) -> int:
    return 1000 * (training.round_index - 1) + _index(training.site)


def _cases(images: Any, labels: Any) -> CaseSet:
    ids = tuple(str(number) for number in range(len(labels)))
    return CaseSet(images=images.contiguous(), labels=labels, case_ids=ids)


def _index(site: str) -> int:
    return int(site.rsplit("-", 1)[1]) - 1
