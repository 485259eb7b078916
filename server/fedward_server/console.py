"""How the coordinators' commands speak: tables for people, JSON with `--json`, errors with a remedy.

Results go to standard output and nothing else does, so that `--json` can be piped; errors and questions
go to standard error. Values are shown as plain text: names come from other machines.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fedward_common.errors import FederationError, UsageError


def emit(document: Any, *, as_json: bool, show: Callable[[], None]) -> None:
    """Print `document` as JSON, or let `show` print it for people."""
    if as_json:
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        show()


def say(text: str = "") -> None:
    """Print one line for people."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; what looks like markup in a value is shown, not obeyed."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(plain(value)) for value in row))
    Console(highlight=False).print(drawn)


def complain(error: FederationError, *, as_json: bool) -> int:
    """Print an error and its remedy to standard error; returns the exit code."""
    if as_json:
        document = {
            "error": error.message,
            "kind": type(error).__name__,
            "remedy": error.remedy,
            "exit_code": error.exit_code,
        }
        sys.stderr.write(json.dumps(document) + "\n")
        return error.exit_code
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(Text.assemble(("error: ", "bold red"), plain(error.message)))
    console.print(Text.assemble(("remedy: ", "bold"), plain(error.remedy)))
    return error.exit_code


def read_file(path: Path) -> bytes:
    """Read a file that the user named.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", remedy="Give the path of a readable file.") from error


def write_file(path: Path, data: bytes) -> None:
    """Write a file that the user named, in one step.

    Raises:
        UsageError: it cannot be written; what was there stays.
    """
    from fedward_common.files import write_atomically

    try:
        write_atomically(path, data, 0o644)
    except OSError as error:
        raise UsageError(
            f"{path}: {error.strerror}", remedy="Give a path in a folder that exists and is writable."
        ) from error


def confirm(question: str, *, yes: bool, as_json: bool) -> None:
    """Ask before something that cannot be undone.

    Raises:
        UsageError: nobody can be asked, and `--yes` was not given.
    """
    if yes:
        return
    import typer

    if as_json or not sys.stdin.isatty():
        raise UsageError("not confirmed", remedy="Confirm on a terminal, or add --yes.")
    typer.confirm(question, abort=True, err=True)


def plain(text: str) -> str:
    """Text without control characters, which could rewrite a terminal.

    >>> plain("a\\x1b[2Jb\\n")
    'a [2Jb '
    """
    return "".join(character if character.isprintable() else " " for character in text)
