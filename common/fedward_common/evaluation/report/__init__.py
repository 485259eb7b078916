"""The report of a run: one document, and three ways to read it.

`RunReport` is the document (JSON for other programs), `render_html` one self-contained page for people,
`render_terminal_table` plain rows for a screen, with `terminal_notes` on what they hold. Nothing in it comes
from an image or a patient: it holds counts that sites released, names from certificates and the plan.
"""

from fedward_common.evaluation.report.document import (
    AbsentSite,
    Provenance,
    RoundReport,
    RunReport,
    SiteRound,
    Verdict,
)
from fedward_common.evaluation.report.page import render_html, render_terminal_table, terminal_notes

__all__ = [
    "AbsentSite",
    "Provenance",
    "RoundReport",
    "RunReport",
    "SiteRound",
    "Verdict",
    "render_html",
    "render_terminal_table",
    "terminal_notes",
]
