"""What the report says first, in words; and how it writes numbers.

The verdict must be understood in five seconds by somebody who has not read the plan. It claims no more
than the counts carry: a difference between two models within the error bound of AUROC is no difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from fedward_common.evaluation.report.document import RunReport
from fedward_common.evaluation.summary import MetricSummary

MISSING = "–"
Tone = Literal["good", "warn", "bad", "busy"]


@dataclass(frozen=True)
class Headline:
    """Result first: a tone (colour and sign), a title, and a few sentences."""

    tone: Tone
    title: str
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class Figure:
    """One large number: name, value, and what it means."""

    name: str
    value: str
    meaning: str


@dataclass(frozen=True)
class AbsenceRow:
    """A site, the rounds it missed for one reason, and the reason."""

    site: str
    rounds: str
    status: str
    reason: str


def headline(report: RunReport) -> Headline:
    """Say how the run ended and what it found."""
    done, planned = len(report.trained_rounds), report.plan.rounds
    rounds = f"{done} of {planned} rounds" if planned > 1 else f"{done} of 1 round"
    if report.verdict == "completed":
        found = (*_result_sentences(report), _participation_sentence(report, rounds))
        if report.without_gaps:
            return Headline("good", "Completed", found)
        return Headline("warn", "Completed, but not every site took part throughout", found)
    why = (report.reason,) if report.reason else ()
    missing = tuple(f"Missing: {absent.site} – {absent.reason}." for absent in report.absent)
    if report.verdict in ("waiting", "running"):
        return Headline("busy", "Still running", (f"{rounds} done so far.", *missing))
    title = {"failed": "Failed", "stopped": "Stopped", "interrupted": "Interrupted"}[report.verdict]
    return Headline("bad", f"{title}: no result", (*why, f"{rounds} were completed.", *missing))


def headline_figures(report: RunReport) -> tuple[str, tuple[Figure, ...]]:
    """Give a caption and up to four large numbers: of the test, else of the last validation."""
    if report.test is not None:
        told = sum(1 for each in report.test_sites.values() if each is not None)
        everyone = _count(len(report.sites), "site")
        sites = everyone if told == len(report.sites) else f"{told} of {everyone}"
        caption = f"The federated model on {_count(report.test.num_cases, 'test case')} from {sites}"
        return caption, _figures(report.test, report)
    measured = [each for each in report.rounds if each.validation is not None]
    if not measured:
        return "", ()
    last = measured[-1]
    caption = f"Validation after round {last.round_index}: progress, not a result"
    return caption, _figures(last.validation, report)


def comparison(report: RunReport) -> tuple[float, str] | None:
    """Compare the federated model with the sites' own: mean difference of AUROC, and where it is higher.

    None when no site has both figures.
    """
    pairs = [auroc_difference(report, site) for site in report.sites]
    differences = [pair for pair in pairs if pair is not None]
    if not differences:
        return None
    higher = sum(1 for change, bound in differences if change > bound)
    lower = sum(1 for change, bound in differences if change < -bound)
    equal = len(differences) - higher - lower
    average = sum(change for change, _ in differences) / len(differences)
    parts = [f"higher AUROC at {higher} of {_count(len(differences), 'site')}"]
    parts += [f"lower at {lower}"] if lower else []
    parts += [f"equal within the error bound at {equal}"] if equal else []
    return average, ", ".join(parts)


def auroc_difference(report: RunReport, site: str) -> tuple[float, float] | None:
    """AUROC of the federated minus the site's own model on its test cases, and the error bound of that."""
    ours, own = report.test_sites.get(site), report.local_sites.get(site)
    if ours is None or own is None or ours.auroc is None or own.auroc is None:
        return None
    return ours.auroc - own.auroc, (ours.auroc_error_bound or 0) + (own.auroc_error_bound or 0)


def absence_rows(report: RunReport) -> list[AbsenceRow]:
    """List who missed which rounds and why, one row a site and reason, in the order of sites.

    A site that was missing when the run ended is listed once more only if no round says so already.
    """
    missed: dict[tuple[str, str, str], list[int]] = {}
    for each in report.rounds:
        for site in each.sites:
            if site.status != "contributed":
                missed.setdefault((site.site, site.status, site.reason), []).append(each.round_index)
    order = {name: place for place, name in enumerate(report.sites)}
    ranked = sorted(missed.items(), key=lambda item: (order.get(item[0][0], len(order)), item[1]))
    rows = [
        AbsenceRow(site=site, rounds=ranges(rounds), status=status, reason=reason)
        for (site, status, reason), rounds in ranked
    ]
    told = {(row.site, row.reason) for row in rows}
    when = "at the end" if report.rounds else "at the start"
    rows += [
        AbsenceRow(site=absent.site, rounds=when, status="missing", reason=absent.reason)
        for absent in report.absent
        if (absent.site, absent.reason) not in told
    ]
    return rows


def ranges(numbers: Iterable[int]) -> str:
    """Write rounds briefly.

    >>> ranges([3, 1, 2, 7])
    '1–3, 7'
    """
    spans: list[list[int]] = []
    for number in sorted(set(numbers)):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first}–{last}" for first, last in spans)


def share(value: float | None, decimals: int = 3) -> str:
    """Write a figure between 0 and 1, or a dash for one that is not defined."""
    return MISSING if value is None else f"{value:.{decimals}f}"


def percent(value: float | None) -> str:
    """Write a share as per cent, or a dash."""
    return MISSING if value is None else f"{100 * value:.1f} %"


def error_bound(value: float | None) -> str:
    """Write the error bound of AUROC, rounded up: it is a promise."""
    if value is None:
        return MISSING
    return "exact" if value == 0 else f"± {math.ceil(value * 10_000) / 10_000:.4f}"


def duration(seconds: float) -> str:
    """Write a duration.

    >>> duration(4.24), duration(75), duration(7500)
    ('4.2 s', '1 min 15 s', '2 h 5 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size(num_bytes: int) -> str:
    """Write a number of bytes in decimal units."""
    amount = float(num_bytes)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"


def moment(at: datetime | None) -> str:
    """Write a time to the minute, in its own zone."""
    return MISSING if at is None else f"{at:%Y-%m-%d %H:%M %Z}"


def _result_sentences(report: RunReport) -> tuple[str, ...]:
    if report.test is None:
        return ("No test cases were measured.",)
    test, labels = report.test, report.plan.task.labels
    compared = comparison(report)
    if len(labels) > 2:
        right = sum(row[index] for index, row in enumerate(test.confusion))
        found = f"The model named the right label for {right:,} of {test.num_cases:,} test cases."
    else:
        positive = report.plan.task.positive_index
        found_positive, positives = test.confusion[positive][positive], sum(test.confusion[positive])
        cleared, negatives = test.confusion[1 - positive][1 - positive], sum(test.confusion[1 - positive])
        found = (
            f"The model found {found_positive:,} of {positives:,} {labels[positive]} cases "
            f"and recognised {cleared:,} of {negatives:,} {labels[1 - positive]} cases."
        )
    if compared is None:
        return (found,)
    average, where = compared
    return found, f"Against the model each site trained alone: {where} ({average:+.3f} on average)."


def _participation_sentence(report: RunReport, rounds: str) -> str:
    if report.without_gaps:
        everyone = _count(len(report.sites), "site")
        return f"{rounds}; {'all ' if len(report.sites) > 1 else ''}{everyone} contributed to every round."
    gaps = sorted({row.site for row in absence_rows(report)} | {absent.site for absent in report.absent})
    shown = ", ".join(gaps[:4]) + (f" and {len(gaps) - 4} more" if len(gaps) > 4 else "")
    return f"{rounds}; not in every round: {shown} (reasons below)." if gaps else f"{rounds}."


def _figures(summary: MetricSummary | None, report: RunReport) -> tuple[Figure, ...]:
    if summary is None:
        return ()
    bound = error_bound(summary.auroc_error_bound)
    macro = ", mean over labels" if len(summary.labels) > 1 else ""
    area = Figure("AUROC", share(summary.auroc), f"{bound}; 0.5 is chance, 1 is perfect{macro}")
    if summary.auroc is None:
        area = Figure("AUROC", MISSING, "not defined: needs cases with and without the finding")
    right = sum(row[index] for index, row in enumerate(summary.confusion))
    accuracy = Figure(
        "Accuracy", percent(summary.accuracy), f"{right:,} of {summary.num_cases:,} cases right"
    )
    if len(summary.labels) > 1:
        balanced = percent(summary.balanced_accuracy)
        return (area, accuracy, Figure("Balanced accuracy", balanced, "mean sensitivity over labels"))
    positive = report.plan.task.positive_index
    names = report.plan.task.labels
    sick, well = summary.confusion[positive], summary.confusion[1 - positive]
    return (
        area,
        Figure(
            "Sensitivity", percent(summary.recall), _of(sick[positive], sum(sick), names[positive], "found")
        ),
        Figure(
            "Specificity",
            percent(summary.specificity),
            _of(well[1 - positive], sum(well), names[1 - positive], "recognised"),
        ),
        accuracy,
    )


def _of(part: int, whole: int, label: str, verb: str) -> str:
    return f"{part:,} of {whole:,} {label} {verb}" if whole else f"no {label} cases"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
