"""The common job as an installed plugin: its network, its data and its training loop, unchanged.

`job.py` is the module that every framework's benchmark runs; here only the framework around it is
fedward's. Found through entry points, as any package that an operator installs.
"""

from __future__ import annotations

import os
import sys
import time
from importlib import import_module
from typing import Any

import torch
from pydantic import BaseModel

from fedward_client.case_set import CaseSet, Splits
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


def fit(model: torch.nn.Module, cases: CaseSet, training: TrainingJob) -> TrainingResult:
    """`job.fit` with the seed that every framework uses for this site and round."""
    index = _index(training.site)
    round_index = training.round_index - 1
    trace = os.environ.get("FEDWARD_BENCH_TRACE")
    started = time.time()
    job.trace(trace, ev="fit_start", site=index, r=round_index)
    job.fit(model, cases.images, cases.labels, 1000 * round_index + index)
    seconds = time.time() - started
    job.trace(trace, ev="fit_end", site=index, r=round_index, dt=seconds)
    return TrainingResult(num_cases=len(cases), mean_loss=0.0, num_steps=0, seconds=seconds)


def _cases(images: Any, labels: Any) -> CaseSet:
    ids = tuple(str(number) for number in range(len(labels)))
    return CaseSet(images=images.contiguous(), labels=labels, case_ids=ids)


def _index(site: str) -> int:
    return int(site.rsplit("-", 1)[1]) - 1
