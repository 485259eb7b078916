"""Run the programs that check deployment files, as the tests and their negative controls both do."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tests.absence import do_without

ROOT = Path(__file__).resolve().parents[2]


def check_compose(*files: Path) -> subprocess.CompletedProcess[str]:
    """Compare compose files with the published schema."""
    return _run(
        Path(sys.executable).with_name("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", *files
    )


def check_dockerfile(file: Path) -> subprocess.CompletedProcess[str]:
    """Lint a Dockerfile; every finding counts, whatever its level."""
    hadolint = Path(sys.executable).with_name("hadolint")
    return _run(hadolint, "--no-color", "--failure-threshold", "style", file)


def verify_unit(file: Path) -> subprocess.CompletedProcess[str]:
    """Have systemd read a unit file; it exits 0 on unknown keys, so look at stderr too."""
    return _run(_systemd_analyze(), "verify", "--man=no", file)


def exposure_of_unit(file: Path, threshold: int) -> subprocess.CompletedProcess[str]:
    """Have systemd rate a unit's sandbox; it exits with 1 when the exposure (0 to 100) is too high."""
    return _run(
        _systemd_analyze(), "security", "--offline=true", f"--threshold={threshold}", "--no-pager", file
    )


def _systemd_analyze() -> Path:
    found = shutil.which("systemd-analyze")
    if found is None:
        do_without("systemd-analyze is not installed (Debian package systemd)")
    return Path(found)


def _run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=60, check=False
    )
