"""Both command lines explain themselves: every command, argument and option, and what scripts can read."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest
import typer

PROGRAMS = {"fedward": "fedward_server.cli", "fedward-site": "fedward_client.cli"}
SERVICES = ("fedward serve", "fedward-site run")  # go on until they are stopped and report nothing


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command that does something, with its name as typed."""
    for program, module in PROGRAMS.items():
        yield from _within(program, typer.main.get_command(importlib.import_module(module).app))


def _within(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        yield name, command
        return
    for word, inner in command.commands.items():
        yield from _within(f"{name} {word}", inner)


COMMANDS = dict(commands())


def help_of(name: str) -> str:
    program, *words = name.split()
    done = subprocess.run(
        [sys.executable, "-m", PROGRAMS[program], *words, "--help"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "80"},
    )
    assert done.stderr == ""
    return done.stdout


def test_every_command_is_found() -> None:
    assert {"fedward run start", "fedward sites", "fedward-site plan approve"} <= COMMANDS.keys()
    assert len(COMMANDS) >= 19


@pytest.mark.parametrize("name", COMMANDS)
def test_command_and_all_that_it_takes_are_explained(name: str) -> None:
    command = COMMANDS[name]
    assert (command.help or "").rstrip().endswith(".")
    for parameter in command.params:
        text = str(getattr(parameter, "help", None) or "")
        assert text.endswith("."), f"{name}: {parameter.name}"


@pytest.mark.parametrize("name", COMMANDS)
def test_command_that_reports_can_do_so_in_json(name: str) -> None:
    offers = any("--json" in parameter.opts for parameter in COMMANDS[name].params)
    assert offers == (name not in SERVICES)


@pytest.mark.parametrize("name", COMMANDS)
def test_option_that_may_be_left_out_says_what_happens_then(name: str) -> None:
    """A default that click shows, a switch, or words."""
    for parameter in COMMANDS[name].params:
        if isinstance(parameter, click.Option) and parameter.default is None and not parameter.required:
            text = (parameter.help or "").lower()
            said = ("not given", "needed the first time", "to add", "only this", "to check", "file for the")
            assert any(words in text for words in said), f"{name}: {parameter.name}"


@pytest.mark.parametrize("name", [*PROGRAMS, *COMMANDS])
def test_help_fits_a_screen_of_80_columns_and_shows_no_markup(name: str) -> None:
    page = help_of(name)
    assert max(map(len, page.splitlines())) <= 80
    assert f"Usage: {name}" in page
    assert "\\[" not in page
    assert "..." not in page.replace("[ARGS]...", "")


@pytest.mark.parametrize("program", PROGRAMS)
def test_version_is_told(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", PROGRAMS[program], "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("fedward ")
