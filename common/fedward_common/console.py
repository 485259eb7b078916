"""How both command lines speak: tables for people, one JSON document with `--json`, errors with a remedy.

Results go to standard output and nothing else does, so that `--json` can be piped; errors and questions
go to standard error. Values are shown as plain text: names and reasons come from other machines, and
neither markup nor a terminal's control characters in them are obeyed.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fedward_common.errors import FederationError, UsageError

if TYPE_CHECKING:
    import typer

CANCELLED = 130
_NARROW = 12  # letters that a column of texts has at least
# A number with its unit, a share of a whole (3/5), or the sign for "none".
_NUMBER = re.compile(r"[+-]?\d[\d,]*(\.\d+)?( ?[%a-zA-Z]{1,3})?|\d+/\d+|-|–|<\d+")


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


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "") -> None:
    """Print a table: numbers to the right, headings on one line, long texts folded in their column.

    Args:
        columns: headings; short, because a heading is never folded.
        rows: one text a column; what looks like markup is shown, not obeyed.
        title: printed above, if given.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [[plain(value) for value in row] for row in rows]
    drawn = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="bold",
        show_header=any(columns),
    )
    needed = 0
    for heading, values in zip(
        columns, zip(*cells, strict=True) if cells else [()] * len(columns), strict=True
    ):
        longest = max(map(len, (heading, *values)))
        numbers = bool(values) and all(map(_NUMBER.fullmatch, values))
        least = longest if numbers else max(len(heading), min(longest, _NARROW))
        needed += least + 2
        drawn.add_column(heading, justify="right" if numbers else "left", overflow="fold", min_width=least)
    for row in cells:
        drawn.add_row(*map(Text, row))
    console = Console(highlight=False)
    # On a screen too narrow even for that, lines run over its edge: better than a number without its end.
    console.print(drawn, width=max(console.width, needed), crop=False, no_wrap=True)


def plain(text: str) -> str:
    """Text without control characters, which could rewrite a terminal.

    >>> plain("a\\x1b[2Jb\\n")
    'a [2Jb '
    """
    return "".join(character if character.isprintable() else " " for character in text)


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


def show_version(wanted: bool) -> None:
    """Print the version and end the command, if that was asked for."""
    if wanted:
        from importlib.metadata import version

        import typer

        say(f"fedward {version('fedward')}")
        raise typer.Exit


def run_command(app: typer.Typer, name: str, arguments: Sequence[str]) -> int:
    """Run a command line to its end and return the exit code; every error is printed with its remedy.

    Args:
        app: the commands.
        name: of the program, for messages.
        arguments: as typed, without the program.
    """
    import typer

    as_json = "--json" in arguments
    try:
        command = typer.main.get_command(app)
        code = command.main(list(arguments), prog_name=name, standalone_mode=False)
        sys.stdout.flush()
    except FederationError as error:
        return complain(error, as_json=as_json)
    except (typer.Abort, KeyboardInterrupt):
        sys.stderr.write("stopped\n")
        return CANCELLED
    except BrokenPipeError:
        # the reader of our output has gone, for example `head`; keep Python from failing at exit too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _misused(error, name, as_json=as_json)
    return code if isinstance(code, int) else 0


def _misused(error: Exception, name: str, *, as_json: bool) -> int:
    """Explain what the parser found wrong with the command line; anything else is raised again."""
    import click

    if not isinstance(error, click.ClickException):
        raise error
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else name
    bare = isinstance(error, click.exceptions.NoArgsIsHelpError)
    if bare and not as_json:
        sys.stderr.write(str(error))  # a group of commands was named without a command: its help
        return UsageError.exit_code
    what = "a command is missing" if bare else error.format_message()
    return complain(UsageError(what, remedy=f"See: {path} --help"), as_json=as_json)
