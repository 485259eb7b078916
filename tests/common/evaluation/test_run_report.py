"""The report as a document and as a page: what it claims, and that nothing can be injected into it."""

from __future__ import annotations

import base64
import doctest
import hashlib
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedward_common.errors import RefusalCode
from fedward_common.evaluation.report import (
    RunReport,
    SiteRound,
    charts,
    render_html,
    render_terminal_table,
    terminal_notes,
    words,
)
from fedward_common.evaluation.report.tables import comparison_table, participation, results_table
from tests.common.evaluation.report_builders import a_failed_report, a_report

HOSTILE = "</style></title><script>steal()</script><img src=x onerror=steal()>\"'&{{7*7}}"
STYLE = Path(charts.__file__).with_name("report.css").read_text()


@dataclass
class Page(HTMLParser):
    """Collects elements, attributes and the text of a page."""

    tags: list[str] = field(default_factory=list)
    attributes: list[tuple[str, str | None]] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] not in (["style"], ["script"]):
            self.text += data


def parsed(html: str) -> Page:
    page = Page()
    page.feed(html)
    return page


def test_report_survives_json_and_forbids_what_is_not_in_the_schema() -> None:
    report = a_report(without_positives=["nordklinik"], absent={("uz-meer", 2): 71})
    assert RunReport.model_validate_json(report.model_dump_json()) == report
    document = report.model_dump(mode="json")
    with pytest.raises(ValidationError):
        RunReport.model_validate({**document, "patient": "x"})
    with pytest.raises(ValidationError):
        RunReport.model_validate({**document, "seconds": float("nan")})
    assert set(RunReport.model_json_schema()["properties"]) == set(document)


def test_an_absence_carries_the_meaning_of_its_code() -> None:
    assert SiteRound(site="a", status="missing", code=71).reason == RefusalCode.SITE_LATE.meaning
    assert SiteRound(site="a", status="refused", code=12345).reason == RefusalCode.INTERNAL.meaning


def test_a_complete_run_says_what_was_found_and_that_all_sites_took_part() -> None:
    report = a_report()
    headline = words.headline(report)
    assert report.test is not None
    (_, _), (missed, found) = report.test.confusion
    assert (headline.tone, headline.title) == ("good", "Completed")
    assert f"found {found} of {found + missed} PNEUMONIA cases" in headline.sentences[0]
    assert headline.sentences[-1] == "5 of 5 rounds; all 3 sites contributed to every round."


def test_a_completed_run_with_gaps_is_not_green_and_names_the_sites() -> None:
    headline = words.headline(a_report(absent={("uz-meer", 2): 71, ("uz-meer", 3): 71, ("st-anna", 1): 42}))
    assert headline.tone == "warn"
    assert "st-anna, uz-meer" in headline.sentences[-1]


def test_a_failed_run_names_who_is_missing_and_shows_no_result() -> None:
    report = a_failed_report()
    headline = words.headline(report)
    assert (headline.tone, headline.title) == ("bad", "Failed: no result")
    assert "Missing: uz-meer – the site was not connected when the round began." in headline.sentences
    caption, figures = words.headline_figures(report)
    assert caption == "Validation after round 2: progress, not a result"
    assert figures
    page = parsed(render_html(report)).text
    assert "Results on test cases" not in page
    assert "the site's images or labels cannot be used for this plan" in page


def test_a_run_that_could_not_start_names_the_missing_sites_and_renders() -> None:
    failed = a_failed_report()
    report = failed.model_copy(update={"rounds": ()})
    assert [(row.site, row.rounds) for row in words.absence_rows(report)] == [
        ("st-anna", "at the start"),
        ("uz-meer", "at the start"),
    ]
    assert words.headline_figures(report) == ("", ())
    assert "at the start" in render_html(report)


def test_a_difference_within_the_error_bound_is_called_equal() -> None:
    report = a_report()
    same = report.model_copy(update={"local_sites": report.test_sites})
    assert words.comparison(same) == (0, "higher AUROC at 0 of 3 sites, equal within the error bound at 3")
    compared = words.comparison(report)
    assert compared is not None
    assert compared[0] > 0.02
    assert compared[1] == "higher AUROC at 3 of 3 sites"
    assert words.comparison(report.model_copy(update={"local_sites": {}})) is None


def test_a_small_difference_that_counts_as_one_does_not_read_as_zero() -> None:
    report = a_report()
    site = report.sites[0]
    ours = report.test_sites[site]
    assert ours is not None
    ours = ours.model_copy(update={"auroc": 0.9581, "auroc_error_bound": 0.0})
    own = ours.model_copy(update={"auroc": 0.9585})
    close = report.model_copy(update={"test_sites": {site: ours}, "local_sites": {site: own}})
    table = comparison_table(close)
    assert table is not None
    assert [(cell.text, cell.style) for cell in table.rows[0] if cell.style] == [("-0.0004", "down")]


def test_undefined_and_held_back_figures_are_dashes() -> None:
    report = a_report(without_positives=["nordklinik"], too_few_cases=["uz-meer"])
    _, negative_only, small = results_table(report).rows
    assert [cell.text for cell in negative_only[2:5]] == ["–", "–", "–"]
    assert negative_only[5].text.endswith("%")
    assert {cell.text for cell in small[1:]} == {"–"}
    html = render_html(report)
    assert re.search(r"\b(nan|None|inf)\b", parsed(html).text, re.IGNORECASE) is None
    assert "uz-meer: counts not released" in html
    assert words.headline_figures(report)[0].endswith("from 2 of 3 sites")


def test_absences_are_grouped_by_site_and_reason() -> None:
    rows = words.absence_rows(a_report(absent={("uz-meer", index): 71 for index in (1, 2, 4)}))
    assert [(row.site, row.rounds, row.reason) for row in rows] == [
        ("uz-meer", "1–2, 4", RefusalCode.SITE_LATE.meaning)
    ]


def test_a_long_run_shows_the_rounds_with_absences_and_says_what_it_leaves_out() -> None:
    matrix = participation(a_report(rounds=130, absent={("uz-meer", 7): 71, ("st-anna", 99): 30}))
    assert matrix.rounds == (7, 99)
    assert matrix.num_hidden == 128
    assert matrix.rows[0][:2] == ("st-anna", "129 of 130")


def test_terminal_table_has_one_row_a_site_and_a_total() -> None:
    report = a_report(too_few_cases=["uz-meer"], absent={("uz-meer", 1): 71})
    header, *sites, total = render_terminal_table(report)
    assert [row[0] for row in sites] == list(report.sites)
    assert {len(row) for row in (header, *sites, total)} == {len(header)}
    assert sites[2][:4] == ("uz-meer", "4/5", "–", "–")
    assert report.test is not None
    assert total[3] == f"{report.test.auroc:.3f}"
    assert header[-1] == "Own AUROC"


def test_terminal_table_leaves_out_figures_that_nobody_has() -> None:
    header, *rows = render_terminal_table(a_failed_report())
    assert header == ("Site", "Rounds")
    assert len(rows) == 4
    assert terminal_notes(a_failed_report()) == []
    alone = a_report().model_copy(update={"local_sites": {}})
    assert "Own AUROC" not in render_terminal_table(alone)[0]
    assert not any("Own AUROC" in note for note in terminal_notes(alone))


def test_terminal_notes_explain_the_columns_in_short_lines() -> None:
    notes = terminal_notes(a_report(too_few_cases=["uz-meer"], labels=("a", "b", "c")))
    assert all(len(note) <= 80 for note in notes)
    text = " ".join(notes)
    for told in ("round 4", "sensitivity", "means over the labels", "Own AUROC", "–: not released"):
        assert told in text
    assert "–" not in " ".join(terminal_notes(a_report()))
    assert "means" not in " ".join(terminal_notes(a_report()))


def test_hostile_names_are_shown_and_never_become_markup() -> None:
    names = (HOSTILE, "b", "c")
    report = a_report(names=names, labels=("NORMAL", HOSTILE), absent={(HOSTILE, 2): 71})
    report = report.model_copy(
        update={
            "verdict": "failed",
            "reason": HOSTILE,
            "name": HOSTILE,
            "run_id": HOSTILE,
            "plan": report.plan.model_copy(update={"description": HOSTILE}),
            "provenance": report.provenance.model_copy(
                update={"versions": {HOSTILE: HOSTILE}, "data": HOSTILE}
            ),
        }
    )
    page, clean = parsed(render_html(report)), parsed(render_html(a_report()))
    assert page.tags.count("script") == page.tags.count("style") == 1
    assert set(page.tags) <= {*clean.tags}
    assert not [
        name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href", "style")
    ]
    assert page.text.count(HOSTILE) > 5
    assert ("title", HOSTILE) in page.attributes


@pytest.mark.parametrize("report", [a_report(), a_failed_report(), a_report(num_sites=12, rounds=1)])
def test_the_page_names_no_other_file_and_allows_only_its_own_style_and_script(report: RunReport) -> None:
    html = render_html(report)
    assert re.findall(r"https?:|url\(|@import|<link|<iframe|<img|\bsrc=|\bhref=", html) == []
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)
    assert policy is not None
    allowed = policy[1].replace("&#39;", "'").replace("&#43;", "+")
    for tag in ("style", "script"):
        text = re.search(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        assert text is not None
        digest = base64.b64encode(hashlib.sha256(text[1].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in allowed
    assert allowed.startswith("default-src 'none'")
    assert render_html(report) == html


@pytest.mark.parametrize(
    "report",
    [
        a_report(),
        a_report(rounds=1),
        a_report(num_sites=12, rounds=40),
        a_report(labels=("a", "b", "c")),
        a_failed_report(),
    ],
)
def test_charts_are_well_formed_and_stay_inside_their_frame(report: RunReport) -> None:
    drawings = re.findall(r'<svg class="chart".*?</svg>', render_html(report), re.DOTALL)
    assert drawings
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        assert root.attrib["aria-label"]
        for circle in root.iter("circle"):
            assert 0 <= float(circle.attrib["cx"]) <= width
            assert 0 <= float(circle.attrib["cy"]) <= height
        for path in root.iter("path"):
            points = re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path.attrib["d"])
            assert all(0 <= float(x) <= width and 0 <= float(y) <= height for x, y in points)


def test_learning_curve_places_values_where_its_axes_say() -> None:
    line = charts.Line("all sites", ((1, 0.6), (2, None), (3, 0.8)), "all")
    root = ElementTree.fromstring(
        charts.line_chart([line], label="x", y_label="y", marked_round=3, y_max=1.0)
    )
    rows = {
        element.text: float(element.attrib["y"]) - 4
        for element in root.iter("text")
        if "end" in element.attrib["class"]
    }
    heights = [float(circle.attrib["cy"]) for circle in root.iter("circle")]
    assert heights == [pytest.approx(rows["0.60"]), pytest.approx(rows["0.80"])]
    path = next(root.iter("path"))
    assert path.attrib["d"].count("M") == 2  # a gap where round 2 was not measured


@given(st.floats(0, 1), st.floats(0, 1))
def test_ticks_cover_the_values_and_never_pass_the_upper_end(first: float, second: float) -> None:
    low, high = sorted((first, second))
    marks = charts.ticks(low, high, 1.0)
    assert 2 <= len(marks) <= 7
    assert marks == sorted(set(marks))
    assert marks[0] <= low + 1e-9
    assert high - 1e-9 <= marks[-1] <= 1.0


def test_error_bound_is_rounded_up() -> None:
    assert [words.error_bound(value) for value in (0, 1e-9, 0.0003, 0.00031, None)] == [
        *("exact", "± 0.0001", "± 0.0003", "± 0.0004", "–")
    ]
    for module in (words, charts):
        assert doctest.testmod(module).failed == 0


def contrast(first: str, second: str) -> float:
    """Contrast ratio of two colours, WCAG 2.2."""

    def luminance(colour: str) -> float:
        channels = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_have_enough_contrast(scheme: int) -> None:
    blocks = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[scheme]))
    for text in ("ink", "soft", "good", "warn", "bad", "accent"):
        assert contrast(colours[text], colours["card"]) >= 4.5, text
    for tone in ("good", "warn", "bad", "busy"):
        assert contrast(colours[tone], colours[f"{tone}-bg"]) >= 4.5, tone
        assert contrast(colours["ink"], colours[f"{tone}-bg"]) >= 4.5, tone
    for line in ("s0", "s1", "s2", "s3", "s4", "s5", "many", "accent"):
        assert contrast(colours[line], colours["card"]) >= 3, line
    assert contrast(colours["soft"], colours["page"]) >= 4.5
    assert contrast(colours["ink"], colours["head"]) >= 4.5
