"""Rows of the report's tables, as text with the number that sorts them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedward_common.evaluation.report.document import RunReport, SiteRound
from fedward_common.evaluation.report.words import (
    MISSING,
    auroc_difference,
    duration,
    error_bound,
    percent,
    share,
    size,
)
from fedward_common.evaluation.summary import LabelSummary, MetricSummary
from fedward_common.plan import TrainingPlan

_MAX_COLUMNS = 100


@dataclass(frozen=True)
class Cell:
    """One cell: what it shows, what it sorts by (None sorts last), a class, and a tooltip."""

    text: str
    key: float | str | None = None
    style: str = ""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the first column names the row. `total` is a row that sorting leaves in place."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    total: tuple[Cell, ...] = ()


@dataclass(frozen=True)
class Participation:
    """Who took part in which round: one row a site, one column a round shown, and rounds left out."""

    rounds: tuple[int, ...]
    rows: tuple[tuple[str, str, tuple[Cell, ...]], ...]
    num_hidden: int


def results_table(report: RunReport) -> Table:
    """Test metrics of the federated model, a row a site and a total."""
    columns = ("Site", "Cases", "AUROC", "Error bound", "Sensitivity", "Specificity", "Precision", "F1")
    rows = [
        _metric_row(site, report.test_sites[site], report.plan)
        for site in report.sites
        if site in report.test_sites
    ]
    total = _metric_row("All sites", report.test, report.plan) if report.test else ()
    return Table((*columns, "Accuracy", "Log loss"), tuple(rows), total)


def labels_table(report: RunReport) -> Table | None:
    """Test metrics of each label against the rest; None with two labels."""
    if report.test is None or len(report.test.labels) < 2:
        return None
    columns = ("Label", "Cases", "AUROC", "Error bound", "Sensitivity", "Specificity", "Precision", "F1")
    return Table(columns, tuple(_label_row(label) for label in report.test.labels))


def comparison_table(report: RunReport) -> Table | None:
    """Each site's own model beside the federated one, on the site's test cases; None without any."""
    columns = (
        "Site",
        "Cases",
        "Own AUROC",
        "Federated",
        "Difference",
        "Own sens.",
        "Fed. sens.",
        "Own spec.",
    )
    rows = []
    for site in report.sites:
        own, ours = report.local_sites.get(site), report.test_sites.get(site)
        if own is None and ours is None:
            continue
        cells = [Cell(site, site), _count(ours or own)]
        for name in ("auroc", "recall", "specificity"):
            pair = [None if each is None else getattr(each, name) for each in (own, ours)]
            cells += [_figure(pair[0], name), _figure(pair[1], name)]
            if name == "auroc":
                cells.append(_difference(report, site))
        rows.append(tuple(cells))
    return Table((*columns, "Fed. spec."), tuple(rows)) if report.local_sites and rows else None


def rounds_table(report: RunReport) -> Table:
    """One row a round: who, how many cases, losses, seconds, bytes, and the model's digest."""
    columns = (
        "Round",
        "Sites",
        "Cases",
        "Training loss",
        "AUROC",
        "Log loss",
        "Time",
        "Received",
        "Sent",
        "Model",
    )
    rows = []
    for each in report.rounds:
        given, measured = each.contributors, each.validation
        up, down = sum(site.bytes_up for site in each.sites), sum(site.bytes_down for site in each.sites)
        mark = " (selected)" if each.round_index == report.selected_round else ""
        cases = sum(site.num_cases for site in given)
        rows.append(
            (
                Cell(
                    f"{each.round_index}{mark or ('' if each.committed else ' (not committed)')}",
                    each.round_index,
                ),
                Cell(f"{len(given)} of {len(each.sites)}" if each.sites else MISSING, len(given)),
                Cell(f"{cases:,}", cases),
                _loss(each.training_loss),
                _figure(measured.auroc if measured else None, "auroc"),
                _loss(measured.log_loss if measured else None),
                Cell(duration(each.seconds), each.seconds),
                Cell(size(up), up),
                Cell(size(down), down),
                Cell(each.weights_digest[:12] or MISSING, None, "code", each.weights_digest),
            )
        )
    return Table(columns, tuple(rows))


def participation(report: RunReport) -> Participation:
    """Build the matrix of sites and rounds; of a long run, rounds with absences come first."""
    trained = [each for each in report.rounds if each.sites]
    incomplete = [each for each in trained if any(site.status != "contributed" for site in each.sites)]
    chosen = trained if len(trained) <= _MAX_COLUMNS else incomplete[:_MAX_COLUMNS]
    rows = []
    for name in report.sites:
        answers = [next((site for site in each.sites if site.site == name), None) for each in trained]
        given = sum(1 for answer in answers if answer is not None and answer.status == "contributed")
        shown = {each.round_index: answer for each, answer in zip(trained, answers, strict=True)}
        cells = tuple(_presence(each.round_index, shown[each.round_index]) for each in chosen)
        rows.append((name, f"{given} of {len(trained)}", cells))
    numbers = tuple(each.round_index for each in chosen)
    return Participation(numbers, tuple(rows), len(trained) - len(chosen))


def confusion_rows(summary: MetricSummary, labels: Sequence[str]) -> list[tuple[str, tuple[Cell, ...]]]:
    """Rows of the confusion matrix, shaded by the share of the row's cases."""
    rows = []
    for index, (label, counts) in enumerate(zip(labels, summary.confusion, strict=True)):
        whole = sum(counts)
        cells = []
        for column, count in enumerate(counts):
            part = count / whole if whole else None
            level = 0 if part is None else round(part * 5)
            kind = "right" if column == index else "wrong"
            cells.append(Cell(f"{count:,}", count, f"{kind} level{level}", percent(part)))
        rows.append((label, tuple(cells)))
    return rows


def held_back(report: RunReport) -> list[str]:
    """Sites whose test counts were not released."""
    return [site for site in report.sites if site in report.test_sites and report.test_sites[site] is None]


def _metric_row(name: str, summary: MetricSummary | None, plan: TrainingPlan) -> tuple[Cell, ...]:
    if summary is None:
        note = f"held back: fewer than {plan.privacy.min_cases} cases of a kind"
        return (Cell(name, name, note=note), *(Cell(MISSING, note=note) for _ in range(9)))
    return (
        Cell(name, name),
        *_common_cells(summary),
        Cell(percent(summary.accuracy), summary.accuracy),
        _loss(summary.log_loss),
    )


def _label_row(label: LabelSummary) -> tuple[Cell, ...]:
    rest = _common_cells(label)[1:]
    return (Cell(label.label, label.label), Cell(f"{label.num_positives:,}", label.num_positives), *rest)


def _common_cells(figures: MetricSummary | LabelSummary) -> tuple[Cell, ...]:
    return (
        Cell(f"{figures.num_cases:,}", figures.num_cases),
        _figure(figures.auroc, "auroc"),
        Cell(error_bound(figures.auroc_error_bound), figures.auroc_error_bound),
        *(_figure(getattr(figures, name), name) for name in ("recall", "specificity", "precision")),
        _figure(figures.f1, "f1"),
    )


def _figure(value: float | None, name: str) -> Cell:
    note = "not defined for these cases" if value is None else ""
    return Cell(share(value) if name in ("auroc", "f1") else percent(value), value, note=note)


def _loss(value: float | None) -> Cell:
    return Cell(MISSING if value is None else f"{value:.4f}", value)


def _count(summary: MetricSummary | None) -> Cell:
    return Cell(MISSING) if summary is None else Cell(f"{summary.num_cases:,}", summary.num_cases)


def _difference(report: RunReport, site: str) -> Cell:
    difference = auroc_difference(report, site)
    if difference is None:
        return Cell(MISSING, note="not defined for these cases")
    change, bound = difference
    style = "" if abs(change) <= bound else "up" if change > 0 else "down"
    digits = 4 if style and abs(change) < 5e-4 else 3  # a difference that is called one must not read as 0
    return Cell(f"{round(change, digits) + 0.0:+.{digits}f}", change, style)


def _presence(round_index: int, answer: SiteRound | None) -> Cell:
    if answer is None:
        return Cell("·", style="none", note=f"round {round_index}: not asked")
    if answer.status == "contributed":
        did = f"{answer.num_cases:,} cases, {duration(answer.seconds)}"
        return Cell("●", style="contributed", note=f"round {round_index}: {did}")
    sign = {"refused": "✕", "missing": "○"}[answer.status]
    return Cell(sign, style=answer.status, note=f"round {round_index}: {answer.reason}")
