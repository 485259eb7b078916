"""How the site's commands speak: tables for people, one JSON document with `--json`, errors with a remedy."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fedward_common.errors import FederationError


def emit(document: Any, *, as_json: bool, show: Callable[[], None]) -> None:
    """Print `document` as JSON, or let `show` print it for people."""
    if as_json:
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        show()


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; neither markup nor a terminal's control characters in values are obeyed."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title or None, title_justify="left", header_style="bold")
    for column in columns:
        drawn.add_column(column)
    for row in rows:
        drawn.add_row(*(Text(plain(value)) for value in row))
    Console().print(drawn)


def say(text: str = "") -> None:
    """Print one line for people."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def plain(text: str) -> str:
    """Text without control characters, which could rewrite a terminal.

    >>> plain("a\\x1b[2Jb")
    'a [2Jb'
    """
    return "".join(letter if letter.isprintable() else " " for letter in text)


def complain(error: FederationError, *, as_json: bool) -> int:
    """Print an error and its remedy to standard error; returns the exit code."""
    if as_json:
        document = {"error": error.message, "remedy": error.remedy, "exit_code": error.exit_code}
        sys.stderr.write(json.dumps(document) + "\n")
    else:
        sys.stderr.write(f"error: {plain(error.message)}\nremedy: {plain(error.remedy)}\n")
    return error.exit_code
