"""The worker process: everything that touches images, and nothing that touches keys or the network.

`python -m fedward_client.worker CHANNEL LIFELINE` serves one request after another over an inherited
socket: open a cohort for a plan, train, evaluate. PyTorch and the decoders are loaded once and stay
warm between rounds. The daemon kills this process to cancel training; when the daemon itself dies, the
lifeline closes and the process ends with it, so no orphan ever trains on.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedward_client.framing import receive_frame, send_frame
from fedward_client.site_data import SiteData
from fedward_common.envelope import job_seed
from fedward_common.errors import (
    CohortError,
    EvaluationError,
    FederationError,
    OutboundError,
    PayloadError,
    PlanError,
    RefusalCode,
)
from fedward_common.plan import TrainingPlan, parse_any_plan, parse_plan, readiness_plan
from fedward_common.registry import DATASETS, STRATEGIES, TRAINERS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from fedward_client.case_set import CaseSet, Splits
    from fedward_common.weights import Layout


@dataclass
class OpenCohort:
    """One site's cases, held for one plan."""

    site: str
    plan: TrainingPlan
    splits: Splits
    layout: Layout
    model: nn.Module
    device: str
    threads: int
    strategy_hook: Any = field(repr=False, default=None)


class Worker:
    """Answers the daemon's requests; holds the open cohorts by site name."""

    def __init__(self) -> None:
        self._open: dict[str, OpenCohort] = {}
        self._operations = {
            "open": self._open_cohort,
            "initial": self._initial,
            "train": self._train,
            "evaluate": self._evaluate,
            "baseline": self._baseline,
            "survey": self._survey,
        }

    def answer(self, request: dict[str, Any], payload: bytearray) -> tuple[dict[str, Any], bytes]:
        """Do what `request` asks; the reply's header has `ok`, and a refusal code when it is false."""
        try:
            header, reply = self._operations[request["op"]](request, payload)
        except Exception as error:  # process edge: the daemon gets a number, the log gets the place
            return {"ok": False, "code": int(code_of(error)), "where": place_of(error)}, b""
        return {"ok": True, **header}, reply

    def _open_cohort(self, request: dict[str, Any], _: bytearray) -> tuple[dict[str, Any], bytes]:
        import torch

        from fedward_common.models import build_model, layout_of

        plan = parse_plan(request["plan"])
        site = SiteData(
            Path(request["home"]),
            Path(request["dicom"]),
            _path(request["labels"]),
            request.get("min_cases", 1),
        )
        if request["threads"] > 0:  # 0, the default of a site's settings: all cores, as PyTorch begins
            torch.set_num_threads(request["threads"])
        splits = DATASETS.load(plan.data.dataset)(plan, site)
        strategy = STRATEGIES.load(plan.strategy.name)
        self._open[request["site"]] = OpenCohort(
            site=request["site"],
            plan=plan,
            splits=splits,
            layout=layout_of(plan),
            model=build_model(plan),
            device=request["device"],
            threads=request["threads"],
            strategy_hook=strategy.adjust_gradients(plan.strategy.options),
        )
        counts = {name: len(getattr(splits, name).labels) for name in ("train", "validation", "test")}
        return {
            "counts": counts | {"quarantined": splits.num_quarantined},
            "left_out": splits.num_left_out,
        }, b""

    def _survey(self, request: dict[str, Any], _: bytearray) -> tuple[dict[str, Any], bytes]:
        from fedward_client.readiness import survey
        from fedward_common.state_payload import pack_state

        plan = readiness_plan(parse_any_plan(request["plan"]))
        site = SiteData(Path(request["home"]), Path(request["dicom"]), _path(request["labels"]))
        return {}, pack_state(survey(plan, site, min_cases=int(request["min_cases"])), plan)

    def _initial(self, request: dict[str, Any], _: bytearray) -> tuple[dict[str, Any], bytes]:
        from fedward_common.models import initial_weights, layout_of
        from fedward_common.weights import pack

        plan = parse_plan(request["plan"])
        layout = layout_of(plan)
        return {"layout": [spec.model_dump() for spec in layout]}, pack(initial_weights(plan), layout)

    def _train(self, request: dict[str, Any], payload: bytearray) -> tuple[dict[str, Any], bytes]:
        import numpy as np

        cohort = self._open[request["site"]]
        self._load(cohort, payload)
        result = self._fit(cohort, cohort.splits.train, request["round_index"], "train")
        trained = self._packed(cohort)
        delta = trained - np.frombuffer(payload, dtype="<f4")
        header = {"num_cases": result.num_cases, "mean_loss": result.mean_loss}
        return header, delta.astype("<f4", copy=False).tobytes()

    def _evaluate(self, request: dict[str, Any], payload: bytearray) -> tuple[dict[str, Any], bytes]:
        cohort = self._open[request["site"]]
        self._load(cohort, payload)
        return self._measure(cohort, request["split"])

    def _baseline(self, request: dict[str, Any], payload: bytearray) -> tuple[dict[str, Any], bytes]:
        cohort = self._open[request["site"]]
        self._load(cohort, payload)
        for round_index in range(1, cohort.plan.rounds + 1):
            self._fit(cohort, cohort.splits.train, round_index, "baseline")
        return self._measure(cohort, request["split"])

    def _load(self, cohort: OpenCohort, payload: bytearray) -> None:
        from fedward_common.models import load_weights
        from fedward_common.weights import unpack

        load_weights(cohort.model, unpack(memoryview(payload), cohort.layout))

    def _packed(self, cohort: OpenCohort) -> NDArray[np.float32]:
        import numpy as np

        from fedward_common.models import extract_weights
        from fedward_common.weights import pack

        return np.frombuffer(pack(extract_weights(cohort.model, cohort.layout), cohort.layout), dtype="<f4")

    def _fit(self, cohort: OpenCohort, cases: CaseSet, round_index: int, purpose: str) -> Any:
        from fedward_client.trainer import TrainingJob

        job = TrainingJob(
            plan=cohort.plan,
            site=cohort.site,
            round_index=round_index,
            seed=job_seed(cohort.plan, cohort.site, round_index, purpose),
            device=cohort.device,
            threads=cohort.threads,
            adjust_gradients=cohort.strategy_hook if purpose == "train" else None,
        )
        return TRAINERS.load(cohort.plan.training.trainer)(cohort.model, cases, job)

    def _measure(self, cohort: OpenCohort, split: str) -> tuple[dict[str, Any], bytes]:
        from fedward_client.evaluator import evaluate
        from fedward_common.state_payload import pack_state

        cases = getattr(cohort.splits, split)
        state = evaluate(cohort.model, cases, cohort.plan, cohort.device)
        return {}, pack_state(state, cohort.plan)


_CODES: dict[type[FederationError], RefusalCode] = {
    CohortError: RefusalCode.COHORT_UNUSABLE,
    PlanError: RefusalCode.PLAN_UNSUPPORTED,
    PayloadError: RefusalCode.PAYLOAD_MALFORMED,
    OutboundError: RefusalCode.OUTBOUND_BLOCKED,
    EvaluationError: RefusalCode.TRAINING_DIVERGED,
}


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def code_of(error: BaseException, otherwise: RefusalCode = RefusalCode.TRAINING_FAILED) -> RefusalCode:
    """The number that stands for an error; a library's exception is never quoted."""
    code = getattr(error, "code", None)
    if isinstance(code, RefusalCode):
        return code
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return RefusalCode.OUT_OF_MEMORY
    for kind, number in _CODES.items():
        if isinstance(error, kind):
            return number
    return otherwise


def place_of(error: BaseException) -> str:
    """Class of the error and the last of our own lines it passed, as one word for the site's log.

    The message is left out: it may quote what it could not read. An operator sees it on the terminal by
    running the failing step there (`fedward-site cohort index`, `fedward-site doctor`).
    """
    place = type(error).__name__
    trace = error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_globals.get("__name__", "")
        if module.startswith("fedward_"):
            place = f"{type(error).__name__}:{module}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def end_with(lifeline: int) -> None:
    """End this process, whatever it is doing, when the daemon's end of the pipe closes."""

    def wait() -> None:
        os.read(lifeline, 1)
        os._exit(0)

    threading.Thread(target=wait, daemon=True, name="lifeline").start()


def main() -> None:
    """Serve requests until the daemon closes the channel."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    end_with(int(sys.argv[2]))
    import torch  # noqa: F401  (the point of this process: loaded before the first request)

    worker = Worker()
    while True:
        try:
            request, payload = receive_frame(channel)
        except EOFError:
            return
        header, reply = worker.answer(request, payload)
        send_frame(channel, header, reply)


if __name__ == "__main__":
    main()
