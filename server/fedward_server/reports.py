"""The report of a run of either kind: training, or a survey of the sites' readiness."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from fedward_common.errors import NotReadyError, PayloadError
from fedward_common.files import write_atomically
from fedward_common.plan import ReadinessPlan, parse_signed_plan
from fedward_server.runs import RunStore

if TYPE_CHECKING:
    from fedward_common.evaluation.report import RunReport
    from fedward_server.readiness_report import ReadinessReport

    Report = RunReport | ReadinessReport


def build_any_report(store: RunStore, run_id: str, *, data_note: str = "", federation: str = "") -> Report:
    """Put a run's records together, whether it has ended or not; see `reporting.build_report`."""
    from fedward_server.reporting import build_report, provenance

    signed = parse_signed_plan(store.signed_plan(run_id))
    if not isinstance(signed.content, ReadinessPlan):
        return build_report(store, run_id, data_note=data_note, federation=federation)
    from fedward_server.readiness_reporting import readiness_report

    result: dict[str, Any] = store.result(run_id) or {}
    origin = provenance(signed, result, data_note=data_note, federation=federation)
    return readiness_report(store.run(run_id), signed, signed.content, result, origin)


def write_any_report(store: RunStore, run_id: str, out: Path, *, data_note: str) -> tuple[Report, Path]:
    """Build a run's report, and write it into `out` as a page and as JSON; the report and the page."""
    report = build_any_report(store, run_id, data_note=data_note)
    name = "report" if _trains(report) else "readiness"
    page = out / f"{name}.html"
    write_atomically(page, page_of(report).encode(), 0o644)
    write_atomically(out / f"{name}.json", report.model_dump_json(indent=2).encode(), 0o644)
    return report, page


def page_of(report: Report) -> str:
    """The report as one self-contained HTML page."""
    from fedward_common.evaluation.report import RunReport, render_html
    from fedward_server.readiness_page import render_readiness

    return render_html(report) if isinstance(report, RunReport) else render_readiness(report)


def parse_report(document: bytes) -> Report:
    """Read a report that a server sent; PayloadError unless it is one."""
    from fedward_common.evaluation.report import RunReport
    from fedward_server.readiness_report import ReadinessReport

    adapter: TypeAdapter[Report] = TypeAdapter(RunReport | ReadinessReport)
    try:
        return adapter.validate_json(document)
    except ValidationError as error:
        raise PayloadError(
            "the server's report has another form than this version knows",
            remedy="Install the same version of fedward on both sides.",
        ) from error


def expect_go(report: Report) -> None:
    """Raise NotReadyError when a survey of the sites ended with no-go."""
    from fedward_common.evaluation.report import RunReport

    if isinstance(report, RunReport) or report.decision == "go":
        return
    stops = report.stops
    sites = len({stop.site for stop in stops})
    rules = "1 rule is" if len(stops) == 1 else f"{len(stops)} rules are"
    raise NotReadyError(
        f"no-go: {rules} not met at {sites} {'site' if sites == 1 else 'sites'}",
        remedy="Have the sites correct what the reasons name, or sign a plan with other rules.",
    )


def _trains(report: Report) -> bool:
    from fedward_common.evaluation.report import RunReport

    return isinstance(report, RunReport)
