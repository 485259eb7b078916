"""`fedward simulate` as a process: a whole run on this machine, and no process left behind at its end."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from fedward_common.evaluation.report import RunReport
from tests.client.site_workers import a_divided_site
from tests.integration.deployment import a_plan_file, wait_for

COMMAND = (sys.executable, "-m", "fedward_server.cli", "simulate")


class Simulation:
    """The command in a process of its own; everything it starts is known by a mark in the environment."""

    def __init__(self, root: Path, plan: Path, *arguments: object) -> None:
        self.mark = f"FEDWARD_TEST_MARK={secrets.token_hex(8)}".encode()
        key, _, value = self.mark.decode().partition("=")
        self.process = subprocess.Popen(
            [*COMMAND, str(plan), "--out", str(root / "out"), "--threads", "1", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=root,
            env={**os.environ, "OMP_NUM_THREADS": "1", "FEDWARD_DATA": str(root / "none"), key: value},
        )

    def end(self) -> tuple[int, str, str]:
        """Wait for the end: exit code, output, errors."""
        out, err = self.process.communicate(timeout=180)
        return self.process.returncode, out, err

    def alive(self) -> list[int]:
        """Ids of all processes of this simulation."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    if self.mark in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return found


@contextmanager
def a_simulation(root: Path, plan: Path, *arguments: object) -> Iterator[Simulation]:
    simulation = Simulation(root, plan, *arguments)
    try:
        yield simulation
    finally:
        for pid in simulation.alive():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        simulation.process.communicate()


def a_plan(path: Path, **tables: Any) -> Path:
    small: dict[str, Any] = {
        "rounds": 2,
        "transforms": {"size": [16, 16]},
        "model": {"name": "cnn2d", "options": {"channels": [2, 4], "dense": 4}},
        "training": {"learning_rate": 0.02, "batch_size": 16, "precision": "float32"},
    }
    return a_plan_file(path, **(small | tables))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two sites with 24 images each."""
    for name in ("north", "south"):
        a_divided_site(tmp_path / "images" / name)
    return tmp_path / "images"


def events_of(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_two_sites_with_phantoms_train_two_rounds_and_every_process_ends(tmp_path: Path) -> None:
    plan = a_plan(tmp_path / "plan.toml")
    with a_simulation(tmp_path, plan, "--sites", 2, "--workers", 2, "--json") as simulation:
        assert simulation.process.stdout is not None
        first = simulation.process.stdout.readline()
        assert len(simulation.alive()) == 3  # the command and two workers
        code, out, err = simulation.end()
        assert code == 0, err
        assert simulation.alive() == []
    events = events_of(first + out)
    assert events[-1]["kind"] == "finished"
    assert events[-1]["fields"]["status"] == "completed"
    assert [one["fields"]["round"] for one in events if one["kind"] == "round_committed"] == [1, 2]
    report = RunReport.model_validate_json((tmp_path / "out" / "report.json").read_text())
    assert report.sites == ("site-1", "site-2")
    assert report.without_gaps
    assert report.provenance.data == "synthetic chest phantoms"
    assert report.test is not None
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000


def digests(out: Path) -> list[str]:
    report = RunReport.model_validate_json((out / "report.json").read_text())
    return [one.weights_digest for one in report.rounds]


def test_the_result_does_not_depend_on_the_number_of_workers(tmp_path: Path, images: Path) -> None:
    plan = a_plan(tmp_path / "plan.toml")
    found = []
    for workers in (1, 2):
        root = tmp_path / str(workers)
        root.mkdir()
        with a_simulation(root, plan, "--sites", 2, "--workers", workers, "--data", images) as simulation:
            code, out, err = simulation.end()
        assert code == 0, err
        assert "2 simulated sites: images from the given folder" in out
        found.append(digests(root / "out"))
    assert len(found[0]) == 2
    assert found[0] == found[1]
    assert sorted(path.name for path in (images / "north").iterdir()) == ["dicom", "home", "labels.csv"]
    assert list((images / "north" / "home").iterdir()) == []  # what the site writes is in --out


@pytest.mark.parametrize("as_json", [False, True])
def test_a_quorum_above_the_number_of_sites_is_refused_before_anything_is_made(
    tmp_path: Path, as_json: bool
) -> None:
    plan = a_plan(tmp_path / "plan.toml", participation={"quorum": 3})
    with a_simulation(tmp_path, plan, "--sites", 2, *(["--json"] if as_json else [])) as simulation:
        code, out, err = simulation.end()
    assert code == 3
    assert out == ""
    told = json.loads(err)["remedy"] if as_json else err
    assert "--sites" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("known", "unknown", "told"),
    [
        ('name = "cnn2d"', 'name = "resnet9000"', "known here: cnn2d"),
        ("channels = ", "chanels = ", "chanels"),
    ],
)
def test_a_plan_that_names_what_is_not_there_is_explained(
    tmp_path: Path, images: Path, known: str, unknown: str, told: str
) -> None:
    plan = a_plan(tmp_path / "plan.toml")
    plan.write_text(plan.read_text().replace(known, unknown))
    with a_simulation(tmp_path, plan, "--sites", 2, "--workers", 1, "--data", images) as simulation:
        code, _, err = simulation.end()
        assert simulation.alive() == []
    assert code == 3
    assert told in err
    assert "Traceback" not in err


def test_a_simulation_below_the_quorum_fails_and_names_the_sites_and_why(
    tmp_path: Path, images: Path
) -> None:
    (images / "south" / "labels.csv").write_text("SOPInstanceUID,label\n2.25.1,0\n2.25.1,1\n")
    plan = a_plan(tmp_path / "plan.toml", participation={"quorum": 2, "gather_s": 0.1})
    arguments = ("--sites", 2, "--workers", 1, "--data", images, "--json")
    with a_simulation(tmp_path, plan, *arguments) as simulation:
        code, out, err = simulation.end()
        assert simulation.alive() == []
    assert code == 8
    assert "Traceback" not in err
    end = events_of(out)[-1]["fields"]
    assert end["status"] == "failed"
    assert "south: the site's images or labels cannot be used for this plan" in end["reason"]
    report = RunReport.model_validate_json((tmp_path / "out" / "report.json").read_text())
    assert [(site.site, site.code) for site in report.absent] == [("south", 30)]
    told, failure = map(json.loads, err.splitlines())
    assert (told["site"], told["action"], told["code"]) == ("south", "prepare", 30)
    assert failure["kind"] == "RunFailedError"


def test_the_screen_says_what_failed_at_which_site_and_the_report_neither_place_nor_path(
    tmp_path: Path, images: Path
) -> None:
    (images / "south" / "labels.csv").write_text("SOPInstanceUID,label\n2.25.777,0\n2.25.777,1\n")
    plan = a_plan(tmp_path / "plan.toml", rounds=1, participation={"quorum": 1, "gather_s": 0.1})
    with a_simulation(tmp_path, plan, "--sites", 2, "--workers", 1, "--data", images) as simulation:
        code, _, err = simulation.end()
    assert code == 0, err
    log = tmp_path / "out" / "sites" / "south" / "home" / "site.log"
    first, matter, place = err.splitlines()
    assert first == "south, round 0, prepare: the site's images or labels cannot be used for this plan"
    assert "row 3: duplicate SOPInstanceUID" in matter
    where = place.split()[1].rstrip(";")
    assert where.startswith("CohortError:fedward_client.")
    assert place.endswith(f"more in {log}")
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert {(event["site"], event["event"], event["where"]) for event in events} == {
        ("south", "instruction_refused", where)
    }
    for name in ("report.html", "report.json"):
        text = (tmp_path / "out" / name).read_text()
        for secret in (where, "2.25.777", "row 3", str(tmp_path), "labels.csv"):
            assert secret not in text


def test_the_end_is_a_table_that_a_screen_of_80_columns_holds_and_the_place_of_the_report(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    plan = a_plan(tmp_path / "plan.toml", rounds=1)
    with a_simulation(tmp_path, plan, "--sites", 2, "--workers", 1, "--data", images) as simulation:
        code, out, err = simulation.end()
    assert (code, err) == (0, "")
    lines = out.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("Site"))
    assert lines[start].split("  ")[-1] == "Own AUROC"
    assert [line.split()[0] for line in lines[start + 1 : start + 4]] == ["north", "south", "All"]
    assert max(map(len, lines[start : start + 4])) <= 80
    assert lines[-1] == f"Report: {tmp_path / 'out' / 'report.html'}"


def test_a_failure_that_names_a_file_is_on_the_screen_and_not_in_the_report(
    tmp_path: Path, images: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoints").write_text("in the way")
    plan = a_plan(tmp_path / "plan.toml", rounds=1)
    with a_simulation(tmp_path, plan, "--sites", 2, "--workers", 1, "--data", images) as simulation:
        code, _, err = simulation.end()
    assert code == 8
    assert f"{tmp_path / 'out' / 'checkpoints'}" in err
    assert "Traceback" not in err
    report = RunReport.model_validate_json((tmp_path / "out" / "report.json").read_text())
    assert (report.verdict, report.reason) == ("failed", "CheckpointError; see what was printed")
    assert str(tmp_path) not in (tmp_path / "out" / "report.html").read_text()


def test_a_second_simulation_in_the_same_folder_is_refused_and_the_first_goes_on(
    tmp_path: Path, images: Path
) -> None:
    endless = {"learning_rate": 0.02, "batch_size": 1, "local_epochs": 100, "precision": "float32"}
    plan = a_plan(tmp_path / "plan.toml", rounds=1000, training=endless)
    first = begun(tmp_path, plan, images)
    with a_simulation(tmp_path, plan, "--sites", 2, "--data", images) as second:
        code, out, err = second.end()
    assert (code, out) == (2, "")
    assert f"another simulation writes to {tmp_path / 'out'} (locked by process {first.process.pid})" in err
    assert "--out" in err
    assert len(first.alive()) == 2
    first.process.kill()  # and leaves no lock behind
    first.end()
    wait_for(lambda: first.alive() == [], "its worker to end", patience_s=10)
    with a_simulation(
        tmp_path, a_plan(tmp_path / "plan.toml", rounds=1), "--sites", 2, "--data", images
    ) as third:
        code, _, err = third.end()
    assert code == 0, err


def begun(root: Path, plan: Path, images: Path) -> Simulation:
    """A simulation that would take days, once its first round has begun."""
    simulation = Simulation(root, plan, "--sites", 2, "--workers", 1, "--data", images, "--json")
    assert simulation.process.stdout is not None
    for line in simulation.process.stdout:
        if json.loads(line)["kind"] == "round_started":
            break
    return simulation


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_stays_when_a_simulation_is_ended_from_outside(
    tmp_path: Path, images: Path, number: signal.Signals
) -> None:
    endless = {"learning_rate": 0.02, "batch_size": 1, "local_epochs": 100, "precision": "float32"}
    plan = a_plan(tmp_path / "plan.toml", rounds=1000, training=endless)
    simulation = begun(tmp_path, plan, images)
    assert len(simulation.alive()) == 2
    simulation.process.send_signal(number)
    code, _, err = simulation.end()
    assert code == (130 if number is signal.SIGINT else -signal.SIGKILL)
    assert "Traceback" not in err
    wait_for(lambda: simulation.alive() == [], "its worker to end", patience_s=10)
