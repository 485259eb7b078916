"""`fedward-site cohort contact-sheet`: a page of the cohort's pictures, for the operator's eyes.

Heavy imports are inside the command: the help appears at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from fedward_client.cli_options import HERE, AsJson, Home, ProgressBar, site_of
from fedward_common.console import emit, say


def cohort_contact_sheet(
    home: Home = HERE,
    cases: Annotated[
        int, typer.Option(metavar="N", min=1, max=500, help="So many cases, drawn by the seed.")
    ] = 48,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Another one draws other cases.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Write a page with pictures of some cases as they train, to look at before anything trains.

    The page is HOME/contact-sheet.html, readable by you alone. It never leaves the site.
    """
    from fedward_client.contact_sheet import make_contact_sheet, write_contact_sheet

    site = site_of(home)
    with ProgressBar(as_json, "decoding") as progress:
        sheet = make_contact_sheet(site, num_cases=cases, seed=seed, progress=progress)
    path = write_contact_sheet(site.home, sheet)
    document = {
        "file": str(path),
        "cases": [
            {"case": tile.case_id, "label": tile.label, "split": tile.split, "decision": tile.decision}
            | ({"fault": tile.fault} if tile.fault else {})
            for tile in sheet.tiles
        ],
        "of": sheet.num_cases,
        "seed": sheet.seed,
    }

    def show() -> None:
        say(f"{len(sheet.tiles)} of {sheet.num_cases} cases are on {path}")
        if sheet.num_faults:
            say(f"{sheet.num_faults} of them cannot be shown, and will not train")
        say("These are pictures of patients. Open it here; delete it, or purge, when you are done.")

    emit(document, as_json=as_json, show=show)


def mount(cohort: typer.Typer) -> None:
    """Add this command to `fedward-site cohort`."""
    cohort.command("contact-sheet")(cohort_contact_sheet)
