"""What only the coordinators' commands print or touch: results of runs, and files that the user named.

The way both command lines speak is `fedward_common.console`; its functions can be had from here as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedward_common.console import complain, confirm, emit, plain, say, table
from fedward_common.errors import UsageError

if TYPE_CHECKING:
    from fedward_common.evaluation.report import RunReport
    from fedward_server.readiness_report import ReadinessReport

__all__ = ["complain", "confirm", "emit", "plain", "read_file", "say", "show_result", "table", "write_file"]


def show_result(report: RunReport | ReadinessReport) -> None:
    """Print a run's result between empty lines: a row a site and one for all, and what the columns hold."""
    from fedward_common.evaluation import report as training
    from fedward_server import readiness_reporting as readiness

    if isinstance(report, training.RunReport):
        (columns, *rows), notes = training.render_terminal_table(report), training.terminal_notes(report)
    else:
        (columns, *rows), notes = readiness.terminal_rows(report), readiness.terminal_notes(report)
    say()
    table(columns, rows)
    for line in ("", *notes, *([""] if notes else [])):
        say(line)


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
