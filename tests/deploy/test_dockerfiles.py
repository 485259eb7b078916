"""The images' Dockerfiles: lint, and the promises that a linter does not know."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.deploy.checkers import ROOT, check_dockerfile
from tests.deploy.test_compose import HOMES, SERVICES

FILES = {"server": ROOT / "deploy" / "server.Dockerfile", "site-a": ROOT / "deploy" / "site.Dockerfile"}
HEALTH = {"server": "fedward_server.health", "site-a": "fedward_client.health"}

each_image = pytest.mark.parametrize("name", FILES)


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, its arguments) of a Dockerfile, continued lines joined, comments dropped."""
    text = re.sub(r"^\s*#.*\n", "", FILES[name].read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line)]


def last(name: str, word: str) -> str:
    """Arguments of the last such instruction."""
    return [rest for found, rest in instructions(name) if found == word][-1]


@each_image
def test_hadolint_finds_nothing(name: str) -> None:
    result = check_dockerfile(FILES[name])
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_no_finding_is_silenced() -> None:
    assert not [path for path in FILES.values() if "hadolint ignore" in path.read_text(encoding="utf-8")]
    assert not list(ROOT.glob(".hadolint*"))


@each_image
@pytest.mark.parametrize(
    ("right", "wrong", "finding"),
    [
        ("tini=0.19.*", "tini", "DL3008"),
        (" --no-install-recommends", "", "DL3015"),
        ("USER 10001:10001", "USER root", "DL3002"),
        ("HEALTHCHECK --interval", "HEALTCHECK --interval", "unexpected 'H'"),
    ],
)
def test_hadolint_catches_a_mistake(name: str, right: str, wrong: str, finding: str, tmp_path: Path) -> None:
    text = FILES[name].read_text(encoding="utf-8")
    assert right in text
    (tmp_path / "Dockerfile").write_text(text.replace(right, wrong))
    result = check_dockerfile(tmp_path / "Dockerfile")
    assert result.returncode != 0
    assert finding in result.stdout + result.stderr


@each_image
def test_image_runs_as_the_user_that_the_compose_file_gives_keys_to(name: str) -> None:
    assert last(name, "USER") == SERVICES[name]["user"] == "10001:10001"


@each_image
def test_image_and_compose_file_agree_on_command_home_and_health(name: str) -> None:
    assert json.loads(last(name, "CMD")) == SERVICES[name]["command"]
    assert last(name, "WORKDIR") == HOMES[name]
    check = last(name, "HEALTHCHECK")
    assert json.loads(check[check.index("[") :]) == ["python", "-m", HEALTH[name]]
    assert SERVICES[name]["healthcheck"]["test"][:4] == ["CMD", "python", "-m", HEALTH[name]]


@each_image
def test_image_starts_through_tini_and_stops_on_sigterm(name: str) -> None:
    assert json.loads(last(name, "ENTRYPOINT")) == ["/usr/bin/tini", "--"]
    assert last(name, "STOPSIGNAL") == "SIGTERM"


@each_image
def test_image_switches_off_what_calls_home_or_installs(name: str) -> None:
    settings = last(name, "ENV").split()
    assert "FLWR_TELEMETRY_ENABLED=0" in settings
    assert "FLWR_DISABLE_UPDATE_CHECK=1" in settings
    assert "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1" in settings
    steps = [rest for word, rest in instructions(name) if word == "RUN"]
    assert any("uninstall --yes --quiet uv pip" in step for step in steps)


@each_image
def test_everything_copied_is_let_through_by_dockerignore(name: str) -> None:
    rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    allowed = [rule.removeprefix("!") for rule in rules if rule.startswith("!")]
    sources = [
        path
        for word, rest in instructions(name)
        if word == "COPY" and "--from" not in rest
        for path in rest.split()[:-1]
    ]
    assert sources
    for source in sources:
        assert (ROOT / source).exists()
        assert source in allowed


def test_dockerignore_starts_by_leaving_everything_out() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert next(line for line in lines if not line.startswith("#")) == "*"
