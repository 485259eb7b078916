"""Logs hold listed fields only: no message of an exception, a library or a warning gets in."""

from __future__ import annotations

import io
import json
import logging
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import pytest

from fedward_common.errors import PlanError, RefusalCode
from fedward_common.logs import JsonLines, configure, describe
from fedward_common.plan import parse_signed_plan

CANARY = "DOE^JOHN"
log = logging.getLogger("fedward_client.test")
foreign = logging.getLogger("somelibrary.test")


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Put back what `configure` changes for the whole process."""
    root, factory = logging.root, logging.getLogRecordFactory()
    handlers, level, hooks = root.handlers[:], root.level, (sys.excepthook, threading.excepthook)
    yield
    logging.captureWarnings(False)
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.setLogRecordFactory(factory)
    sys.excepthook, threading.excepthook = hooks
    for name in ("fedward_client", "fedward_common", "fedward_server", "fedward"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def lines_of(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def logged(stream: io.StringIO) -> dict[str, Any]:
    (line,) = lines_of(stream)
    return line


def test_event_is_one_json_line_with_its_fields_and_context() -> None:
    stream = io.StringIO()
    configure(stream, site="north")

    log.info("round_started", extra={"run_id": "00ff", "round": 3, "mean_loss": 0.25, "code": RefusalCode.OK})

    line = logged(stream)
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "info",
        "logger": "fedward_client.test",
        "event": "round_started",
        "site": "north",
        "run_id": "00ff",
        "round": 3,
        "mean_loss": 0.25,
        "code": 0,
    }


def test_fields_that_are_not_listed_are_dropped_and_counted() -> None:
    stream = io.StringIO()
    configure(stream)

    log.info("case_read", extra={"patient": CANARY, "file": "/data/x", "round": 1})

    assert logged(stream)["num_dropped"] == 2
    assert logged(stream)["round"] == 1
    assert "patient" not in logged(stream)
    assert CANARY not in stream.getvalue()


@pytest.mark.parametrize("value", [CANARY, "/data/x.dcm", "two words", ["a"], {"a": 1}, b"x", object()])
def test_listed_field_is_withheld_when_its_value_is_not_a_word_or_number(value: object) -> None:
    stream = io.StringIO()
    configure(stream)

    log.info("case_read", extra={"reason": value})

    assert logged(stream)["reason"] == "withheld"


@pytest.mark.parametrize(
    ("message", "args"),
    [(f"read {CANARY}", ()), ("read %s", (CANARY,)), (CANARY, ()), (ValueError(CANARY), ())],
)
def test_free_text_of_our_own_is_withheld(message: object, args: tuple[str, ...]) -> None:
    stream = io.StringIO()
    configure(stream)

    log.warning(message, *args)

    assert logged(stream)["event"] == "message_withheld"
    assert CANARY not in stream.getvalue()


def test_exception_is_its_class_and_the_places_in_our_code() -> None:
    stream = io.StringIO()
    configure(stream)

    try:
        parse_signed_plan(CANARY.encode())
    except PlanError:
        log.exception("plan_unreadable")

    kind, place, cause, cause_place = logged(stream)["exception"]
    assert (kind, cause) == ("PlanError", "ValidationError")
    assert place.startswith("fedward_common.plan:")
    assert cause_place.startswith("fedward_common.plan:")
    assert CANARY not in stream.getvalue()


def test_exception_outside_our_code_leaves_its_class_only() -> None:
    with pytest.raises(json.JSONDecodeError) as caught:
        json.loads(CANARY)

    assert describe(caught.value) == ["JSONDecodeError"]


def test_library_s_message_is_gone_for_every_handler_even_one_added_later() -> None:
    ours, theirs = io.StringIO(), io.StringIO()
    configure(ours)
    late = logging.StreamHandler(theirs)
    foreign.addHandler(late)

    try:
        foreign.warning("invalid value for VR PN: %s", CANARY)
        try:
            raise ValueError(CANARY)
        except ValueError:
            foreign.exception("could not parse %r", CANARY, stack_info=True)
    finally:
        foreign.removeHandler(late)

    assert theirs.getvalue() == "message_withheld\nmessage_withheld\n"
    assert [line["logger"] for line in lines_of(ours)] == ["somelibrary.test", "somelibrary.test"]
    assert CANARY not in ours.getvalue()


def test_handlers_that_libraries_installed_before_are_removed() -> None:
    before = io.StringIO()
    handler = logging.StreamHandler(before)
    foreign.addHandler(handler)
    configure(io.StringIO())

    foreign.warning("x")

    assert before.getvalue() == ""
    assert handler not in foreign.handlers


def test_libraries_are_heard_from_warning_even_with_a_level_of_their_own() -> None:
    stream = io.StringIO()
    configure(stream)
    foreign.setLevel(logging.DEBUG)

    try:
        foreign.info("x")
        foreign.warning("x")
    finally:
        foreign.setLevel(logging.NOTSET)

    assert [line["level"] for line in lines_of(stream)] == ["warning"]


def test_formatter_survives_values_that_json_does_not_know() -> None:
    record = logging.makeLogRecord(
        {
            "name": "fedward_client",
            "msg": "step_done",
            "loss": float("nan"),
            "seconds": float("inf"),
            "round": 10**40,
        }
    )

    line = json.loads(JsonLines().format(record))

    assert line["event"] == "step_done"
    assert (line["loss"], line["seconds"], line["round"]) == (None, None, 10**40)


def test_context_field_that_is_not_listed_is_left_out() -> None:
    stream = io.StringIO()
    configure(stream, patient="x", site="north")

    log.info("started")

    assert "patient" not in logged(stream)


def test_uncaught_exceptions_and_warnings_of_a_process_lose_their_text(tmp_path: Path) -> None:
    """A whole process: main thread, another thread and a warning, all with the canary in their text."""
    path = tmp_path / "site.log"
    script = f"""
        import threading, warnings
        from pathlib import Path
        from fedward_common.logs import configure
        configure(Path({str(path)!r}), site="north")
        warnings.warn("{CANARY}")
        def fail():
            raise ValueError("{CANARY}")
        thread = threading.Thread(target=fail, name="{CANARY}")
        thread.start()
        thread.join()
        fail()
    """

    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )

    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["event"] for line in lines] == [
        "message_withheld",
        "uncaught_exception",
        "uncaught_exception",
    ]
    assert [line["logger"] for line in lines[:1]] == ["py.warnings"]
    assert lines[1]["exception"] == lines[2]["exception"] == ["ValueError"]
    assert ended.returncode == 1
    assert CANARY not in path.read_text() + ended.stdout + ended.stderr


def test_log_file_is_private_also_after_it_was_rotated(tmp_path: Path) -> None:
    path = tmp_path / "site.log"
    configure(path)
    (handler,) = [one for one in logging.root.handlers if isinstance(one, RotatingFileHandler)]

    log.info("started")
    handler.doRollover()
    log.info("stopped")

    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert modes == {"site.log": 0o600, "site.log.1": 0o600}
    assert json.loads(path.read_text())["event"] == "stopped"
