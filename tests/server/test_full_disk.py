"""Runs that end because the disk is full: the space put aside, and an end that is written later."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fedward_common.errors import StorageError
from fedward_server import supervisor as supervisor_module
from fedward_server.disk_reserve import NUM_BYTES, DiskReserve
from fedward_server.following import follow
from fedward_server.run_records import RunStatus
from tests.server.supervised import Mailboxes, a_home, a_script, a_supervisor


def test_reserve_takes_real_space_gives_it_up_and_takes_it_again(tmp_path: Path) -> None:
    path = tmp_path / "reserve"
    reserve = DiskReserve(path)

    assert reserve.hold()
    assert path.stat().st_blocks * 512 >= NUM_BYTES
    reserve.release()
    assert not path.exists()
    reserve.release()
    assert reserve.hold()
    assert reserve.hold()


def test_reserve_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    """RLIMIT_FSIZE fails a write in the middle, as a full disk does."""
    path = tmp_path / "reserve"
    script = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from fedward_server.disk_reserve import DiskReserve\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "sys.exit(DiskReserve(Path(sys.argv[1])).hold())"
    )

    assert subprocess.run([sys.executable, "-c", script, str(path)], check=False).returncode == 0
    assert not path.exists()


@pytest.mark.parametrize("num_failures", [1, 4])
def test_a_run_whose_end_could_not_be_written_is_ended_as_soon_as_it_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_failures: int
) -> None:
    monkeypatch.setattr(supervisor_module, "_RECORD_PAUSE_S", 0.05)
    home, mailboxes = a_home(tmp_path / "federation"), Mailboxes()
    with a_supervisor(home, mailboxes) as supervisor:
        write, held = supervisor.store.finish, []

        def finish(run_id: str, status: RunStatus, reason: str = "") -> bool:
            held.append((home.state / "reserve").exists())
            if len(held) <= num_failures:
                raise StorageError("database or disk is full", remedy="Free space.")
            return write(run_id, status, reason)

        monkeypatch.setattr(supervisor.store, "finish", finish)
        run_id = supervisor.start(a_script(home, "die"))
        *_, last = follow(supervisor.store, run_id, stop=threading.Event(), poll_s=0.02)
        mailboxes.wait_closed(1)

        assert (last.kind, last.fields["status"]) == ("finished", "failed")
        assert held[:2] == [True, False]
        assert len(held) == num_failures + 1
        supervisor.resume(run_id)
        assert (home.state / "reserve").exists()
