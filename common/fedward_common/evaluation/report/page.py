"""Put the report on one page, or into rows for a terminal."""

from __future__ import annotations

from typing import Any

from fedward_common.evaluation.report import charts, tables, words
from fedward_common.evaluation.report.document import RunReport
from fedward_common.evaluation.report.rendering import plan_sections, render_page
from fedward_common.evaluation.summary import MetricSummary


def render_html(report: RunReport) -> str:
    """Render the report as one self-contained HTML page, every text escaped."""
    caption, figures = words.headline_figures(report)
    return render_page(
        "report.html.j2",
        report=report,
        plan=report.plan,
        headline=words.headline(report),
        caption=caption,
        figures=figures,
        charts=_charts(report),
        sample=charts.sample,
        legend=_site_legend(report),
        results=tables.results_table(report),
        held_back=tables.held_back(report),
        labels=tables.labels_table(report),
        comparison=tables.comparison_table(report),
        compared=words.comparison(report),
        confusion=tables.confusion_rows(report.test, report.plan.task.labels) if report.test else [],
        participation=tables.participation(report),
        absences=words.absence_rows(report),
        rounds=tables.rounds_table(report),
        plan_sections=plan_sections(report.plan),
    )


def render_terminal_table(report: RunReport) -> list[tuple[str, ...]]:
    """Give rows of text for a terminal, the first with the column names and the last for all sites.

    Eighty columns hold the table as long as sites' names have at most twenty letters.
    """
    trained, columns = report.trained_rounds, _terminal_columns(report)
    rows: list[tuple[str, ...]] = [("Site", "Rounds", *columns)]
    for site in report.sites:
        given = sum(1 for each in trained if any(other.site == site for other in each.contributors))
        own = report.local_sites.get(site)
        figures = (*_terminal_figures(report.test_sites.get(site)), words.share(own.auroc if own else None))
        rows.append((site, f"{given}/{report.plan.rounds}", *figures[: len(columns)]))
    figures = (*_terminal_figures(report.test), words.MISSING)
    return [*rows, ("All sites", f"{len(trained)}/{report.plan.rounds}", *figures[: len(columns)])]


def terminal_notes(report: RunReport) -> list[str]:
    """Say below the terminal's table, in lines of at most 80 letters, what its columns hold."""
    if report.test is None:
        return []
    notes = [
        f"Test cases, federated model of round {report.selected_round} (sensitivity, specificity, accuracy)."
    ]
    if len(report.plan.task.labels) > 2:
        notes.append("AUROC, sensitivity and specificity are means over the labels.")
    if report.local_sites:
        notes.append("Own AUROC: the model that the site trained alone, on the same cases.")
    if any(words.MISSING in row for row in render_terminal_table(report)[1:-1]):
        notes.append(f"{words.MISSING}: not released (too few cases), not measured, or not defined.")
    return notes


def _terminal_columns(report: RunReport) -> tuple[str, ...]:
    """Names of the figures; none without a test, and a site's own model only where there is one."""
    if report.test is None:
        return ()
    columns = ("Cases", "AUROC", "Sens.", "Spec.", "Acc.")
    return (*columns, "Own AUROC") if report.local_sites else columns


def _terminal_figures(summary: MetricSummary | None) -> tuple[str, ...]:
    if summary is None:
        return (words.MISSING,) * 5
    shares = (words.percent(value) for value in (summary.recall, summary.specificity, summary.accuracy))
    return (f"{summary.num_cases:,}", words.share(summary.auroc), *shares)


def _charts(report: RunReport) -> dict[str, Any]:
    """Draw every chart; an empty one is left out of the page."""
    chosen = report.selected_round
    measured = [each for each in report.rounds if each.validation is not None]
    last = len(measured) > 1
    return {
        "auroc": charts.line_chart(
            _round_lines(report, "auroc"),
            label="AUROC on validation cases after each round, all sites together and each site",
            y_label="AUROC",
            marked_round=chosen if last else None,
            y_max=1.0,
        ),
        "loss": charts.line_chart(
            [*_round_lines(report, "log_loss"), _training_line(report)],
            label="Log loss on validation cases after each round, and training loss",
            y_label="Log loss",
            marked_round=chosen if last else None,
        ),
        "roc": _roc(report),
        "pairs": charts.pair_chart(
            _pairs(report), label="AUROC at each site: its own model and the federated model"
        ),
    }


def _round_lines(report: RunReport, figure: str) -> list[charts.Line]:
    rounds = [each for each in report.rounds if each.committed]
    points = [(each.round_index, _value(each.validation, figure)) for each in rounds]
    lines = [charts.Line("all sites", tuple(points), "all")]
    for index, site in enumerate(report.sites):
        values = [(each.round_index, _value(each.validation_sites.get(site), figure)) for each in rounds]
        lines.append(charts.Line(site, tuple(values), charts.line_style(index, len(report.sites))))
    return lines


def _training_line(report: RunReport) -> charts.Line:
    points = [(each.round_index, each.training_loss) for each in report.rounds if each.committed]
    return charts.Line("training loss", tuple(points), "training")


def _roc(report: RunReport) -> Any:
    test = report.test
    if test is None:
        return ""
    if len(test.labels) > 1:
        curves = [
            charts.Line(label.label, label.roc, charts.line_style(index, len(test.labels)))
            for index, label in enumerate(test.labels)
        ]
        return charts.roc_chart(
            curves, label="ROC curve of each label against the rest", operating_point=None
        )
    curves = [charts.Line("all sites", test.roc, "all")]
    for index, site in enumerate(report.sites):
        summary = report.test_sites.get(site)
        if summary is not None and summary.roc:
            curves.append(charts.Line(site, summary.roc, charts.line_style(index, len(report.sites))))
    defined = test.recall is not None and test.specificity is not None
    point = (1 - (test.specificity or 0), test.recall or 0) if defined else None
    return charts.roc_chart(curves, label="ROC curve on the test cases", operating_point=point)


def _pairs(report: RunReport) -> list[charts.Pair]:
    pairs = []
    for site in report.sites:
        ours, own = report.test_sites.get(site), report.local_sites.get(site)
        if ours is not None and own is not None and ours.auroc is not None and own.auroc is not None:
            pairs.append(charts.Pair(site, own.auroc, ours.auroc))
    return pairs


def _site_legend(report: RunReport) -> list[tuple[str, str]]:
    """(class, name) of the thin lines: every site, or one entry when they all look alike."""
    count = len(report.sites)
    named = [(charts.line_style(index, count), site) for index, site in enumerate(report.sites)]
    return named if not named or named[0][0] != "many" else [("many", f"each of the {count} sites")]


def _value(summary: MetricSummary | None, figure: str) -> float | None:
    return None if summary is None else getattr(summary, figure)
