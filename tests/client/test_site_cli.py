"""`fedward-site`, command by command: for people, as JSON, and when something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedward_client import cli
from fedward_client.outbound import OutboundDoor
from fedward_client.site_data import SiteData
from fedward_common.audit import AuditLog, verify
from fedward_common.errors import RefusalCode
from fedward_common.identity import load_identity, sign
from tests.builders import a_dicom, write_labels
from tests.client.site_workers import a_divided_site
from tests.federations import a_federation, a_plan, a_signed_plan
from tests.integration.deployment import free_ports, wait_for
from tests.messages import an_instruction, packed, signed


@dataclass(frozen=True)
class Said:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Said]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Type a command."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("FEDWARD_SITE_HOME", raising=False)

    def typed(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["fedward-site", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Said(ended.value.code, out, err)

    return typed


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (port,) = free_ports(1)
    return a_federation(tmp_path_factory.mktemp("cli") / "federation", server_port=port)


@pytest.fixture
def data(tmp_path: Path) -> SiteData:
    return a_divided_site(tmp_path / "data")


@pytest.fixture
def home(run: Run, federation: Path, data: SiteData, tmp_path: Path) -> Path:
    """A site that has joined."""
    folder = tmp_path / "home"
    kit = federation / "sites" / "north"
    said = run(
        "join", kit, "--home", folder, "--dicom", data.dicom, "--labels", data.labels, "--device", "cpu"
    )
    assert said.code == 0, said.err
    return folder


@pytest.fixture
def plan_file(federation: Path, tmp_path: Path) -> Path:
    path = tmp_path / "plan.signed"
    path.write_bytes(a_signed_plan(federation).to_bytes())
    return path


def test_join_says_what_to_compare_and_what_comes_next(
    run: Run, federation: Path, data: SiteData, tmp_path: Path
) -> None:
    kit, fingerprint = (
        federation / "sites" / "north",
        load_identity(federation / "server").federation.fingerprint,
    )
    there = ("--dicom", data.dicom, "--labels", data.labels)
    said = run("join", kit, "--home", tmp_path / "one", *there)
    assert said.code == 0
    assert fingerprint in said.out
    assert "fedward-site doctor" in said.out
    document = run("join", kit, "--home", tmp_path / "two", *there, "--json").json
    assert document["site"] == "north"
    assert document["fingerprint"] == fingerprint


def test_doctor_lists_every_check_and_fails_when_one_does(run: Run, home: Path) -> None:
    said = run("doctor", "--home", home)
    assert said.code == 1  # no server runs
    assert "FAIL  server reachable" in said.out
    assert "remedy:" in said.out
    assert "ok    identity" in said.out
    said = run("doctor", "--home", home, "--json")
    assert said.code == 1
    assert said.json["ok"] is False
    failed = [check for check in said.json["checks"] if not check["ok"]]
    assert all(check["remedy"] for check in failed)
    assert {check["name"] for check in said.json["checks"]} >= {"identity", "labels", "audit log"}


def test_doctor_of_a_folder_that_is_no_home_fails_and_explains(run: Run, tmp_path: Path) -> None:
    said = run("doctor", "--home", tmp_path / "nowhere", "--json")
    assert said.code == 1
    assert any("fedward-site join" in check["remedy"] for check in said.json["checks"])


def test_cohort_index_counts_files_and_what_is_in_quarantine(run: Run, home: Path, data: SiteData) -> None:
    (data.dicom / "broken.dcm").write_bytes(b"DICM, but no more")
    said = run("cohort", "index", "--home", home)
    assert said.code == 0
    assert "25 files, 25 of them new or changed" in said.out
    assert "24 labelled images make up the cohort" in said.out
    assert "1 in quarantine" in said.out
    document = run("cohort", "index", "--home", home, "--json").json
    assert (document["files"], document["read"], document["images"]) == (25, 0, 24)
    assert sum(document["quarantined"].values()) == 1


def test_cohort_show_counts_cases_and_gives_reasons_and_remedies(
    run: Run, home: Path, data: SiteData
) -> None:
    (data.dicom / "broken.dcm").write_bytes(b"DICM, but no more")
    run("cohort", "index", "--home", home)
    said = run("cohort", "show", "--home", home)
    assert said.code == 0
    assert "Quarantine" in said.out
    document = run("cohort", "show", "--home", home, "--json").json
    assert document["counts"]["split"] == {"train": "12", "validation": "6", "test": "6"}
    (item,) = document["quarantine"]
    assert item["remedy"]
    assert item["files"] == 1
    assert "broken" not in said.out  # a file's name may be a patient's


def test_cohort_commands_before_the_index_or_with_a_wrong_label_file_name_the_remedy(
    run: Run, home: Path, data: SiteData
) -> None:
    write_labels(data.labels, [["2.25.1", 0], ["2.25.1", 1]])
    said = run("cohort", "index", "--home", home)
    assert said.code == 6
    assert said.err.startswith("error: ")
    assert "\nremedy: " in said.err
    said = run("cohort", "index", "--home", home, "--json")
    assert said.code == 6
    assert said.out == ""
    assert set(json.loads(said.err)) == {"error", "kind", "remedy", "exit_code"}


def test_plan_list_is_empty_until_a_plan_has_arrived(run: Run, home: Path, plan_file: Path) -> None:
    assert run("plan", "list", "--home", home).out == "No plan has arrived yet.\n"
    assert run("plan", "list", "--home", home, "--json").json == []
    run("plan", "approve", plan_file, "--yes", "--home", home)
    assert "approved" in run("plan", "list", "--home", home).out
    (listed,) = run("plan", "list", "--home", home, "--json").json
    assert (listed["name"], listed["signer"], listed["status"]) == ("pneumonia", "anna", "approved")


def test_plan_approve_shows_the_plan_and_approves_exactly_that_one(
    run: Run, home: Path, plan_file: Path, federation: Path
) -> None:
    said = run("plan", "approve", plan_file, "--yes", "--home", home)
    assert said.code == 0
    assert "coordinator anna" in said.out
    digest = run("plan", "list", "--home", home, "--json").json[0]["digest"]
    assert digest in said.out
    assert run("plan", "approve", digest[:16], "--yes", "--home", home, "--json").json == {
        "approved": digest,
        "name": "pneumonia",
    }


def test_digest_to_compare_can_be_copied_from_a_screen_of_80_columns(
    run: Run, home: Path, plan_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    said = run("plan", "approve", plan_file, "--yes", "--home", home)
    digest = run("plan", "list", "--home", home, "--json").json[0]["digest"]
    assert f"\n  {digest}\n" in said.out
    assert max(map(len, said.out.splitlines())) <= 80


def test_plan_approve_says_that_images_will_not_do_for_volumes(run: Run, home: Path, plan_file: Path) -> None:
    assert "warning" not in run("plan", "approve", plan_file, "--yes", "--home", home).out
    (home / "cohort.toml").write_text('unit = "volume"\n')
    said = run("plan", "approve", plan_file, "--yes", "--home", home)
    assert "warning: the site would refuse this plan" in said.out
    assert "a case of this site is one volume" in said.out
    assert "approved" in run("plan", "list", "--home", home).out


def test_plan_approve_without_confirmation_approves_nothing(run: Run, home: Path, plan_file: Path) -> None:
    for extra in ((), ("--json",)):
        said = run("plan", "approve", plan_file, "--home", home, *extra)
        assert said.code == 2
        assert "--yes" in said.err
    assert run("plan", "list", "--home", home, "--json").json == []


def test_a_plan_cannot_redraw_the_operators_screen(
    run: Run, home: Path, federation: Path, tmp_path: Path
) -> None:
    path = tmp_path / "evil.signed"
    evil = a_plan(description="\x1b[2J\x1b[1;1H[bold]approved[/bold]\u202e", task={"labels": ("a\x07", "b")})
    path.write_bytes(a_signed_plan(federation, evil).to_bytes())
    said = run("plan", "approve", path, "--yes", "--home", home)
    assert said.code == 0
    assert "[bold]approved[/bold]" in said.out
    for letter in ("\x1b[2J", "\x1b[1;1H", "\x07", "\u202e"):
        assert letter not in said.out


@pytest.mark.parametrize("source", ["nothing.signed", "0123456789abcdef"])
def test_plan_approve_of_what_is_not_there_is_refused(run: Run, home: Path, source: str) -> None:
    said = run("plan", "approve", source, "--yes", "--home", home)
    assert said.code == 2
    assert "remedy:" in said.err


def test_plan_approve_of_a_changed_plan_is_refused(run: Run, home: Path, plan_file: Path) -> None:
    plan_file.write_bytes(plan_file.read_bytes().replace(b'"rounds":5', b'"rounds":6'))
    said = run("plan", "approve", plan_file, "--yes", "--home", home, "--json")
    assert said.code == 3
    assert json.loads(said.err)["exit_code"] == 3


def let_out(home: Path) -> None:
    """Two messages through the site's own door."""
    site = load_identity(home / "identity")
    plan = signed()
    door = OutboundDoor("north", lambda body: sign(site, body), AuditLog(home / "audit.jsonl").append)
    door.update(an_instruction(plan, base=packed()), plan, packed(0.5), 40, 0.7)
    door.refusal(an_instruction(plan, base=packed(), round_index=2), RefusalCode.OUT_OF_MEMORY)


def test_outbound_show_explains_every_message_that_left(run: Run, home: Path) -> None:
    assert run("outbound", "show", "--home", home).out == "Nothing has left this site.\n"
    assert run("outbound", "show", "--home", home, "--json").json == []
    let_out(home)
    said = run("outbound", "show", "--home", home)
    assert said.code == 0
    assert len(said.out.splitlines()) == 2
    assert "a weight update; numbers released: num cases 40" in said.out
    assert len(run("outbound", "show", 2, "--home", home).out.splitlines()) == 1
    (document,) = run("outbound", "show", 1, "--run", "run-1", "--home", home, "--json").json
    assert document["payload_bytes"] == 32
    assert run("outbound", "show", "--run", "run-2", "--home", home, "--json").json == []


def test_outbound_show_of_a_folder_that_is_no_home_does_not_say_that_nothing_left(
    run: Run, tmp_path: Path
) -> None:
    said = run("outbound", "show", "--home", tmp_path)
    assert said.code == 2
    assert "Nothing" not in said.out
    assert "fedward-site join" in said.err


def test_outbound_show_without_an_audit_log_does_not_say_that_nothing_left(run: Run, home: Path) -> None:
    (home / "audit.jsonl").unlink()
    said = run("outbound", "show", "--home", home)
    assert said.code == 10
    assert "Nothing" not in said.out


def test_outbound_show_of_a_changed_audit_log_names_the_line(run: Run, home: Path) -> None:
    let_out(home)
    log = home / "audit.jsonl"
    log.write_text(log.read_text().replace('"num_cases":40', '"num_cases":4'))
    said = run("outbound", "show", "--home", home)
    assert said.code == 10
    assert "line 2" in said.err


@pytest.mark.parametrize(
    "command",
    [
        ("run",),
        ("cohort", "index"),
        ("cohort", "show"),
        ("plan", "list"),
        ("plan", "approve", "x"),
        ("outbound", "show"),
    ],
)
def test_every_command_in_a_folder_that_is_no_home_fails_with_a_remedy(
    run: Run, command: tuple[str, ...], tmp_path: Path
) -> None:
    said = run(*command, "--home", tmp_path / "nowhere")
    assert said.code > 0
    assert said.err.startswith("error: ")
    assert "\nremedy: " in said.err
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("nope",), "No such command"),
        (("doctor", "--nope"), "No such option"),
        (("join",), "Missing argument"),
    ],
)
def test_a_command_that_cannot_be_understood_ends_with_2_and_points_to_the_help(
    run: Run, arguments: tuple[str, ...], expected: str
) -> None:
    said = run(*arguments)
    assert said.code == 2
    assert expected in said.err
    assert "--help" in said.err


@pytest.mark.parametrize("group", [(), ("cohort",), ("plan",), ("outbound",)])
def test_help_of_every_group_ends_well(run: Run, group: tuple[str, ...]) -> None:
    said = run(*group, "--help")
    assert said.code == 0
    assert "Usage" in said.out


def test_the_home_can_be_named_in_the_environment(
    run: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDWARD_SITE_HOME", str(home))
    assert run("outbound", "show", "--json").json == []


def test_the_help_loads_no_heavy_library() -> None:
    script = (
        "import sys; import fedward_client.cli; "
        "print([name for name in ('torch', 'monai', 'flwr', 'sklearn', 'numpy', 'pydicom', 'pydantic', "
        "'cryptography', 'grpc') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_output_into_a_pipe_that_was_closed_ends_quietly(home: Path) -> None:
    let_out(home)
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "fedward_client.cli", "outbound", "show", "--home", str(home)]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write_end)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


# --- the daemon -------------------------------------------------------------------------------------------


def test_run_serves_without_a_server_until_it_is_told_to_stop(home: Path) -> None:
    command = [sys.executable, "-m", "fedward_client.cli", "run", "--home", str(home)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as daemon:
        assert daemon.stdout is not None
        assert daemon.stdout.readline().startswith("site north serves ")
        log = home / "site.log"
        wait_for(lambda: log.exists() and "server_unreachable" in log.read_text(), "an attempt to connect")
        daemon.terminate()
        assert daemon.wait(20) == 0
        assert daemon.stderr is not None
        assert daemon.stderr.read() == ""
    events = [entry.event for entry in AuditLog(home / "audit.jsonl").entries()]
    assert events == ["joined", "started", "stopped"]
    assert verify(home / "audit.jsonl") == 3


def a_daemon(home: Path) -> subprocess.Popen[str]:
    """A daemon that serves."""
    command = [sys.executable, "-m", "fedward_client.cli", "run", "--home", str(home)]
    daemon = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert daemon.stdout is not None
    assert daemon.stdout.readline().startswith("site north serves ")
    return daemon


def test_second_daemon_of_a_home_is_refused_and_the_first_is_left_alone(run: Run, home: Path) -> None:
    with a_daemon(home) as first:
        said = run("run", "--home", home)

        assert said.code == 2
        assert said.err.startswith(
            f"error: another daemon already serves {home} (locked by process {first.pid})"
        )
        assert "\nremedy: Leave it running, or stop it first" in said.err
        assert first.poll() is None
        events = [entry.event for entry in AuditLog(home / "audit.jsonl").entries()]
        assert events == ["joined", "started"]
        first.terminate()
        assert first.wait(20) == 0


def test_daemon_starts_at_once_where_another_was_killed(home: Path) -> None:
    with a_daemon(home) as killed:
        killed.kill()
        killed.wait()

    with a_daemon(home) as next_one:
        next_one.terminate()
        assert next_one.wait(20) == 0


def test_run_survives_a_certificate_that_is_half_copied(home: Path) -> None:
    command = [sys.executable, "-m", "fedward_client.cli", "run", "--home", str(home)]
    certificate = home / "identity" / "tls.crt"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as daemon:
        assert daemon.stdout is not None
        daemon.stdout.readline()
        whole = certificate.read_bytes()
        certificate.write_bytes(whole[: len(whole) // 2])
        log = home / "site.log"
        wait_for(lambda: log.exists() and "ConnectionError:IdentityError" in log.read_text(), "a refusal")
        assert daemon.poll() is None
        daemon.terminate()
        assert daemon.wait(20) == 0


def test_run_refuses_a_name_that_is_not_the_certificates(run: Run, home: Path) -> None:
    settings = home / "site.toml"
    settings.write_text(settings.read_text().replace('"north"', '"south"'))
    said = run("run", "--home", home)
    assert said.code == 4
    assert "certificate of site north" in said.err
    assert "fedward-site doctor" in said.err


def test_run_refuses_a_policy_that_cannot_be_read_before_anything_is_connected(run: Run, home: Path) -> None:
    (home / "policy.toml").write_text("[limits]\nmax_round = 5\n")
    said = run("run", "--home", home)
    assert said.code == 5
    assert "max_round" in said.err
    assert [entry.event for entry in AuditLog(home / "audit.jsonl").entries()] == ["joined"]


def test_files_that_are_no_images_do_not_stop_the_index(run: Run, home: Path, data: SiteData) -> None:
    (data.dicom / "notes.txt").write_text("DOE JOHN")
    (data.dicom / "empty.dcm").write_bytes(b"")
    (data.dicom / "other.dcm").write_bytes(a_dicom(Modality="MR"))
    said = run("cohort", "index", "--home", home, "--json")
    assert said.code == 0
    assert said.json["images"] >= 24
    assert "DOE" not in said.out + said.err
