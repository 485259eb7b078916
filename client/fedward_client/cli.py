"""`fedward-site`: what the person next to the PACS types. Parse, call, print, exit.

Heavy imports are inside the commands: the help appears at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedward_client.cli_cohort import cohort
from fedward_client.cli_options import HERE, AsJson, Home
from fedward_common.console import confirm, emit, run_command, say, show_version, table

if TYPE_CHECKING:
    from fedward_client.approvals import PlanGate
    from fedward_client.config import SiteHome
    from fedward_common.plan import ReadinessPlan, TrainingPlan

app = typer.Typer(
    name="fedward-site",
    help="Run one hospital's site: its images stay here; only approved weight updates and counts leave.",
    epilog="In this order: join, doctor, cohort index, run; then plan approve for each plan.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
plan = typer.Typer(
    help="Plans, for training or a survey: list them, read and approve them.", no_args_is_help=True
)
outbound = typer.Typer(help="What left this site, from its audit log.", no_args_is_help=True)
app.add_typer(cohort, name="cohort")
app.add_typer(plan, name="plan")
app.add_typer(outbound, name="outbound")

NewHome = Annotated[
    Path,
    typer.Option("--home", envvar="FEDWARD_SITE_HOME", help="New folder for what the site itself writes."),
]


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
    labels: Annotated[
        Path | None,
        typer.Option(
            help="CSV file with the labels: a key column (SOPInstanceUID, SeriesInstanceUID, StudyInstanceUID"
            " or PatientID), a column label and, if wanted, a column split (train, validation, test)."
            " If not given, HOME/cohort.toml says which SEG, SR or RTSTRUCT objects hold them."
        ),
    ] = None,
    dicom: Annotated[
        Path | None, typer.Option(help="Folder with DICOM files; only ever read. If not given: --source.")
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            help="Settings of a PACS, if --dicom is not given: a TOML file of which the table [source] is"
            " read, as in deploy/site/dicomweb.toml and dimse.toml."
        ),
    ] = None,
    home: NewHome = HERE,
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

    set_up(kit, home, dicom, labels, threads, device, source)
    config = load_config(_place(home))
    fingerprint = read_federation(_place(home).identity / "federation.json").fingerprint
    document = {"site": config.name, "home": str(home), "server": config.server, "fingerprint": fingerprint}

    def show() -> None:
        say(f"Site {config.name} is set up in {home}; it will connect to {config.server}.")
        say("Compare this fingerprint of the federation with the coordinator, by phone:")
        say(f"  {fingerprint}")
        if labels is None:
            say(f"No label file is named: say in {home}/cohort.toml which DICOM objects hold them, as in")
            say('  labels.source = "segmentations"')
            say('  labels.mask = { segment = "SCT:10200004", absent_is_empty = true }')
        say(f"Next: fedward-site doctor --home {home}")

    emit(document, as_json=as_json, show=show)


@app.command()
def doctor(home: Home = HERE, as_json: AsJson = False) -> None:
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
    home: Home = HERE,
    warm: Annotated[
        bool, typer.Option(help="Load PyTorch now, or only when the first plan arrives.")
    ] = False,
) -> None:
    """Serve the federation until stopped (SIGTERM or Ctrl-C); one daemon a home, reconnects by itself.

    What it does and why something failed is in HOME/site.log.
    """
    from fedward_client.daemon import run_site

    run_site(_place(home), warm=warm, ready=say)


@plan.command("list")
def plan_list(home: Home = HERE, as_json: AsJson = False) -> None:
    """List every plan that this site knows, and whether it may run."""
    stored = _gate(home).plans()
    document = [
        {
            "digest": item.signed.digest,
            "name": item.signed.content.name,
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
            (item.signed.digest[:16], item.signed.content.name, item.signed.signer, item.status)
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
    home: Home = HERE,
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
        _warn_of_misfit(signed.content, home)
    confirm("Approve this plan for this site?", yes=yes, as_json=as_json)
    gate.approve(signed)
    emit(
        {"approved": signed.digest, "name": signed.content.name},
        as_json=as_json,
        show=lambda: say(
            f"Approved. The site will take part when the coordinator runs {signed.content.name}."
        ),
    )


def _warn_of_misfit(content: TrainingPlan | ReadinessPlan, home: Path) -> None:
    """Say beforehand what the log of a run could only say with a place in the code."""
    from fedward_client.cohort_file import read_cohort_file
    from fedward_client.dataset import check_dimensions
    from fedward_common.errors import CohortError
    from fedward_common.plan import TrainingPlan

    try:
        if isinstance(content, TrainingPlan) and content.data.dataset == "dicom_folder":
            check_dimensions(content, read_cohort_file(home))
    except CohortError as error:
        say(f"warning: the site would refuse this plan: {error.message}. {error.remedy}")


@outbound.command("show")
def outbound_show(
    round_index: Annotated[
        int | None, typer.Argument(metavar="ROUND", help="Only this round; all if not given.")
    ] = None,
    run_id: Annotated[
        str | None, typer.Option("--run", metavar="RUN", help="Only this run, by its id.")
    ] = None,
    home: Home = HERE,
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


def _gate(home: Path) -> PlanGate:
    from fedward_client.approvals import PlanGate
    from fedward_common.audit import AuditLog
    from fedward_common.federation import read_federation

    place = _place(home)
    return PlanGate(place, read_federation(place.identity / "federation.json"), AuditLog(place.audit))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; every error ends with its remedy and its exit code."""
    sys.exit(run_command(app, "fedward-site", sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    main()
