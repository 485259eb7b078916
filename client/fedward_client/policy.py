"""The site's policy: which plans run without asking, and which never run here.

`HOME/policy.toml` has two parts. Limits refuse a plan even if the operator approved it. Rules approve a
plan in the operator's place; a plan must meet every condition of one rule. Without the file nothing is
approved by rule and the plan's own bounds are the limits.

    [limits]
    max_rounds = 100            # more are refused
    max_payload_mb = 500.0      # of one message
    min_cases = 10              # a plan must keep back numbers about fewer cases than this
    models = ["densenet121"]    # only these; likewise tasks, strategies, trainers, datasets
    kinds = ["training"]        # of plans; without this, "readiness" plans too may be approved

    [[approve]]
    coordinators = ["anna"]     # who signed; all these keys must be given
    models = ["densenet121"]
    tasks = ["classification"]
    strategies = ["fedavg", "fedprox"]
    max_rounds = 20

No rule approves a readiness plan: cases that come or go between two surveys are the difference of their
counts, and only a person who knows what changed can see that.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedward_client.config import faults_of
from fedward_common.errors import PolicyError
from fedward_common.plan import Name, SignedPlan, TrainingPlan
from fedward_common.weights import num_bytes

Names = Annotated[frozenset[Name], Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Limits(_Part):
    """What no plan may exceed here, whoever approved it. A list that is left out does not restrict."""

    max_rounds: int = Field(default=10_000, ge=1)
    max_local_epochs: int = Field(default=100, ge=1)
    max_payload_mb: float = Field(default=2000, gt=0)
    min_cases: int = Field(default=1, ge=1)
    models: Names | None = None
    tasks: Names | None = None
    strategies: Names | None = None
    trainers: Names | None = None
    datasets: Names | None = None
    kinds: Names | None = None


class ApprovalRule(_Part):
    """A plan that meets all of this runs without asking."""

    coordinators: Names
    models: Names
    tasks: Names
    strategies: Names
    max_rounds: int = Field(ge=1)
    max_local_epochs: int = Field(default=10, ge=1)
    max_payload_mb: float = Field(default=500, gt=0)
    min_cases: int = Field(default=5, ge=1)
    trainers: Names = frozenset({"local_epochs"})
    datasets: Names = frozenset({"dicom_folder"})

    @property
    def kinds(self) -> Names:
        """Kinds of plans that a rule can approve."""
        return frozenset({"training"})


class SitePolicy(_Part):
    """The whole file."""

    limits: Limits = Limits()
    approve: tuple[ApprovalRule, ...] = ()

    def objections(self, signed: SignedPlan) -> list[str]:
        """Every limit that a plan exceeds, in words for the operator; none means that it may run."""
        return _excess(signed, self.limits)

    def approves(self, signed: SignedPlan) -> bool:
        """Whether one rule approves the plan and no limit speaks against it."""
        return not self.objections(signed) and any(
            signed.signer in rule.coordinators and not _excess(signed, rule) for rule in self.approve
        )


def load_policy(path: Path) -> SitePolicy:
    """Read a policy; a file that is not there approves nothing.

    Raises:
        PolicyError: unreadable, not TOML, an unknown key, or a value out of bounds; all are named.
    """
    try:
        return SitePolicy.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return SitePolicy()
    except OSError as error:
        raise PolicyError(f"{path}: {error.strerror}", remedy="Correct the file's owner and mode.") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PolicyError(
            f"{path} is not TOML: {error}", remedy="Correct it; until then no plan runs."
        ) from error
    except ValidationError as error:
        raise PolicyError(
            f"{path}: {faults_of(error)}", remedy="Correct the named keys; until then no plan runs."
        ) from error


def _excess(signed: SignedPlan, bound: Limits | ApprovalRule) -> list[str]:
    plan = signed.content
    used: list[tuple[str, str, Names | None]] = [
        ("kind", plan.kind, bound.kinds),
        ("dataset", plan.data.dataset, bound.datasets),
    ]
    numbers: list[tuple[str, float, float]] = []
    if isinstance(plan, TrainingPlan):
        used += [
            ("model", plan.model.name, bound.models),
            ("task", plan.task.name, bound.tasks),
            ("strategy", plan.strategy.name, bound.strategies),
            ("trainer", plan.training.trainer, bound.trainers),
        ]
        numbers += [
            ("rounds", plan.rounds, bound.max_rounds),
            ("local epochs", plan.training.local_epochs, bound.max_local_epochs),
            ("MB a message", num_bytes(signed.body.layout) / 1e6, bound.max_payload_mb),
        ]
    found = [
        f"{kind} {name} is not permitted"
        for kind, name, names in used
        if names is not None and name not in names
    ]
    found += [f"{value:g} {what}, {most:g} permitted" for what, value, most in numbers if value > most]
    if plan.privacy.min_cases < bound.min_cases:
        found.append(f"numbers about {plan.privacy.min_cases} cases, {bound.min_cases} required")
    return found
