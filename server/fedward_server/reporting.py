"""From a run's records to its report: one document for the screen, the HTML page and other programs."""

from __future__ import annotations

import os
import platform
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue

from fedward_common.files import write_atomically
from fedward_common.plan import SignedPlan, parse_signed_plan
from fedward_server.run_records import Event, RoundRecord, RunInfo
from fedward_server.runs import RunStore

if TYPE_CHECKING:
    from fedward_common.evaluation.report import (
        AbsentSite,
        Provenance,
        RoundReport,
        RunReport,
        SiteRound,
    )
    from fedward_common.evaluation.summary import MetricSummary
    from fedward_server.rounds import Measurement, RunOutcome
    from fedward_server.survey import SurveyOutcome

_PACKAGES = ("fedward", "flwr", "torch", "monai", "pydicom", "numpy", "cryptography", "scikit-learn")


def result_document(outcome: RunOutcome | SurveyOutcome) -> dict[str, JsonValue]:
    """What the run store keeps of an outcome; read back by `reports.build_any_report`."""
    from fedward_server.survey import SurveyOutcome

    origin: dict[str, JsonValue] = {"versions": dict(_versions()), "machine": _machine()}
    if isinstance(outcome, SurveyOutcome):
        return outcome.document() | origin
    return origin | {
        "selected_round": outcome.selected_round,
        "initial_digest": outcome.initial_digest,
        "test": _measurement(outcome.test),
        "local": {name: _dump(summary) for name, summary in outcome.local.items()},
    }


def write_report(
    store: RunStore, run_id: str, out: Path, *, data_note: str, federation: str = ""
) -> RunReport:
    """Build a run's report and write `report.html` and `report.json` into `out`."""
    from fedward_common.evaluation.report import render_html

    report = build_report(store, run_id, data_note=data_note, federation=federation)
    write_atomically(out / "report.html", render_html(report).encode(), 0o644)
    write_atomically(out / "report.json", report.model_dump_json(indent=2).encode(), 0o644)
    return report


def build_report(store: RunStore, run_id: str, *, data_note: str = "", federation: str = "") -> RunReport:
    """Put a run's records together, whether it has ended or not.

    Args:
        store: where the run is recorded.
        run_id: which run.
        data_note: one phrase on the images, when known.
        federation: the federation's name.

    Raises:
        UsageError: there is no such run.
    """
    from fedward_common.evaluation.report import RunReport

    info, events = store.run(run_id), store.events(run_id)
    signed = parse_signed_plan(store.signed_plan(run_id))
    result: dict[str, Any] = store.result(run_id) or {}
    records = store.rounds(run_id)
    sites = _everyone(events, records)
    test = result.get("test", {})
    selected = next((each for each in records if each.round_index == info.selected_round), None)
    return RunReport(
        verdict=info.status,
        reason=info.reason,
        run_id=run_id,
        name=signed.plan.name,
        created_at=info.created_at,
        finished_at=info.finished_at,
        seconds=_seconds(info),
        sites=sites,
        absent=_absent(events, info),
        plan=signed.plan,
        plan_digest=signed.digest,
        rounds=tuple(_rounds(records, events)),
        selected_round=info.selected_round,
        test=_load(test.get("global")),
        test_sites={name: _load(document) for name, document in test.get("sites", {}).items()},
        local_sites={name: _load(document) for name, document in result.get("local", {}).items()},
        provenance=provenance(signed, result, data_note=data_note, federation=federation).model_copy(
            update={
                "initial_weights_digest": str(result.get("initial_digest", "")),
                "model_file": "" if selected is None else selected.checkpoint_file,
                "model_sha256": "" if selected is None else selected.checkpoint_sha256,
            }
        ),
    )


def provenance(signed: SignedPlan, result: dict[str, Any], *, data_note: str, federation: str) -> Provenance:
    """Where a result comes from: federation, signer, images, versions and machine."""
    from fedward_common.evaluation.report import Provenance

    return Provenance(
        federation=federation,
        signer=signed.signer,
        data=data_note,
        versions=result.get("versions") or _versions(),
        machine=str(result.get("machine") or _machine()),
    )


def every_site_in_every_round(report: RunReport) -> bool:
    """Whether the run completed and no site missed a round."""
    return report.verdict == "completed" and report.without_gaps


def _rounds(records: list[RoundRecord], events: list[Event]) -> list[RoundReport]:
    from fedward_common.evaluation.report import RoundReport

    untrained = [
        event.fields
        for event in events
        if event.kind == "evaluated" and event.fields["round"] == 0 and event.fields["split"] == "validation"
    ]
    reports = [
        RoundReport(
            round_index=0,
            seconds=0,
            validation=_load(fields["global"]),
            validation_sites=_loads(fields["sites"]),
        )
        for fields in untrained[-1:]  # a run resumed before its first round measured it again
    ]
    for record in records:
        reports.append(
            RoundReport(
                round_index=record.round_index,
                seconds=record.seconds,
                sites=tuple(_site_round(site.model_dump()) for site in record.sites),
                weights_digest=record.weights_digest,
                validation=_load(record.validation),
                validation_sites=_loads(record.validation_sites),
            )
        )
    return [*reports, *_uncommitted(records, events)]


def _uncommitted(records: list[RoundRecord], events: list[Event]) -> list[RoundReport]:
    """The round that ended the run without being committed: who answered what."""
    from fedward_common.evaluation.report import RoundReport

    done = records[-1].round_index if records else 0
    told: dict[int, dict[str, SiteRound]] = defaultdict(dict)
    for event in events:
        index = event.fields.get("round")
        if event.kind in ("site_update", "site_refused") and isinstance(index, int) and index > done:
            site = _site_round(
                {
                    **{key: value for key, value in event.fields.items() if key != "round"},
                    "status": "contributed" if event.kind == "site_update" else _absence(event),
                }
            )
            told[index][site.site] = site
    return [
        RoundReport(round_index=index, committed=False, seconds=0, sites=tuple(told[index].values()))
        for index in sorted(told)
    ]


def _absence(event: Event) -> str:
    code = event.fields["code"]
    return "missing" if isinstance(code, int) and code >= 70 else "refused"


def _absent(events: list[Event], info: RunInfo) -> tuple[AbsentSite, ...]:
    """Sites that were not ready when the run began, unless they took part later."""
    from fedward_common.evaluation.report import AbsentSite

    waiting: dict[str, Any] = {}
    for event in events:
        if event.kind == "sites":
            waiting = dict(event.fields["waiting"])  # type: ignore[arg-type]
        elif event.kind == "site_update":
            waiting.pop(str(event.fields["site"]), None)
        elif event.kind == "site_refused" and info.status != "completed":
            waiting[str(event.fields["site"])] = event.fields["code"]
    return tuple(AbsentSite(site=site, code=code) for site, code in sorted(waiting.items()))


def _everyone(events: list[Event], records: list[RoundRecord]) -> tuple[str, ...]:
    names: set[str] = {site.site for record in records for site in record.sites}
    for event in events:
        if event.kind == "sites":
            names.update(event.fields["ready"])  # type: ignore[arg-type]
            names.update(event.fields["waiting"])  # type: ignore[arg-type]
    return tuple(sorted(names))


def _site_round(document: dict[str, Any]) -> SiteRound:
    from fedward_common.evaluation.report import SiteRound

    return SiteRound.model_validate({key: value for key, value in document.items() if value is not None})


def _measurement(measured: Measurement) -> dict[str, JsonValue]:
    sites: dict[str, JsonValue] = {name: _dump(summary) for name, summary in measured.sites.items()}
    return {"global": _dump(measured.total), "sites": sites}


def _dump(summary: MetricSummary | None) -> Any:
    return None if summary is None else summary.model_dump(mode="json")


def _load(document: Any) -> MetricSummary | None:
    from fedward_common.evaluation.summary import MetricSummary

    return None if document is None else MetricSummary.model_validate(document)


def _loads(documents: Any) -> dict[str, MetricSummary | None]:
    return {name: _load(document) for name, document in documents.items()}


def _seconds(info: RunInfo) -> float:
    return 0.0 if info.finished_at is None else (info.finished_at - info.created_at).total_seconds()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _machine() -> str:
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
