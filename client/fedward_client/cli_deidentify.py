"""`fedward-site cohort deidentify` and `cohort ocr`: safe copies for others, and a look for text in pictures.

Heavy imports are inside the commands: the help appears at once.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedward_client.cli_options import HERE, AsJson, Home, ProgressBar, site_of
from fedward_common.console import CANCELLED, emit, say, table

if TYPE_CHECKING:
    from fedward_client.safe_export import ExportReport, FileReport

Names = Annotated[bool, typer.Option("--names", help="Also the names of the files. They may name patients.")]


def cohort_deidentify(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder for the copies; new, or of a run that was stopped.")
    ],
    home: Home = HERE,
    keep_times: Annotated[
        bool, typer.Option("--keep-times", help="Times of day stay; else only the shifted dates.")
    ] = False,
    keep_characteristics: Annotated[
        bool, typer.Option("--keep-characteristics", help="Sex, age (90 at most), size and weight stay.")
    ] = False,
    keep_private: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GROUP|CREATOR|ELEMENT",
            help='A private number that stays, for example "0019|SIEMENS MR HEADER|0C". May be repeated;'
            " none stays if not given.",
        ),
    ] = None,
    names: Names = False,
    as_json: AsJson = False,
) -> None:
    """Write copies of the cohort's studies that may leave the hospital, each proven by searching its bytes.

    A run that was stopped goes on when it is started again with the same options. Exit code 1 when a file has
    no copy. A face can be recognised from a head scan.

    A name in the picture stays there: look at the contact sheet, and see: fedward-site cohort ocr.
    """
    from fedward_client.safe_export import export_cohort, export_options

    site = site_of(home)
    options = export_options(
        keep_times=keep_times, keep_characteristics=keep_characteristics, keep_private=keep_private or ()
    )
    with ProgressBar(as_json, "copying") as progress:
        report = export_cohort(site, out, options, progress)
    refused = [_refusal(each, names=names) for each in report.refused]
    emit(_document(report, refused), as_json=as_json, show=lambda: _show(report, refused, out))
    if report.stopped:
        raise typer.Exit(CANCELLED)
    if refused:
        raise typer.Exit(1)


def _document(report: ExportReport, refused: list[dict[str, object]]) -> dict[str, object]:
    return {
        "files": report.num_files,
        "written": len(report.written),
        "from_before": report.num_kept,
        "withdrawn": report.num_withdrawn,
        "stopped": report.stopped,
        "pixels": dict(Counter(each.pixels for each in report.written)),
        "identifiers_searched": sum(each.num_searched for each in report.written),
        "identifiers_not_searched": sum(each.num_not_searched for each in report.written),
        "copies": [{"content": each.file.content, "copy": each.copy} for each in report.written],
        "refused": refused,
    }


def _refusal(report: FileReport, *, names: bool) -> dict[str, object]:
    assert report.reason is not None
    reason, kind = report.reason, report.kind
    return {
        "content": report.file.content,
        "study": report.file.study,
        "reason": reason.value,
        "meaning": f"{reason.meaning} ({kind})" if kind else reason.meaning,
        "remedy": reason.remedy,
        "found": [
            {"element": leak.keyword, "notation": leak.notation, "where": leak.zone} for leak in report.leaks
        ],
        **({"name": report.file.shown_name} if names else {}),
    }


def _show_progress(report: ExportReport, out: Path) -> None:
    say(f"{len(report.written)} of {report.num_files} files have a safe copy in {out}")
    if report.num_kept:
        say(f"  {report.num_kept}: from an earlier run, unchanged")
    if report.num_withdrawn:
        say(f"  {report.num_withdrawn} copies of files that left the cohort since were deleted")
    if report.stopped:
        num_left = report.num_files - len(report.files)
        say(f"Stopped: {num_left} files are left; the same command goes on with them.")


def _show(report: ExportReport, refused: list[dict[str, object]], out: Path) -> None:
    _show_progress(report, out)
    num_searched = sum(each.num_searched for each in report.written)
    num_not = sum(each.num_not_searched for each in report.written)
    changes: Counter[str] = Counter(each.pixels for each in report.written)
    meanings = {
        "identical": "pixels unchanged, byte by byte",
        "trimmed": "pixels unchanged; bytes behind the last pixel cut off",
        "blanked": "pixels unchanged; comments inside the compressed pictures blanked",
        "decoded": "pixels unchanged, written uncompressed: more than a picture was in the compressed data",
        "cleared": "pixels unchanged; bits that may hold an overlay cleared",
        "masked": "blackened outside the regions that the gate keeps",
        "none": "without pixels",
    }
    for change, meaning in meanings.items():
        if changes[change]:
            say(f"  {changes[change]}: {meaning}")
    say(f"{num_searched} identifiers were searched for in the bytes of their copies; none is there")
    if num_not:
        say(f"{num_not} values are too short, too common or mere numbers, and cannot be searched for")
    if not refused:
        return
    rows = []
    for each in refused:
        found = each["found"]
        assert isinstance(found, list)
        where = "; ".join(f"{leak['element']} as {leak['notation']} in the {leak['where']}" for leak in found)
        why = f"{each['meaning']}{f': {where}' if where else ''}"
        rows.append((str(each["content"])[:12], str(each["study"])[:12], why, str(each["remedy"])))
    say()
    table(("Content", "Study", "Why", "Remedy"), rows, title="No copy")
    for each in refused:
        if "name" in each:
            say(f"{str(each['content'])[:12]}  {each['name']}")


def cohort_ocr(
    home: Home = HERE,
    sample: Annotated[
        int, typer.Option(metavar="N", min=1, max=100_000, help="So many pictures, drawn at random.")
    ] = 100,
    words: Annotated[
        bool, typer.Option("--words", help="Also show the words. They may name patients.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Look for text in a random sample of the cohort's pictures, as they train; needs tesseract.

    An aid, no proof: small letters and handwriting are missed, and side markers are found.
    """
    from fedward_client.text_sampling import sample_text

    site = site_of(home)
    with ProgressBar(as_json, "reading") as progress:
        found = sample_text(site, sample, progress)
    with_text = [each for each in found if each.words]
    document = {
        "pictures": len(found),
        "with_text": [
            {
                "case": each.case_id,
                "frame": each.frame_index,
                "words": len(each.words),
                **({"text": [word.text for word in each.words]} if words else {}),
            }
            for each in with_text
        ],
    }

    def show() -> None:
        say(f"{len(with_text)} of {len(found)} pictures seem to have text in them")
        if not with_text:
            say("That proves nothing: letters lower than about 14 pixels are missed.")
            return
        rows = [
            (
                each.case_id,
                str(each.frame_index + 1),
                " ".join(word.text for word in each.words) if words else str(len(each.words)),
            )
            for each in with_text
        ]
        table(("Case", "Frame", "Words"), rows)
        say("Look at them; then, for each that must not train: fedward-site cohort exclude CASE")

    emit(document, as_json=as_json, show=show)


def mount(cohort: typer.Typer) -> None:
    """Add these commands to `fedward-site cohort`."""
    cohort.command("deidentify")(cohort_deidentify)
    cohort.command("ocr")(cohort_ocr)
