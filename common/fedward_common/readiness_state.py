"""What a site says about its cases before training: whole numbers of fixed shape that add.

Every table counts the same cases once each, so that its cells add up to `num_cases`; the last cell takes
what is unknown. Tables are never crossed. The state is what is released: a site first holds back small
cells (`fedward_client.suppression`), which then read 0, as do enough others that no one of them can be had
by subtraction. So 0 means none, or none that may be told, and every other count is at least the floor (but
for the bound of `refused`, which may be one below it).
Adding states of sites adds what was released, number for number.

Names and shapes:

    num_cases       (1,)    cases whose images could be decoded; of patients with several, one if they are few
    num_patients    (1,)    patients they belong to
    refused         (3,)    studies in quarantine; at most how many, where that is held back as well; and
                            studies in use, rounded down to a multiple of the site's floor
    label_patients  (C + 1,) patients all of whose cases have the label, and those with several labels
    torn            (2,)    patients with cases on two sides of the division, and all others
    repeated        (2,)    cases whose pixels equal those of another case, and all others
    label, split, age, sex, scanner, spacing, slice: (cells of the table,) cases
    intensity       (B + 2,) pixels, each case counting 2**20 in all: below the range, cells, above
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fedward_common.errors import PayloadError
from fedward_common.readiness_plan import ReadinessPlan

State = dict[str, NDArray[np.int64]]

CASE_WEIGHT = 2**20
"""What one case's pixels count together, so that a large image weighs as much as a small one."""

UNKNOWN = "unknown"
SEXES = ("F", "M")
SIDES = ("train", "validation", "test")


def survey_tables(plan: ReadinessPlan) -> dict[str, tuple[str, ...]]:
    """Tables of cases in the order in which they travel: name -> names of the cells."""
    survey = plan.survey
    found = {
        "label": plan.task.labels,
        "split": SIDES,
        "age": (*_bands(survey.age_edges), UNKNOWN),
        "sex": (*SEXES, "other or unknown"),
        "scanner": (*survey.scanners, "other or unknown"),
        "spacing": (*_bands(survey.spacing_edges_mm), UNKNOWN),
        "slice": (*_bands(survey.slice_edges_mm), UNKNOWN),
    }
    return {name: cells for name, cells in found.items() if len(cells) > 1}


def survey_layout(plan: ReadinessPlan) -> dict[str, tuple[int, ...]]:
    """List the arrays of a state, in the order in which they travel: name -> shape, all int64."""
    return {
        "num_cases": (1,),
        "num_patients": (1,),
        "refused": (3,),
        "label_patients": (len(plan.task.labels) + 1,),
        "torn": (2,),
        "repeated": (2,),
        **{name: (len(cells),) for name, cells in survey_tables(plan).items()},
        "intensity": (plan.survey.intensity.bins + 2,),
    }


def empty_survey(plan: ReadinessPlan) -> State:
    """Give the state that says nothing: zero everywhere, and neutral when states are added."""
    return {name: np.zeros(shape, dtype=np.int64) for name, shape in survey_layout(plan).items()}


def cell_of(value: float | None, edges: Sequence[float]) -> int:
    """Cell of a number; the last one of an unknown number.

    >>> [cell_of(value, (18.0, 40.0)) for value in (17, 18, 99, None)]
    [0, 1, 2, 3]
    """
    return len(edges) + 1 if value is None else bisect_right(edges, value)


def scanner_cell(scanner: str, scanners: Sequence[str]) -> int:
    """Cell of a scanner: the longest declared beginning of its name; the last one when there is none.

    >>> scanner_cell("GE MEDICAL SYSTEMS Definium", ("AGFA", "GE"))
    1
    """
    fits = [(len(name), cell) for cell, name in enumerate(scanners) if scanner.upper().startswith(name)]
    return max(fits)[1] if fits else len(scanners)


def check_survey(
    state: Mapping[str, NDArray[np.int64]], plan: ReadinessPlan, *, min_cases: int | None = None
) -> None:
    """Insist that a state is a release of at most the plan's number of cases that protects small cells.

    Runs at the site's door before a state leaves, and at the server before it is used. Elements are bounded
    before anything is summed, so no sum here can overflow.

    Args:
        state: what a site's survey released; a state of zeros is one that holds everything back.
        plan: its plan.
        min_cases: the floor; the plan's own when not given. A site's policy may only raise it.

    Raises:
        PayloadError: wrong names, shapes or dtype; a number that contradicts another; a count below the
            floor; or one held back alone, so that it could be had by subtraction.
    """
    floor = max(plan.privacy.min_cases, min_cases or 0)
    shapes = {name: array.shape for name, array in state.items()}
    if shapes != survey_layout(plan) or any(array.dtype != np.int64 for array in state.values()):
        raise _impossible("names, shapes or types differ from the plan's")
    num_cases, num_patients = int(state["num_cases"][0]), int(state["num_patients"][0])
    most = plan.privacy.max_cases
    for name, array in state.items():
        bound = most * CASE_WEIGHT if name == "intensity" else most
        if array.min() < 0 or array.max() > bound:
            raise _impossible(f"{name} has an element below 0 or above {bound}")
    if num_cases == 0:
        if any(array.any() for array in state.values()):
            raise _impossible("counts without a case")
        return
    if not floor <= num_patients <= num_cases:
        raise _impossible(f"{num_patients} patients of {num_cases} cases, expected {floor} or more")
    for name in survey_tables(plan):
        _check_table(name, state[name], num_cases, floor)
    _check_table("torn", state["torn"], num_patients, floor)
    _check_table("repeated", state["repeated"], num_cases, floor)
    _check_table("intensity", state["intensity"], num_cases * CASE_WEIGHT, 1)
    _check_refused(state["refused"], floor)
    _check_labels(state, num_cases, num_patients, floor)


def _check_refused(refused: NDArray[np.int64], floor: int) -> None:
    """Nothing is refused, fewer studies than some floor that is not lower, or a number that may be told."""
    told, most, num_used = (int(count) for count in refused)
    if told < floor if told else 0 < most < floor - 1:
        raise _impossible("refused is below the floor")
    if told not in (0, most) or num_used < floor:
        raise _impossible("refused contradicts itself")


def _check_labels(
    state: Mapping[str, NDArray[np.int64]], num_cases: int, num_patients: int, floor: int
) -> None:
    """Patients by label fit the cases by label, and neither tells what the other holds back."""
    _check_table("label_patients", state["label_patients"], num_patients, floor)
    only = state["label_patients"][:-1]
    if only[state["label"] == 0].any():
        raise _impossible("label_patients tells of a label that is held back")
    # Every patient with several cases adds to such a difference: a small one is about few of them.
    more = [num_cases - num_patients, *(state["label"] - only)[only > 0].tolist()]
    if min(more) < 0:
        raise _impossible("a label has more patients than cases")
    if any(0 < difference < floor for difference in more):
        raise _impossible("cases less patients tells of too few patients")


def _check_table(name: str, cells: NDArray[np.int64], total: int, floor: int) -> None:
    """Cells at the floor or above, and what is held back of the total spread over two cells or more."""
    told = cells[cells > 0]
    if told.size and told.min() < floor:
        raise _impossible(f"{name} has a count below the floor of {floor}")
    held_back = total - sum(map(int, told))
    if held_back < 0:
        raise _impossible(f"{name} adds up to more than {total}")
    if held_back and (held_back < floor or len(cells) - len(told) < 2):
        raise _impossible(f"{name} holds a count back that can be had by subtraction")


def _bands(edges: Sequence[float]) -> tuple[str, ...]:
    if not edges:
        return ()
    inner = (f"{left:g} to {right:g}" for left, right in pairwise(edges))
    return (f"below {edges[0]:g}", *inner, f"{edges[-1]:g} and more")


def _impossible(what: str) -> PayloadError:
    return PayloadError(
        f"survey: {what}", remedy="Both sides must run the same plan and the same version of fedward."
    )
