"""Worker processes for tests: real ones on a tiny cohort, and scripted ones that misbehave."""

from __future__ import annotations

import stat
import sys
from pathlib import Path
from typing import Any

from fedward_client.site_data import SiteData
from fedward_client.worker_process import WorkerProcess
from fedward_common.plan import TrainingPlan, parse_plan
from fedward_common.weights import Layout, TensorSpec
from tests.builders import a_site

NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 12, 6, 6


def a_small_plan(**changes: Any) -> TrainingPlan:
    """A network of some hundred weights on images of 16 x 16; keyword tables are merged in."""
    document: dict[str, Any] = {
        "name": "small",
        "rounds": 2,
        "seed": 3,
        "participation": {"quorum": 1},
        "task": {"labels": ("normal", "pneumonia")},
        "transforms": {"size": (16, 16)},
        "model": {"name": "cnn2d", "options": {"channels": (2, 4), "dense": 4}},
        "training": {"learning_rate": 0.05, "batch_size": 4, "precision": "float32"},
        "privacy": {"min_cases": 2},
        "evaluation": {"score_bins": 16},
    }
    for name, change in changes.items():
        default = document.get(name)
        document[name] = {**default, **change} if isinstance(default, dict) else change
    return parse_plan(document)


def a_divided_site(folder: Path, **elements: Any) -> SiteData:
    """A site of 24 patients with one image each, half of them for training."""

    def side(patient: int) -> str:
        if patient < NUM_TRAIN:
            return "train"
        return "validation" if patient < NUM_TRAIN + NUM_VALIDATION else "test"

    return a_site(folder, num_patients=24, images_per_patient=1, split=side, **elements)


def open_request(site: SiteData, plan: TrainingPlan, name: str = "north", threads: int = 1) -> dict[str, Any]:
    """Ask a worker to open a cohort."""
    return {
        "op": "open",
        "site": name,
        "plan": plan.model_dump(mode="json"),
        "home": str(site.home),
        "dicom": str(site.dicom),
        "labels": str(site.labels),
        "threads": threads,
        "device": "cpu",
    }


def untrained(worker: WorkerProcess, plan: TrainingPlan) -> tuple[Layout, bytes]:
    """Layout and first weights, as the worker makes them."""
    header, payload = worker.call({"op": "initial", "plan": plan.model_dump(mode="json")})
    return tuple(TensorSpec.model_validate(spec) for spec in header["layout"]), bytes(payload)


def a_scripted_program(path: Path, script: str) -> Path:
    """An executable that stands in for the Python that runs a worker; `channel` is its socket.

    The script sees `channel`, `receive()` (one request) and `reply(header, payload)`.
    """
    path.write_text(
        f"""#!{sys.executable} -P
import json, os, socket, struct, sys, threading, time
sys.path[:0] = {sys.path!r}
channel = socket.socket(fileno=int(sys.argv[4]))
lifeline = int(sys.argv[5])
threading.Thread(target=lambda: (os.read(lifeline, 1), os._exit(0)), daemon=True).start()
from fedward_client.framing import receive_frame, send_frame
receive = lambda: receive_frame(channel)
reply = lambda header, payload=b"": send_frame(channel, header, payload)
hang = lambda: threading.Event().wait()
{script}
"""
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path
