"""Count a cohort's cases for the operator's screen; small numbers are hidden, so that no row is a person."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from fedward_client.cohort import Case, Cohort

SMALLEST_COUNT_SHOWN = 5
_AGE_BANDS = ((18, "0-17"), (40, "18-39"), (60, "40-59"), (80, "60-79"))


def count_cases(cohort: Cohort) -> dict[str, dict[str, str]]:
    """Count cases by split, label, modality, year, sex, age band, scanner, body part and view.

    Returns:
        group -> value -> number as text; numbers from 1 to 4 read "<5".
    """
    columns: Mapping[str, Callable[[Case], str]] = {
        "split": lambda case: case.split,
        "label": lambda case: cohort.label_names[case.label],
        "modality": lambda case: case.modality,
        "year": lambda case: str(case.study_year or "unknown"),
        "sex": lambda case: case.sex or "unknown",
        "age": lambda case: _age_band(case.age_years),
        "scanner": lambda case: case.scanner,
        "body part": lambda case: case.body_part or "unknown",
        "view": lambda case: case.view or "unknown",
    }
    return {
        group: {value: shown(count) for value, count in sorted(Counter(map(value_of, cohort.cases)).items())}
        for group, value_of in columns.items()
    }


def shown(count: int) -> str:
    """A number of cases as the screen shows it.

    >>> [shown(count) for count in (0, 1, 4, 5)]
    ['0', '<5', '<5', '5']
    """
    return f"<{SMALLEST_COUNT_SHOWN}" if 0 < count < SMALLEST_COUNT_SHOWN else str(count)


def _age_band(age_years: int | None) -> str:
    if age_years is None:
        return "unknown"
    return next((band for limit, band in _AGE_BANDS if age_years < limit), "80+")


def leftovers(cohort: Cohort) -> dict[str, str]:
    """What is there and not used, and how much of it; empty when everything is used."""
    counts = {
        "label rows whose image is in quarantine": cohort.num_rows_without_image,
        "label rows that find no image": cohort.num_rows_unmatched,
        "label rows that find too much": cohort.num_rows_ambiguous,
        "images without a label": cohort.num_unlabelled,
        "excluded cases": cohort.num_excluded,
        "studies in quarantine": cohort.num_rejected(),
        "images left out of volumes": len(cohort.left_out),
        **{f"images of another {name}": count for name, count in sorted(cohort.num_unmet.items())},
    }
    return {what: shown(count) for what, count in counts.items() if count}
