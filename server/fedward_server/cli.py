"""`fedward`: what coordinators and researchers type. Parse, call, print, exit.

Heavy imports are inside the commands, so the help appears at once. Errors end in `main`, the only place
that prints them and chooses the exit code.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from fedward_common.errors import FederationError, RunFailedError, UsageError
from fedward_server.cli_plan import plan
from fedward_server.cli_run import run, sites
from fedward_server.console import complain, emit, say, table

app = typer.Typer(
    name="fedward",
    help="Federated learning across hospitals: make a federation, sign plans, run and watch them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(plan, name="plan")
app.add_typer(run, name="run")
app.command("sites")(sites)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_CANCELLED = 130


@app.command()
def provision(
    directory: Annotated[Path, typer.Argument(help="Folder of the federation; made if absent.")],
    name: Annotated[str, typer.Option(help="What people call the federation. Needed the first time.")] = "",
    host: Annotated[
        list[str] | None,
        typer.Option(help="DNS name or address of the server; members use the first. Needed the first time."),
    ] = None,
    site: Annotated[list[str] | None, typer.Option(help="A site to add; a,b,c adds three.")] = None,
    coordinator: Annotated[list[str] | None, typer.Option(help="A coordinator to add.")] = None,
    observer: Annotated[list[str] | None, typer.Option(help="An observer to add; may only watch.")] = None,
    server_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Where sites connect.")] = None,
    control_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Where coordinators connect.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a federation's authority and everybody's keys; run again to add members."""
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
    members = [
        *(("site", each, f"sites/{each}") for each in federation.sites),
        *(("coordinator", each, f"coordinators/{each}") for each in federation.coordinators),
        *(("observer", each, f"observers/{each}") for each in federation.observers),
    ]
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
        table(("role", "name", "folder for this member only"), members)
        say(f"Keep {directory / 'ca'} off the server. Next: fedward serve {directory}")

    emit(document, as_json=as_json, show=show)


@app.command()
def serve(
    directory: Annotated[
        Path,
        typer.Argument(help="The federation's folder, or the server's part of it.", envvar="FEDWARD_HOME"),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "0.0.0.0",  # noqa: S104 - mutual TLS
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="For sites; as provisioned if not given.")
    ] = None,
    control_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="For coordinators; as provisioned if not given.")
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


@app.command()
def simulate(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan in TOML.")],
    sites: Annotated[int, typer.Option(min=1, max=10_000, help="How many sites.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Images to divide among the sites (.npz), or a folder with one folder a site."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for models, records and report.")] = Path("simulation"),
    workers: Annotated[int, typer.Option(min=0, help="Sites at a time; 0: one a core or GPU.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads a site; 0: shares the cores.")] = 0,
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], typer.Option(help="Where to train.")] = "auto",
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="ray: Flower's engine for clusters.")
    ] = "local",
    as_json: AsJson = False,
) -> None:
    """Run a plan with many sites on this machine, without a network."""
    from fedward_common.plan import read_plan
    from fedward_server.simulation import simulate as run_simulation

    status = run_simulation(
        read_plan(plan_file),
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


@app.command()
def demo(
    data: Annotated[Path | None, typer.Option(help="Chest radiographs (.npz in MedMNIST's form).")] = None,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds to run.")] = 5,
    sites: Annotated[int, typer.Option(min=1, max=64, help="Sites, each a process of its own.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("demo"),
    as_json: AsJson = False,
) -> None:
    """Make a federation on this machine, run it over mutual TLS, and write report.html."""
    from fedward_server.demo import demo as run_demo

    _expect_completed(run_demo(data=data, rounds=rounds, sites=sites, out=out, json_lines=as_json))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; every error is printed with its remedy."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in given
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # it writes every failed handshake to standard error
    try:
        command = typer.main.get_command(app)
        code = command.main(given, prog_name="fedward", standalone_mode=False)
        sys.stdout.flush()
    except FederationError as error:
        return complain(error, as_json=as_json)
    except (typer.Abort, KeyboardInterrupt):
        sys.stderr.write("stopped\n")
        return _CANCELLED
    except BrokenPipeError:
        # the reader of our output has gone, for example `head`; keep Python from failing at exit too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        usage = _usage_error(error)
        if usage is None:
            raise
        if _is_bare(error) and not as_json:
            sys.stderr.write(f"{error}\n")
            return usage.exit_code
        return complain(usage, as_json=as_json)
    return code if isinstance(code, int) else 0


def _usage_error(error: Exception) -> UsageError | None:
    """What the parser found wrong with the command line; None for anything else."""
    import click

    if not isinstance(error, click.ClickException):
        return None
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        return UsageError("a command is missing", remedy=f"See: {error.ctx.command_path} --help")
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "fedward"
    return UsageError(error.format_message(), remedy=f"See: {command} --help")


def _is_bare(error: Exception) -> bool:
    """Whether a group of commands was named without a command: then its help is the answer."""
    import click

    return isinstance(error, click.exceptions.NoArgsIsHelpError)


def _listed(values: Sequence[str] | None) -> list[str]:
    """Take `--site a --site b,c` apart."""
    return [name.strip() for value in values or () for name in value.split(",") if name.strip()]


def _expect_completed(status: str) -> None:
    if status != "completed":
        raise RunFailedError(f"the run ended {status}", remedy="The reason is shown above and in the report.")


if __name__ == "__main__":
    sys.exit(main())
