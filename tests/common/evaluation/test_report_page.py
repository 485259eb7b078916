"""The report in a real browser: fits the screen, asks nothing of the network, sorts its tables."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from fedward_common.evaluation.report import RunReport, render_html
from tests.common.evaluation.report_builders import a_failed_report, a_report

pytestmark = pytest.mark.integration

HEIGHT = 844
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
REPORTS = {
    "completed": a_report(),
    "failed": a_failed_report(),
    "undefined": a_report(without_positives=["nordklinik"], too_few_cases=["uz-meer"]),
    "twelve-sites": a_report(num_sites=12, rounds=40, absent={("uz-meer", 4): 71}),
    "one-round": a_report(rounds=1),
    "many-labels": a_report(labels=[f"finding number {index}" for index in range(9)]),
    "hostile": a_report(names=(HOSTILE * 3, "b", "c"), labels=("NORMAL", HOSTILE)),
}


@pytest.fixture
def complaints() -> list[str]:
    return []


def opened(browser: Browser, report: RunReport, width: int, folder: Path, complaints: list[str]) -> Page:
    """Open a report; whatever the page logs or requests beyond itself lands in `complaints`."""
    file = folder / "report.html"
    file.write_text(render_html(report), encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": HEIGHT})
    page.on("console", lambda message: complaints.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
    page.on(
        "request", lambda request: complaints.append(request.url) if request.url != file.as_uri() else None
    )
    page.goto(file.as_uri())
    return page


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", REPORTS)
def test_page_fits_and_shows_its_verdict_first(
    name: str, width: int, browser: Browser, tmp_path: Path, complaints: list[str]
) -> None:
    page = opened(browser, REPORTS[name], width, tmp_path, complaints)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = page.evaluate(
        """width => [...document.querySelectorAll("section, .figure, .verdict, .scroll, svg.chart, dl")]
        .filter(each => each.getBoundingClientRect().right > width).map(each => each.className)""",
        width,
    )
    assert outside == []
    verdict = page.locator(".verdict .title")
    box = verdict.bounding_box()
    assert verdict.is_visible()
    assert box is not None
    assert box["y"] + box["height"] < HEIGHT / 2
    assert page.title() != "taken"
    assert complaints == []
    page.close()


def column(page: Page, table: str, index: int) -> list[str]:
    return [
        text.strip() for text in page.locator(f"{table} tbody tr > :nth-child({index})").all_inner_texts()
    ]


def test_tables_sort_both_ways_with_undefined_figures_last(
    browser: Browser, tmp_path: Path, complaints: list[str]
) -> None:
    report = a_report(num_sites=12, rounds=3, without_positives=["riverside"], too_few_cases=["oslo-vest"])
    page = opened(browser, report, 1280, tmp_path, complaints)
    table, auroc = "#results table", 3
    before = column(page, table, auroc)
    defined = [text for text in before if text != "–"]
    head = page.locator(f"{table} thead th").nth(auroc - 1)

    head.locator("button").click()
    assert column(page, table, auroc) == [*sorted(defined), "–", "–"]
    assert head.get_attribute("aria-sort") == "ascending"
    head.locator("button").click()
    assert column(page, table, auroc) == [*sorted(defined, reverse=True), "–", "–"]
    assert head.get_attribute("aria-sort") == "descending"
    page.locator(f"{table} thead button").first.click()
    assert column(page, table, 1) == sorted(report.sites)
    assert head.get_attribute("aria-sort") is None
    assert page.locator(f"{table} tfoot th").inner_text() == "All sites"
    assert complaints == []
    page.close()


def test_counts_with_separators_sort_as_numbers(
    browser: Browser, tmp_path: Path, complaints: list[str]
) -> None:
    page = opened(browser, a_report(num_sites=12, rounds=3), 390, tmp_path, complaints)
    page.locator("#comparison thead button").nth(1).click()
    page.locator("#comparison thead button").nth(1).click()
    counts = [int(text.replace(",", "")) for text in column(page, "#comparison table", 2)]
    assert counts == sorted(counts, reverse=True)
    assert complaints == []
    page.close()


def test_injected_script_would_be_blocked_by_the_pages_own_policy(
    browser: Browser, tmp_path: Path, complaints: list[str]
) -> None:
    page = opened(browser, a_report(), 1280, tmp_path, complaints)
    page.evaluate("document.body.insertAdjacentHTML('beforeend', `" + HOSTILE + "`)")
    page.wait_for_function("document.querySelector('body > img') !== null")
    page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "document.title = 'taken'";
            document.body.append(script);
        }"""
    )
    assert page.title() != "taken"
    assert any("Content Security Policy" in complaint for complaint in complaints)
    page.close()
