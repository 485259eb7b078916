"""The record of runs: what was committed is there, in order, for both processes, whatever dies."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from pydantic import ValidationError

from fedward_common.errors import StorageError, UsageError
from fedward_server.following import follow
from fedward_server.run_records import Event, RoundRecord
from fedward_server.runs import RunStore
from tests.federations import a_federation, a_plan, a_signed_plan
from tests.server.run_builders import a_round, patience, wait_for


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = a_federation(tmp_path_factory.mktemp("runs") / "federation")
    return a_signed_plan(folder, a_plan(rounds=3)).to_bytes()


@pytest.fixture
def store(tmp_path: Path, signed: bytes) -> RunStore:
    store = RunStore(tmp_path / "runs.sqlite")
    store.create("run-1", signed, "a" * 64, "pneumonia")
    return store


def test_new_run_waits_and_knows_its_plan(store: RunStore, signed: bytes) -> None:
    info = store.run("run-1")

    assert (info.status, info.rounds_done, info.rounds_total, info.finished_at) == ("waiting", 0, 3, None)
    assert store.signed_plan("run-1") == signed
    assert [event.kind for event in store.events("run-1")] == ["status"]


def test_unknown_run_is_refused_by_name(store: RunStore) -> None:
    with pytest.raises(UsageError, match="no run 'run-9'"):
        store.run("run-9")
    with pytest.raises(UsageError):
        store.events("run-9")
    with pytest.raises(UsageError):
        store.set_result("run-9", {})


def test_committed_rounds_come_back_equal_from_another_connection(store: RunStore) -> None:
    measured = {"auroc": 0.8, "confusion": [[3, 1], [0, 4]]}
    records = [
        a_round(1, validation=measured, validation_sites={"north": measured, "south": None}),
        a_round(2),
    ]
    for record in records:
        store.commit_round("run-1", record)

    other = RunStore(store.path)

    assert other.rounds("run-1") == records
    assert other.run("run-1").rounds_done == 2


@pytest.mark.parametrize("index", [1, 2, 4])
def test_round_that_does_not_follow_the_last_is_refused(store: RunStore, index: int) -> None:
    store.commit_round("run-1", a_round(1))
    store.commit_round("run-1", a_round(2))

    with pytest.raises(StorageError, match="cannot follow round 2"):
        store.commit_round("run-1", a_round(index))

    assert store.run("run-1").rounds_done == 2


def test_discarded_rounds_can_be_run_again(store: RunStore) -> None:
    for index in (1, 2, 3):
        store.commit_round("run-1", a_round(index))

    assert store.discard_rounds_after("run-1", 1) == 2
    store.commit_round("run-1", a_round(2, seconds=9.0))

    assert [record.seconds for record in store.rounds("run-1")] == [2.5, 9.0]


def test_first_end_of_a_run_is_the_last_word(store: RunStore) -> None:
    assert store.finish("run-1", "completed", "", selected_round=2)

    assert not store.finish("run-1", "failed", "its process died")

    info = store.run("run-1")
    assert (info.status, info.reason, info.selected_round) == ("completed", "", 2)
    assert info.finished_at is not None
    finished = [event.fields for event in store.events("run-1") if event.kind == "finished"]
    assert finished == [{"status": "completed", "reason": "", "selected_round": 2}]


def test_interrupted_run_can_be_reopened_or_stopped(store: RunStore) -> None:
    store.finish("run-1", "interrupted", "the server died")

    store.reopen("run-1")
    assert (store.run("run-1").status, store.run("run-1").finished_at) == ("waiting", None)

    store.finish("run-1", "interrupted", "again")
    assert store.finish("run-1", "stopped", "stopped by a coordinator")


def test_events_are_numbered_in_order_and_can_be_read_after_one(store: RunStore, signed: bytes) -> None:
    store.create("run-2", signed, "b" * 64, "other")
    first = store.add_event("run-1", "round_started", {"round": 1, "sites": ["north"]})
    store.add_event("run-2", "round_started", {"round": 1, "sites": []})
    second = store.add_event("run-1", "aggregated", {"round": 1, "num_sites": 1, "num_cases": 7})

    assert second > first
    assert [event.sequence for event in store.events("run-1", after=first)] == [second]


def test_number_that_is_not_finite_never_enters_an_event_or_a_record(store: RunStore) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.add_event("run-1", "aggregated", {"loss": float("nan")})
    with pytest.raises(ValidationError):
        a_round(1, seconds=float("inf"))

    assert [event.kind for event in store.events("run-1")] == ["status"]


def test_result_is_kept(store: RunStore) -> None:
    assert store.result("run-1") is None

    store.set_result("run-1", {"test": {"auroc": 0.9}})

    assert RunStore(store.path).result("run-1") == {"test": {"auroc": 0.9}}


def test_runs_are_listed_newest_first(tmp_path: Path, signed: bytes) -> None:
    times = iter(range(100, 200))
    store = RunStore(tmp_path / "runs.sqlite", clock=lambda: float(next(times)))
    for run_id in ("old", "new"):
        store.create(run_id, signed, "a" * 64, "x")

    assert [info.run_id for info in store.runs()] == ["new", "old"]


def test_follower_sees_the_past_and_what_comes_and_ends_with_the_run(store: RunStore) -> None:
    store.add_event("run-1", "round_started", {"round": 1, "sites": []})
    seen: list[Event] = []

    def look() -> None:
        with patience() as stop:
            seen.extend(follow(store, "run-1", stop=stop, poll_s=0.01))

    watcher = threading.Thread(target=look)
    watcher.start()
    other = RunStore(store.path)
    other.commit_round("run-1", a_round(1))
    other.add_event("run-1", "round_committed", {"round": 1, "seconds": 2.5})
    other.finish("run-1", "stopped", "enough")
    watcher.join(timeout=30)

    assert not watcher.is_alive()
    assert [event.kind for event in seen] == ["status", "round_started", "round_committed", "finished"]


def test_follower_ends_when_told_although_the_run_goes_on(store: RunStore) -> None:
    stop = threading.Event()
    stop.set()

    assert [event.kind for event in follow(store, "run-1", stop=stop)] == ["status"]


def test_file_of_a_newer_version_is_refused(store: RunStore) -> None:
    store._connection.execute("PRAGMA user_version = 9")

    with pytest.raises(StorageError, match="format 9"):
        RunStore(store.path)


def test_file_that_is_not_a_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs.sqlite"
    path.write_bytes(b"not a database" * 100)

    with pytest.raises(StorageError, match="not a database"):
        RunStore(path)


_WRITER = """
import sys
from pathlib import Path
from fedward_server.runs import RunStore
from fedward_server.run_records import RoundRecord
store = RunStore(Path(sys.argv[1]))
record = RoundRecord.model_validate_json(sys.stdin.readline())
for index in range(1, 10_000):
    store.commit_round("run-1", record.model_copy(update={"round_index": index}))
    store.add_event("run-1", "round_committed", {"round": index, "seconds": 0.0})
    print(index, flush=True)
"""


def test_rounds_committed_before_a_kill_are_all_there(store: RunStore) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(store.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdin is not None
    assert writer.stdout is not None
    with writer:
        writer.stdin.write(a_round(1).model_dump_json() + "\n")
        writer.stdin.flush()
        told = [int(writer.stdout.readline()) for _ in range(5)]
        wait_for(store, "run-1", "round_committed", round=5)  # readable while the other process writes
        writer.kill()
        told += [int(line) for line in writer.stdout.read().split()]

    rounds = [record.round_index for record in store.rounds("run-1")]
    assert told == list(range(1, len(told) + 1))
    assert rounds[: len(told)] == told
    store.commit_round("run-1", a_round(rounds[-1] + 1))


_FULL_DISK = """
import resource, sys
from pathlib import Path
from fedward_common.errors import StorageError
from fedward_server.runs import RunStore
store = RunStore(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
count = 0
try:
    while True:
        store.add_event("run-1", "status", {"status": "running", "reason": "x" * 4000})
        count += 1
except StorageError as error:
    print(count, error.message, error.remedy)
"""


def test_full_disk_is_a_clear_error_and_keeps_what_was_written(store: RunStore) -> None:
    child = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, str(store.path)], capture_output=True, text=True, timeout=60
    )

    assert child.returncode == 0, child.stderr
    count = int(child.stdout.split()[0])
    assert count > 5
    assert "free space" in child.stdout
    assert len(store.events("run-1")) == 1 + count
    store.finish("run-1", "interrupted", "the disk was full")


def test_round_record_refuses_unknown_keys() -> None:
    document = a_round(1).model_dump() | {"patient": "x"}

    with pytest.raises(ValidationError, match="patient"):
        RoundRecord.model_validate(document)
