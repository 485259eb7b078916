"""The report as a document: everything a run found and how it came about, ready for JSON.

`RunReport.model_json_schema()` is the schema; `schema_version` rises when a field changes its meaning.
A metric summary of None means that a site held its counts back because they rest on too few cases, or
sent none; a site that is missing from a mapping was not measured.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from fedward_common.errors import RefusalCode
from fedward_common.evaluation.summary import MetricSummary
from fedward_common.plan import TrainingPlan

Verdict = Literal["waiting", "running", "completed", "failed", "stopped", "interrupted"]
SiteMetrics = dict[str, MetricSummary | None]


def _meaning(validated: dict[str, Any]) -> str:
    try:
        return RefusalCode(validated.get("code", 0)).meaning
    except ValueError:
        return RefusalCode.INTERNAL.meaning


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class AbsentSite(_Part):
    """A site that was expected and did not take part; `code` is a RefusalCode, `reason` its meaning."""

    site: str
    code: int
    reason: str = Field(default_factory=_meaning)


class SiteRound(_Part):
    """What one site did in one round.

    Attributes:
        status: `contributed`; `refused` (the site said no, or the server did not admit its update);
            `missing` (no answer).
        code: a RefusalCode; 0 for a contribution.
        reason: the code in words.
        num_cases: training cases behind the contribution.
        num_quarantined: studies of which the site refuses something; None below its smallest count.
        loss: training loss per case.
        seconds: from the start of the round to the site's answer.
        bytes_up: bytes received from the site.
        bytes_down: bytes sent to it.
    """

    site: str
    status: Literal["contributed", "refused", "missing"]
    code: int = 0
    reason: str = Field(default_factory=_meaning)
    num_cases: int = Field(default=0, ge=0)
    num_quarantined: int | None = Field(default=None, ge=0)
    loss: float | None = None
    seconds: float = Field(default=0, ge=0)
    bytes_up: int = Field(default=0, ge=0)
    bytes_down: int = Field(default=0, ge=0)


class RoundReport(_Part):
    """One round; round 0 is the untrained model, measured only.

    Attributes:
        committed: whether it counts; a round without quorum does not.
        weights_digest: SHA-256 of the packed global weights after the round.
        validation: global metrics on the validation cases; None when not measured.
        validation_sites: the same per site.
    """

    round_index: int = Field(ge=0)
    committed: bool = True
    seconds: float = Field(ge=0)
    sites: tuple[SiteRound, ...] = ()
    weights_digest: str = ""
    validation: MetricSummary | None = None
    validation_sites: SiteMetrics = {}

    @property
    def contributors(self) -> tuple[SiteRound, ...]:
        """The sites whose updates made the round."""
        return tuple(site for site in self.sites if site.status == "contributed")

    @property
    def training_loss(self) -> float | None:
        """Training loss per case over all contributors that gave one."""
        told = [(site.loss, site.num_cases) for site in self.contributors if site.loss is not None]
        cases = sum(count for _, count in told)
        return sum(loss * count for loss, count in told) / cases if cases else None


class Provenance(_Part):
    """What a reader needs to trace the result.

    Attributes:
        federation: the federation's name.
        signer: coordinator who signed the plan.
        data: what the sites trained on, in one line (for example "synthetic phantoms").
        initial_weights_digest: SHA-256 of the weights before round 1.
        model_file: name of the result's file.
        model_sha256: SHA-256 of that file.
        versions: package -> version, of the machine that ran the rounds.
        machine: that machine in words: processor, cores, accelerator.
    """

    federation: str = ""
    signer: str = ""
    data: str = ""
    initial_weights_digest: str = ""
    model_file: str = ""
    model_sha256: str = ""
    versions: dict[str, str] = {}
    machine: str = ""


class RunReport(_Part):
    """Everything that a run found.

    Attributes:
        verdict: how the run ended, or that it has not.
        reason: why, when it did not complete.
        name: the plan's name, shown as the title.
        sites: every site of the federation that was expected, in the order to show them.
        absent: sites missing when the run ended or could not start.
        plan: the plan in full; `plan_digest` is the SHA-256 that operators approved.
        selected_round: whose model is the result.
        test: the selected model on all test cases together; `test_sites` per site.
        local_sites: the model that each site trained alone, on its own test cases.
    """

    schema_version: Literal[1] = 1
    verdict: Verdict
    reason: str = ""
    run_id: str
    name: str
    created_at: AwareDatetime
    finished_at: AwareDatetime | None = None
    seconds: float = Field(default=0, ge=0)
    sites: tuple[str, ...]
    absent: tuple[AbsentSite, ...] = ()
    plan: TrainingPlan
    plan_digest: str
    rounds: tuple[RoundReport, ...] = ()
    selected_round: int | None = None
    test: MetricSummary | None = None
    test_sites: SiteMetrics = {}
    local_sites: SiteMetrics = {}
    provenance: Provenance = Provenance()

    @property
    def trained_rounds(self) -> tuple[RoundReport, ...]:
        """Committed rounds in which sites trained."""
        return tuple(each for each in self.rounds if each.committed and each.round_index > 0)

    @property
    def without_gaps(self) -> bool:
        """Whether every expected site contributed to every round of the plan."""
        everyone = set(self.sites)
        return len(self.trained_rounds) == self.plan.rounds and all(
            {site.site for site in each.contributors} >= everyone for each in self.trained_rounds
        )
