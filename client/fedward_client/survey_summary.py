"""A signed readiness plan in words, for the operator who has to approve it: what is counted, what leaves."""

from __future__ import annotations

from fedward_common.readiness_plan import ReadinessPlan
from fedward_common.readiness_state import survey_tables
from fedward_common.state_payload import state_bytes


def survey_rows(plan: ReadinessPlan) -> list[tuple[str, str]]:
    """Titles and texts of what is particular to a readiness plan, most important first."""
    floor = plan.privacy.min_cases
    return [
        ("Learns", "nothing: the site's cases are counted, once, before any training"),
        ("Data used", f"{plan.data.dataset}, every image of modality {', '.join(plan.data.modalities)}"),
        ("Counted", _counted(plan)),
        ("Intensities", _intensities(plan)),
        ("Leaves once", f"counts of {state_bytes(plan):,} bytes; asked again, the site repeats its answer"),
        ("Numbers that leave", _numbers(plan)),
        (
            "Kept back",
            f"every count about fewer than {floor} patients, and as many others as it takes that none of"
            " them can be had by subtraction; everything, where that does not do; all but one case of each"
            " patient who has several, where fewer patients have",
        ),
        ("Never leaves", "images, DICOM fields, file names, case ids, error texts"),
        (
            "Not told by this",
            "whether a patient is known at another site too: patients of two sites are never compared",
        ),
        (
            "Several plans",
            "a survey and training count the same cases; a side of the division with too few patients is in"
            " neither; cells that differ from an earlier survey's are held back; a survey with another"
            " min_cases is not answered, nor is a plan, for a survey or for training, whose [data] takes"
            " slightly other cases, or divides them slightly otherwise, than one answered before it",
        ),
        (
            "Beware",
            "cases that come or go between two plans are the difference of their numbers: approve few",
        ),
    ]


def _counted(plan: ReadinessPlan) -> str:
    tables = survey_tables(plan)
    listed = "; ".join(f"{name}: {', '.join(cells)}" for name, cells in tables.items())
    return f"cases by {listed}"


def _intensities(plan: ReadinessPlan) -> str:
    part = plan.survey.intensity
    return f"pixels in {part.bins} cells from {part.low:g} to {part.high:g} ({part.units} units)"


def _numbers(plan: ReadinessPlan) -> str:
    return (
        f"cases and patients, cases in each cell, patients of each of the {len(plan.task.labels)} labels,"
        " studies in quarantine (or at most how many) and, rounded, in use, cases whose pixels occur twice,"
        " patients on two sides of the division"
    )
