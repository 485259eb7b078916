"""`fedward plan`: look at a plan before it is signed, and sign it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedward_common.console import emit, say, table
from fedward_server.console import read_file, write_file

if TYPE_CHECKING:
    from fedward_common.plan import ReadinessPlan, SignedPlan, TrainingPlan
    from fedward_common.weights import Layout

plan = typer.Typer(
    help="Plans, for training or for a survey before it: check and sign them.", no_args_is_help=True
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@plan.command("check")
def check(
    path: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan in TOML, or a signed plan's file.")],
    identity: Annotated[
        Path | None,
        typer.Option(
            envvar="FEDWARD_IDENTITY", help="Any member's folder: to check a signed plan's signature as well."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a plan and every part that it names, and show what it asks of a site; nothing is sent."""
    from fedward_common.plan import check_names, parse_signed_plan, read_any_plan

    signed: SignedPlan | None = None
    document = read_file(path)
    if document.lstrip().startswith(b"{"):
        signed = parse_signed_plan(document)
        if identity is not None:
            from fedward_common.identity import load_identity, verify_plan

            verify_plan(document, load_identity(identity).federation)
    content = read_any_plan(path) if signed is None else signed.content
    check_names(content)
    layout = _layout(content)
    checked = signed is not None and identity is not None
    _show(content, layout, signed, signature_checked=checked, as_json=as_json)


@plan.command("sign")
def sign(
    path: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan in TOML.")],
    identity: Annotated[
        Path, typer.Option(envvar="FEDWARD_IDENTITY", help="A coordinator's folder, from: fedward provision.")
    ],
    out: Annotated[Path, typer.Option(help="File for the signed plan.")],
    valid_days: Annotated[
        float,
        typer.Option(
            metavar="DAYS", min=0.001, max=3650, help="Until it expires, unless the plan has `expires`."
        ),
    ] = 30,
    as_json: AsJson = False,
) -> None:
    """Sign a plan for one run; from then on every byte of it is fixed, and so is what may leave a site."""
    from fedward_common.identity import load_identity, sign_plan
    from fedward_common.plan import check_names, read_any_plan

    signer = load_identity(identity)
    content = read_any_plan(path)
    check_names(content)
    signed = sign_plan(content, _layout(content), signer, valid_days=valid_days)
    write_file(out, signed.to_bytes())
    expires = signed.content.expires
    assert expires is not None
    document = {
        "file": str(out),
        "name": content.name,
        "digest": signed.digest,
        "signer": signed.signer,
        "expires": expires.isoformat(),
    }

    def show() -> None:
        say(f"Signed plan {content.name} as {signed.signer}, valid until {expires:%Y-%m-%d %H:%M %Z}: {out}")
        say(f"Sites approve this digest: {signed.digest}")
        say(f"Next: fedward run start {out}")

    emit(document, as_json=as_json, show=show)


def _layout(content: TrainingPlan | ReadinessPlan) -> Layout:
    from fedward_common.models import layout_of
    from fedward_common.plan import ReadinessPlan

    return () if isinstance(content, ReadinessPlan) else layout_of(content)


def _show(
    content: TrainingPlan | ReadinessPlan,
    layout: Layout,
    signed: SignedPlan | None,
    *,
    signature_checked: bool,
    as_json: bool,
) -> None:
    from fedward_common.weights import num_bytes

    parameters = sum(spec.size for spec in layout if spec.kind == "parameter")
    document = {
        "plan": content.model_dump(mode="json"),
        "parameters": parameters,
        "bytes_per_update": num_bytes(layout),
        "signed": signed is not None,
        "signature_checked": signature_checked,
        "digest": None if signed is None else signed.digest,
    }
    rows = [
        ("plan", content.name),
        ("description", content.description or "-"),
        ("task", f"{content.task.name}: {', '.join(content.task.labels)}"),
        *_asks(content, parameters, num_bytes(layout)),
        ("privacy", f"no number from fewer than {content.privacy.min_cases} cases"),
        ("signature", _signature(signed, checked=signature_checked)),
    ]

    def show() -> None:
        table(("", ""), rows)
        if signed is not None:
            say(f"Digest that sites approve:\n  {signed.digest}")

    emit(document, as_json=as_json, show=show)


def _asks(content: TrainingPlan | ReadinessPlan, parameters: int, update: int) -> list[tuple[str, str]]:
    """What is particular to the plan's kind."""
    from fedward_common.plan import TrainingPlan
    from fedward_common.readiness_state import survey_tables

    if not isinstance(content, TrainingPlan):
        return [
            ("survey", f"cases by {', '.join(survey_tables(content))}; pixels by intensity"),
            ("rounds", f"none: one question, quorum {content.participation.quorum} sites"),
        ]
    return [
        ("model", f"{content.model.name}, {parameters:,} parameters"),
        ("update", f"{update / 1e6:,.2f} MB a site and round"),
        ("training", _training(content)),
        ("rounds", f"{content.rounds}, quorum {content.participation.quorum} sites"),
        ("strategy", content.strategy.name),
    ]


def _training(content: TrainingPlan) -> str:
    part = content.training
    return (
        f"{part.local_epochs} local epochs, {part.optimizer}, learning rate {part.learning_rate:g},"
        f" batches of {part.batch_size}"
    )


def _signature(signed: SignedPlan | None, *, checked: bool) -> str:
    if signed is None:
        return "none yet"
    verdict = "holds" if checked else "not checked; give --identity"
    return f"by {signed.signer}: {verdict}"
