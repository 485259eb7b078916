"""`fedward-site cohort index`: fetch what is new, read what changed, say what is used and what is not.

Once, or with `--watch` again and again. What it prints of the quarantine is counted from the very list that
`cohort quarantine` shows. Heavy imports are inside the command: the help appears at once.
"""

from __future__ import annotations

import signal
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from fedward_client.cli_options import HERE, AsJson, Home, ProgressBar
from fedward_common import logs
from fedward_common.console import complain, emit, say
from fedward_common.errors import FederationError, UsageError

if TYPE_CHECKING:
    from fedward_client.config import SiteConfig
    from fedward_client.index import IndexSummary
    from fedward_client.quarantine import Standing
    from fedward_client.site_data import SiteData
    from fedward_client.sources.refresh import Wanted
    from fedward_client.sources.retrieval import Retrieved

_RADIOGRAPHS = ("CR", "DX")
_SHORT_WAIT_S = 1.0


def cohort_index(
    home: Home = HERE,
    full: Annotated[
        bool, typer.Option("--full", help="Ask a PACS for the contents of every study, also of known ones.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on doing so, and receive what a PACS pushes, until SIGTERM.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Fetch what is new from a PACS, read new and changed files, and check the labels against them."""
    from fedward_client.config import SiteHome, load_config
    from fedward_client.sources.refresh import refresh_source

    config = load_config(SiteHome(home))
    wanted = _wanted(home)
    if watch:
        _watch(config, home, wanted, as_json)
    with ProgressBar(as_json, "fetching") as progress:
        retrieved = refresh_source(
            config.images, home, wanted.selection, progress, full=full, settle_s=wanted.settle_s
        )
    _index(config.site_data(home), retrieved, as_json)


def _wanted(home: Path) -> Wanted:
    """What HOME/cohort.toml says now.

    Raises:
        UsageError: it is not sound.
    """
    from fedward_client.cohort_file import read_cohort_file
    from fedward_client.sources.refresh import Wanted

    file = read_cohort_file(home)
    return Wanted(file.selection(_RADIOGRAPHS), file.settle_s)


class _Declarations:
    """What the operator may change while a watch runs.

    Args:
        config: as the watch began; the settings of the source hold until it ends.
        home: the site's.
        wanted: of the cohort file, as the watch began.
        as_json: how to complain.
    """

    def __init__(self, config: SiteConfig, home: Path, wanted: Wanted, as_json: bool) -> None:
        self._config, self._home, self._as_json = config, home, as_json
        self._last_wanted = wanted
        self._settings = _stamp(home / "site.toml")

    def wanted(self) -> Wanted:
        """What the cohort file says now; what it said before, while it is not sound.

        The pass that follows complains of it: nothing is indexed by a file that cannot be read.
        """
        try:
            self._last_wanted = _wanted(self._home)
        except FederationError:
            return self._last_wanted
        return self._last_wanted

    def stamp(self) -> str:
        """Differs when there is reason to look again though no image changed."""
        settings = _stamp(self._home / "site.toml")
        if settings != self._settings:
            self._settings = settings
            error = UsageError(
                "site.toml changed since this watch began, and is read only when it begins",
                remedy="End this command and start it again.",
            )
            complain(error, as_json=self._as_json)
        site = self._config.site_data(self._home)
        labels = "" if site.label_file is None else _stamp(site.label_file)
        return f"{site.declaration()} {labels} {self._arriving()}"

    def _arriving(self) -> str:
        """A moment, while files move: they have to be looked at again when they do no longer."""
        from fedward_client.index_arrival import MOVING
        from fedward_client.index_store import INDEX_FILE, CaseIndex

        if not (self._home / INDEX_FILE).is_file():
            return ""
        try:
            with CaseIndex(self._home) as index:
                return str(time.monotonic()) if MOVING in index.arriving().values() else ""
        except FederationError:  # the pass that follows says so
            return "?"


def _stamp(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"


def _watch(config: SiteConfig, home: Path, wanted: Wanted, as_json: bool) -> NoReturn:
    """Index whenever there is something new; what is the matter with one pass does not end the next."""
    from fedward_client.sources.refresh import watch_source

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    logs.configure(site=config.name)
    declared = _Declarations(config, home, wanted, as_json)
    if not as_json:
        say("Watching; what is new is read and reported here. End it with Ctrl-C.")
    with closing(watch_source(config.images, home, declared.wanted, declared.stamp)) as passes:
        for retrieved in passes:
            try:
                _index(config.site_data(home), retrieved, as_json)
            except FederationError as error:
                complain(error, as_json=as_json)
            sys.stdout.flush()
    raise AssertionError("a watch ends with a signal")


def _index(site: SiteData, retrieved: Retrieved, as_json: bool) -> None:
    from fedward_client.cohort import open_cohort
    from fedward_client.index import index_folder
    from fedward_client.quarantine import standing_of

    def say_that_it_waits(seconds: float) -> None:
        if not as_json and seconds >= _SHORT_WAIT_S:
            say(f"Some files came a moment ago: waiting {seconds:.0f} s to see whether more are on their way")

    with ProgressBar(as_json) as progress:
        summary = index_folder(site, progress, waiting=say_that_it_waits)
    standing = standing_of(site)
    if not as_json:  # what was read is known whether or not the labels fit it
        _say_what_was_read(retrieved, summary, standing)
    found = open_cohort(site)
    document = {
        "fetched": retrieved.num_new,
        "not_fetched": dict(retrieved.missing),
        "files": summary.num_files,
        "read": summary.num_read,
        "images": standing.num_images,
        "copies": summary.num_copies,
        "unreadable": summary.num_unreadable,
        "quarantined": dict(standing.quarantined),
        "left_out": dict(standing.left_out),
        "labelled_cases": len(found.cases),
        "label_rows_in_quarantine": found.num_rows_without_image,
    }

    def show() -> None:
        is_image = all(case.geometry is None for case in found.cases)
        say(f"{len(found.cases)} labelled {'images' if is_image else 'volumes'} make up the cohort")
        for warning in found.warnings:
            say(f"warning: {warning}")

    emit(document, as_json=as_json, show=show)


def _say_what_was_read(retrieved: Retrieved, summary: IndexSummary, standing: Standing) -> None:
    if retrieved.num_studies:
        say(f"{retrieved.num_studies} studies at the PACS, {retrieved.num_new} new images fetched")
    for refusal, number in retrieved.missing.items():
        say(f"{number} not fetched, {refusal.meaning}. {refusal.remedy}")
    say(f"{summary.num_files} files, {summary.num_read} of them new or changed")
    say(f"{standing.num_images} usable images")
    if summary.num_copies:
        are = "file is a copy" if summary.num_copies == 1 else "files are copies"
        say(f"{summary.num_copies} {are} of others")
    aside = f", {standing.num_left_out} left out of volumes that are used" if standing.num_left_out else ""
    say(
        f"{standing.num_quarantined} in quarantine{aside}; reasons and remedies:"
        " fedward-site cohort quarantine"
    )


def mount(cohort: typer.Typer) -> None:
    """Add this command to `fedward-site cohort`."""
    cohort.command("index")(cohort_index)
