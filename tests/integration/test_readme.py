"""Every command in the README is run here, in its order, as a reader would type it."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.integration.deployment import free_ports

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.integration
# commands that go on until they are stopped
SERVICES = ("fedward serve", "fedward-site run")


def readme_commands() -> list[str]:
    """Lines of the README's bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


class Reader:
    """Types commands in one folder, keeps services running, and knows the run's id."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "deploy").symlink_to(ROOT / "deploy")
        ports = free_ports(2)
        self.replaced = {"9443": str(ports[0]), "9444": str(ports[1])}
        self.services: list[subprocess.Popen[bytes]] = []
        bin_folder = Path(sys.executable).parent
        self.env = {
            **os.environ,
            "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "100",
        }

    def types(self, line: str) -> str:
        """Run one command; its standard output."""
        for before, after in self.replaced.items():
            line = line.replace(before, after)
        if line.startswith(SERVICES):
            with (self.folder / "services.log").open("ab") as log:
                command = shlex.split(line)
                self.services.append(
                    subprocess.Popen(command, cwd=self.folder, env=self.env, stdout=log, stderr=log)
                )
            self.awaits_ports()
            return ""
        words = [word.replace("RUN", self.run_id()) if word == "RUN" else word for word in shlex.split(line)]
        keyboard, terminal = os.openpty()
        try:
            os.write(keyboard, b"y\n")  # for the one command that asks
            done = subprocess.run(
                words,
                cwd=self.folder,
                env=self.env,
                stdin=terminal,
                capture_output=True,
                text=True,
                check=False,
                timeout=600,
            )
        finally:
            os.close(keyboard)
            os.close(terminal)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def makes(self, line: str) -> None:
        """Run a make target in the repository, writing here."""
        venv = Path(sys.prefix)
        words = [*shlex.split(line), f"VENV={venv}", f"OUT={self.folder / 'demo-out'}"]
        if "test" in words:
            words.insert(1, "--dry-run")  # it is what runs this test
        done = subprocess.run(
            words, cwd=ROOT, env=self.env, capture_output=True, text=True, check=False, timeout=900
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

    def awaits_ports(self) -> None:
        """Until whatever was started as a service listens, so that the next command finds it."""
        for port in map(int, self.replaced.values()):
            for _ in range(600):
                with suppress(OSError), socket.create_connection(("localhost", port), 1):
                    break
                time.sleep(0.1)

    def awaits_server(self) -> None:
        command = ["fedward", "sites", "--identity", "federation/coordinators/anna", "--json"]
        for _ in range(300):
            done = subprocess.run(
                command, cwd=self.folder, env=self.env, capture_output=True, text=True, check=False
            )
            if done.returncode == 0 and all(site["online"] for site in json.loads(done.stdout)):
                return
            time.sleep(0.2)
        raise AssertionError(done.stdout + done.stderr)

    def run_id(self) -> str:
        listed = self.types("fedward run list --identity federation/coordinators/anna --json")
        return str(json.loads(listed)[0]["run_id"])


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    person = Reader(tmp_path)
    yield person
    for service in person.services:
        service.terminate()
    for service in person.services:
        service.wait(30)


def test_every_command_in_the_readme_works_in_its_order(reader: Reader) -> None:
    commands = readme_commands()
    assert len(commands) >= 18
    for line in commands:
        if line.startswith("make "):
            reader.makes(line)
        elif line == "source .venv/bin/activate":
            assert (Path(sys.prefix) / "bin" / "activate").is_file()
        else:
            if line.startswith("fedward run start"):
                reader.awaits_server()
            shown = reader.types(line)
            if "--home north" in line and "outbound" not in line:
                # the second site's operator types the same, at another machine
                for north, south in (("north", "south"), ("site-1", "site-2"), ("safe-copies", "safe-too")):
                    line = line.replace(north, south)
                reader.types(line)
            if line.startswith("fedward run start"):
                assert "completed" in shown
    assert (reader.folder / "report.html").is_file()
    assert (reader.folder / "demo-out" / "report.html").is_file()
    assert (reader.folder / "simulation" / "report.html").is_file()


def test_every_command_that_the_readme_names_in_passing_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(fedward(?:-site)?) ((?:[a-z]+ ?)+)", text))
    assert named
    for program, words in named:
        verbs = words.split()
        done = subprocess.run(
            [str(Path(sys.executable).parent / program), *verbs, "--help"],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
