"""`fedward-site`: what the person next to the PACS types. Parse, call, print, exit.

Heavy imports are inside the commands: the help appears at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedward_common.console import confirm, emit, run_command, say, show_version, table

if TYPE_CHECKING:
    from fedward_client.approvals import PlanGate
    from fedward_client.config import SiteHome
    from fedward_client.site_data import SiteData

app = typer.Typer(
    name="fedward-site",
    help="Run one hospital's site: its images stay here; only approved weight updates and counts leave.",
    epilog="In this order: join, doctor, cohort index, run; then plan approve for each plan.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
cohort = typer.Typer(help="The site's images and labels: read them, count them.", no_args_is_help=True)
plan = typer.Typer(help="Training plans: list them, read and approve them.", no_args_is_help=True)
outbound = typer.Typer(help="What left this site, from its audit log.", no_args_is_help=True)
app.add_typer(cohort, name="cohort")
app.add_typer(plan, name="plan")
app.add_typer(outbound, name="outbound")

Home = Annotated[
    Path,
    typer.Option("--home", envvar="FEDWARD_SITE_HOME", help="The site's folder, made by: fedward-site join."),
]
NewHome = Annotated[
    Path,
    typer.Option("--home", envvar="FEDWARD_SITE_HOME", help="New folder for what the site itself writes."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
_HERE = Path("fedward-site")


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options before any command."""


@app.command()
def join(
    kit: Annotated[
        Path,
        typer.Argument(help="This site's folder of keys, as the coordinator made it: fedward provision."),
    ],
    dicom: Annotated[Path, typer.Option(help="Folder with DICOM files; only ever read.")],
    labels: Annotated[
        Path,
        typer.Option(
            help="CSV file with the labels: a key column (SOPInstanceUID, SeriesInstanceUID, StudyInstanceUID"
            " or PatientID), a column label and, if wanted, a column split (train, validation, test)."
        ),
    ],
    home: NewHome = _HERE,
    threads: Annotated[
        int, typer.Option(metavar="N", min=0, max=1024, help="CPU threads for training; 0 uses all cores.")
    ] = 0,
    device: Annotated[
        Literal["auto", "cpu", "cuda", "mps"],
        typer.Option(help="Where to train; auto takes a GPU if there is one."),
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Set this machine up as a site of a federation: check keys and folders, make the site's home."""
    from fedward_client.config import load_config
    from fedward_client.joining import join as set_up
    from fedward_common.federation import read_federation

    set_up(kit, home, dicom, labels, threads, device)
    config = load_config(_place(home))
    fingerprint = read_federation(_place(home).identity / "federation.json").fingerprint
    document = {"site": config.name, "home": str(home), "server": config.server, "fingerprint": fingerprint}

    def show() -> None:
        say(f"Site {config.name} is set up in {home}; it will connect to {config.server}.")
        say("Compare this fingerprint of the federation with the coordinator, by phone:")
        say(f"  {fingerprint}")
        say(f"Next: fedward-site doctor --home {home}")

    emit(document, as_json=as_json, show=show)


@app.command()
def doctor(home: Home = _HERE, as_json: AsJson = False) -> None:
    """Check everything that a site needs; exit code 1 and a remedy for each check that fails."""
    from fedward_client.preflight import checks

    found = checks(home)
    failed = [check for check in found if not check.ok]
    document = {
        "ok": not failed,
        "checks": [
            {"name": check.name, "ok": check.ok, "detail": check.detail, "remedy": check.remedy}
            for check in found
        ],
    }

    def show() -> None:
        for check in found:
            say(f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.detail}")
            if not check.ok:
                say(f"      remedy: {check.remedy}")
        say(f"{len(found) - len(failed)} of {len(found)} checks passed")

    emit(document, as_json=as_json, show=show)
    if failed:
        raise typer.Exit(1)


@app.command()
def run(
    home: Home = _HERE,
    warm: Annotated[
        bool, typer.Option(help="Load PyTorch now, or only when the first plan arrives.")
    ] = False,
) -> None:
    """Serve the federation until stopped (SIGTERM or Ctrl-C); one daemon a home, reconnects by itself.

    What it does and why something failed is in HOME/site.log.
    """
    from fedward_client.daemon import run_site

    run_site(_place(home), warm=warm, ready=say)


@cohort.command("index")
def cohort_index(home: Home = _HERE, as_json: AsJson = False) -> None:
    """Read new and changed files of the DICOM folder, and check the label file against them."""
    from fedward_client.cohort import open_cohort
    from fedward_client.index import index_folder

    site = _site(home)
    with _Progress(as_json) as progress:
        summary = index_folder(site, progress)
    found = open_cohort(site)
    document = {
        "files": summary.num_files,
        "read": summary.num_read,
        "images": summary.num_images,
        "unreadable": summary.num_unreadable,
        "quarantined": dict(summary.quarantined),
        "labelled_cases": len(found.cases),
        "label_rows_in_quarantine": found.num_rows_without_image,
    }

    def show() -> None:
        say(f"{summary.num_files} files, {summary.num_read} of them new or changed")
        say(f"{summary.num_images} usable images, {len(found.cases)} of them labelled")
        say(f"{summary.num_quarantined} in quarantine; reasons and remedies: fedward-site cohort show")

    emit(document, as_json=as_json, show=show)


@cohort.command("show")
def cohort_show(home: Home = _HERE, as_json: AsJson = False) -> None:
    """Count the cases by split, label, modality, year, sex and age; list what is in quarantine."""
    from fedward_client.cohort import count_cases, open_cohort
    from fedward_client.index import list_quarantine

    site = _site(home)
    counts = count_cases(open_cohort(site))
    quarantine = [
        {
            "content": item.content,
            "reason": item.reason.value,
            "meaning": item.reason.meaning,
            "files": item.num_files,
            "remedy": item.remedy,
        }
        for item in list_quarantine(site.home)
    ]

    def show() -> None:
        rows = [(group, value, count) for group, values in counts.items() for value, count in values.items()]
        table(("By", "Value", "Cases"), rows, title="Cases")
        if quarantine:
            listed = [
                (str(item["content"])[:12], str(item["meaning"]), str(item["remedy"])) for item in quarantine
            ]
            say()
            table(("Content", "Why", "Remedy"), listed, title="Quarantine")

    emit({"counts": counts, "quarantine": quarantine}, as_json=as_json, show=show)


@plan.command("list")
def plan_list(home: Home = _HERE, as_json: AsJson = False) -> None:
    """List every plan that this site knows, and whether it may run."""
    stored = _gate(home).plans()
    document = [
        {
            "digest": item.signed.digest,
            "name": item.signed.plan.name,
            "signer": item.signed.signer,
            "status": item.status,
            "received": item.received,
            "run_id": item.run_id,
            "last_round": item.last_round,
            "objections": list(item.objections),
        }
        for item in stored
    ]

    def show() -> None:
        if not stored:
            say("No plan has arrived yet.")
            return
        rows = [
            (item.signed.digest[:16], item.signed.plan.name, item.signed.signer, item.status)
            for item in stored
        ]
        table(("Digest", "Name", "Signed by", "Status"), rows)

    emit(document, as_json=as_json, show=show)


@plan.command("approve")
def plan_approve(
    source: Annotated[
        str,
        typer.Argument(
            metavar="PLAN",
            help="A signed plan's file, or at least 12 digits of a digest from: fedward-site plan list.",
        ),
    ],
    home: Home = _HERE,
    yes: Annotated[bool, typer.Option("--yes", help="Approve without asking; for scripts.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a plan would do here, and approve exactly that plan, for one run."""
    from fedward_client.plan_summary import readable_summary

    gate = _gate(home)
    signed = gate.inspect(source)
    if not as_json:
        table(("", ""), readable_summary(signed))
        say(f"Digest, to compare with the coordinator:\n  {signed.digest}")
    confirm("Approve this plan for this site?", yes=yes, as_json=as_json)
    gate.approve(signed)
    emit(
        {"approved": signed.digest, "name": signed.plan.name},
        as_json=as_json,
        show=lambda: say(f"Approved. The site will take part when the coordinator runs {signed.plan.name}."),
    )


@outbound.command("show")
def outbound_show(
    round_index: Annotated[
        int | None, typer.Argument(metavar="ROUND", help="Only this round; all if not given.")
    ] = None,
    run_id: Annotated[
        str | None, typer.Option("--run", metavar="RUN", help="Only this run, by its id.")
    ] = None,
    home: Home = _HERE,
    as_json: AsJson = False,
) -> None:
    """Show what left this site, message by message, from the audit log."""
    from fedward_client.config import load_config
    from fedward_client.outbound_log import explain, sent_messages

    load_config(_place(home))  # in a folder that is no site's home nothing left, and that says nothing
    messages = sent_messages(_place(home).audit, run_id=run_id, round_index=round_index)

    def show() -> None:
        if not messages:
            say("Nothing has left this site.")
        for message in messages:
            say(explain(message))

    emit([message.fields for message in messages], as_json=as_json, show=show)


def _place(home: Path) -> SiteHome:
    from fedward_client.config import SiteHome

    return SiteHome(home)


def _site(home: Path) -> SiteData:
    from fedward_client.config import load_config
    from fedward_client.site_data import SiteData

    config = load_config(_place(home))
    return SiteData(home, config.dicom, config.labels)


def _gate(home: Path) -> PlanGate:
    from fedward_client.approvals import PlanGate
    from fedward_common.audit import AuditLog
    from fedward_common.federation import read_federation

    place = _place(home)
    return PlanGate(place, read_federation(place.identity / "federation.json"), AuditLog(place.audit))


class _Progress:
    """A progress bar on a terminal, nothing elsewhere."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet or not sys.stderr.isatty()

    def __enter__(self) -> Callable[[int, int], None] | None:
        if self._quiet:
            return None
        from rich.console import Console
        from rich.progress import Progress

        self._bar = Progress(console=Console(stderr=True))
        self._bar.start()
        task = self._bar.add_task("reading", total=None)
        return lambda done, total: self._bar.update(task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        if not self._quiet:
            self._bar.stop()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; every error ends with its remedy and its exit code."""
    sys.exit(run_command(app, "fedward-site", sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    main()
