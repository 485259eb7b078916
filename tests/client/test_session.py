"""A site's answer to one instruction: real worker, real door, and nothing but numbers when it goes wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedward_client.app import client_app
from fedward_client.approvals import PlanGate
from fedward_client.cohort import open_cohort
from fedward_client.config import SiteHome
from fedward_client.exclusions import write_exclusions
from fedward_client.outbound import OutboundDoor
from fedward_client.session import SiteSession, SiteSettings, SiteWorker
from fedward_client.site_data import COHORT_FILE, SiteData
from fedward_client.worker_process import WorkerProcess
from fedward_common import weights
from fedward_common.audit import AuditLog
from fedward_common.envelope import Action, Envelope, Instruction, SplitName, parse_envelope
from fedward_common.errors import AuditError, PlanRefusedError, RefusalCode
from fedward_common.evaluation.state import check_state
from fedward_common.identity import load_identity, new_signer, sign_plan
from fedward_common.plan import SignedPlan, canonical_bytes, parse_signed_plan
from fedward_common.protocol import Down, Up, down_content, read_up
from fedward_common.state_payload import state_bytes, unpack_state
from fedward_common.weights import Layout
from tests.builders import canary_elements
from tests.client.site_workers import NUM_TRAIN, a_divided_site, a_small_plan, untrained
from tests.federations import a_federation
from tests.integration.deployment import alive, wait_for
from tests.messages import LAYOUT, a_message, a_plan, an_instruction, packed, signed

SIGN, KEY = new_signer()
PLAN = a_small_plan()


class OpenGate:
    """Accepts every well-formed plan and every question; remembers the questions about models."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def decide(self, document: bytes, run_id: str) -> SignedPlan:
        return parse_signed_plan(document)

    def admit(self, signed: SignedPlan, instruction: Instruction) -> None:
        self.asked.append((instruction.action, instruction.round_index))


@dataclass
class Place:
    """One site with its session, and what it wrote down."""

    session: SiteSession
    worker: SiteWorker
    plan: SignedPlan
    base: bytes
    gate: OpenGate
    audit: list[dict[str, Any]] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, action: Action, round_index: int = 1, **changes: Any) -> Up:
        """Send one instruction with the untrained model."""
        base = None if action == "prepare" else self.base
        return self.send(an_instruction(self.plan, action, base=base, round_index=round_index), **changes)

    def send(self, instruction: Instruction, **changes: Any) -> Up:
        down: dict[str, Any] = {
            "instruction": canonical_bytes(instruction),
            "signed_plan": self.plan.to_bytes(),
            "payload": None if instruction.action == "prepare" else self.base,
        }
        up = self.session.handle(Down(**(down | changes)))
        assert up is not None
        return up


def a_place(
    data: SiteData, worker: SiteWorker, plan: SignedPlan, base: bytes, *, name: str = "north"
) -> Place:
    gate = OpenGate()
    audit: list[dict[str, Any]] = []
    log: list[dict[str, Any]] = []
    session = SiteSession(
        SiteSettings(name, data, threads=1, device="cpu"),
        gate,
        OutboundDoor(name, SIGN, lambda event, **fields: audit.append(fields)),
        worker,
        lambda event, **fields: log.append({"event": event, **fields}),
    )
    return Place(session, worker, plan, base, gate, audit, log)


@pytest.fixture(scope="module")
def worker() -> Iterator[WorkerProcess]:
    made = WorkerProcess()
    made.start()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> SiteData:
    """A site in whose files every text element is a canary."""
    folder = tmp_path_factory.mktemp("session") / "CNRYFOLDER"
    mine = {"PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "Modality"}
    texts = {key: text for key, text in canary_elements().items() if key not in mine}
    return a_divided_site(folder, **texts)


@pytest.fixture(scope="module")
def model(worker: WorkerProcess) -> tuple[Layout, bytes]:
    return untrained(worker, PLAN)


@pytest.fixture
def place(data: SiteData, worker: WorkerProcess, model: tuple[Layout, bytes]) -> Place:
    layout, base = model
    return a_place(data, worker, signed(PLAN, layout), base)


def envelope_of(up: Up) -> Envelope:
    return parse_envelope(up.envelope)


def code_of(up: Up) -> RefusalCode:
    return RefusalCode(envelope_of(up).code)


# --- work -------------------------------------------------------------------------------------------------


def test_a_site_prepares_trains_evaluates_and_trains_alone(place: Place) -> None:
    prepared = envelope_of(place.ask("prepare", 0))
    assert prepared.numbers.num_train == NUM_TRAIN
    assert prepared.numbers.num_test == 6

    update = place.ask("train")
    assert envelope_of(update).numbers.num_cases == NUM_TRAIN
    delta = weights.unpack(update.payload or b"", place.plan.body.layout)
    assert weights.all_finite(delta)
    assert weights.l2_norm(delta) > 0

    for action in ("evaluate", "baseline"):
        measured = place.ask(action)
        state = unpack_state(measured.payload or b"", PLAN)
        check_state(state, PLAN, max_cases=100)
        assert state["num_cases"][0] == 6
    assert [line["action"] for line in place.audit] == ["prepare", "train", "evaluate", "baseline"]
    assert place.gate.asked == [("train", 1), ("evaluate", 1), ("baseline", 1)]


def test_a_site_trains_without_having_been_asked_to_prepare(place: Place) -> None:
    assert code_of(place.ask("train", 2)) is RefusalCode.OK


def test_the_same_question_gets_the_same_bytes_without_being_worked_on_again(place: Place) -> None:
    first = place.ask("train")
    pid = place.worker.pid
    place.worker.kill()
    wait_for(lambda: place.worker.pid is None, "the worker to end")
    assert place.ask("train") == first
    assert place.worker.pid is None
    assert place.gate.asked == [("train", 1)]
    assert pid is not None
    assert len(place.audit) == 2
    assert place.audit[0] == place.audit[1]


def test_a_site_that_was_restarted_gives_the_same_bytes_again(place: Place, data: SiteData) -> None:
    again = a_place(data, place.worker, place.plan, place.base)
    assert place.ask("train") == again.ask("train")
    assert place.ask("evaluate") == again.ask("evaluate")


def test_two_sites_may_share_a_worker(place: Place, data: SiteData) -> None:
    other = a_place(data, place.worker, place.plan, place.base, name="south")
    first, second = place.ask("train"), other.ask("train")
    assert envelope_of(second).site == "south"
    assert first.payload != second.payload  # another seed
    assert place.ask("evaluate").payload == other.ask("evaluate").payload


def test_what_the_operator_takes_out_is_used_no_more_from_the_next_round_on(
    worker: WorkerProcess, model: tuple[Layout, bytes], tmp_path: Path
) -> None:
    layout, base = model
    site = a_divided_site(tmp_path / "site")
    place = a_place(site, worker, signed(PLAN, layout), base)
    assert envelope_of(place.ask("train")).numbers.num_cases == NUM_TRAIN

    write_exclusions(site.home, [case.case_id for case in open_cohort(site).of("train")[:2]])
    assert envelope_of(place.ask("train", 2)).numbers.num_cases == NUM_TRAIN - 2

    (site.home / COHORT_FILE).write_text("[gate]\nidentity_removed = true\n")
    assert code_of(place.ask("train", 3)) is RefusalCode.COHORT_UNUSABLE


def test_an_idle_session_ends_its_worker_and_a_busy_one_does_not(place: Place) -> None:
    place.ask("evaluate")
    place.session.rest(3600)
    pid = place.worker.pid
    assert pid is not None
    place.session.rest(0)
    assert not alive(pid)
    assert code_of(place.ask("evaluate", 2)) is RefusalCode.OK


# --- what is not worked on --------------------------------------------------------------------------------


def test_a_model_that_does_not_match_its_digest_is_refused_before_any_work(place: Place) -> None:
    flipped = bytes([place.base[0] ^ 1]) + place.base[1:]
    assert code_of(place.ask("train", payload=flipped)) is RefusalCode.BASE_MISMATCH
    assert place.gate.asked == []


@pytest.mark.parametrize("payload", [None, b"", b"1234"])
def test_a_model_without_the_plans_layout_is_refused(place: Place, payload: bytes | None) -> None:
    assert code_of(place.ask("train", payload=payload)) is RefusalCode.PAYLOAD_MALFORMED


def test_an_instruction_for_another_plan_than_the_one_sent_along_is_refused(place: Place) -> None:
    other = signed(a_small_plan(seed=9), place.plan.body.layout)
    instruction = an_instruction(other, base=place.base)
    assert code_of(place.send(instruction)) is RefusalCode.PAYLOAD_MALFORMED
    assert place.audit[0]["plan"] == other.digest


def test_a_plan_that_is_no_plan_is_refused(place: Place) -> None:
    assert code_of(place.ask("train", signed_plan=b"DOE^JOHN")) is RefusalCode.PLAN_UNSUPPORTED
    assert "DOE" not in json.dumps(place.log)


@pytest.mark.parametrize("document", [b"", b"DOE^JOHN", b"{}", b"[1]", b"\xff"])
def test_what_is_no_instruction_gets_no_answer_at_all(place: Place, document: bytes) -> None:
    assert place.session.handle(Down(document, place.plan.to_bytes(), place.base)) is None
    assert place.audit == []
    assert [line["event"] for line in place.log] == ["instruction_malformed"]


def test_a_refused_plan_or_round_is_answered_with_the_gates_own_code(place: Place) -> None:
    class Closed(OpenGate):
        def decide(self, document: bytes, run_id: str) -> SignedPlan:
            raise PlanRefusedError("DOE^JOHN", remedy="x", code=RefusalCode.PLAN_EXPIRED)

    class Replayed(OpenGate):
        def admit(self, signed: SignedPlan, instruction: Instruction) -> None:
            raise PlanRefusedError("DOE^JOHN", remedy="x", code=RefusalCode.ROUND_REPLAYED)

    for gate, code in ((Closed(), RefusalCode.PLAN_EXPIRED), (Replayed(), RefusalCode.ROUND_REPLAYED)):
        place.session._gate = gate
        up = place.ask("train")
        assert code_of(up) is code
        assert up.payload is None
    assert "DOE" not in json.dumps(place.log)


def test_approval_that_was_withdrawn_also_ends_the_sending_of_an_old_answer(place: Place) -> None:
    place.ask("evaluate")

    class Closed(OpenGate):
        def decide(self, document: bytes, run_id: str) -> SignedPlan:
            raise PlanRefusedError("x", remedy="x", code=RefusalCode.PLAN_REFUSED)

    place.session._gate = Closed()
    assert code_of(place.ask("evaluate")) is RefusalCode.PLAN_REFUSED


def test_too_few_cases_for_the_plan_are_said_as_such(data: SiteData, place: Place) -> None:
    narrow = signed(a_small_plan(privacy={"min_cases": NUM_TRAIN + 1}), place.plan.body.layout)
    site = a_place(data, place.worker, narrow, place.base)
    assert code_of(site.ask("prepare", 0)) is RefusalCode.COHORT_TOO_SMALL
    up = site.ask("train")
    assert code_of(up) is RefusalCode.COHORT_TOO_SMALL
    assert up.payload is None


def test_training_that_diverges_is_said_as_such(data: SiteData, place: Place) -> None:
    wild = signed(a_small_plan(training={"learning_rate": 10.0, "local_epochs": 100}), place.plan.body.layout)
    huge = np.full(len(place.base) // 4, 1e30, "<f4").tobytes()
    site = a_place(data, place.worker, wild, huge)
    assert code_of(site.ask("train")) is RefusalCode.TRAINING_DIVERGED


def test_a_site_whose_images_are_gone_says_so_and_not_where_they_were(place: Place, tmp_path: Path) -> None:
    lost = SiteData(tmp_path, tmp_path / "DOE^JOHN", tmp_path / "labels.csv")
    site = a_place(lost, place.worker, place.plan, place.base)
    up = site.ask("prepare", 0)
    assert code_of(up) is RefusalCode.COHORT_UNUSABLE
    assert b"DOE" not in up.envelope
    assert "DOE" not in json.dumps(site.log)


def test_nothing_at_all_is_answered_when_the_audit_log_cannot_be_written(place: Place) -> None:
    def full(event: str, **fields: Any) -> None:
        raise AuditError("no space", remedy="Free disk space.")

    place.session._door = OutboundDoor("north", SIGN, full)
    instruction = canonical_bytes(an_instruction(place.plan, "train", base=place.base))
    assert place.session.handle(Down(instruction, place.plan.to_bytes(), place.base)) is None
    assert place.log[-1]["event"] == "answer_withheld"


# --- cancelling -------------------------------------------------------------------------------------------


def test_cancelled_training_is_answered_as_such_and_the_next_request_is_served(
    data: SiteData, model: tuple[Layout, bytes]
) -> None:
    layout, base = model
    endless = signed(a_small_plan(rounds=10_000, training={"local_epochs": 100}), layout)
    worker = WorkerProcess()
    site = a_place(data, worker, endless, base)
    answers: list[Up] = []
    thread = threading.Thread(target=lambda: answers.append(site.ask("baseline")))
    thread.start()
    wait_for(lambda: site.session._opened is not None, "the cohort to be open")
    site.session.cancel()
    thread.join(30)
    assert [code_of(up) for up in answers] == [RefusalCode.CANCELLED]
    assert code_of(site.ask("prepare", 0)) is RefusalCode.OK
    site.session.close()
    assert worker.pid is None


def test_cancelling_before_the_work_has_begun_also_stops_it(place: Place) -> None:
    class Slow(OpenGate):
        def decide(self, document: bytes, run_id: str) -> SignedPlan:
            place.session.cancel()
            return super().decide(document, run_id)

    place.worker.stop()  # there is nothing to kill yet
    place.session._gate = Slow()
    assert code_of(place.ask("train")) is RefusalCode.CANCELLED


# --- a worker that says too much --------------------------------------------------------------------------

CANARY = "DOE^JOHN"
SMALL = signed(a_plan())
BASE = packed(1.0)


@dataclass
class TalkativeWorker:
    """Answers with whatever it is told to: what a compromised worker process could send."""

    header: Any
    payload: bytes
    pid: int | None = 7

    def start(self) -> bool:
        return False

    def call(
        self, request: Mapping[str, Any], payload: bytes | memoryview = b""
    ) -> tuple[dict[str, Any], bytes]:
        if request["op"] == "open":
            return {"counts": {"train": 50, "validation": 50, "test": 50, CANARY: CANARY}}, b""
        return self.header, self.payload

    def kill(self) -> None:
        pass

    def stop(self) -> None:
        pass


VALUES: st.SearchStrategy[Any] = st.one_of(
    st.text(max_size=20).map(lambda text: CANARY + text),
    st.integers(),
    st.floats(),
    st.none(),
    st.lists(st.just(CANARY), max_size=2),
)
HEADERS = st.dictionaries(
    st.sampled_from(["num_cases", "mean_loss", "code", "where", "note", CANARY]), VALUES, max_size=6
)
PAYLOADS = st.one_of(
    st.binary(max_size=64).map(lambda tail: CANARY.encode() + tail),
    st.lists(st.floats(-4, 4, width=32), min_size=8, max_size=8).map(lambda values: packed(*values)),
    st.just(bytes(state_bytes(SMALL.plan))),
)


@given(header=HEADERS, payload=PAYLOADS, action=st.sampled_from(["train", "evaluate", "baseline"]))
def test_no_word_of_a_worker_reaches_a_message_or_the_audit_log(
    header: Any, payload: bytes, action: Action
) -> None:
    nowhere = Path("nowhere")
    site = a_place(SiteData(nowhere, nowhere, nowhere), TalkativeWorker(header, payload), SMALL, BASE)
    up = site.ask(action)
    assert CANARY.encode() not in up.envelope
    assert CANARY not in json.dumps(site.audit)
    numbers = envelope_of(up).numbers.model_dump(exclude_none=True)
    assert set(numbers) <= {"num_cases", "mean_loss"}
    if up.payload is not None:
        assert len(up.payload) in (weights.num_bytes(LAYOUT), state_bytes(SMALL.plan))


@pytest.mark.parametrize("text", ["code", "message", "remedy", "args"])
def test_an_exception_whose_attributes_are_texts_leaves_as_a_number(text: str) -> None:
    class OddError(Exception):
        pass

    error = OddError(CANARY)
    if text != "args":
        setattr(error, text, CANARY)

    class Raising(TalkativeWorker):
        def call(
            self, request: Mapping[str, Any], payload: bytes | memoryview = b""
        ) -> tuple[dict[str, Any], bytes]:
            raise error

    nowhere = Path("nowhere")
    site = a_place(SiteData(nowhere, nowhere, nowhere), Raising({}, b""), SMALL, BASE)
    up = site.ask("train")
    assert code_of(up) is RefusalCode.INTERNAL
    assert CANARY.encode() not in up.envelope
    assert CANARY not in json.dumps([site.audit, site.log])


def test_no_byte_that_leaves_holds_a_text_of_the_images(place: Place) -> None:
    sent = [place.ask("prepare", 0), place.ask("train"), place.ask("evaluate"), place.ask("baseline")]
    for up in sent:
        assert b"CNRY" not in up.envelope + (up.payload or b"") + up.signature.encode()
    assert "CNRY" not in json.dumps([place.audit, place.log])
    # the canary itself: the files do hold the texts
    assert b"CNRY" in next(iter(place.session._settings.data.dicom.iterdir())).read_bytes()


# --- the whole: gate, app, processes ----------------------------------------------------------------------


def test_with_the_real_gate_a_plan_runs_once_approved_and_a_changed_byte_is_refused(
    data: SiteData, worker: WorkerProcess, model: tuple[Layout, bytes], tmp_path: Path
) -> None:
    federation = a_federation(tmp_path / "federation")
    north = load_identity(federation / "sites" / "north")
    home = SiteHome(tmp_path / "home")
    home.root.mkdir()
    audit = AuditLog(home.audit)
    gate = PlanGate(home, north.federation, audit)
    layout, base = model
    plan = sign_plan(PLAN, layout, load_identity(federation / "coordinators" / "anna"))
    site = a_place(data, worker, plan, base)
    site.session._gate = gate
    assert code_of(site.ask("prepare", 0)) is RefusalCode.PLAN_NOT_APPROVED
    gate.approve(plan)
    assert code_of(site.ask("prepare", 0)) is RefusalCode.OK
    changed = plan.to_bytes().replace(b'"rounds":2', b'"rounds":3')
    assert code_of(site.ask("prepare", 0, signed_plan=changed)) is RefusalCode.PLAN_SIGNATURE
    assert code_of(site.ask("train", 2)) is RefusalCode.OK
    assert code_of(site.ask("train", 1)) is RefusalCode.ROUND_REPLAYED
    assert code_of(site.ask("train", 2)) is RefusalCode.OK
    assert code_of(site.ask("evaluate", 1)) is RefusalCode.OK
    crafted = np.frombuffer(base, "<f4").copy()
    places: tuple[tuple[Action, int, SplitName, int], ...] = (
        ("evaluate", 1, "validation", 2),
        ("baseline", 0, "test", 1),
    )
    for action, index, split, num_more in places:
        answers = []
        for _ in range(num_more + 1):
            crafted[0] += 1
            instruction = an_instruction(plan, action, base=crafted.tobytes(), round_index=index, split=split)
            answers.append(site.send(instruction, payload=crafted.tobytes()))
        assert [code_of(answer) for answer in answers[:-1]] == [RefusalCode.OK] * num_more
        assert code_of(answers[-1]) is RefusalCode.ROUND_REPLAYED
        assert answers[-1].payload is None
    assert code_of(site.ask("evaluate", 1)) is RefusalCode.OK


def test_the_flower_app_answers_every_message_and_says_nothing_to_what_is_none(place: Place) -> None:
    from flwr.app import ConfigRecord, Context, RecordDict

    app = client_app(place.session)
    context = Context(1, 2, {}, RecordDict(), {})
    instruction = an_instruction(place.plan, "evaluate", base=place.base)
    down = Down(canonical_bytes(instruction), place.plan.to_bytes(), place.base)
    reply = app(a_message(down_content(down), "evaluate"), context)
    up = read_up(reply, max_payload=state_bytes(PLAN))
    assert envelope_of(up).numbers.num_cases == 6
    assert len(up.payload or b"") == state_bytes(PLAN)
    for content in (RecordDict(), RecordDict({"x": ConfigRecord({"y": CANARY})})):
        silent = app(a_message(content), context)
        assert len(silent.content) == 0


_LOADED = """
import sys
import fedward_client.daemon, fedward_client.session, fedward_client.app, fedward_client.node
heavy = ("torch", "monai", "pydicom", "sklearn", "scipy", "PIL", "openjpeg", "ray")
print([name for name in heavy if name in sys.modules])
"""


def test_the_daemons_modules_load_neither_pytorch_nor_a_dicom_parser() -> None:
    done = subprocess.run([sys.executable, "-c", _LOADED], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
