"""Go or no-go: hold what sites released against the rules that the plan declared.

Pure functions of counts. A count that a site held back is never guessed: where a rule depends on it and
cannot be shown to hold, the rule is not met, and the reason says that the count is held back. Where a bound
of the count shows that it holds, a note says so. Every site is compared with all other sites together, so
that the largest does not compare itself with itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedward_common.readiness_plan import IntensityPart, ReadinessPlan, RulesPart
from fedward_common.readiness_state import CASE_WEIGHT, State, survey_tables
from fedward_server.readiness_report import Comparison, Reason

Counts = NDArray[np.int64]

COMPARED: Mapping[str, Callable[[RulesPart], float]] = {
    "label": lambda rules: rules.max_label_distance,
    "age": lambda rules: rules.max_age_distance,
    "sex": lambda rules: rules.max_sex_distance,
    "scanner": lambda rules: rules.max_scanner_distance,
    "spacing": lambda rules: rules.max_spacing_distance,
    "slice": lambda rules: rules.max_slice_distance,
}
"""Tables in which sites are compared, and the largest distance that the rules permit."""

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

_MOST_HELD_BACK = 0.5  # with more of its cases held back, a site's table is not compared


def jensen_shannon(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Distance of two distributions, 0 (equal) to 1 (disjoint): the root of the divergence in bits.

    Args:
        first: shares, any number of cells, adding up to 1.
        second: likewise.

    Source: Endres and Schindelin 2003, "A new metric for probability distributions".

    >>> jensen_shannon(np.array([1.0, 0.0]), np.array([0.0, 1.0]))
    1.0
    """
    middle = (first + second) / 2
    total = 0.0
    for shares in (first, second):
        there = shares > 0
        total += float((shares[there] * np.log2(shares[there] / middle[there])).sum()) / 2
    return math.sqrt(min(max(total, 0.0), 1.0))


def overlap(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Common area of two histograms of shares, 0 (disjoint) to 1 (equal)."""
    return float(np.minimum(first, second).sum())


def shares_of(cells: Counts, total: int) -> NDArray[np.float64] | None:
    """Shares of the cells that are told; None when more than half of the total is held back."""
    told = int(cells.sum())
    if told == 0 or told < (1 - _MOST_HELD_BACK) * total:
        return None
    return cells / told


def quantiles_of(cells: Sequence[int], part: IntensityPart) -> tuple[float, ...] | None:
    """Quantiles of a histogram, drawn straight within each cell; None when nothing is told.

    What lies outside the range counts as lying at its end.

    >>> quantiles_of((0, 10, 10, 0), IntensityPart(bins=2))
    (0.05, 0.25, 0.5, 0.75, 0.95)
    """
    total = sum(cells)
    if total == 0:
        return None
    width = (part.high - part.low) / part.bins
    found = []
    for share in QUANTILES:
        wanted, below, value = share * total, 0.0, part.high
        for cell, count in enumerate(cells):
            if count and below + count >= wanted:
                start = part.low + (cell - 1) * width
                inside = 0 < cell <= part.bins
                value = start + width * (wanted - below) / count if inside else max(start, part.low)
                break
            below += count
        found.append(round(min(value, part.high), 6))
    return tuple(found)


def compare(states: Mapping[str, State], plan: ReadinessPlan) -> dict[str, Comparison]:
    """Compare every site with all others together; without others there is nothing to compare."""
    tables = [name for name in survey_tables(plan) if name in COMPARED]
    found = {}
    for site, state in states.items():
        others = [other for name, other in states.items() if name != site]
        if others:
            measured = {name: _measured(name, state, others, jensen_shannon) for name in tables}
            found[site] = Comparison(
                distances=measured,
                shifts=_shifts(plan, state, others, [name for name in tables if measured[name] is not None]),
                intensity_overlap=_measured("intensity", state, others, overlap),
                medians=_medians(plan, state, others),
            )
    return found


def _shifts(
    plan: ReadinessPlan, state: State, others: list[State], tables: Sequence[str]
) -> dict[str, tuple[str, float, float]]:
    """The cell of each table whose share differs most, with its two shares."""
    found = {}
    for name in tables:
        here = state[name] / max(1, int(state[name].sum()))
        there = _sum(name, others) / max(1, int(_sum(name, others).sum()))
        cell = int(np.abs(here - there).argmax())
        found[name] = (
            survey_tables(plan)[name][cell],
            round(float(here[cell]), 4),
            round(float(there[cell]), 4),
        )
    return found


def _medians(plan: ReadinessPlan, state: State, others: list[State]) -> tuple[float, float] | None:
    part = plan.survey.intensity
    here = quantiles_of(state["intensity"].tolist(), part)
    there = quantiles_of(_sum("intensity", others).tolist(), part)
    return None if here is None or there is None else (here[2], there[2])


def _sum(table: str, states: list[State]) -> Counts:
    return sum((each[table] for each in states), np.zeros_like(states[0][table]))


def _measured(
    table: str,
    state: State,
    others: list[State],
    measure: Callable[[NDArray[np.float64], NDArray[np.float64]], float],
) -> float | None:
    total = _total(table, state)
    here = shares_of(state[table], total)
    there = shares_of(
        _sum(table, others),
        sum(_total(table, other) for other in others),
    )
    return None if here is None or there is None else round(measure(here, there), 4)


def _total(table: str, state: State) -> int:
    return int(state["num_cases"][0]) * (CASE_WEIGHT if table == "intensity" else 1)


_IF_HELD_BACK = (
    "Use fewer, wider cells in a new plan; if an earlier survey told this table, use its cells. Where the"
    " table does not matter, rules.{} = {} asks for nothing."
)
_REMEDIES: Mapping[str, str] = {
    "min_cases": "Add cases",
    "min_patients": "Add patients",
    "min_cases_per_label": "Add cases of the label",
    "min_patients_per_label": "Add patients with the label",
    "min_label_share": "Add cases of the rare label",
    "max_repeated_share": "Exclude copies: the site finds their case ids in HOME/surveys/findings.json",
    "max_refused_share": "See why at the site, fedward-site cohort quarantine",
    "max_torn_patients": "Give each patient one side in the site's label file (case ids are in"
    " HOME/surveys/findings.json there): training refuses such cases whatever the plan's rules say.",
    "max_label_distance": "Balance the labels",
    "max_age_distance": "See whether ages are missing or the patients are others",
    "max_sex_distance": "See whether sex is missing or the patients are others",
    "max_scanner_distance": "Add images of other scanners",
    "max_spacing_distance": "Have the plan resample, or select images by spacing",
    "max_slice_distance": "Have the plan resample, or select series by slice distance",
    "min_intensity_overlap": "Look at windows and units there, fedward-site cohort contact-sheet",
}


def remedy_of(rule: str) -> str:
    """What the site can do about a rule that is not met, or else the coordinator.

    >>> remedy_of("min_cases")
    'Add cases; or lower rules.min_cases in a new plan.'
    """
    if _REMEDIES[rule].endswith("."):
        return _REMEDIES[rule]
    change = "raise" if rule.startswith("max_") else "lower"
    return f"{_REMEDIES[rule]}; or {change} rules.{rule} in a new plan."


def _laxest(rule: str) -> str:
    return "1.0" if rule.startswith("max_") else "0.0"


@dataclass(frozen=True)
class _Site:
    """One site under judgement; `fail` and `note` make reasons about it."""

    name: str
    state: State
    plan: ReadinessPlan

    @property
    def num_cases(self) -> int:
        return int(self.state["num_cases"][0])

    @property
    def num_patients(self) -> int:
        return int(self.state["num_patients"][0])

    def fail(self, rule: str, text: str) -> Reason:
        return Reason(level="stop", site=self.name, rule=rule, text=text, remedy=remedy_of(rule))

    def note(self, rule: str, text: str) -> Reason:
        return Reason(level="note", site=self.name, rule=rule, text=text)

    def open(self, rule: str, text: str) -> Reason:
        """A rule that cannot be shown to hold, because a table is held back."""
        change = remedy_of(rule) if "label" in rule else _IF_HELD_BACK.format(rule, _laxest(rule))
        return Reason(level="stop", site=self.name, rule=rule, text=text, remedy=change)


def judge_site(
    name: str, state: State | None, plan: ReadinessPlan, comparison: Comparison | None
) -> list[Reason]:
    """Every rule that a site is not shown to meet ("stop"), and what is held back without harm ("note")."""
    if state is None:
        floor = plan.privacy.min_cases
        text = f"everything is held back: the site has too few patients ({2 * floor - 1} are needed, or more"
        text += " if its own floor is higher)"
        rule = "min_patients"
        return [Reason(level="stop", site=name, rule=rule, text=text, remedy="Add patients at the site.")]
    site = _Site(name, state, plan)
    reasons = [*_sizes(site), *_labels(site), *_balance(site), *_defects(site)]
    return reasons + (_comparisons(site, comparison) if comparison is not None else [])


def _sizes(site: _Site) -> list[Reason]:
    rules = site.plan.rules
    found = (
        ("min_cases", site.num_cases, rules.min_cases, "cases"),
        ("min_patients", site.num_patients, rules.min_patients, "patients"),
    )
    return [
        site.fail(rule, f"{count:,} {noun}, {least:,} required")
        for rule, count, least, noun in found
        if count < least
    ]


def _labels(site: _Site) -> list[Reason]:
    rules, reasons = site.plan.rules, list[Reason]()
    cases = site.state["label"]
    is_certain = int(site.state["label_patients"].sum()) == site.num_patients
    doubt = "" if is_certain else " for certain (others are held back)"
    patients = [_least_patients(site, label) for label in range(len(cases))]
    is_told = int(cases.sum()) == site.num_cases
    hidden = [label for label, count in zip(site.plan.task.labels, cases, strict=True) if not count]
    if hidden and not is_told and (rules.min_cases_per_label or rules.min_patients_per_label):
        text = f"cases of {' and '.join(hidden)} are held back: at least one label has too few patients here"
        text += f" (fewer than {site.plan.privacy.min_cases} in training, or the site's own floor)"
        reasons.append(site.fail("min_cases_per_label", text))
    for index, label in enumerate(site.plan.task.labels):
        least = (
            (f"cases of {label}", cases[index], rules.min_cases_per_label, "min_cases_per_label"),
            (
                f"patients of {label}{doubt}",
                patients[index],
                rules.min_patients_per_label,
                "min_patients_per_label",
            ),
        )
        if cases[index] == 0 and not is_told:
            continue
        reasons += [
            site.fail(rule, f"{int(count):,} {noun}, {bound:,} required")
            for noun, count, bound, rule in least
            if count < bound
        ]
    return reasons


def _least_patients(site: _Site, label: int) -> int:
    """Patients who have at least one case of the label, as many as can be told."""
    *only, several = (int(count) for count in site.state["label_patients"])
    # No count of cases is about fewer than the floor.
    known = max(only[label], site.plan.privacy.min_cases if site.state["label"][label] else 0)
    if len(only) > 2:
        return known  # those with several labels may have others
    other = only[1 - label]
    not_the_other = site.num_patients - other if other else 0
    return max(known, only[label] + several, not_the_other)


def _balance(site: _Site) -> list[Reason]:
    rules = site.plan.rules
    cases, least = site.state["label"], rules.min_label_share
    if int(cases.sum()) < site.num_cases:
        if not least or rules.min_cases_per_label or rules.min_patients_per_label:
            return []  # nothing is asked, or it is said already, label by label
        return [site.fail("min_label_share", "cases of the rarest label are held back")]
    rarest = int(cases.argmin())
    share = int(cases[rarest]) / site.num_cases
    if share >= least:
        return []
    label = site.plan.task.labels[rarest]
    return [site.fail("min_label_share", f"{share:.1%} of cases are {label}, {least:.1%} required")]


def _defects(site: _Site) -> list[Reason]:
    rules, state, reasons = site.plan.rules, site.state, []
    torn, repeated = int(state["torn"][0]), int(state["repeated"][0])
    # Of two numbers that are held back either may be the small one, and the site's floor is not known here.
    if not state["torn"].any():
        if rules.max_torn_patients < site.num_patients:
            text = "some patients are on two sides of the division (how many is held back)"
            reasons.append(site.fail("max_torn_patients", text))
    elif torn > rules.max_torn_patients:
        text = f"{torn:,} patients are on two sides of the division, {rules.max_torn_patients:,} permitted"
        reasons.append(site.fail("max_torn_patients", text))
    if not state["repeated"].any():
        if rules.max_repeated_share < 1:
            text = "some cases have the same pixels (how many is held back)"
            reasons.append(site.fail("max_repeated_share", text))
    elif repeated > rules.max_repeated_share * site.num_cases:
        text = f"{repeated:,} of {site.num_cases:,} cases have the pixels of another one"
        reasons.append(site.fail("max_repeated_share", f"{text}, {rules.max_repeated_share:.1%} permitted"))
    return [*reasons, *_quarantine(site)]


def _quarantine(site: _Site) -> list[Reason]:
    """The share in quarantine, by what is told of the number: itself, or that it is below some bound."""
    told, most, num_used = (int(count) for count in site.state["refused"])
    permitted = site.plan.rules.max_refused_share
    share = most / (most + num_used) if most else 0.0
    if told:
        text = f"{told:,} studies are in quarantine, {share:.1%} of all"
        return [site.fail("max_refused_share", f"{text}; {permitted:.1%} permitted")] * (share > permitted)
    text = f"fewer than {most + 1:,} studies are in quarantine (how many is held back), "
    text += f"at most {share:.1%} of all"
    if share > permitted:
        return [site.fail("max_refused_share", f"{text}; {permitted:.1%} permitted")]
    return [site.note("max_refused_share", f"{text}; {permitted:.1%} permitted")] if most else []


def _comparisons(site: _Site, comparison: Comparison) -> list[Reason]:
    rules, reasons = site.plan.rules, []
    for table, distance in comparison.distances.items():
        most = COMPARED[table](rules)
        rule = f"max_{table}_distance"
        if distance is None and most < 1:
            where = _where_held_back(site, table)
            reasons.append(site.open(rule, f"{table} cannot be compared: too much is held back {where}"))
        elif distance is not None and distance > most:
            text = f"{table} differs from all other sites by {distance:.2f}, {most:.2f} permitted"
            if table in comparison.shifts:
                cell, here, there = comparison.shifts[table]
                text += f": {cell} {here:.0%} here, {there:.0%} elsewhere"
            reasons.append(site.fail(rule, text))
    least, common = rules.min_intensity_overlap, comparison.intensity_overlap
    if common is None and least > 0:
        text = "intensities cannot be compared: too much is held back"
        text += f" {_where_held_back(site, 'intensity')}"
        reasons.append(site.open("min_intensity_overlap", text))
    elif common is not None and common < least:
        text = f"intensities overlap with all other sites by {common:.2f}, {least:.2f} required"
        if comparison.medians is not None:
            text += ": median {:.4g} here, {:.4g} elsewhere".format(*comparison.medians)
        reasons.append(site.fail("min_intensity_overlap", text))
    return reasons


def _where_held_back(site: _Site, table: str) -> str:
    is_here = shares_of(site.state[table], _total(table, site.state)) is None
    return "here" if is_here else "at the other sites"
