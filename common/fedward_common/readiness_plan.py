"""The readiness plan: what a coordinator asks of sites before training, without a model.

A site that approved it counts its cases once, in cells that the plan declares, and releases the counts
(`readiness_state.py`). The plan travels the way of a training plan: signed, approved, valid until a date,
good for one run. It also declares the rules by which the coordinator's side decides on go or no-go, so that
nobody can bend them once the counts are known.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, model_validator

from fedward_common.plan_parts import DataPart, Name, Part, Participation, TaskPart

_Edges = Annotated[
    tuple[Annotated[float, Field(gt=0, le=1e6)], ...], Field(max_length=64, description="ascending")
]
_Share = Annotated[float, Field(ge=0, le=1)]


class IntensityPart(Part):
    """How intensities are counted: cells of equal width between two values, and one beyond either end.

    Attributes:
        units: "display" is what a viewer would show, from 0 (black) to 1; "modality" is what the image's
            own rescaling gives, such as HU.
    """

    units: Literal["display", "modality"] = "display"
    low: float = 0.0
    high: float = 1.0
    bins: int = Field(default=32, ge=2, le=1024)

    @model_validator(mode="after")
    def _ascending(self) -> IntensityPart:
        if not self.low < self.high:
            raise ValueError("low must be below high")
        return self


class SurveyPart(Part):
    """The cells into which a site counts; a list left empty leaves its table out.

    Attributes:
        age_edges: years at which a new band begins.
        scanners: how names of manufacturers begin, in capitals; all others count as one.
        spacing_edges_mm: distances of pixels at which a new cell begins.
        slice_edges_mm: likewise distances of slices, for volumes.
    """

    age_edges: _Edges = (18, 40, 60, 80)
    scanners: tuple[Annotated[str, Field(pattern=r"^[A-Z0-9][A-Z0-9 .&-]{0,31}$")], ...] = Field(
        default=("AGFA", "CANON", "CARESTREAM", "FUJI", "GE", "HOLOGIC", "PHILIPS", "SAMSUNG", "SIEMENS"),
        max_length=64,
    )
    spacing_edges_mm: _Edges = (0.12, 0.16, 0.2, 0.3, 0.5, 1.0)
    slice_edges_mm: _Edges = ()
    intensity: IntensityPart = IntensityPart()

    @model_validator(mode="after")
    def _in_order(self) -> SurveyPart:
        for name, edges in (
            ("age_edges", self.age_edges),
            ("spacing_edges_mm", self.spacing_edges_mm),
            ("slice_edges_mm", self.slice_edges_mm),
        ):
            if any(left >= right for left, right in pairwise(edges)):
                raise ValueError(f"{name} must ascend")
        if len(set(self.scanners)) != len(self.scanners):
            raise ValueError("scanners must differ")
        return self


class SurveyPrivacy(Part):
    """Bounds on what may leave a site. A site's own policy may only tighten them.

    Attributes:
        min_cases: least number of patients, and so of cases, behind any released number; with two, whatever
            is held back would be one.
        max_cases: a site may not claim more cases than this.
    """

    min_cases: int = Field(default=5, ge=3)
    max_cases: int = Field(default=1_000_000, ge=1, le=2**24)


class RulesPart(Part):
    """What must hold for "go". Distances and overlaps compare a site with all other sites together.

    Attributes:
        min_cases, min_patients: at every site.
        min_cases_per_label, min_patients_per_label: at every site, for every label.
        min_label_share: share of the rarest label at every site.
        max_repeated_share: share of cases whose pixels equal those of another case of the site.
        max_refused_share: share of studies that stand in quarantine; one used in part counts as its share.
        max_torn_patients: patients of whom a site has cases on two sides of its division.
        max_label_distance ... max_slice_distance: Jensen-Shannon distance, 0 (equal) to 1 (disjoint).
        min_intensity_overlap: common area of two intensity histograms, 0 (disjoint) to 1 (equal).
    """

    min_cases: int = Field(default=50, ge=0)
    min_patients: int = Field(default=20, ge=0)
    min_cases_per_label: int = Field(default=10, ge=0)
    min_patients_per_label: int = Field(default=10, ge=0)
    min_label_share: _Share = 0.05
    max_repeated_share: _Share = 0.01
    max_refused_share: _Share = 0.2
    max_torn_patients: int = Field(default=0, ge=0)
    max_label_distance: _Share = 0.4
    max_age_distance: _Share = 0.6
    max_sex_distance: _Share = 0.4
    max_scanner_distance: _Share = 1.0
    max_spacing_distance: _Share = 1.0
    max_slice_distance: _Share = 1.0
    min_intensity_overlap: _Share = 0.4


class ReadinessPlan(Part):
    """Everything a coordinator may ask of a site before training."""

    kind: Literal["readiness"]
    name: Name
    description: str = Field(default="", max_length=2000)
    federation_id: str = Field(default="", max_length=64)
    expires: AwareDatetime | None = None
    participation: Participation
    task: TaskPart
    data: DataPart = DataPart()
    survey: SurveyPart = SurveyPart()
    privacy: SurveyPrivacy = SurveyPrivacy()
    rules: RulesPart = RulesPart()

    @property
    def rounds(self) -> int:
        """No round is run: sites answer one question."""
        return 0
