"""Parts that plans of every kind are made of: names, participation, labels, and which cases are used."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,62}$")]


class Part(BaseModel):
    """A table of a plan: unknown keys are refused, nothing can be changed."""

    # TOML and JSON readers let nan and inf through; as a bound, either would permit everything.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Participation(Part):
    """Who must take part, and how long the others wait.

    Attributes:
        quorum: least number of sites whose updates make a round.
        deadline_s: seconds a round waits for its sites.
        gather_s: seconds the start of a run waits for sites to be online and to have approved.
    """

    quorum: int = Field(ge=1, le=1000)
    deadline_s: float = Field(default=3600, gt=0, le=7 * 86400)
    gather_s: float = Field(default=300, gt=0, le=7 * 86400)


class TaskPart(Part):
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


class DataPart(Part):
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
