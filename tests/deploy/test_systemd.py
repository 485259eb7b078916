"""The systemd units: what systemd itself says of them."""

from __future__ import annotations

import sys
from configparser import RawConfigParser
from pathlib import Path

import pytest

from tests.deploy.checkers import ROOT, exposure_of_unit, verify_unit
from tests.deploy.test_compose import SERVICES

FOLDER = ROOT / "deploy" / "systemd"
UNITS = ("fedward-server.service", "fedward-site.service", "fedward-site-images.service")
COMMANDS = {
    "fedward-server.service": SERVICES["server"]["command"],
    "fedward-site.service": SERVICES["site-a"]["command"],
    "fedward-site-images.service": [
        *("fedward-site", "cohort", "index", "--watch"),
        *("--home", "/var/lib/fedward-site"),
    ],
}

each_unit = pytest.mark.parametrize("name", UNITS)


def installed_here(name: str, folder: Path) -> Path:
    """Copy a unit, with this environment's commands: systemd wants the program to exist."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert "/opt/fedward/bin/" in text
    copy = folder / name
    copy.write_text(text.replace("ExecStart=/opt/fedward/bin/", f"ExecStart={Path(sys.executable).parent}/"))
    return copy


@each_unit
def test_systemd_accepts_the_unit_without_a_word(name: str, tmp_path: Path) -> None:
    result = verify_unit(installed_here(name, tmp_path))
    assert (result.returncode, result.stderr) == (0, "")


@each_unit
@pytest.mark.parametrize(
    ("right", "wrong", "named"),
    [
        ("ProtectSystem=strict", "ProtectSytem=strict", "ProtectSytem"),
        ("KillMode=mixed", "KillMode=mixd", "mixd"),
    ],
)
def test_systemd_names_a_mistake(name: str, right: str, wrong: str, named: str, tmp_path: Path) -> None:
    unit = installed_here(name, tmp_path)
    text = unit.read_text(encoding="utf-8")
    assert right in text
    unit.write_text(text.replace(right, wrong))
    assert named in verify_unit(unit).stderr


@each_unit
def test_systemd_rates_the_sandbox_as_tight(name: str, tmp_path: Path) -> None:
    result = exposure_of_unit(installed_here(name, tmp_path), threshold=20)
    assert result.returncode == 0, result.stdout[-200:]


def test_rating_notices_a_sandbox_that_was_opened(tmp_path: Path) -> None:
    unit = installed_here("fedward-site.service", tmp_path)
    text = unit.read_text(encoding="utf-8")
    unit.write_text(text.replace("User=fedward-site\n", "").replace("CapabilityBoundingSet=\n", ""))
    assert exposure_of_unit(unit, threshold=20).returncode != 0


@each_unit
def test_unit_runs_the_command_that_the_image_runs_too(name: str) -> None:
    parser = RawConfigParser(strict=False, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]  # keys keep their case
    parser.read(FOLDER / name, encoding="utf-8")
    assert parser["Service"]["ExecStart"].removeprefix("/opt/fedward/bin/").split() == COMMANDS[name]
    assert parser["Service"]["Restart"] == "always"
