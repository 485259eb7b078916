"""`fedward-site cohort`: read the site's images, count them, see what is refused, take cases out, purge.

Heavy imports are inside the commands: the help appears at once.
"""

from __future__ import annotations

import signal
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from fedward_client import cli_contact_sheet, cli_deidentify
from fedward_client.cli_options import HERE, AsJson, Home, ProgressBar, site_of
from fedward_common import logs
from fedward_common.console import complain, confirm, emit, say, table
from fedward_common.errors import FederationError

if TYPE_CHECKING:
    from fedward_client.config import SiteConfig
    from fedward_client.index import IndexSummary
    from fedward_client.site_data import SiteData
    from fedward_client.sources.retrieval import Retrieved
    from fedward_client.sources.settings import Selection

cohort = typer.Typer(help="The site's images and labels: read them, count them.", no_args_is_help=True)


@cohort.command("index")
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
    from fedward_client.cohort_file import read_cohort_file
    from fedward_client.config import SiteHome, load_config
    from fedward_client.sources.refresh import refresh_source

    config = load_config(SiteHome(home))
    selection = read_cohort_file(home).selection(("CR", "DX"))
    if watch:
        _watch(config, home, selection, as_json)
    with ProgressBar(as_json, "fetching") as progress:
        retrieved = refresh_source(config.images, home, selection, progress, full=full)
    _index(config.site_data(home), retrieved, as_json)


def _watch(config: SiteConfig, home: Path, selection: Selection, as_json: bool) -> NoReturn:
    """Index whenever there is something new; what is the matter with one pass does not end the next."""
    from fedward_client.sources.refresh import watch_source

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    logs.configure(site=config.name)
    with closing(watch_source(config.images, home, selection)) as passes:
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

    with ProgressBar(as_json) as progress:
        summary = index_folder(site, progress)
    if not as_json:  # what was read is known whether or not the labels fit it
        _say_what_was_read(retrieved, summary)
    found = open_cohort(site)
    document = {
        "fetched": retrieved.num_new,
        "not_fetched": dict(retrieved.missing),
        "files": summary.num_files,
        "read": summary.num_read,
        "images": summary.num_images,
        "copies": summary.num_copies,
        "unreadable": summary.num_unreadable,
        "quarantined": dict(summary.quarantined),
        "labelled_cases": len(found.cases),
        "label_rows_in_quarantine": found.num_rows_without_image,
    }

    def show() -> None:
        is_image = all(case.geometry is None for case in found.cases)
        say(f"{len(found.cases)} labelled {'images' if is_image else 'volumes'} make up the cohort")
        for warning in found.warnings:
            say(f"warning: {warning}")

    emit(document, as_json=as_json, show=show)


def _say_what_was_read(retrieved: Retrieved, summary: IndexSummary) -> None:
    if retrieved.num_studies:
        say(f"{retrieved.num_studies} studies at the PACS, {retrieved.num_new} new images fetched")
    for refusal, number in retrieved.missing.items():
        say(f"{number} not fetched, {refusal.meaning}. {refusal.remedy}")
    say(f"{summary.num_files} files, {summary.num_read} of them new or changed")
    say(f"{summary.num_images} usable images")
    say(f"{summary.num_quarantined} in quarantine; reasons and remedies: fedward-site cohort quarantine")


@cohort.command("show")
def cohort_show(home: Home = HERE, as_json: AsJson = False) -> None:
    """Count the cases by split, label, modality, year, sex, age, scanner, body part and view."""
    from fedward_client.cohort import open_cohort
    from fedward_client.cohort_counts import count_cases, leftovers

    found = open_cohort(site_of(home))
    counts, left = count_cases(found), leftovers(found)
    quarantine = [
        {
            "content": item.content,
            "reason": item.reason.value,
            "meaning": item.reason.meaning,
            "files": item.num_files,
            "remedy": item.remedy,
        }
        for item in found.quarantined
    ]

    def show() -> None:
        rows = [(group, value, count) for group, values in counts.items() for value, count in values.items()]
        table(("By", "Value", "Cases"), rows, title="Cases")
        if left:
            say()
            table(("Not used", "Number"), list(left.items()), title="Left over")
        if quarantine:
            listed = [
                (str(item["content"])[:12], str(item["meaning"]), str(item["remedy"])) for item in quarantine
            ]
            say()
            table(("Content", "Why", "Remedy"), listed, title="Quarantine")
        for warning in found.warnings:
            say(f"warning: {warning}")

    document = {
        "counts": counts,
        "left_over": left,
        "warnings": list(found.warnings),
        "quarantine": quarantine,
    }
    emit(document, as_json=as_json, show=show)


@cohort.command("quarantine")
def cohort_quarantine(
    home: Home = HERE,
    names: Annotated[
        bool,
        typer.Option("--names", help="Also the names of the files. They may name patients."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List each study of which something is refused, with the reason and what to do about it."""
    from fedward_client.quarantine import quarantine_rows

    rows = quarantine_rows(site_of(home), names=names)
    document = [
        {
            "study": row.study,
            "used": row.used,
            "reason": row.reason.value,
            "meaning": row.meaning,
            "files": row.num_files,
            "remedy": row.remedy,
            **({"names": list(row.names)} if names else {}),
        }
        for row in rows
    ]

    def show() -> None:
        if not rows:
            say("Nothing is in quarantine.")
            return
        listed = [(row.study[:12], str(row.num_files), row.meaning, row.remedy) for row in rows]
        table(("Study", "Files", "Why", "Remedy"), listed, title="Quarantine")
        for row in rows if names else ():
            for name in row.names:
                say(f"{row.study[:12]}  {name}")

    emit(document, as_json=as_json, show=show)


@cohort.command("exclude")
def cohort_exclude(
    case: Annotated[str, typer.Argument(metavar="CASE", help="A case id, or its first 8 digits or more.")],
    home: Home = HERE,
    undo: Annotated[bool, typer.Option("--undo", help="Take the case in again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Take one case out of the cohort, whatever becomes of its files; or take it in again."""
    from fedward_client.exclusions import exclude_case, include_case

    site = site_of(home)
    case_id, num_excluded = (include_case if undo else exclude_case)(site, case)
    document = {"case": case_id, "excluded": not undo, "num_excluded": num_excluded}
    done = "is used again" if undo else "is not used any more"
    emit(
        document,
        as_json=as_json,
        show=lambda: say(f"Case {case_id} {done}; excluded cases: {num_excluded}."),
    )


@cohort.command("purge")
def cohort_purge(
    home: Home = HERE,
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking; for scripts.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete what was made from the images: prepared images, images fetched from an archive, the index.

    The DICOM folder, the labels, the key of the case ids and the exclusions stay.
    """
    from fedward_client.purging import purge, purgeable

    site = site_of(home)
    found = purgeable(site.home)
    if not as_json:
        rows = [(each.what, str(each.num_files), f"{each.num_bytes / 1e6:.1f} MB") for each in found]
        table(("What", "Files", "Size"), rows, title="To be deleted")
    confirm("Delete all of this?", yes=yes, as_json=as_json)
    purge(site.home)
    document = [{"what": each.what, "files": each.num_files, "bytes": each.num_bytes} for each in found]
    emit({"deleted": document}, as_json=as_json, show=lambda: say("Deleted. Next: fedward-site cohort index"))


cli_contact_sheet.mount(cohort)
cli_deidentify.mount(cohort)
