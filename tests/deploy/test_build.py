"""Makefile, pinned versions and the CI script."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.pin_constraints import CONSTRAINTS, pins
from tests.deploy.checkers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def make(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    # an outer make hands down its flags and the variables it was given
    variables = ("PYTHON", "VENV", "TORCH_INDEX", "DATA", "OUT", "PYTEST_ARGS")
    inherited = {key: value for key, value in os.environ.items() if key not in variables}
    environment = {key: value for key, value in inherited.items() if not key.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def pinned() -> dict[str, str]:
    lines = [
        line for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines() if not line.startswith("#")
    ]
    return dict(line.split("==") for line in lines)


def test_constraints_pin_exactly_the_versions_that_these_tests_run_with() -> None:
    # Fails after a dependency was added or upgraded by hand: make constraints.
    assert pinned() == pins()


def test_constraints_satisfy_every_requirement_of_the_project() -> None:
    requirements = [
        Requirement(text) for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
    ]
    versions = pinned()
    for requirement in requirements:
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


def test_pins_leave_out_the_project_itself_and_what_it_does_not_need() -> None:
    needed = pins("fedward")
    assert "fedward" not in needed
    assert "pytest" not in needed
    assert "pytest" in pins("fedward[dev]")


def test_pins_name_what_is_not_installed() -> None:
    with pytest.raises(LookupError, match="no-such-distribution"):
        pins("no-such-distribution")


def test_setup_installs_torch_first_and_alone() -> None:
    steps = [
        line
        for line in make("--dry-run", "setup", "VENV=none", "TORCH_INDEX=INDEX").stdout.splitlines()
        if "-m pip install" in line
    ]
    assert len(steps) == 2
    assert '--index-url "INDEX" "$(grep \'^torch==\' deploy/constraints.txt)"' in steps[0]
    assert "INDEX" not in steps[1]
    assert "--constraint deploy/constraints.txt --editable ." in steps[1]


def test_demo_passes_data_on_only_when_given() -> None:
    without, given = make("--dry-run", "demo").stdout, make("--dry-run", "demo", "DATA=x ray.npz").stdout
    assert 'fedward demo --out "demo-out" \n' in without
    assert 'fedward demo --out "demo-out" --data "x ray.npz"\n' in given


def test_demo_needs_no_test_tools() -> None:
    assert "[dev]" not in make("--dry-run", "demo", "VENV=none").stdout
    assert "[dev]" in make("--dry-run", "test", "VENV=none").stdout


def test_setup_refuses_a_python_that_is_too_old_and_says_what_to_do(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    result = make("setup", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}")
    assert result.returncode != 0
    assert "3.11 or newer" in result.stdout
    assert not (tmp_path / "venv").exists()


def test_bench_lists_every_benchmark_with_what_it_measures(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    folder = tmp_path / "tests" / "benchmarks"
    folder.mkdir(parents=True)
    (folder / "speed.py").write_text('"""How fast.\n\nMore."""\nif __name__ == "__main__":\n    pass\n')
    (folder / "floor.py").write_text('"""Not a benchmark."""\n')
    assert make("bench", folder=tmp_path).stdout == "python tests/benchmarks/speed.py --json    How fast.\n"


def test_help_names_every_target_that_a_person_calls() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = set(re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)[0].split())
    assert {line.split()[0] for line in make("help").stdout.splitlines()} == phony


def test_ci_script_is_executable_and_sound() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0


def test_ci_script_fails_when_no_test_ran_and_passes_on_the_count_of_those_that_did(tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    tools = tmp_path / "bin"
    tools.mkdir()
    # so that nothing is installed here
    for tool in ("chromium", "ip", "systemd-analyze", "Orthanc", "storescu", "tesseract", "dciodvfy"):
        (tools / tool).symlink_to(shutil.which("true") or "/bin/true")
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}

    def ci(recipe: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "Makefile").write_text(f"test:\n\t@{recipe}\n")
        command = [str(tmp_path / ".ci" / "run")]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    passed = ci("echo '3 passed, 1 skipped in 1.25s'; echo 'TOTAL 90%'")
    assert (passed.returncode, passed.stdout.splitlines()[-1]) == (0, "3 passed, 1 skipped in 1.25s")
    failed = ci("echo '1 failed, 3 passed in 75.10s (0:01:15)'; exit 1")
    assert failed.returncode != 0
    assert failed.stdout.splitlines()[-1].startswith("1 failed, 3 passed")
    assert ci("echo 'no tests ran in 0.01s'; exit 5").returncode != 0
    assert ci("true").returncode != 0
