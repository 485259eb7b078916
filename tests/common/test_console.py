"""What people read on a terminal, and what scripts read instead."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import typer

from fedward_common.console import CANCELLED, complain, confirm, emit, plain, run_command, table
from fedward_common.errors import PlanError, UsageError
from fedward_common.evaluation.report import render_terminal_table
from tests.common.evaluation.report_builders import a_report

ROWS = [("north", "5/5", "1,160", "0.907", "88.1 %"), ("south-west", "4/5", "97", "–", "100.0 %")]
COLUMNS = ("Site", "Rounds", "Cases", "AUROC", "Acc.")


class Screen:
    """Prints tables for a terminal of some width and gives back the lines."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def lines(self, columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
        self._monkeypatch.setenv("COLUMNS", str(width))
        table(columns, rows)
        return self._capsys.readouterr().out.splitlines()


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Screen:
    return Screen(monkeypatch, capsys)


def test_numbers_end_below_each_other_and_texts_begin_so(screen: Screen) -> None:
    header, first, second = screen.lines(COLUMNS, ROWS, 80)

    for heading, *values in zip(COLUMNS, *ROWS, strict=True):
        places = [line.index(value) for line, value in zip((first, second), values, strict=True)]
        if heading == "Site":
            assert {header.index(heading), *places} == {0}
        else:
            ends = {at + len(value) for at, value in zip(places, values, strict=True)}
            assert {header.index(heading) + len(heading), *ends} == {max(ends)}


@pytest.mark.parametrize("width", [80, 100, 140])
@pytest.mark.parametrize("num_sites", [1, 12])
def test_result_of_a_run_has_its_headings_on_one_line_and_fits_the_screen(
    screen: Screen, width: int, num_sites: int
) -> None:
    columns, *rows = render_terminal_table(a_report(num_sites=num_sites, too_few_cases=["uz-meer"]))

    header, *lines = screen.lines(columns, rows, width)

    assert [part.strip() for part in header.split("  ") if part.strip()] == list(columns)
    assert max(map(len, (header, *lines))) <= width
    folded = sum(len(row[0]) > 23 for row in rows) if width == 80 else 0
    assert len(lines) == len(rows) + folded


def test_screen_too_narrow_for_the_numbers_loses_none_of_them(screen: Screen) -> None:
    header, *lines = screen.lines(COLUMNS, ROWS, 20)

    assert header.split() == list(COLUMNS)
    for line, row in zip(lines, ROWS, strict=True):
        assert " ".join(line.split()) == " ".join(row)


def test_long_texts_are_folded_whole(screen: Screen) -> None:
    reason = "fewer sites than the quorum: " + ", ".join(f"site-{index}" for index in range(40))

    lines = screen.lines(("Run", "Reason"), [("run-1", reason)], 80)

    assert max(map(len, lines)) <= 80
    assert " ".join(" ".join(lines[1:]).split()) == f"run-1 {reason}"


def test_table_obeys_neither_markup_nor_control_characters(screen: Screen) -> None:
    text = "\n".join(screen.lines(("a",), [("[bold red]x[/]\x1b[2J\x07",)], 80))

    assert "[bold red]x[/]" in text
    assert "\x1b" not in text
    assert "\x07" not in text


def test_table_without_rows_is_its_headings(screen: Screen) -> None:
    assert screen.lines(("Site", "State"), [], 80)[0].split() == ["Site", "State"]


def test_plain_text_has_no_control_characters() -> None:
    assert plain("a\x00b\u202ec") == "a b c"


def test_result_is_json_or_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    emit({"a": 1}, as_json=True, show=lambda: None)
    assert json.loads(capsys.readouterr().out) == {"a": 1}
    emit({"a": 1}, as_json=False, show=lambda: print("one"))
    assert capsys.readouterr().out == "one\n"


def test_error_goes_to_standard_error_with_its_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    error = PlanError("no such \x1bplan [bold]", remedy="Give another.")

    assert complain(error, as_json=False) == 3
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "error: no such  plan [bold]\nremedy: Give another.\n")

    assert complain(error, as_json=True) == 3
    told = json.loads(capsys.readouterr().err)
    assert told == {"error": error.message, "kind": "PlanError", "remedy": error.remedy, "exit_code": 3}


def test_question_that_nobody_can_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    confirm("Sure?", yes=True, as_json=True)
    with pytest.raises(UsageError, match="not confirmed"):
        confirm("Sure?", yes=False, as_json=False)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    with pytest.raises(UsageError):
        confirm("Sure?", yes=False, as_json=True)


def an_app(error: BaseException | None) -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    group = typer.Typer(no_args_is_help=True)
    app.add_typer(group, name="group")

    @group.command("go")
    def go(count: int = 0) -> None:
        if error is not None:
            raise error
        raise typer.Exit(count)

    return app


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (UsageError("x", remedy="y"), 2),
        (PlanError("x", remedy="y"), 3),
        (KeyboardInterrupt(), CANCELLED),
        (typer.Abort(), CANCELLED),
    ],
)
def test_command_ends_with_the_code_of_its_error(error: BaseException | None, code: int) -> None:
    assert run_command(an_app(error), "tool", ["group", "go"]) == code


def test_command_may_choose_its_exit_code() -> None:
    assert run_command(an_app(None), "tool", ["group", "go", "--count", "7"]) == 7


def test_fault_of_the_program_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(an_app(ZeroDivisionError()), "tool", ["group", "go"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["fly"], "No such command 'fly'"), (["group", "go", "--count", "x"], "'--count'")],
)
def test_wrong_usage_ends_with_2_and_names_the_help_of_that_command(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(an_app(None), "tool", arguments) == 2

    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert "remedy: See: tool" in printed.err


def test_group_without_a_command_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(an_app(None), "tool", ["group"]) == 2

    printed = capsys.readouterr()
    assert "Usage: tool group" in printed.out + printed.err
