"""From a run's records to its report: one document for the screen, the HTML page and other programs."""

from __future__ import annotations

from typing import Any

from pydantic import JsonValue

from fedward_common.evaluation.state import MetricSummary
from fedward_server.rounds import Measurement, RunOutcome


def result_document(outcome: RunOutcome) -> dict[str, JsonValue]:
    """What the run store keeps of an outcome; read back by `build_report`."""
    return {
        "selected_round": outcome.selected_round,
        "test": _measurement(outcome.test),
        "local": {name: _dump(summary) for name, summary in outcome.local.items()},
    }


def _measurement(measured: Measurement) -> dict[str, JsonValue]:
    sites: dict[str, JsonValue] = {name: _dump(summary) for name, summary in measured.sites.items()}
    return {"global": _dump(measured.total), "sites": sites}


def _dump(summary: MetricSummary | None) -> Any:
    return None if summary is None else summary.model_dump(mode="json")
