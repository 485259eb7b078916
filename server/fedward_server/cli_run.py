"""`fedward run` and `fedward sites`: launch runs, watch them, end them, read their reports."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedward_common.console import confirm, emit, plain, say, table
from fedward_common.errors import ConnectionLostError, RunFailedError
from fedward_server.console import read_file, show_result, write_file

if TYPE_CHECKING:
    from fedward_server.control_client import ControlClient
    from fedward_server.run_records import RunInfo

run = typer.Typer(help="Runs: start, watch, stop and resume them, read reports.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
EventsAsJson = Annotated[
    bool, typer.Option("--json", help="Print the run's events as JSON, one a line, and nothing else.")
]
RunAndEventsAsJson = Annotated[
    bool,
    typer.Option("--json", help="Print JSON: the run on the first line, then, if watched, an event a line."),
]
Watch = Annotated[bool, typer.Option(help="Show the run until it ends. It goes on if you leave with Ctrl-C.")]
IdentityDir = Annotated[
    Path,
    typer.Option(
        "--identity",
        envvar="FEDWARD_IDENTITY",
        help="A coordinator's folder, or an observer's to look only; from: fedward provision.",
    ),
]
RunId = Annotated[str, typer.Argument(metavar="RUN", help="The run's id; see: fedward run list.")]


@run.command("start")
def start(
    signed: Annotated[
        Path, typer.Argument(metavar="SIGNED", help="A signed plan's file, from: fedward plan sign.")
    ],
    identity: IdentityDir,
    watch: Watch = True,
    as_json: RunAndEventsAsJson = False,
) -> None:
    """Start a run of a signed plan, and show it until it ends; exit code 0 only if it was completed."""
    document = read_file(signed)
    with _client(identity) as client:
        info = client.launch(document)
        if as_json:
            sys.stdout.write((_compact if watch else _indented)(info) + "\n")
            sys.stdout.flush()
        else:
            say(f"Run {info.run_id} started.")
        if watch:
            _follow(client, info.run_id, as_json=as_json)


@run.command("list")
def list_runs(identity: IdentityDir, as_json: AsJson = False) -> None:
    """List all runs, newest first."""
    with _client(identity) as client:
        infos = client.runs()

    def show() -> None:
        if not infos:
            say("No run yet. Start one with: fedward run start SIGNED")
            return
        rows = [
            (
                info.run_id,
                info.status,
                f"{info.rounds_done}/{info.rounds_total}",
                f"{info.created_at.astimezone():%Y-%m-%d %H:%M}",
                info.reason,
            )
            for info in infos
        ]
        table(("Run", "Status", "Rounds", "Started", "Reason"), rows)

    emit([info.model_dump(mode="json") for info in infos], as_json=as_json, show=show)


@run.command("watch")
def watch_run(run_id: RunId, identity: IdentityDir, as_json: EventsAsJson = False) -> None:
    """Show a run from its first event until it ends; exit code 0 only if it was completed."""
    with _client(identity) as client:
        _follow(client, run_id, as_json=as_json)


@run.command("stop")
def stop(
    run_id: RunId,
    identity: IdentityDir,
    yes: Annotated[bool, typer.Option("--yes", help="Stop without asking.")] = False,
    as_json: AsJson = False,
) -> None:
    """Stop a run; committed rounds are kept, and it can be resumed."""
    confirm(f"Stop run {run_id}?", yes=yes, as_json=as_json)
    with _client(identity) as client:
        info = client.stop(run_id)
    emit(info.model_dump(mode="json"), as_json=as_json, show=lambda: say(f"Run {run_id} was told to stop."))


@run.command("resume")
def resume(
    run_id: RunId,
    identity: IdentityDir,
    watch: Watch = True,
    as_json: RunAndEventsAsJson = False,
) -> None:
    """Continue a run that ended early after its last committed round, and show it until it ends."""
    with _client(identity) as client:
        info = client.resume(run_id)
        if as_json:
            sys.stdout.write((_compact if watch else _indented)(info) + "\n")
            sys.stdout.flush()
        else:
            say(f"Run {run_id} continues after round {info.rounds_done}.")
        if watch:
            _follow(client, run_id, as_json=as_json)


@run.command("report")
def report(
    run_id: RunId,
    identity: IdentityDir,
    out: Annotated[Path | None, typer.Option(help="File for the report as one HTML page.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a run's report as a table; with --out, write it as an HTML page; with --json, print all of it."""
    with _client(identity) as client:
        document = client.report(run_id)
    from fedward_server.reports import page_of, parse_report

    parsed = parse_report(document)
    if out is not None:
        write_file(out, page_of(parsed).encode())

    def show() -> None:
        reason = f", {plain(parsed.reason)}" if parsed.reason else ""
        say(f"{parsed.name}, run {run_id}: {parsed.verdict}{reason}")
        show_result(parsed)
        if out is not None:
            say(f"Report: {out}")

    emit(json.loads(document), as_json=as_json, show=show)


def sites(identity: IdentityDir, as_json: AsJson = False) -> None:
    """List the federation's sites and whether each is connected."""
    with _client(identity) as client:
        found = client.sites()
    rows = [(site.name, "connected" if site.online else "not connected") for site in found]
    emit(
        [site.model_dump(mode="json") for site in found],
        as_json=as_json,
        show=lambda: table(("Site", "State"), rows),
    )


def _client(identity: Path) -> ControlClient:
    from fedward_common.identity import load_identity
    from fedward_server.control_client import ControlClient

    return ControlClient(load_identity(identity))


def _follow(client: ControlClient, run_id: str, *, as_json: bool) -> None:
    """Show a run until it ends, and make its end the command's."""
    from fedward_server.reports import expect_go, parse_report
    from fedward_server.watch import watch

    _, content = client.describe(run_id)
    try:
        status = watch(client.watch(run_id), plan=content, json_lines=as_json)
    except KeyboardInterrupt:
        sys.stderr.write(f"The run goes on. See it again with: fedward run watch {run_id}\n")
        raise
    if status in ("waiting", "running"):
        raise ConnectionLostError(
            f"the events of run {run_id} broke off", remedy=f"Watch it again: fedward run watch {run_id}"
        )
    if status != "completed":
        info, _ = client.describe(run_id)
        raise RunFailedError(
            f"run {run_id} {status} after round {info.rounds_done} of {info.rounds_total}: {info.reason}",
            remedy=f"When the cause is removed: fedward run resume {run_id}",
        )
    report = parse_report(client.report(run_id))
    if not as_json:
        show_result(report)
        say(f"Report as a page: fedward run report {run_id} --out report.html")
    expect_go(report)


def _compact(info: RunInfo) -> str:
    return info.model_dump_json()


def _indented(info: RunInfo) -> str:
    return info.model_dump_json(indent=2)
