"""`HOME/cohort.toml`: which of the site's images make up its cohort. Absent: radiographs, labels from CSV.

The plan says what it needs, this file what the site gives; an image has to satisfy both. A criterion that
a header does not answer (no date, no body part) is not met: nothing is guessed. The same criteria, as far
as an archive understands them, limit what is retrieved from it.
"""

from __future__ import annotations

import fnmatch
import tomllib
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fedward_client.config import faults_of
from fedward_client.dicom.gate import GatePolicy
from fedward_client.dicom.sop_classes import RADIOGRAPHS
from fedward_client.index_records import IndexedImage, Rule
from fedward_client.labels import LabelConfig
from fedward_client.site_data import COHORT_FILE as COHORT_FILE
from fedward_client.sources.settings import ListedText, Selection, Uid
from fedward_common.errors import UsageError

Unit = Literal["image", "volume"]
Criterion = Literal["modality", "body part", "view", "date", "age", "description", "study"]

_MAX_LISTED = 100_000
_Code = Annotated[
    str,
    BeforeValidator(lambda text: " ".join(text.upper().split()) if isinstance(text, str) else text),
    Field(pattern=r"^[A-Z0-9_ ]{1,16}$"),
]
_Pattern = Annotated[str, Field(pattern=r"^[^\[\]\\\x00-\x1f]{1,64}$")]
"""Text with `*` and `?`; no classes, so that a pattern's cost is bounded by its length."""

_Patterns = Annotated[tuple[_Pattern, ...], Field(max_length=32)]
_Age = Annotated[int, Field(ge=0, le=150)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DescriptionPatterns(_Part):
    """Which SeriesDescription an image may have; letters of either case, `*` and `?` as in file names.

    Args:
        include: at least one of these; () for any description, also none.
        exclude: none of these.
    """

    include: _Patterns = ()
    exclude: _Patterns = ()

    def match(self, description: str) -> bool:
        """Whether a series of this description is wanted."""
        text = description.lower()
        if any(fnmatch.fnmatchcase(text, pattern.lower()) for pattern in self.exclude):
            return False
        return not self.include or any(fnmatch.fnmatchcase(text, each.lower()) for each in self.include)


class Arrival(_Part):
    """What counts as a series that is still arriving, of which no volume is made.

    Args:
        settle_s: so long after the newest file is the folder looked at again, and an archive asked again;
            what moves in between is still arriving. 0: what is there is taken to be all.
        images_in_acquisition: whether a study needs as many images of an acquisition as they say it has.
    """

    settle_s: Annotated[float, Field(ge=0, le=86_400)] = 10
    images_in_acquisition: bool = True


class CohortFile(_Part):
    """The cohort as the site declares it; every criterion left out admits everything.

    Args:
        unit: what one case is: one image, or one volume of a series.
        modalities: of these only; by default whatever the plan asks for.
        body_parts: BodyPartExamined is one of these.
        views: ViewPosition is one of these.
        date_from: earliest StudyDate.
        date_to: latest StudyDate.
        age_from: least PatientAge, completed years.
        age_to: greatest PatientAge.
        series_description: patterns of SeriesDescription.
        accessions: AccessionNumber is one of these, as written.
        studies: StudyInstanceUID is one of these.
        labels: where labels come from, and what may be left over.
        gate: what the site's own rules say about text, screens and faces in pictures.
        arrival: for volumes, when a series is taken to be whole.
        cache_gb: most that prepared images may take in HOME/cache, in 10^9 bytes.
    """

    unit: Unit = "image"
    modalities: Annotated[tuple[_Code, ...], Field(min_length=1)] | None = None
    body_parts: tuple[_Code, ...] = ()
    views: tuple[_Code, ...] = ()
    date_from: date | None = None
    date_to: date | None = None
    age_from: _Age | None = None
    age_to: _Age | None = None
    series_description: DescriptionPatterns = DescriptionPatterns()
    accessions: Annotated[frozenset[ListedText], Field(max_length=_MAX_LISTED, repr=False)] = frozenset()
    studies: Annotated[frozenset[Uid], Field(max_length=_MAX_LISTED, repr=False)] = frozenset()
    labels: LabelConfig = LabelConfig()
    gate: GatePolicy = GatePolicy()
    arrival: Arrival = Arrival()
    cache_gb: Annotated[float, Field(gt=0, le=1e6)] = 50

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.date_from and self.date_to and self.date_from > self.date_to:
            raise ValueError("`date_from` is later than `date_to`")
        if self.age_from is not None and self.age_to is not None and self.age_from > self.age_to:
            raise ValueError("`age_from` is greater than `age_to`")
        return self

    def wanted_modalities(self, asked: tuple[str, ...]) -> tuple[str, ...]:
        """Those that a plan asks for and the site gives."""
        return asked if self.modalities is None else tuple(each for each in asked if each in self.modalities)

    def rule(self, modalities: tuple[str, ...]) -> Rule:
        """Which refusals count: radiographs alone are held to the stricter, older list."""
        plain = self.unit == "image" and set(modalities) <= set(RADIOGRAPHS.values())
        return "radiograph" if plain else "image"

    @property
    def settle_s(self) -> float:
        """How long to wait for more; single images need no others beside them."""
        return self.arrival.settle_s if self.unit == "volume" else 0.0

    def selection(self, asked: tuple[str, ...] = ()) -> Selection:
        """What of this an archive can be asked for.

        Args:
            asked: modalities to ask for when the file names none.
        """
        return Selection(
            modalities=self.modalities if self.modalities is not None else asked,
            date_from=self.date_from,
            date_to=self.date_to,
            body_parts=self.body_parts,
            accessions=tuple(sorted(self.accessions)),
            studies=tuple(sorted(self.studies)),
        )

    def unmet(self, image: IndexedImage) -> Criterion | None:
        """The first criterion that an image does not meet; None when it meets them all.

        Modalities are left to `wanted_modalities`: they depend on the plan.
        """
        return next((name for name, met in _CRITERIA if not met(self, image)), None)


def _is_listed(file: CohortFile, image: IndexedImage) -> bool:
    return (not file.studies or image.study in file.studies) and (
        not file.accessions or image.accession in file.accessions
    )


def _is_dated(file: CohortFile, image: IndexedImage) -> bool:
    if file.date_from is None and file.date_to is None:
        return True
    if image.study_date is None:
        return False
    first, last = file.date_from or date.min, file.date_to or date.max
    return f"{first:%Y%m%d}".zfill(8) <= image.study_date <= f"{last:%Y%m%d}"


def _is_aged(file: CohortFile, image: IndexedImage) -> bool:
    if file.age_from is None and file.age_to is None:
        return True
    if image.age_years is None:
        return False
    most = 1000 if file.age_to is None else file.age_to
    return (file.age_from or 0) <= image.age_years <= most


def _normal(text: str) -> str:
    return " ".join(text.upper().split())


_CRITERIA: tuple[tuple[Criterion, Callable[[CohortFile, IndexedImage], bool]], ...] = (
    ("study", _is_listed),
    ("body part", lambda file, image: not file.body_parts or _normal(image.body_part) in file.body_parts),
    ("view", lambda file, image: not file.views or _normal(image.view_position) in file.views),
    ("date", _is_dated),
    ("age", _is_aged),
    ("description", lambda file, image: file.series_description.match(image.series_description)),
)


def read_cohort_file(home: Path) -> CohortFile:
    """Read `HOME/cohort.toml`; without one, the defaults.

    Raises:
        UsageError: not TOML, an unknown key, or a value out of bounds; all are named.
    """
    path = home / COHORT_FILE
    try:
        return CohortFile.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return CohortFile()
    except OSError as error:
        raise UsageError(f"HOME/{COHORT_FILE}: {error.strerror}", remedy="Make it readable.") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"HOME/{COHORT_FILE} is not TOML: {error}", remedy="Correct the file.") from error
    except ValidationError as error:
        raise UsageError(
            f"HOME/{COHORT_FILE}: {faults_of(error)}", remedy="Correct the named keys."
        ) from None  # the original quotes accession numbers
