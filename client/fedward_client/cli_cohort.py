"""`fedward-site cohort`: read the site's images, count them, see what is refused, take cases out, purge.

Heavy imports are inside the commands: the help appears at once.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import typer

from fedward_client import cli_cohort_index, cli_contact_sheet, cli_deidentify
from fedward_client.cli_options import HERE, AsJson, Home, site_of
from fedward_common.console import confirm, emit, say, table

cohort = typer.Typer(help="The site's images and labels: read them, count them.", no_args_is_help=True)
cli_cohort_index.mount(cohort)


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
            files = Counter[tuple[str, str]]()
            for item in found.quarantined:
                files[item.reason.meaning, item.reason.remedy] += item.num_files
            listed = [(str(number), why, remedy) for (why, remedy), number in files.most_common()]
            say()
            table(("Files", "Why", "Remedy"), listed, title="Quarantine")
            say("Study by study: fedward-site cohort quarantine")
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
