"""Runs in processes of their own: started, stopped, resumed, and never lost when something dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedward_common.audit import AuditLog, verify
from fedward_common.errors import PlanRefusedError, RefusalCode, RunFailedError, UsageError
from fedward_server.config import ServerHome
from fedward_server.home_lock import only_server
from fedward_server.runs import RunStore
from fedward_server.supervisor import RunSupervisor
from tests.server.run_builders import a_round, wait_for
from tests.server.supervised import ROOT, Mailboxes, a_home, a_script, a_supervisor


@pytest.fixture
def home(tmp_path: Path) -> ServerHome:
    return a_home(tmp_path / "federation", settings="stop_grace_s = 0.5\n")


def audited(home: ServerHome) -> list[tuple[str, Any]]:
    assert verify(home.audit) > 0
    return [(entry.event, entry.fields.get("peer")) for entry in AuditLog(home.audit).entries()]


def pid_of(supervisor: RunSupervisor, run_id: str) -> int:
    return int(str(wait_for(supervisor.store, run_id, "status", status="running").fields["pid"]))


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # an orphan that nobody has collected yet is dead all the same
    state = Path(f"/proc/{pid}/stat")
    return not (state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z")


def test_run_is_executed_recorded_and_audited(home: ServerHome) -> None:
    mailboxes = Mailboxes()
    with a_supervisor(home, mailboxes) as supervisor:
        run_id = supervisor.start(a_script(home, "complete"), by="anna")
        mailboxes.wait_closed(1)

        info = supervisor.store.run(run_id)
        assert (info.status, info.rounds_done, info.selected_round) == ("completed", 2, 2)
        order = json.loads(
            str(wait_for(supervisor.store, run_id, "status", status="running").fields["order"])
        )
    assert order == {
        "run_id": run_id,
        "flower_run_id": 100,
        "token": "token-100",
        "runtime_address": "127.0.0.1:9",
        "home": str(home.directory),
        "resume": False,
    }
    assert mailboxes.closed == {100: False}
    assert audited(home) == [("run_started", "anna"), ("run_finished", None)]


def test_next_runner_is_warm_before_the_next_run(home: ServerHome) -> None:
    mailboxes = Mailboxes()
    with a_supervisor(home, mailboxes) as supervisor:
        first = supervisor._warm
        assert first is not None
        one = supervisor.start(a_script(home, "complete"))
        mailboxes.wait_closed(1)
        with supervisor._lock:
            second = supervisor._warm
        assert second is not None
        two = supervisor.start(a_script(home, "complete"))
        mailboxes.wait_closed(2)

        assert [pid_of(supervisor, run_id) for run_id in (one, two)] == [first.pid, second.pid]


def test_second_run_at_the_same_time_is_refused_with_a_remedy(home: ServerHome) -> None:
    with a_supervisor(home) as supervisor:
        run_id = supervisor.start(a_script(home, "wait"))

        with pytest.raises(UsageError, match=run_id) as caught:
            supervisor.start(a_script(home, "complete"))

        assert "run stop" in caught.value.remedy
        assert len(supervisor.store.runs()) == 1


def test_two_runs_go_at_the_same_time_where_the_settings_allow_it(tmp_path: Path) -> None:
    home = a_home(tmp_path / "federation", settings="max_runs = 2\n")
    with a_supervisor(home) as supervisor:
        runs = [supervisor.start(a_script(home, "wait")) for _ in range(2)]

        assert len({pid_of(supervisor, run_id) for run_id in runs}) == 2


def test_plan_of_another_federation_or_with_changed_bytes_is_refused(
    home: ServerHome, tmp_path: Path
) -> None:
    other = a_home(tmp_path / "other")
    genuine = a_script(home, "complete")
    with a_supervisor(home) as supervisor:
        for document, code in (
            (a_script(other, "complete"), RefusalCode.PLAN_FEDERATION),
            (genuine.replace(b'"rounds":2', b'"rounds":3'), RefusalCode.PLAN_SIGNATURE),
        ):
            with pytest.raises(PlanRefusedError) as caught:
                supervisor.start(document)
            assert caught.value.code is code

        assert supervisor.store.runs() == []
    assert not home.audit.exists()


def test_plan_that_has_committed_rounds_cannot_start_a_second_run(home: ServerHome) -> None:
    mailboxes = Mailboxes()
    document = a_script(home, "complete")
    with a_supervisor(home, mailboxes) as supervisor:
        run_id = supervisor.start(document)
        mailboxes.wait_closed(1)

        with pytest.raises(UsageError, match=f"already used by run {run_id}") as caught:
            supervisor.start(document)

        assert f"run resume {run_id}" in caught.value.remedy


def test_plan_that_never_got_to_a_round_may_be_started_again(home: ServerHome) -> None:
    mailboxes = Mailboxes(refuse=True)
    document = a_script(home, "complete")
    with a_supervisor(home, mailboxes) as supervisor:
        with pytest.raises(RunFailedError, match="no mailbox"):
            supervisor.start(document)
        mailboxes.refuse = False
        run_id = supervisor.start(document)
        mailboxes.wait_closed(1)

        assert {info.run_id: info.status for info in supervisor.store.runs()}.pop(run_id) == "completed"
        assert sorted(info.status for info in supervisor.store.runs()) == ["completed", "failed"]


def test_stopped_run_keeps_its_rounds_and_can_be_resumed(home: ServerHome) -> None:
    mailboxes = Mailboxes()
    with a_supervisor(home, mailboxes) as supervisor:
        run_id = supervisor.start(a_script(home, "wait"), by="anna")
        wait_for(supervisor.store, run_id, "round_committed", round=1)
        supervisor.stop(run_id, by="berta")
        mailboxes.wait_closed(1)
        assert supervisor.store.run(run_id).status == "stopped"

        supervisor.resume(run_id, by="anna")
        mailboxes.wait_closed(2)

        info = supervisor.store.run(run_id)
        assert (info.status, info.rounds_done) == ("completed", 2)
        rounds = [e.fields["round"] for e in supervisor.store.events(run_id) if e.kind == "round_committed"]
        assert rounds == [1, 2]
    assert mailboxes.closed == {100: True, 101: False}
    assert audited(home) == [
        ("run_started", "anna"),
        ("run_stopped", "berta"),
        ("run_finished", None),
        ("run_resumed", "anna"),
        ("run_finished", None),
    ]


def test_run_that_ignores_the_stop_is_ended_after_the_grace_period(home: ServerHome) -> None:
    mailboxes = Mailboxes()
    with a_supervisor(home, mailboxes) as supervisor:
        run_id = supervisor.start(a_script(home, "hang"))
        pid = pid_of(supervisor, run_id)
        supervisor.stop(run_id)
        mailboxes.wait_closed(1)

        assert supervisor.store.run(run_id).status == "stopped"
        assert not is_alive(pid)


@pytest.mark.parametrize(("script", "how"), [("die", "with exit code 3"), ("killed", "by SIGKILL")])
def test_run_whose_process_dies_is_failed_with_the_reason_and_can_be_resumed(
    home: ServerHome, script: str, how: str
) -> None:
    mailboxes = Mailboxes()
    with a_supervisor(home, mailboxes) as supervisor:
        run_id = supervisor.start(a_script(home, script))
        mailboxes.wait_closed(1)

        info = supervisor.store.run(run_id)
        assert (info.status, info.rounds_done) == ("failed", 1)
        assert how in info.reason
        assert f"run resume {run_id}" in info.reason
        assert wait_for(supervisor.store, run_id, "finished").fields["status"] == "failed"
        supervisor.resume(run_id)
        mailboxes.wait_closed(2)
        assert supervisor.store.run(run_id).status == "completed"


def test_warm_runner_that_dies_is_replaced_when_a_run_needs_one(home: ServerHome) -> None:
    mailboxes = Mailboxes()
    with a_supervisor(home, mailboxes) as supervisor:
        warm = supervisor._warm
        assert warm is not None
        os.kill(warm.pid, signal.SIGKILL)
        assert warm.join(30)

        run_id = supervisor.start(a_script(home, "complete"))
        mailboxes.wait_closed(1)

        assert supervisor.store.run(run_id).status == "completed"


@pytest.mark.parametrize("what", ["stop", "resume"])
def test_completed_run_can_neither_be_stopped_nor_resumed(home: ServerHome, what: str) -> None:
    mailboxes = Mailboxes()
    with a_supervisor(home, mailboxes) as supervisor:
        run_id = supervisor.start(a_script(home, "complete"))
        mailboxes.wait_closed(1)

        with pytest.raises(UsageError, match="is completed"):
            getattr(supervisor, what)(run_id)
        with pytest.raises(UsageError, match="no run"):
            getattr(supervisor, what)("nothing")


def test_going_run_cannot_be_resumed(home: ServerHome) -> None:
    with a_supervisor(home) as supervisor:
        run_id = supervisor.start(a_script(home, "wait"))

        with pytest.raises(UsageError, match=r"is (waiting|running)"):
            supervisor.resume(run_id)


def test_shutdown_interrupts_the_run_and_the_next_server_resumes_it(home: ServerHome) -> None:
    with a_supervisor(home) as supervisor:
        run_id = supervisor.start(a_script(home, "wait"))
        wait_for(supervisor.store, run_id, "round_committed", round=1)
        pid = pid_of(supervisor, run_id)
    assert not is_alive(pid)
    mailboxes = Mailboxes()
    with a_supervisor(home, mailboxes) as supervisor:
        info = supervisor.store.run(run_id)
        assert (info.status, info.rounds_done) == ("interrupted", 1)

        supervisor.resume(run_id)
        mailboxes.wait_closed(1)

        assert supervisor.store.run(run_id).status == "completed"


_SERVER = """
import sys, time
from pathlib import Path
from fedward_server.config import ServerHome
from tests.server.run_builders import wait_for
from tests.server.supervised import RUNNER, Mailboxes
from fedward_server.supervisor import RunSupervisor
supervisor = RunSupervisor(ServerHome(Path(sys.argv[1])), Mailboxes(), command=RUNNER)
run_id = supervisor.start(Path(sys.argv[2]).read_bytes())
wait_for(supervisor.store, run_id, "round_committed")
print(run_id, flush=True)
sys.stdin.read()
"""


def test_killed_server_takes_its_runner_along_and_its_run_can_be_resumed(
    home: ServerHome, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.signed"
    plan.write_bytes(a_script(home, "wait"))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _SERVER, str(home.directory), str(plan)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as server:
        assert server.stdout is not None
        run_id = server.stdout.readline().strip()
        store = RunStore(home.runs)
        runner = int(str(wait_for(store, run_id, "status", status="running").fields["pid"]))
        server.kill()

    mailboxes = Mailboxes()
    with a_supervisor(home, mailboxes) as supervisor:  # waits for the lock, which the old runner shares
        assert not is_alive(runner)
        assert supervisor.store.run(run_id).status == "interrupted"
        assert "server ended" in supervisor.store.run(run_id).reason
        supervisor.resume(run_id)
        mailboxes.wait_closed(1)
        assert supervisor.store.run(run_id).status == "completed"


def test_second_server_in_the_same_folder_is_refused(home: ServerHome) -> None:
    with a_supervisor(home), pytest.raises(UsageError, match="another server"):
        only_server(home, wait_s=0)


def test_interrupted_run_can_be_given_up(home: ServerHome) -> None:
    home.prepare()
    store = RunStore(home.runs)
    store.create("run-1", a_script(home, "wait"), "a" * 64, "pneumonia")
    store.commit_round("run-1", a_round(1))
    with a_supervisor(home) as supervisor:
        assert supervisor.store.run("run-1").status == "interrupted"

        supervisor.stop("run-1", by="anna")

        assert supervisor.store.run("run-1").status == "stopped"


@pytest.mark.parametrize("settings", ["max_runs = 0\n", "max_run = 1\n", "max_runs ="])
def test_settings_that_are_not_valid_are_refused_by_name(home: ServerHome, settings: str) -> None:
    (home.root / "server.toml").write_text(settings)

    with pytest.raises(UsageError, match=r"server\.toml"):
        home.config()


def test_home_is_found_in_every_layout(home: ServerHome, tmp_path: Path) -> None:
    inner = ServerHome(home.directory / "server")
    assert (inner.root, inner.identity, inner.runs) == (home.root, home.identity, home.runs)

    mounted = tmp_path / "container"
    (mounted / "identity").mkdir(parents=True)
    assert ServerHome(mounted).federation == mounted / "identity" / "federation.json"
    assert ServerHome(mounted).state == mounted / "state"
