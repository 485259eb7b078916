"""The plan: what a coordinator asks sites to do, and the only thing a site acts on.

There are two kinds: the training plan, in this module, and the readiness plan (`readiness_plan.py`), which
counts a site's cases before training. A plan is a TOML file parsed once, here, into a frozen model that
forbids unknown keys. Signing adds what the plan implies but does not spell out (the layout of the tensors
that may travel) and fixes it with the coordinator's Ed25519 signature over canonical bytes. A site reads
nothing else: neither file names nor code nor settings arrive in any other way.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from fedward_common.errors import PlanError, PlanRefusedError, RefusalCode
from fedward_common.plan_parts import DataPart, Name, Part, Participation, TaskPart
from fedward_common.readiness_plan import ReadinessPlan
from fedward_common.registry import DATASETS, MODELS, STRATEGIES, TASKS, TRAINERS, TRANSFORMS
from fedward_common.weights import Layout

__all__ = [
    "AnyPlan",
    "Augmentation",
    "DataPart",
    "EvaluationPart",
    "ModelPart",
    "Name",
    "Options",
    "Participation",
    "PlanBody",
    "PrivacyPart",
    "ReadinessPlan",
    "Scalar",
    "SignedPlan",
    "StrategyPart",
    "TaskPart",
    "TrainingPart",
    "TrainingPlan",
    "TransformPart",
    "canonical_bytes",
    "check_names",
    "parse_any_plan",
    "parse_plan",
    "parse_signed_plan",
    "read_any_plan",
    "read_plan",
    "readiness_plan",
    "training_plan",
]

Scalar = bool | int | float | str
Options = dict[str, Scalar | tuple[Scalar, ...]]


_Percentile = Annotated[float, Field(ge=0, le=100)]
_Millimetres = Annotated[float, Field(ge=0.05, le=50)]


class Augmentation(Part):
    """Random changes of training images; 0 switches one off. Seeded by plan, round and site."""

    rotate_degrees: float = Field(default=0, ge=0, le=180)
    flip: bool = False
    zoom: float = Field(default=0, ge=0, lt=1)
    intensity: float = Field(default=0, ge=0, le=1)
    probability: float = Field(default=0.5, gt=0, le=1)


class TransformPart(Part):
    """How an image or volume becomes a tensor.

    Attributes:
        name: the pipeline (see `fedward_common/transforms`).
        size: height and width, or of a volume slices, rows and columns.
        window: what becomes black and white: "file", what the file would have a viewer show; "percentiles",
            two of them for each image; or two values in the image's units, such as HU.
        percentiles: which two.
        spacing_mm: of a volume, between slices, rows and columns: its middle is cut out or padded to `size`.
            Without it, the whole field of view is scaled to `size`.
        view: which way a volume lies; "acquired" leaves slices as they were acquired.
        augmentation: random changes of training images.
    """

    name: Name = "chest_xray"
    size: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = Field(
        default=(64, 64), min_length=2, max_length=3
    )
    window: Literal["file", "percentiles"] | tuple[float, float] = "file"
    percentiles: tuple[_Percentile, _Percentile] = (0.5, 99.5)
    spacing_mm: tuple[_Millimetres, _Millimetres, _Millimetres] | None = None
    view: Literal["acquired", "axial", "coronal", "sagittal"] = "acquired"
    augmentation: Augmentation = Augmentation()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if isinstance(self.window, tuple) and not self.window[0] < self.window[1]:
            raise ValueError("window: the first value must be below the second")
        if not self.percentiles[0] < self.percentiles[1]:
            raise ValueError("percentiles: the first must be below the second")
        if len(self.size) == 2 and (self.spacing_mm is not None or self.view != "acquired"):
            raise ValueError("spacing_mm and view are for volumes: size needs three numbers")
        return self


class ModelPart(Part):
    """Which network, with which options (see `fedward_common/models`)."""

    name: Name
    options: Options = Field(default_factory=dict)


class TrainingPart(Part):
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


class StrategyPart(Part):
    """How contributions become the next global model (see `fedward_common/strategies`)."""

    name: Name = "fedavg"
    options: Options = Field(default_factory=dict)


class PrivacyPart(Part):
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


class EvaluationPart(Part):
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


class TrainingPlan(Part):
    """Everything a coordinator may ask of a site that trains, parsed once and never changed."""

    kind: Literal["training"] = "training"
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


def _kind_of(document: Any) -> str:
    """Which kind of plan a document or a plan is; without a word on it, it trains."""
    kind = document.get("kind", "training") if isinstance(document, dict) else getattr(document, "kind", "")
    return str(kind)


AnyPlan = Annotated[
    Annotated[TrainingPlan, Tag("training")] | Annotated[ReadinessPlan, Tag("readiness")],
    Discriminator(_kind_of),
]
_ANY_PLAN: TypeAdapter[TrainingPlan | ReadinessPlan] = TypeAdapter(AnyPlan)


def read_any_plan(path: Path) -> TrainingPlan | ReadinessPlan:
    """Parse a TOML plan of either kind.

    Raises:
        PlanError: not readable, not TOML, an unknown key, or a value out of bounds; every fault is named.
    """
    try:
        return parse_any_plan(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PlanError(
            f"plan {path.name}: {error}", remedy="Give the path of a TOML plan; see deploy/plans."
        ) from error


def read_plan(path: Path) -> TrainingPlan:
    """Parse a TOML training plan; see `read_any_plan` for the errors."""
    return training_plan(read_any_plan(path))


def parse_any_plan(document: dict[str, Any]) -> TrainingPlan | ReadinessPlan:
    """Check a parsed document and turn it into a plan; see `read_any_plan` for the errors."""
    try:
        return _ANY_PLAN.validate_python(document)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(str(step) for step in _path(fault['loc'])) or 'plan'}: {fault['msg']}"
            for fault in error.errors(include_url=False)
        )
        raise PlanError(f"plan is not valid: {faults}", remedy="Correct the named keys.") from error


def parse_plan(document: dict[str, Any]) -> TrainingPlan:
    """Check a parsed document and turn it into a training plan; see `read_any_plan` for the errors."""
    return training_plan(parse_any_plan(document))


def training_plan(plan: TrainingPlan | ReadinessPlan) -> TrainingPlan:
    """Pass a training plan on.

    Raises:
        PlanRefusedError: it is of another kind; whatever only knows training does nothing with it.
    """
    if isinstance(plan, TrainingPlan):
        return plan
    raise PlanRefusedError(
        f"plan {plan.name} is a {plan.kind} plan, and this needs a training plan",
        remedy="Give a plan that trains; see deploy/plans.",
        code=RefusalCode.PLAN_UNSUPPORTED,
    )


def readiness_plan(plan: TrainingPlan | ReadinessPlan) -> ReadinessPlan:
    """Pass a readiness plan on.

    Raises:
        PlanRefusedError: it is of another kind.
    """
    if isinstance(plan, ReadinessPlan):
        return plan
    raise PlanRefusedError(
        f"plan {plan.name} is a {plan.kind} plan, and this needs a readiness plan",
        remedy='Give a plan with kind = "readiness"; see deploy/plans.',
        code=RefusalCode.PLAN_UNSUPPORTED,
    )


def _path(location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """A fault's place without the kind of plan, with which pydantic begins it."""
    return location[1:] if location[:1] in (("training",), ("readiness",)) else location


def check_names(plan: TrainingPlan | ReadinessPlan) -> None:
    """Raise PlanError when a part that the plan names is unknown on this machine or rejects its options."""
    DATASETS.check(plan.data.dataset)
    if isinstance(plan, ReadinessPlan):
        _check_surveyable(plan)
        return
    TRAINERS.check(plan.training.trainer)
    TASKS.load(plan.task.name)
    TRANSFORMS.load(plan.transforms.name)
    MODELS.load(plan.model.name).check(plan.model.options)
    STRATEGIES.load(plan.strategy.name).check(plan.strategy.options)


def _check_surveyable(plan: ReadinessPlan) -> None:
    """Only folders of DICOM files are surveyed; another dataset's cases have no header to count by."""
    if plan.data.dataset != "dicom_folder":
        raise PlanError(
            f"dataset {plan.data.dataset!r} cannot be surveyed, only dicom_folder can",
            remedy="Leave data.dataset out of the readiness plan.",
        )


class PlanBody(Part):
    """What is signed: the plan, the layout of tensors that may travel (none without a model), and a nonce.

    The nonce makes every signing unique: a site runs one signed plan for one run only.
    """

    plan: AnyPlan
    layout: Layout
    nonce: str = Field(pattern=r"^[0-9a-f]{32}$")
    signed_at: AwareDatetime


class SignedPlan(Part):
    """A plan body with the coordinator's signature over its canonical bytes."""

    body: PlanBody
    signer: Name
    signature: str = Field(pattern=r"^[0-9a-f]{128}$")

    @property
    def content(self) -> TrainingPlan | ReadinessPlan:
        """The plan itself."""
        return self.body.plan

    @property
    def plan(self) -> TrainingPlan:
        """The plan itself, for whatever only knows training: PlanRefusedError when it is of another kind."""
        return training_plan(self.body.plan)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical bytes: what an operator approves."""
        return hashlib.sha256(canonical_bytes(self.body)).hexdigest()

    def to_bytes(self) -> bytes:
        """The document as canonical JSON."""
        return canonical_bytes(self)

    def expired(self, now: datetime | None = None) -> bool:
        """Whether the plan has no expiry (fail closed) or it has passed."""
        expires = self.content.expires
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
