"""`fedward`: what coordinators and researchers type. Parse, call, print, exit.

Heavy imports are inside the commands, so the help appears at once. Errors end in `run_command`, which
prints them and chooses the exit code.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedward_common.console import emit, run_command, say, show_version, table
from fedward_common.errors import RunFailedError
from fedward_server.cli_plan import plan
from fedward_server.cli_run import run, sites

if TYPE_CHECKING:
    from fedward_common.federation import Federation

app = typer.Typer(
    name="fedward",
    help="Federated learning across hospitals: make a federation, sign plans, run and watch them.",
    epilog="A hospital's side is the command fedward-site. Try it all on this machine: fedward demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_OPERATE, _COORDINATE, _TRY = "Run a federation's server", "Coordinate", "On this machine alone"
app.add_typer(plan, name="plan", rich_help_panel=_COORDINATE)
app.add_typer(run, name="run", rich_help_panel=_COORDINATE)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
EventsAsJson = Annotated[
    bool, typer.Option("--json", help="Print the run's events as JSON, one a line, and nothing else.")
]
Device = Annotated[
    Literal["auto", "cpu", "cuda", "mps"],
    typer.Option(help="Where to train; auto takes a GPU if there is one."),
]


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options before any command."""


@app.command(rich_help_panel=_OPERATE)
def provision(
    directory: Annotated[Path, typer.Argument(help="Folder of the federation; made if absent.")],
    name: Annotated[str, typer.Option(help="The federation's name, for people. Needed the first time.")] = "",
    host: Annotated[
        list[str] | None,
        typer.Option(
            help="DNS name or address of the server; give several as a,b: members use the first."
            " Needed the first time."
        ),
    ] = None,
    site: Annotated[
        list[str] | None, typer.Option(help="Name of a site (hospital) to add; a,b,c adds three.")
    ] = None,
    coordinator: Annotated[
        list[str] | None,
        typer.Option(help="Name of a coordinator to add, who signs plans and starts runs; a,b adds two."),
    ] = None,
    observer: Annotated[
        list[str] | None, typer.Option(help="Name of an observer to add, who may only watch; a,b adds two.")
    ] = None,
    server_port: Annotated[
        int | None,
        typer.Option(metavar="PORT", min=1, max=65535, help="Where sites connect; 8443 if not given."),
    ] = None,
    control_port: Annotated[
        int | None,
        typer.Option(metavar="PORT", min=1, max=65535, help="Where coordinators connect; 8444 if not given."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a federation's authority and everybody's keys; run it again to add members."""
    from fedward_server.provisioning import provision as make

    federation = make(
        directory,
        name=name,
        hosts=_listed(host),
        site_names=_listed(site),
        coordinator_names=_listed(coordinator),
        observer_names=_listed(observer),
        server_port=server_port,
        control_port=control_port,
    )
    members = _members(federation)
    document = {
        "federation": federation.name,
        "federation_id": federation.federation_id,
        "fingerprint": federation.fingerprint,
        "server": federation.server,
        "control": federation.control,
        "members": [{"role": role, "name": who, "folder": folder} for role, who, folder in members],
    }

    def show() -> None:
        say(f"Federation {federation.name} in {directory}; fingerprint to compare by phone:")
        say(f"  {federation.fingerprint}")
        table(("Role", "Name", "Folder for this member only"), members)
        say(f"Keep {directory / 'ca'} off the server. Next: fedward serve {directory}")

    emit(document, as_json=as_json, show=show)


@app.command(rich_help_panel=_OPERATE)
def serve(
    directory: Annotated[
        Path,
        typer.Argument(help="The federation's folder, or the server's part of it.", envvar="FEDWARD_HOME"),
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen on; the default is every network.")
    ] = "0.0.0.0",  # noqa: S104 - mutual TLS
    port: Annotated[
        int | None,
        typer.Option(
            metavar="PORT",
            min=0,
            max=65535,
            help="For sites; as provisioned if not given, 0 takes a free one.",
        ),
    ] = None,
    control_port: Annotated[
        int | None,
        typer.Option(
            metavar="PORT",
            min=0,
            max=65535,
            help="For coordinators; as provisioned if not given, 0 takes a free one.",
        ),
    ] = None,
) -> None:
    """Serve sites and coordinators until stopped (SIGTERM or Ctrl-C)."""
    from fedward_common.federation import read_federation, split_address
    from fedward_server.config import ServerHome
    from fedward_server.serve import serve as run_server

    federation = read_federation(ServerHome(directory).federation)
    run_server(
        directory,
        host=host,
        port=split_address(federation.server)[1] if port is None else port,
        control_port=split_address(federation.control)[1] if control_port is None else control_port,
        ready=say,
    )


app.command("sites", rich_help_panel=_COORDINATE)(sites)


@app.command(rich_help_panel=_TRY)
def simulate(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan in TOML; it need not be signed.")],
    sites: Annotated[int, typer.Option(metavar="N", min=1, max=10_000, help="How many sites.")],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Images to divide among the sites (an .npz file as in MedMNIST), or a folder with SITE/dicom"
            " and SITE/labels.csv for each site. If not given: real radiographs from FEDWARD_DATA if they are"
            " there, else phantoms drawn on the spot."
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for images, models, records, report.html and the sites' logs.")
    ] = Path("simulation"),
    workers: Annotated[
        int,
        typer.Option(metavar="N", min=0, help="Sites that train at the same time; 0: one for each CPU core."),
    ] = 0,
    threads: Annotated[
        int,
        typer.Option(metavar="N", min=0, help="CPU threads for each site that trains; 0 shares the cores."),
    ] = 0,
    device: Device = "auto",
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(
            help="local: processes on this machine; ray: Flower's engine, here or on a Ray cluster."
        ),
    ] = "local",
    as_json: EventsAsJson = False,
) -> None:
    """Run a plan with many sites on this machine, without a network and without keys."""
    from fedward_common.plan import read_any_plan
    from fedward_server.simulation import simulate as run_simulation

    status = run_simulation(
        read_any_plan(plan_file),
        num_sites=sites,
        data=data,
        out=out,
        workers=workers,
        threads=threads,
        device=device,
        engine=engine,
        json_lines=as_json,
    )
    _expect_completed(status)


@app.command(rich_help_panel=_TRY)
def demo(
    data: Annotated[
        Path | None,
        typer.Option(
            help="Chest radiographs (an .npz file as in MedMNIST). If not given: those from FEDWARD_DATA if"
            " they are there, else phantoms drawn on the spot."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, max=1000, help="Rounds to run.")] = 5,
    sites: Annotated[
        int, typer.Option(metavar="N", min=1, max=64, help="How many sites, each a process of its own.")
    ] = 3,
    out: Annotated[
        Path, typer.Option(help="Folder for everything the demo makes; new, or of an earlier demo.")
    ] = Path("demo"),
    as_json: EventsAsJson = False,
) -> None:
    """Make a federation on this machine, run it over mutual TLS, and write report.html."""
    from fedward_server.demo import demo as run_demo

    _expect_completed(run_demo(data=data, rounds=rounds, sites=sites, out=out, json_lines=as_json))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; every error is printed with its remedy."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # it writes every failed handshake to standard error
    return run_command(app, "fedward", sys.argv[1:] if arguments is None else arguments)


def _members(federation: Federation) -> list[tuple[str, str, str]]:
    """Role, name and folder of every member."""
    return [
        *(("site", each, f"sites/{each}") for each in federation.sites),
        *(("coordinator", each, f"coordinators/{each}") for each in federation.coordinators),
        *(("observer", each, f"observers/{each}") for each in federation.observers),
    ]


def _listed(values: Sequence[str] | None) -> list[str]:
    """Take `--site a --site b,c` apart."""
    return [name.strip() for value in values or () for name in value.split(",") if name.strip()]


def _expect_completed(status: str) -> None:
    if status != "completed":
        raise RunFailedError(f"the run ended {status}", remedy="The reason is shown above and in the report.")


if __name__ == "__main__":
    sys.exit(main())
