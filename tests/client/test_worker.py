"""The worker process: what it computes, how it ends, and that whatever it says ends as a number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fedward_client import worker_process
from fedward_client.dataset import open_dicom_folder
from fedward_client.evaluator import evaluate
from fedward_client.site_data import SiteData
from fedward_client.trainer import TrainingJob, train
from fedward_client.worker import code_of, place_of
from fedward_client.worker_process import WorkerProcess, WorkError
from fedward_common.envelope import job_seed
from fedward_common.errors import (
    CohortError,
    EvaluationError,
    FederationError,
    PayloadError,
    PlanError,
    PlanRefusedError,
    RefusalCode,
    TrainingError,
)
from fedward_common.models import build_model, extract_weights, initial_weights, layout_of, load_weights
from fedward_common.state_payload import pack_state
from fedward_common.weights import pack, unpack
from tests.client.site_workers import (
    NUM_TEST,
    NUM_TRAIN,
    NUM_VALIDATION,
    a_divided_site,
    a_scripted_program,
    a_small_plan,
    open_request,
    untrained,
)
from tests.integration.deployment import alive, wait_for

PLAN = a_small_plan()
ENDLESS = a_small_plan(rounds=10_000, training={"local_epochs": 100})


@pytest.fixture(scope="module")
def worker() -> Iterator[WorkerProcess]:
    made = WorkerProcess()
    made.start()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> SiteData:
    return a_divided_site(tmp_path_factory.mktemp("worker") / "north")


@pytest.fixture(scope="module")
def base(worker: WorkerProcess, site: SiteData) -> bytes:
    """The untrained model; the site's cohort is open."""
    worker.call(open_request(site, PLAN))
    return untrained(worker, PLAN)[1]


def trained_here(site: SiteData, base: bytes, rounds: list[int], purpose: str) -> torch.nn.Module:
    """The model after training in this process, with the library's own functions."""
    model = build_model(PLAN)
    load_weights(model, unpack(base, layout_of(PLAN)))
    cases = open_dicom_folder(PLAN, site).train
    for index in rounds:
        seed = job_seed(PLAN, "north", index, purpose)
        train(model, cases, TrainingJob(PLAN, index, seed, device="cpu", threads=1))
    return model


def counted_here(model: torch.nn.Module, site: SiteData, split: str) -> bytes:
    cases = getattr(open_dicom_folder(PLAN, site), split)
    return pack_state(evaluate(model, cases, PLAN, "cpu"), PLAN)


def test_opening_a_cohort_gives_the_number_of_cases_for_each_purpose(
    worker: WorkerProcess, site: SiteData
) -> None:
    header, payload = worker.call(open_request(site, PLAN))
    counts = {"train": NUM_TRAIN, "validation": NUM_VALIDATION, "test": NUM_TEST, "quarantined": 0}
    assert header == {"ok": True, "counts": counts, "left_out": 0}
    assert payload == b""


def test_a_side_with_fewer_patients_than_the_floor_is_in_no_count(
    worker: WorkerProcess, site: SiteData
) -> None:
    header, _ = worker.call(open_request(site, PLAN, name="floor") | {"min_cases": NUM_VALIDATION + 1})
    counts = {"train": NUM_TRAIN, "validation": 0, "test": 0, "quarantined": 0}
    assert header == {"ok": True, "counts": counts, "left_out": NUM_VALIDATION + NUM_TEST}


def test_a_cohort_opens_with_the_default_settings_of_a_site(worker: WorkerProcess, site: SiteData) -> None:
    header, _ = worker.call(open_request(site, PLAN, name="default", threads=0))
    assert header["counts"]["train"] == NUM_TRAIN


def test_the_untrained_model_is_the_one_that_the_plan_describes(worker: WorkerProcess) -> None:
    layout, payload = untrained(worker, PLAN)
    assert layout == layout_of(PLAN)
    assert payload == pack(initial_weights(PLAN), layout)


@pytest.mark.parametrize("round_index", [1, 2])
def test_an_update_is_the_change_by_local_training_to_the_bit(
    worker: WorkerProcess, site: SiteData, base: bytes, round_index: int
) -> None:
    request = {"op": "train", "site": "north", "round_index": round_index, "split": "validation"}
    header, payload = worker.call(request, base)
    after = pack(
        extract_weights(trained_here(site, base, [round_index], "train"), layout_of(PLAN)), layout_of(PLAN)
    )
    expected = np.frombuffer(after, "<f4") - np.frombuffer(base, "<f4")
    assert payload == expected.tobytes()
    assert np.any(expected)
    assert header["num_cases"] == NUM_TRAIN
    assert 0 < header["mean_loss"] < 2


@pytest.mark.parametrize("split", ["validation", "test"])
def test_metric_counts_are_those_of_the_model_that_was_sent(
    worker: WorkerProcess, site: SiteData, base: bytes, split: str
) -> None:
    request = {"op": "evaluate", "site": "north", "round_index": 1, "split": split}
    _, payload = worker.call(request, base)
    assert payload == counted_here(trained_here(site, base, [], "train"), site, split)


def test_the_model_trained_alone_is_trained_as_long_as_the_global_one(
    worker: WorkerProcess, site: SiteData, base: bytes
) -> None:
    request = {"op": "baseline", "site": "north", "round_index": 0, "split": "test"}
    _, payload = worker.call(request, base)
    alone = trained_here(site, base, list(range(1, PLAN.rounds + 1)), "baseline")
    assert payload == counted_here(alone, site, "test")


@pytest.mark.parametrize(
    ("request_", "payload", "code"),
    [
        ({"op": "train", "site": "stranger", "round_index": 1}, b"", RefusalCode.TRAINING_FAILED),
        ({"op": "train", "site": "north", "round_index": 1}, b"1234", RefusalCode.PAYLOAD_MALFORMED),
        ({"op": "shell"}, b"", RefusalCode.TRAINING_FAILED),
        ({}, b"", RefusalCode.TRAINING_FAILED),
        ({"op": "initial", "plan": {"name": "DOE JOHN"}}, b"", RefusalCode.PLAN_UNSUPPORTED),
    ],
)
def test_what_cannot_be_done_is_a_code_and_the_worker_goes_on(
    worker: WorkerProcess, base: bytes, request_: dict[str, object], payload: bytes, code: RefusalCode
) -> None:
    pid = worker.pid
    with pytest.raises(WorkError) as caught:
        worker.call(request_, payload)
    assert caught.value.code is code
    assert "DOE" not in caught.value.where
    assert worker.pid == pid


def test_a_cohort_that_cannot_be_opened_is_a_code_without_a_path(
    worker: WorkerProcess, site: SiteData, tmp_path: Path
) -> None:
    lost = SiteData(site.home, tmp_path / "DOE^JOHN", site.labels)
    with pytest.raises(WorkError) as caught:
        worker.call(open_request(lost, PLAN))
    assert caught.value.code is RefusalCode.COHORT_UNUSABLE
    assert "DOE" not in f"{caught.value.where} {caught.value}"


# --- how it ends ------------------------------------------------------------------------------------------


def a_call_in_progress(worker: WorkerProcess, site: SiteData) -> tuple[threading.Thread, list[WorkError]]:
    """Training that would take days, begun in another thread, and the list that gets its error."""
    worker.call(open_request(site, ENDLESS, name="endless"))
    _, first = untrained(worker, ENDLESS)
    errors: list[WorkError] = []

    def work() -> None:
        try:
            worker.call({"op": "baseline", "site": "endless", "round_index": 0, "split": "test"}, first)
        except WorkError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    wait_for(worker._lock.locked, "the call to begin")
    return thread, errors


def test_killing_ends_training_as_cancelled_and_the_next_request_is_served(site: SiteData) -> None:
    worker = WorkerProcess()
    thread, errors = a_call_in_progress(worker, site)
    first_pid = worker.pid
    worker.kill()
    thread.join(20)
    assert [error.code for error in errors] == [RefusalCode.CANCELLED]
    assert worker.pid is None
    header, _ = worker.call(open_request(site, PLAN))
    assert header["counts"]["train"] == NUM_TRAIN
    assert worker.pid not in (None, first_pid)

    # the same process once more, and now the system kills it
    thread, errors = a_call_in_progress(worker, site)
    assert worker.pid is not None
    subprocess.run(["kill", "-9", str(worker.pid)], check=True)
    thread.join(20)
    assert [error.code for error in errors] == [RefusalCode.OUT_OF_MEMORY]
    worker.stop()


def test_a_retired_worker_ends_its_call_as_cancelled_and_starts_no_new_process(site: SiteData) -> None:
    worker = WorkerProcess()
    thread, errors = a_call_in_progress(worker, site)
    pid = worker.pid
    assert pid is not None
    worker.retire()
    thread.join(20)
    assert [error.code for error in errors] == [RefusalCode.CANCELLED]
    assert not alive(pid)
    with pytest.raises(WorkError) as caught:
        worker.call(open_request(site, PLAN))
    assert caught.value.code is RefusalCode.CANCELLED
    assert worker.pid is None


def test_a_stopped_worker_is_gone_and_starts_again_when_it_is_asked() -> None:
    worker = WorkerProcess()
    assert worker.start()
    assert not worker.start()
    pid = worker.pid
    assert pid is not None
    worker.stop()
    assert not alive(pid)
    assert worker.pid is None
    assert worker.start()
    worker.stop()


_PARENT = """
import json, sys, threading
from fedward_client.worker_process import WorkerProcess
worker = WorkerProcess()
opening = json.loads(sys.argv[1])
worker.call(opening)
_, first = worker.call({"op": "initial", "plan": opening["plan"]})
request = {"op": "baseline", "site": opening["site"], "round_index": 0, "split": "test"}
threading.Thread(target=worker.call, args=(request, bytes(first)), daemon=True).start()
print(worker.pid, flush=True)
sys.stdin.read()
"""


def seconds_of_work(pid: int) -> float:
    """Processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) / os.sysconf("SC_CLK_TCK")


def test_a_worker_in_the_middle_of_training_ends_when_its_daemon_is_killed(site: SiteData) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, json.dumps(open_request(site, ENDLESS))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        before = seconds_of_work(pid)
        wait_for(lambda: seconds_of_work(pid) > before + 0.3, "training to be under way")
        parent.kill()
    wait_for(lambda: not alive(pid), "the orphan to end", patience_s=10)


# --- a worker that cannot be trusted ----------------------------------------------------------------------

MISBEHAVING = {
    "no json": ("channel.sendall(struct.pack('<IQ', 4, 0) + b'DOE^')", "malformed-reply"),
    "no object": ("channel.sendall(struct.pack('<IQ', 2, 0) + b'[]')", "malformed-reply"),
    "too deep": ("channel.sendall(struct.pack('<IQ', 300000, 0) + b'[' * 300000)", "malformed-reply"),
    "too large": ("channel.sendall(struct.pack('<IQ', 2, 2**62) + b'{}')", "malformed-reply"),
    "closes and stays": ("channel.shutdown(socket.SHUT_RDWR)", "malformed-reply"),
    "exits": ("os._exit(3)", "exit-code:3"),
    "exits as if all were well": ("os._exit(0)", "exit-code:0"),
}


@pytest.mark.parametrize("case", MISBEHAVING)
def test_a_worker_that_breaks_the_form_is_ended_and_its_request_has_failed(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    act, where = MISBEHAVING[case]
    program = a_scripted_program(tmp_path / "python", f"receive()\n{act}\nhang()")
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(worker_process, "_ENDING_S", 0.2)
    worker = WorkerProcess()
    worker.start()
    pid = worker.pid
    assert pid is not None
    with pytest.raises(WorkError) as caught:
        worker.call({"op": "train"}, b"1234")
    assert caught.value.code is RefusalCode.TRAINING_FAILED
    assert caught.value.where == where
    assert not alive(pid)
    assert worker.pid is None


@pytest.mark.parametrize(
    ("header", "code"),
    [
        ('{"ok": False, "code": 42, "where": "x"}', RefusalCode.OUT_OF_MEMORY),
        ('{"ok": False, "code": 0}', RefusalCode.TRAINING_FAILED),
        ('{"ok": False, "code": 71}', RefusalCode.TRAINING_FAILED),
        ('{"ok": False, "code": 9999}', RefusalCode.TRAINING_FAILED),
        ('{"ok": False, "code": "DOE"}', RefusalCode.TRAINING_FAILED),
        ('{"ok": False, "code": [1]}', RefusalCode.TRAINING_FAILED),
        ('{"ok": "yes"}', RefusalCode.TRAINING_FAILED),
        ("{}", RefusalCode.TRAINING_FAILED),
    ],
)
def test_a_refusal_of_a_worker_is_a_code_that_a_site_may_say(
    header: str, code: RefusalCode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = a_scripted_program(tmp_path / "python", f"receive()\nreply({header})\nhang()")
    monkeypatch.setattr(sys, "executable", str(program))
    worker = WorkerProcess()
    with pytest.raises(WorkError) as caught:
        worker.call({"op": "train"})
    assert caught.value.code is code
    worker.stop()


# --- what is said of an error -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CohortError("x", remedy="y"), RefusalCode.COHORT_UNUSABLE),
        (PlanError("x", remedy="y"), RefusalCode.PLAN_UNSUPPORTED),
        (PlanRefusedError("x", remedy="y", code=RefusalCode.PLAN_EXPIRED), RefusalCode.PLAN_EXPIRED),
        (PayloadError("x", remedy="y"), RefusalCode.PAYLOAD_MALFORMED),
        (EvaluationError("x", remedy="y"), RefusalCode.TRAINING_DIVERGED),
        (
            TrainingError("x", remedy="y", code=RefusalCode.TRAINING_DIVERGED),
            RefusalCode.TRAINING_DIVERGED,
        ),
        (MemoryError(), RefusalCode.OUT_OF_MEMORY),
        (torch.OutOfMemoryError("x"), RefusalCode.OUT_OF_MEMORY),
        (FederationError("x", remedy="y"), RefusalCode.TRAINING_FAILED),
        (ValueError("DOE^JOHN"), RefusalCode.TRAINING_FAILED),
        (SystemExit("DOE^JOHN"), RefusalCode.TRAINING_FAILED),  # its `code` is a text
    ],
)
def test_every_error_has_a_code(error: BaseException, code: RefusalCode) -> None:
    assert code_of(error) is code


def test_an_error_without_a_code_of_its_own_gets_the_one_that_the_caller_names() -> None:
    assert code_of(ValueError(), otherwise=RefusalCode.INTERNAL) is RefusalCode.INTERNAL
    assert code_of(MemoryError(), otherwise=RefusalCode.INTERNAL) is RefusalCode.OUT_OF_MEMORY


def test_the_place_of_an_error_is_one_word_of_class_module_and_line_and_not_its_message() -> None:
    from fedward_common.plan import parse_plan

    try:
        parse_plan({"name": "DOE JOHN"})
    except PlanError as error:
        place = place_of(error)
    kind, module, line = place.split(":")
    assert (kind, module) == ("PlanError", "fedward_common.plan")
    assert line.isdigit()
