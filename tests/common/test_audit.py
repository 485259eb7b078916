"""The audit log: any later change shows at its line, nothing but tokens and numbers enters."""

from __future__ import annotations

import hashlib
import json
import random
import stat
import subprocess
import sys
import textwrap
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fedward_common.audit import AuditLog, is_token, verify
from fedward_common.errors import AuditError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A log of six entries."""
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, clock=lambda: datetime(2026, 1, 31, 10, tzinfo=UTC))
    log.append("started", site="north")
    for index in range(1, 6):
        log.append("outbound", run_id="00ff", round=index, mean_loss=0.5, last=index == 5)
    return path


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def test_entries_come_back_as_they_were_appended(path: Path) -> None:
    entries = list(AuditLog(path).entries())

    assert verify(path) == 6
    assert [entry.sequence for entry in entries] == [1, 2, 3, 4, 5, 6]
    assert entries[0].event == "started"
    assert entries[0].fields == {"site": "north"}
    assert entries[5].fields == {"run_id": "00ff", "round": 5, "mean_loss": 0.5, "last": True}
    assert entries[5].time == "2026-01-31T10:00:00.000+00:00"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_each_digest_is_the_sha256_of_the_entry_and_the_digest_before(path: Path) -> None:
    """Computed here from the file alone, so that an auditor needs no code of ours."""
    previous = "0" * 64

    for line in path.read_text().splitlines():
        entry = json.loads(line)
        parts = [entry["sequence"], entry["time"], entry["event"], entry["fields"], previous]
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
        assert entry["digest"] == hashlib.sha256(text.encode()).hexdigest()
        assert entry["previous"] == previous
        previous = entry["digest"]


@pytest.mark.parametrize("number", [1, 3, 6])
def test_edited_byte_is_detected_at_its_line(path: Path, number: int) -> None:
    original = lines_of(path)

    for position in range(len(original[number - 1]) - 1):
        changed = bytearray(original[number - 1])
        changed[position] ^= 1
        path.write_bytes(b"".join([*original[: number - 1], bytes(changed), *original[number:]]))
        with pytest.raises(AuditError, match=f"line {number} "):
            verify(path)


def test_edited_entry_is_detected_at_its_line_even_with_its_own_digest_made_good(path: Path) -> None:
    lines = lines_of(path)
    entry = json.loads(lines[2])
    entry["fields"]["round"] = 9
    parts = [entry[key] for key in ("sequence", "time", "event", "fields", "previous")]
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    entry["digest"] = hashlib.sha256(text.encode()).hexdigest()
    lines[2] = json.dumps(entry, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    path.write_bytes(b"".join(lines))

    with pytest.raises(AuditError, match="line 4 does not follow"):
        verify(path)


@pytest.mark.parametrize(
    ("order", "line"),
    [
        ((1, 2, 3, 4, 5), 1),  # first line removed
        ((0, 1, 3, 4, 5), 3),  # a line removed
        ((0, 2, 1, 3, 4, 5), 2),  # two lines exchanged
        ((0, 1, 1, 2, 3, 4, 5), 3),  # a line repeated
        ((5, 0, 1, 2, 3, 4), 1),  # the last line moved to the front
    ],
)
def test_removed_moved_and_repeated_lines_are_detected(path: Path, order: tuple[int, ...], line: int) -> None:
    lines = lines_of(path)
    path.write_bytes(b"".join(lines[index] for index in order))

    with pytest.raises(AuditError, match=f"line {line} does not follow"):
        verify(path)


def test_part_cut_out_of_the_middle_is_detected_at_its_line(path: Path) -> None:
    lines = lines_of(path)
    path.write_bytes(b"".join([*lines[:2], lines[2][:40], *lines[3:]]))

    with pytest.raises(AuditError, match="line 3 was changed"):
        verify(path)


def test_line_of_another_log_is_detected(path: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "other.jsonl"
    for _ in range(3):
        AuditLog(foreign).append("stopped")
    lines = lines_of(path)
    path.write_bytes(b"".join([*lines[:2], lines_of(foreign)[2], *lines[3:]]))

    with pytest.raises(AuditError, match="line 3 does not follow"):
        verify(path)


def test_absent_log_does_not_verify(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="no such audit log"):
        verify(tmp_path / "audit.jsonl")


def test_append_refuses_to_build_on_a_changed_last_line(path: Path) -> None:
    lines = lines_of(path)
    path.write_bytes(b"".join([*lines[:5], lines[5].replace(b'"round":5', b'"round":6')]))

    with pytest.raises(AuditError, match="line last was changed"):
        AuditLog(path).append("stopped")


@pytest.mark.parametrize("kept", [1, 40, -1])
def test_line_left_unfinished_by_a_crash_is_removed_and_recorded(path: Path, kept: int) -> None:
    lines = lines_of(path)
    path.write_bytes(b"".join([*lines[:5], lines[5][:kept]]))
    with pytest.raises(AuditError, match="line 6 is not complete"):
        verify(path)

    AuditLog(path).append("stopped")

    entries = list(AuditLog(path).entries())
    assert [entry.event for entry in entries[4:]] == ["outbound", "audit_repaired", "stopped"]
    assert entries[5].fields == {"num_bytes": len(lines[5][:kept])}


def test_first_line_left_unfinished_by_a_crash_is_removed_and_recorded(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(b'{"digest":')

    AuditLog(path).append("started")

    assert [entry.event for entry in AuditLog(path).entries()] == ["audit_repaired", "started"]


@pytest.mark.parametrize(
    "value",
    [
        "DOE^JOHN",
        "two words",
        "/data/x.dcm",
        "",
        "line\nbreak",
        "ü",
        "x" * 129,
        float("nan"),
        float("inf"),
        2**63,
    ],
)
def test_value_is_refused_unless_it_is_a_token_or_a_number(path: Path, value: str | float) -> None:
    before = path.read_bytes()

    with pytest.raises(AuditError, match="not permitted: reason") as caught:
        AuditLog(path).append("outbound", reason=value)

    assert path.read_bytes() == before
    assert isinstance(value, float | int) or not value or value not in str(caught.value)


def test_unknown_event_is_refused(path: Path) -> None:
    with pytest.raises(AuditError, match="of unknown kind"):
        AuditLog(path).append("patient_seen")


def test_digest_and_date_and_name_are_tokens() -> None:
    assert is_token("ab" * 32)
    assert is_token("2026-01-31T10:00:00+00:00")
    assert is_token("chest_xray.v1")


def test_entries_of_several_processes_and_threads_make_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    script = """
        import sys
        from concurrent.futures import ThreadPoolExecutor
        from pathlib import Path
        from fedward_common.audit import AuditLog
        log = AuditLog(Path(sys.argv[1]))
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda index: log.append("outbound", index=index), range(25)))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    processes = [subprocess.Popen(command) for _ in range(3)]

    assert [process.wait(60) for process in processes] == [0, 0, 0]

    assert verify(path) == 75
    indices = [entry.fields["index"] for entry in AuditLog(path).entries()]
    assert sorted(map(int, indices)) == sorted([*range(25)] * 3)


def test_log_stays_whole_when_the_disk_is_full(tmp_path: Path) -> None:
    """A limit on file size, which makes the kernel write a part of a line and then refuse."""
    path = tmp_path / "audit.jsonl"
    script = """
        import resource, signal, sys
        from pathlib import Path
        from fedward_common.audit import AuditLog
        from fedward_common.errors import AuditError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        log = AuditLog(Path(sys.argv[1]))
        written = 0
        try:
            while True:
                log.append("outbound", index=written)
                written += 1
        except AuditError as error:
            assert "could not be written" in error.message
        print(written)
    """

    command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    written = int(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)

    assert verify(path) == written > 0
    AuditLog(path).append("stopped")
    assert verify(path) == written + 1


def test_append_finds_the_last_entry_of_a_long_log(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    generator = random.Random(0)
    for _ in range(60):
        log.append("outbound", **{f"field_{index}": "f" * 128 for index in range(generator.randrange(1, 50))})

    assert verify(path) == 60
    assert path.stat().st_size > 3 * 16384


def test_reading_stops_at_the_size_the_file_had(path: Path) -> None:
    """Appending while reading neither blocks nor shows up."""
    log = AuditLog(path)
    seen = 0
    for _ in log.entries():
        log.append("outbound", round=seen)
        seen += 1

    assert seen == 6
    assert verify(path) == 12
