"""`fedward` as people type it: what it prints, what it writes, and how it ends."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from fedward_common.identity import load_identity, verify_plan
from fedward_common.plan import parse_signed_plan
from fedward_server.cli import main
from fedward_server.supervisor import RunSupervisor
from tests.server.run_builders import wait_for
from tests.server.supervised import Mailboxes, a_control_server, a_home, a_script, a_supervisor

PLAN = """
name = "pneumonia"
rounds = 2
[participation]
quorum = 2
[task]
labels = ["normal", "pneumonia"]
[transforms]
size = [16, 16]
[model]
name = "cnn2d"
[training]
learning_rate = 0.05
"""
FEDWARD = (sys.executable, "-m", "fedward_server.cli")


@dataclass(frozen=True)
class Place:
    """A server to talk to, and a folder to work in."""

    folder: Path
    supervisor: RunSupervisor
    mailboxes: Mailboxes

    def member(self, folder: str = "coordinators/anna") -> str:
        return str(self.supervisor.home.directory / folder)

    def plan(self, script: str) -> str:
        path = self.folder / f"{script}.signed"
        path.write_bytes(a_script(self.supervisor.home, script))
        return str(path)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    mailboxes = Mailboxes()
    home = a_home(tmp_path / "federation")
    with a_supervisor(home, mailboxes) as supervisor, a_control_server(home, supervisor, ["north"]):
        place = Place(tmp_path, supervisor, mailboxes)
        monkeypatch.setenv("FEDWARD_IDENTITY", place.member())
        yield place


def started(place: Place, script: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Start a run without watching; its id."""
    assert main(["run", "start", place.plan(script), "--no-watch", "--json"]) == 0
    return str(json.loads(capsys.readouterr().out)["run_id"])


def test_help_needs_no_heavy_imports_and_little_time() -> None:
    look = (
        "import sys; from fedward_server.cli import main; main(['--help']);"
        "print(sorted({name.partition('.')[0] for name in sys.modules}"
        " & {'torch', 'monai', 'flwr', 'grpc', 'numpy', 'cryptography', 'sklearn'}))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", look], capture_output=True, text=True, timeout=60, env=environment
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert "provision" in done.stdout
    assert min(seconds) < 0.5


@pytest.mark.parametrize(
    "arguments", [["plan", "--help"], ["run", "start", "--help"], ["serve", "--help"], ["demo", "--help"]]
)
def test_every_group_has_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    assert "Usage: fedward" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "No such command 'fly'"),
        (["run", "start"], "Missing argument 'SIGNED'"),
        (["simulate", "plan.toml", "--sites", "0"], "'--sites'"),
        (["provision"], "Missing argument 'DIRECTORY'"),
    ],
)
def test_wrong_usage_is_explained_on_standard_error_and_ends_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2

    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert "remedy: See: fedward" in printed.err


def test_error_is_a_json_object_with_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN.replace("rounds = 2", "rounds = 0\nround = 3"))

    assert main(["plan", "check", str(plan), "--json"]) == 3

    printed = capsys.readouterr()
    error = json.loads(printed.err)
    assert printed.out == ""
    assert (error["kind"], error["exit_code"]) == ("PlanError", 3)
    assert "round:" in error["error"]
    assert "rounds:" in error["error"]
    assert error["remedy"]


def test_provision_says_who_gets_which_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "federation"
    arguments = ["provision", str(folder), "--name", "Lung", "--host", "127.0.0.1", "--site", "north,south"]
    assert main([*arguments, "--coordinator", "anna", "--observer", "otto", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)

    assert main(["provision", str(folder), "--site", "west"]) == 0

    assert [member["folder"] for member in first["members"]] == [
        "sites/north",
        "sites/south",
        "coordinators/anna",
        "observers/otto",
    ]
    text = capsys.readouterr().out
    assert "sites/west" in text
    assert first["fingerprint"] in text
    assert load_identity(folder / "sites" / "west").peer.name == "west"


def test_plan_is_checked_signed_and_verified(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    plan, signed = place.folder / "plan.toml", place.folder / "plan.signed"
    plan.write_text(PLAN)

    assert main(["plan", "check", str(plan), "--json"]) == 0
    checked = json.loads(capsys.readouterr().out)
    assert main(["plan", "sign", str(plan), "--out", str(signed), "--valid-days", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert main(["plan", "check", str(signed)]) == 0
    text = capsys.readouterr().out

    document = verify_plan(signed.read_bytes(), load_identity(Path(place.member())).federation)
    sizes = [spec.size for spec in document.body.layout]
    assert checked["bytes_per_update"] == 4 * sum(sizes)
    assert checked["parameters"] > 0
    assert (told["digest"], told["signer"]) == (document.digest, "anna")
    assert document.plan.expires is not None
    assert document.plan.expires - document.body.signed_at == timedelta(days=2)
    assert "by anna: holds" in text


def test_changed_signed_plan_does_not_pass_the_check(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(place.plan("complete"))
    path.write_bytes(path.read_bytes().replace(b'"rounds":2', b'"rounds":3'))

    assert main(["plan", "check", str(path)]) == 3
    assert "signature of coordinator anna does not hold" in capsys.readouterr().err


def test_observer_cannot_sign(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    plan, out = place.folder / "plan.toml", place.folder / "plan.signed"
    plan.write_text(PLAN)

    code = main(["plan", "sign", str(plan), "--identity", place.member("observers/otto"), "--out", str(out)])

    assert code == 4
    assert "may not sign" in capsys.readouterr().err
    assert not out.exists()


def test_run_is_started_and_watched_to_its_end(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "start", place.plan("complete")]) == 0

    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("Run pneumonia-")
    assert "round 2/2 committed" in "\n".join(lines)
    (end,) = [at for at, line in enumerate(lines) if line.endswith("run completed, result: model of round 2")]
    assert lines[end + 1] == ""
    assert lines[end + 2].split()[:2] == ["Site", "Rounds"]
    assert lines[-1].startswith("Report as a page: fedward run report pneumonia-")


def test_json_of_a_watched_run_is_the_run_and_then_its_events(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "start", place.plan("complete"), "--json"]) == 0

    run, *events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert run["status"] in ("waiting", "running")
    assert events[-1]["kind"] == "finished"


def test_run_that_fails_ends_the_command_with_8_and_a_remedy(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "start", place.plan("die")]) == 8

    error = capsys.readouterr().err
    assert "failed after round 1 of 2" in error
    assert "fedward run resume pneumonia-" in error
    assert main(["run", "report", place.supervisor.store.runs()[0].run_id]) == 0
    assert "failed, the run's process ended with exit code 3" in capsys.readouterr().out


def test_runs_are_listed_stopped_and_resumed(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    run_id = started(place, "wait", capsys)
    wait_for(place.supervisor.store, run_id, "round_committed")
    assert main(["run", "stop", run_id]) == 2
    assert "--yes" in capsys.readouterr().err
    assert main(["run", "stop", run_id, "--yes"]) == 0
    place.mailboxes.wait_closed(1)
    assert main(["run", "watch", run_id]) == 8
    assert main(["run", "resume", run_id]) == 0
    capsys.readouterr()

    assert main(["run", "list", "--json"]) == 0

    listing = json.loads(capsys.readouterr().out)
    assert [(run["run_id"], run["status"], run["rounds_done"]) for run in listing] == [
        (run_id, "completed", 2)
    ]
    assert main(["run", "list"]) == 0
    assert run_id in capsys.readouterr().out


def test_report_is_a_page_a_table_or_json(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    run_id = started(place, "complete", capsys)
    place.mailboxes.wait_closed(1)
    page = place.folder / "report.html"

    assert main(["run", "report", run_id, "--out", str(page)]) == 0
    text = capsys.readouterr().out
    assert main(["run", "report", run_id, "--json"]) == 0

    assert json.loads(capsys.readouterr().out)["run_id"] == run_id
    assert run_id in text
    assert "completed" in text
    assert page.read_text().lstrip().lower().startswith("<!doctype html>")
    assert run_id in page.read_text()


def test_sites_are_listed_with_their_connection(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sites"]) == 0
    assert capsys.readouterr().out.split() == [
        *("Site", "State", "north", "connected"),
        *("south", "not", "connected"),
    ]

    assert main(["sites", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[1] == {"name": "south", "online": False}


def test_observer_may_watch_but_not_start(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    otto = ["--identity", place.member("observers/otto")]
    run_id = started(place, "complete", capsys)

    assert main(["run", "watch", run_id, *otto]) == 0
    assert main(["run", "start", place.plan("wait"), *otto]) == 4
    assert "observer otto may not call Launch" in capsys.readouterr().err


def test_unknown_run_and_missing_server_have_their_own_exit_codes(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "watch", "nothing"]) == 2
    assert "no run 'nothing'" in capsys.readouterr().err

    roster = Path(place.member()) / "federation.json"
    document = json.loads(roster.read_text()) | {"control": "127.0.0.1:1"}
    roster.write_text(json.dumps(document))
    assert main(["run", "list"]) == 7
    assert "fedward serve" in capsys.readouterr().err


def test_identity_that_is_missing_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FEDWARD_IDENTITY", raising=False)
    assert main(["run", "list"]) == 2
    assert "--identity" in capsys.readouterr().err

    assert main(["run", "list", "--identity", str(tmp_path)]) == 4
    assert "federation.json" in capsys.readouterr().err


def test_ctrl_c_leaves_the_run_going_and_ends_with_130(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = started(place, "wait", capsys)
    command = [*FEDWARD, "run", "watch", run_id, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout is not None
        assert watcher.stderr is not None
        while json.loads(watcher.stdout.readline())["kind"] != "round_committed":
            pass
        watcher.send_signal(signal.SIGINT)
        error = watcher.stderr.read()

    assert watcher.returncode == 130
    assert f"fedward run watch {run_id}" in error
    assert "Traceback" not in error
    assert place.supervisor.store.run(run_id).status == "running"


def test_reader_that_goes_away_ends_the_command_quietly(place: Place) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as gone:
        done = subprocess.run(
            [*FEDWARD, "sites", "--json"], stdout=gone, stderr=subprocess.PIPE, text=True, timeout=60
        )

    assert done.returncode == 1
    assert done.stderr == ""


def test_page_that_cannot_be_written_is_explained(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    run_id = started(place, "complete", capsys)
    place.mailboxes.wait_closed(1)

    assert main(["run", "report", run_id, "--out", str(place.folder / "absent" / "report.html")]) == 2
    assert "No such file or directory" in capsys.readouterr().err


def test_signed_plan_is_a_file_others_may_read(place: Place) -> None:
    plan, signed = place.folder / "plan.toml", place.folder / "plan.signed"
    plan.write_text(PLAN)

    assert main(["plan", "sign", str(plan), "--out", str(signed)]) == 0

    assert signed.stat().st_mode & 0o777 == 0o644
    assert parse_signed_plan(signed.read_bytes()).plan.name == "pneumonia"
