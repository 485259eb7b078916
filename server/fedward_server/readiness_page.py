"""A survey's result as one page: go or no-go first, the reasons by site, then the counts behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedward_common.evaluation.report import charts
from fedward_common.evaluation.report.rendering import plan_sections, render_page
from fedward_common.evaluation.report.tables import Cell, Table
from fedward_common.evaluation.report.words import MISSING, Figure, Headline
from fedward_common.readiness_plan import IntensityPart, ReadinessPlan
from fedward_common.readiness_state import CASE_WEIGHT
from fedward_server.readiness_report import ReadinessReport, Reason, SiteReadiness
from fedward_server.readiness_rules import QUANTILES, quantiles_of

Counts = Mapping[str, tuple[int, ...]]

_HERE = Path(__file__).resolve().parent
_PAIRS = ("repeated", "torn")
_TITLES = {
    "label": "Labels",
    "split": "Sides of the division",
    "age": "Age in years",
    "sex": "Sex",
    "scanner": "Manufacturer of the scanner",
    "spacing": "Distance of pixels in mm",
    "slice": "Distance of slices in mm",
}


def render_readiness(report: ReadinessReport) -> str:
    """Render the report as one self-contained HTML page, every text escaped."""
    count = len(report.sites)
    lines = [charts.line_style(index, count) for index in range(count)]
    return render_page(
        "readiness.html.j2",
        _HERE,
        report=report,
        plan=report.plan,
        headline=headline(report),
        figures=_figures(report),
        reasons=_reasons(report),
        overview=_overview(report),
        tables=[(_TITLES[name], _shares(report, name)) for name in report.tables],
        comparison=_comparison(report),
        quantiles=_quantiles(report),
        intensity=_intensity_chart(report, lines),
        legend=_legend(report.sites, lines),
        sample=charts.sample,
        plan_sections=plan_sections(report.plan),
    )


def headline(report: ReadinessReport) -> Headline:
    """Say whether training may begin, and what stands against it."""
    if report.verdict in ("waiting", "running"):
        return Headline("busy", "The sites are being asked", ("There is no decision yet.",))
    if report.verdict != "completed":
        why = (report.reason,) if report.reason else ()
        return Headline("bad", "No-go: the survey has no result", why)
    asked = f"{_count(len(report.sites), 'site')} answered"
    asked += f", {len(report.absent)} did not" if report.absent else ""
    if report.decision == "go":
        return Headline("good", "Go", (f"{asked}. Every rule of the plan is met at every one of them.",))
    sites = {reason.site for reason in report.stops}
    unmet = f"{_count(len(report.stops), 'rule')} not met at {_count(len(sites), 'site')}"
    return Headline("bad", "No-go", (f"{asked}. {unmet}; the reasons are below.",))


def _figures(report: ReadinessReport) -> tuple[Figure, ...]:
    if not report.sites:
        return ()
    ready = sum(1 for site in report.sites if site.decision == "go")
    counts = report.counts
    held_back = sum(1 for site in report.sites if site.counts is None)
    note = f"; {held_back} hold{'s' if held_back == 1 else ''} everything back" if held_back else ""
    return (
        Figure("Sites", f"{ready} of {len(report.sites)}", f"meet every rule{note}"),
        Figure("Cases", _told(counts["num_cases"][0]), "whose images can be used"),
        Figure("Patients", _told(counts["num_patients"][0]), "counted at each site by itself"),
        Figure("In quarantine", _refused_cell(counts).text, "studies whose images cannot be used"),
    )


def _reasons(report: ReadinessReport) -> list[tuple[str, str, str, list[tuple[str, Reason]]]]:
    """For each site its name, decision, style and reasons with their style, sites with stops first."""
    ranked = sorted(report.sites, key=lambda site: (site.decision == "go", site.site))
    return [
        (
            site.site,
            site.decision,
            "contributed" if site.decision == "go" else "refused",
            [
                ("refused" if each.level == "stop" else "missing", each)
                for each in sorted(site.reasons, key=lambda each: each.level, reverse=True)
            ],
        )
        for site in ranked
    ]


def _overview(report: ReadinessReport) -> Table:
    columns = ("Site", "Decision", "Cases", "Patients", "Quarantine", "Same pixels", "On two sides")
    rows = tuple(
        (Cell(site.site, site.site), Cell(site.decision, site.decision), *_overview_cells(site.counts))
        for site in report.sites
    )
    is_whole = {name: all(any(site.counts[name]) for site in report.sites if site.counts) for name in _PAIRS}
    total = (Cell("All sites"), Cell(report.decision), *_overview_cells(report.counts, is_whole))
    return Table(columns, rows, total if len(rows) > 1 else ())


def _overview_cells(counts: Counts | None, is_whole: Mapping[str, bool] | None = None) -> tuple[Cell, ...]:
    """Cells of one site, or of all; `is_whole` is False for what some of the sites hold back."""
    if counts is None or not counts["num_cases"][0]:
        return (Cell(MISSING, note="held back"),) * 5
    sizes = (counts[name][0] for name in ("num_cases", "num_patients"))
    return (
        *(Cell(_told(size), size) for size in sizes),
        _refused_cell(counts),
        *(_pair_cell(counts[name], (is_whole or {}).get(name, True)) for name in _PAIRS),
    )


def _refused_cell(counts: Counts) -> Cell:
    """Studies in quarantine, or between what two numbers they are."""
    told, most, _ = counts["refused"]
    if told == most:
        return Cell(f"{told:,}", told)
    return Cell(f"{told:,} to {most:,}" if told else f"fewer than {most + 1:,}", told)


def _pair_cell(told: Sequence[int], is_whole: bool) -> Cell:
    if not any(told) or not (is_whole or told[0]):
        return Cell("held back")
    return Cell(f"{told[0]:,}", told[0]) if is_whole else Cell(f"{told[0]:,} or more", told[0])


def _shares(report: ReadinessReport, table: str) -> Table:
    """Cases by site and cell, with the share of the site's cases."""
    names, shown = report.tables[table], _cells_shown(report, table)
    rows = tuple(
        (Cell(site.site, site.site), *_share_cells(site.counts, table, shown)) for site in report.sites
    )
    total = (Cell("All sites"), *_share_cells(report.counts, table, shown))
    columns = ("Site", *(names[cell] for cell in shown), "Held back")
    return Table(columns, rows, total if len(rows) > 1 else ())


def _cells_shown(report: ReadinessReport, table: str) -> list[int]:
    """Every label and side; of the other tables, the cells that some site has told."""
    told = report.counts[table]
    return [cell for cell in range(len(told)) if told[cell] or table in ("label", "split")]


def _share_cells(counts: Counts | None, table: str, shown: Sequence[int]) -> tuple[Cell, ...]:
    if counts is None or not counts["num_cases"][0]:
        return (Cell(MISSING, note="held back"),) * (len(shown) + 1)
    total = counts["num_cases"][0]
    held_back = total - sum(counts[table])
    nothing = Cell(MISSING, 0, note="held back, or none" if held_back else "none")
    told = [counts[table][cell] for cell in shown]
    cells = [Cell(f"{count:,} · {count / total:.0%}", count) if count else nothing for count in told]
    return (*cells, Cell(f"{held_back:,}" if held_back else MISSING, held_back))


def _comparison(report: ReadinessReport) -> Table | None:
    """Distances to all other sites, with those beyond the plan's bound marked."""
    compared = [site for site in report.sites if site.comparison is not None]
    if not compared:
        return None
    names = [name for name in report.tables if name in (compared[0].comparison or _none()).distances]
    rows = tuple(_comparison_row(site, names) for site in compared)
    return Table(("Site", *(_TITLES[name] for name in names), "Intensity overlap"), rows)


def _comparison_row(site: SiteReadiness, names: Sequence[str]) -> tuple[Cell, ...]:
    comparison = site.comparison or _none()
    failed = {reason.rule for reason in site.reasons if reason.level == "stop"}
    values = [(f"max_{name}_distance", comparison.distances[name]) for name in names]
    values.append(("min_intensity_overlap", comparison.intensity_overlap))
    cells = (
        Cell(MISSING, note="too much is held back")
        if value is None
        else Cell(f"{value:.2f}", value, "down" if rule in failed else "")
        for rule, value in values
    )
    return (Cell(site.site, site.site), *cells)


def _none() -> Any:
    from fedward_server.readiness_report import Comparison

    return Comparison()


def _quantiles(report: ReadinessReport) -> Table:
    part = report.plan.survey.intensity
    rows = tuple(_quantile_row(site.site, site.counts, part) for site in report.sites)
    total = _quantile_row("All sites", report.counts, part) if len(rows) > 1 else ()
    return Table(("Site", *(f"{share:.0%}" for share in QUANTILES), "Held back"), rows, total)


def _quantile_row(name: str, counts: Counts | None, part: IntensityPart) -> tuple[Cell, ...]:
    found = None if counts is None else quantiles_of(counts["intensity"], part)
    if counts is None or found is None:
        return (Cell(name, name), *(Cell(MISSING, note="held back"),) * (len(QUANTILES) + 1))
    total = counts["num_cases"][0] * CASE_WEIGHT
    share = (total - sum(counts["intensity"])) / total
    held_back = Cell(MISSING if share == 0 else f"{share:.1%}", share)
    return (Cell(name, name), *(Cell(f"{value:.4g}", value) for value in found), held_back)


def _intensity_chart(report: ReadinessReport, styles: Sequence[str]) -> Any:
    part = report.plan.survey.intensity
    lines = [charts.Line("all sites", _density(report.counts, part), "all")]
    for site, style in zip(report.sites, styles, strict=True):
        if site.counts is not None:
            lines.append(charts.Line(site.site, _density(site.counts, part), style))
    label = "Share of pixels by intensity, all sites together and each site"
    return charts.curve_chart(lines, label=label, x_label=_axis(report.plan), y_label="Share of pixels")


def _density(counts: Counts, part: IntensityPart) -> tuple[tuple[float, float | None], ...]:
    total = sum(counts["intensity"])
    if not total:
        return ()
    width = (part.high - part.low) / part.bins
    return tuple(
        (part.low + (cell + 0.5) * width, count / total)
        for cell, count in enumerate(counts["intensity"][1:-1])
    )


def _axis(plan: ReadinessPlan) -> str:
    return "Intensity, 0 black to 1 white" if plan.survey.intensity.units == "display" else "Modality units"


def _legend(sites: Sequence[SiteReadiness], styles: Sequence[str]) -> list[tuple[str, str]]:
    if styles and styles[0] == "many":
        return [("many", f"each of the {len(sites)} sites")]
    return [(style, site.site) for style, site in zip(styles, sites, strict=True) if site.counts]


def _told(count: int) -> str:
    return f"{count:,}" if count else MISSING


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
