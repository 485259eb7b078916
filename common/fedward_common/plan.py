"""The training plan: what a coordinator asks sites to do, and the only thing a site acts on.

A plan is a TOML file parsed once, here, into a frozen model that forbids unknown keys. Signing adds
what the plan implies but does not spell out (the layout of the tensors that may travel) and fixes it
with the coordinator's Ed25519 signature over canonical bytes. A site reads nothing else: neither file
names nor code nor settings arrive in any other way.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedward_common.errors import PlanError
from fedward_common.registry import DATASETS, MODELS, STRATEGIES, TASKS, TRAINERS, TRANSFORMS
from fedward_common.weights import Layout

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,62}$")]
Scalar = bool | int | float | str
Options = dict[str, Scalar | tuple[Scalar, ...]]


class _Part(BaseModel):
    # TOML and JSON readers let nan and inf through; as a bound, either would permit everything.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Participation(_Part):
    """Who must take part, and how long the others wait.

    Attributes:
        quorum: least number of sites whose updates make a round.
        deadline_s: seconds a round waits for its sites.
        gather_s: seconds the start of a run waits for sites to be online and to have approved.
    """

    quorum: int = Field(ge=1, le=1000)
    deadline_s: float = Field(default=3600, gt=0, le=7 * 86400)
    gather_s: float = Field(default=300, gt=0, le=7 * 86400)


class TaskPart(_Part):
    """What is learned. `labels` are the classes in the order of the label file's numbers."""

    name: Name = "classification"
    labels: tuple[str, ...] = Field(min_length=2, max_length=64)
    positive: str | None = None

    @property
    def positive_index(self) -> int:
        """Index of the positive class; the last label when none is named."""
        return len(self.labels) - 1 if self.positive is None else self.labels.index(self.positive)

    @model_validator(mode="after")
    def _labels_differ(self) -> TaskPart:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels must differ")
        if self.positive is not None and self.positive not in self.labels:
            raise ValueError(f"positive = {self.positive!r} is not among the labels")
        return self


class DataPart(_Part):
    """Which cases a site uses, and how patients are divided.

    The label file's own `split` column wins where it has one; else patients are divided by a hash of
    `split_seed` and the patient, so that the division is stable and no patient is on two sides.
    """

    dataset: Name = "dicom_folder"
    modalities: tuple[str, ...] = ("CR", "DX")
    validation_fraction: float = Field(default=0.15, ge=0, lt=1)
    test_fraction: float = Field(default=0.2, ge=0, lt=1)
    split_seed: int = Field(default=0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _something_left_to_train_on(self) -> DataPart:
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validation_fraction + test_fraction must be below 1")
        return self


class Augmentation(_Part):
    """Random changes of training images; 0 switches one off. Seeded by plan, round and site."""

    rotate_degrees: float = Field(default=0, ge=0, le=180)
    flip: bool = False
    zoom: float = Field(default=0, ge=0, lt=1)
    intensity: float = Field(default=0, ge=0, le=1)
    probability: float = Field(default=0.5, gt=0, le=1)


class TransformPart(_Part):
    """How an image becomes a tensor."""

    name: Name = "chest_xray"
    size: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = Field(
        default=(64, 64), min_length=2, max_length=3
    )
    augmentation: Augmentation = Augmentation()


class ModelPart(_Part):
    """Which network, with which options (see `fedward_common/models`)."""

    name: Name
    options: Options = {}


class TrainingPart(_Part):
    """What a site does with its training cases in one round."""

    trainer: Name = "local_epochs"
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: float = Field(gt=0, le=10)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=0, ge=0, le=1)
    schedule: Literal["constant", "cosine"] = "constant"
    batch_size: int = Field(default=64, ge=1, le=4096)
    local_epochs: int = Field(default=1, ge=1, le=100)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    label_smoothing: float = Field(default=0, ge=0, lt=0.5)


class StrategyPart(_Part):
    """How contributions become the next global model (see `fedward_common/strategies`)."""

    name: Name = "fedavg"
    options: Options = {}


class PrivacyPart(_Part):
    """Bounds on what may leave a site. A site's own policy may only tighten them.

    Attributes:
        min_cases: least number of cases behind any released number.
        max_cases: a site may not claim more training cases than this.
        max_abs: no element of an update may exceed this.
        max_norm: global L2 norm bound of an update.
    """

    min_cases: int = Field(default=5, ge=1)
    max_cases: int = Field(default=1_000_000, ge=1, le=2**24)
    max_abs: float = Field(default=64.0, gt=0, le=1024)
    max_norm: float = Field(default=1e4, gt=0)


class EvaluationPart(_Part):
    """What is measured.

    Attributes:
        every: measure the validation split after every this many rounds.
        initial: also measure the untrained model, as round 0.
        score_bins: cells of the score grid; AUROC is exact but for ties within one cell.
        threshold: score at or above which a binary case counts as positive.
        select: which round's model is the result, by validation AUROC or simply the last.
        compare_local: each site also trains alone, for the comparison in the report.
    """

    every: int = Field(default=1, ge=1)
    initial: bool = False
    score_bins: int = Field(default=4096, ge=16, le=65536)
    threshold: float = Field(default=0.5, gt=0, lt=1)
    select: Literal["best", "last"] = "best"
    compare_local: bool = True


class TrainingPlan(_Part):
    """Everything a coordinator may ask of a site, parsed once and never changed."""

    name: Name
    description: str = Field(default="", max_length=2000)
    federation_id: str = Field(default="", max_length=64)
    expires: AwareDatetime | None = None
    rounds: int = Field(ge=1, le=10_000)
    seed: int = Field(default=0, ge=0, lt=2**32)
    participation: Participation
    task: TaskPart
    data: DataPart = DataPart()
    transforms: TransformPart = TransformPart()
    model: ModelPart
    training: TrainingPart
    strategy: StrategyPart = StrategyPart()
    privacy: PrivacyPart = PrivacyPart()
    evaluation: EvaluationPart = EvaluationPart()


def read_plan(path: Path) -> TrainingPlan:
    """Parse a TOML plan.

    Raises:
        PlanError: not readable, not TOML, an unknown key, or a value out of bounds; every fault is named.
    """
    try:
        return parse_plan(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PlanError(
            f"plan {path.name}: {error}", remedy="Give the path of a TOML plan; see deploy/plans."
        ) from error


def parse_plan(document: dict[str, Any]) -> TrainingPlan:
    """Check a parsed document and turn it into a plan; see `read_plan` for the errors."""
    try:
        plan = TrainingPlan.model_validate(document)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(str(step) for step in fault['loc']) or 'plan'}: {fault['msg']}"
            for fault in error.errors(include_url=False)
        )
        raise PlanError(f"plan is not valid: {faults}", remedy="Correct the named keys.") from error
    return plan


def check_names(plan: TrainingPlan) -> None:
    """Raise PlanError when a part that the plan names is unknown on this machine or rejects its options."""
    DATASETS.check(plan.data.dataset)
    TRAINERS.check(plan.training.trainer)
    TASKS.load(plan.task.name)
    TRANSFORMS.load(plan.transforms.name)
    MODELS.load(plan.model.name).check(plan.model.options)
    STRATEGIES.load(plan.strategy.name).check(plan.strategy.options)


class PlanBody(_Part):
    """What is signed: the plan, the layout of tensors that may travel, and a nonce.

    The nonce makes every signing unique: a site runs one signed plan for one run only.
    """

    plan: TrainingPlan
    layout: Layout
    nonce: str = Field(pattern=r"^[0-9a-f]{32}$")
    signed_at: AwareDatetime


class SignedPlan(_Part):
    """A plan body with the coordinator's signature over its canonical bytes."""

    body: PlanBody
    signer: Name
    signature: str = Field(pattern=r"^[0-9a-f]{128}$")

    @property
    def plan(self) -> TrainingPlan:
        """The plan itself."""
        return self.body.plan

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical bytes: what an operator approves."""
        return hashlib.sha256(canonical_bytes(self.body)).hexdigest()

    def to_bytes(self) -> bytes:
        """The document as canonical JSON."""
        return canonical_bytes(self)

    def expired(self, now: datetime | None = None) -> bool:
        """Whether the plan has no expiry (fail closed) or it has passed."""
        expires = self.plan.expires
        return expires is None or expires <= (now or datetime.now(UTC))


def canonical_bytes(part: BaseModel) -> bytes:
    """Sorted keys, no white space, UTF-8: the one byte string that stands for a document."""
    document = part.model_dump(mode="json")
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def parse_signed_plan(document: bytes) -> SignedPlan:
    """Read a signed plan and insist on canonical form, so that one plan has one byte string.

    This checks form only. Who signed it, and whether that still holds, is `identity.verify_plan`.

    Raises:
        PlanError: not a signed plan, or not in canonical form.
    """
    remedy = "Sign the plan again with: fedward plan sign"
    if len(document) > 4_000_000:
        raise PlanError(f"signed plan has {len(document)} bytes, 4,000,000 at most", remedy=remedy)
    try:
        signed = SignedPlan.model_validate_json(document)
    except ValidationError as error:
        raise PlanError(f"not a signed plan: {error.error_count()} faults", remedy=remedy) from error
    if signed.to_bytes() != document:
        raise PlanError("signed plan is not in canonical form: its bytes were changed", remedy=remedy)
    return signed
