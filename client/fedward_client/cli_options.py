"""Options that several commands of `fedward-site` share, and the progress bar."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedward_client.site_data import SiteData

Home = Annotated[
    Path,
    typer.Option("--home", envvar="FEDWARD_SITE_HOME", help="The site's folder, made by: fedward-site join."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
HERE = Path("fedward-site")


def site_of(home: Path) -> SiteData:
    """The images, labels and state of the site at `home`."""
    from fedward_client.config import SiteHome, load_config

    return load_config(SiteHome(home)).site_data(home)


class ProgressBar:
    """A progress bar on a terminal, nothing elsewhere.

    Args:
        quiet: nothing anywhere.
        what: is done, in one word.
    """

    def __init__(self, quiet: bool, what: str = "reading") -> None:
        self._quiet = quiet or not sys.stderr.isatty()
        self._what = what

    def __enter__(self) -> Callable[[int, int], None] | None:
        if self._quiet:
            return None
        from rich.console import Console
        from rich.progress import Progress

        self._bar = Progress(console=Console(stderr=True))
        self._bar.start()
        task = self._bar.add_task(self._what, total=None)
        return lambda done, total: self._bar.update(task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        if not self._quiet:
            self._bar.stop()
