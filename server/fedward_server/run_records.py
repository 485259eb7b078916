"""What is written down about a run: its status, its events, its rounds.

These records cross process boundaries (runner, server, coordinator's screen, report), always as JSON,
so they are pydantic models that forbid unknown keys and numbers that are not finite.
"""

from __future__ import annotations

from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, JsonValue

RunStatus = Literal["waiting", "running", "completed", "failed", "stopped", "interrupted"]
ACTIVE: frozenset[RunStatus] = frozenset({"waiting", "running"})
FINAL: frozenset[RunStatus] = frozenset({"completed", "failed", "stopped"})
ENDED: frozenset[RunStatus] = FINAL | {"interrupted"}

EventKind = Literal[
    "status",
    "sites",
    "round_started",
    "site_update",
    "site_refused",
    "aggregated",
    "evaluated",
    "round_committed",
    "site_surveyed",
    "judged",
    "finished",
]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Event(_Record):
    """One thing that happened in a run; `sequence` grows, so a watcher can continue after one."""

    sequence: int
    at: AwareDatetime
    kind: EventKind
    fields: dict[str, JsonValue]


class SiteRecord(_Record):
    """What one site did in one round; `code` is a RefusalCode, `seconds` the site's own time.

    Attributes:
        num_quarantined: studies of which the site refuses something; None below its smallest count.
    """

    site: str
    status: Literal["contributed", "refused", "missing"]
    code: int = 0
    num_cases: int = Field(default=0, ge=0)
    num_quarantined: int | None = Field(default=None, ge=0)
    loss: float | None = None
    seconds: float = Field(default=0, ge=0)
    bytes_up: int = Field(default=0, ge=0)
    bytes_down: int = Field(default=0, ge=0)


class RoundRecord(_Record):
    """One committed round: which model went in, which came out, who took part, what was measured.

    Attributes:
        base_digest: SHA-256 of the packed weights the sites started from.
        weights_digest: SHA-256 of the packed weights after aggregation.
        validation: global MetricSummary as a document; None when the round was not measured.
        validation_sites: the same per site; None for a site below the plan's minimum of cases.
        checkpoint_file: name inside the run's folder of checkpoints.
    """

    round_index: int = Field(ge=0)
    base_digest: str
    weights_digest: str
    started_at: AwareDatetime
    seconds: float = Field(ge=0)
    sites: tuple[SiteRecord, ...]
    validation: dict[str, JsonValue] | None = None
    validation_sites: dict[str, dict[str, JsonValue] | None] = {}
    checkpoint_file: str
    checkpoint_sha256: str


class RunInfo(_Record):
    """A run at a glance; `rounds_done` counts committed rounds, `selected_round` is the result's."""

    run_id: str
    name: str
    plan_digest: str
    status: RunStatus
    reason: str
    created_at: AwareDatetime
    finished_at: AwareDatetime | None
    rounds_done: int
    rounds_total: int
    selected_round: int | None


class SiteStatus(_Record):
    """A site of the roster, and whether it is connected to the server now."""

    name: str
    online: bool
