"""What a survey of the sites found, as a document: go or no-go, the reasons, and the released counts.

`readiness.json` is this document; `readiness_page` shows it. It holds counts that sites released and what
follows from them, names from certificates, and the plan. A count of 0 is "none, or none that may be told".
"""

from __future__ import annotations

from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from fedward_common.evaluation.report import AbsentSite, Provenance, Verdict
from fedward_common.readiness_plan import ReadinessPlan

Decision = Literal["go", "no-go"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Reason(_Part):
    """One rule, and what a site has to do with it.

    Attributes:
        level: "stop" is a rule that is not met, or cannot be shown to be; "note" is something that is held
            back and yet cannot break its rule.
        rule: its name in the plan's table of rules.
        text: what was found and what is required.
        remedy: what the site can do, or the coordinator.
    """

    level: Literal["stop", "note"]
    site: str
    rule: str
    text: str
    remedy: str = ""


class Comparison(_Part):
    """A site against all other sites together; None where too much is held back.

    Attributes:
        distances: table -> Jensen-Shannon distance, 0 (equal) to 1 (disjoint).
        shifts: table -> the cell whose share differs most, its share here, and at all other sites.
        intensity_overlap: common area of the histograms of intensity, 0 (disjoint) to 1 (equal).
        medians: of intensity, here and at all other sites.
    """

    distances: dict[str, float | None] = {}
    shifts: dict[str, tuple[str, float, float]] = {}
    medians: tuple[float, float] | None = None
    intensity_overlap: float | None = None


class SiteReadiness(_Part):
    """One site.

    Attributes:
        counts: released counts by table, see `fedward_common.readiness_state`; None when all is held back.
        comparison: None without another site to compare with.
    """

    site: str
    counts: dict[str, tuple[int, ...]] | None
    comparison: Comparison | None = None
    reasons: tuple[Reason, ...] = ()

    @property
    def decision(self) -> Decision:
        """Whether this site meets every rule."""
        return "no-go" if any(reason.level == "stop" for reason in self.reasons) else "go"


class ReadinessReport(_Part):
    """Everything that a survey found.

    Attributes:
        verdict: how the run ended, or that it has not.
        reason: why, when it did not complete.
        decision: "go" when the run completed and every site that answered meets every rule.
        sites: those that answered; absent: those that did not.
        counts: the sum of what the sites released.
        tables: names of the cells by table.
    """

    kind: Literal["readiness"] = "readiness"
    schema_version: Literal[1] = 1
    verdict: Verdict
    reason: str = ""
    decision: Decision
    run_id: str
    name: str
    created_at: AwareDatetime
    finished_at: AwareDatetime | None = None
    seconds: float = Field(default=0, ge=0)
    sites: tuple[SiteReadiness, ...] = ()
    absent: tuple[AbsentSite, ...] = ()
    counts: dict[str, tuple[int, ...]]
    tables: dict[str, tuple[str, ...]]
    plan: ReadinessPlan
    plan_digest: str
    provenance: Provenance = Provenance()

    @property
    def stops(self) -> tuple[Reason, ...]:
        """Every rule that is not met, at every site."""
        return tuple(reason for site in self.sites for reason in site.reasons if reason.level == "stop")
