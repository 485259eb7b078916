"""The spool: whole files or none, named by what they hold, within its limit."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import stat
import time
from contextlib import closing
from pathlib import Path

import pytest

from fedward_client.purging import purge
from fedward_client.sources.manifest import Kept, Manifest, Refusal
from fedward_client.sources.part10 import Instance
from fedward_client.sources.receiver import receiving
from fedward_client.sources.refresh import Wanted, refresh_source, watch_source
from fedward_client.sources.retrieval import Retrieved
from fedward_client.sources.settings import DicomwebConfig, DimseConfig, Selection
from fedward_client.sources.spool import Spool, SpoolBusyError
from fedward_common.errors import CohortError, StorageError
from tests.integration.deployment import free_ports

XRAYS = Selection(modalities=("CR", "DX"))


def an_instance(number: int = 1, size: int = 1000) -> Instance:
    return Instance("1.2.840.10008.5.1.4.1.1.2", f"1.2.{number}", "1.2.840.10008.1.2.1", bytes(size))


def open_spool(home: Path, max_bytes: int = 10**6, max_object_bytes: int = 10**5) -> Spool:
    return Spool(home, max_bytes=max_bytes, max_object_bytes=max_object_bytes)


def files_in(home: Path) -> list[Path]:
    return sorted(path for path in (home / "spool" / "files").rglob("*") if path.is_file())


def test_a_file_is_named_by_its_content_and_private(tmp_path: Path) -> None:
    with open_spool(tmp_path) as spool:
        assert spool.add(an_instance()) is None
        assert spool.add(an_instance()) is None

    (path,) = files_in(tmp_path)
    assert path.name == hashlib.sha256(path.read_bytes()).hexdigest()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "spool").stat().st_mode) == 0o700


def test_where_a_file_cannot_be_nameless_it_is_written_under_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on NFS: O_TMPFILE asks for a folder to be opened for writing.
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)
    with open_spool(tmp_path) as spool:
        spool.add(an_instance())
        assert list((tmp_path / "spool" / "drafts").iterdir()) == []

    assert len(files_in(tmp_path)) == 1


def test_drafts_of_a_crash_are_cleared_when_they_are_old(tmp_path: Path) -> None:
    with open_spool(tmp_path):
        pass
    drafts = tmp_path / "spool" / "drafts"
    for name in ("old", "new"):
        (drafts / name).write_bytes(b"half")
    os.utime(drafts / "old", (time.time() - 10_000,) * 2)

    with open_spool(tmp_path):
        assert [path.name for path in drafts.iterdir()] == ["new"]


def test_what_is_over_a_limit_is_not_kept(tmp_path: Path) -> None:
    with open_spool(tmp_path, max_bytes=3000) as spool:
        assert spool.add(an_instance(1, 200_000)) is Refusal.TOO_LARGE
        assert spool.add(an_instance(2)) is None
        assert spool.add(an_instance(3, 1001)) is None
        with pytest.raises(StorageError, match="full"):
            spool.add(an_instance(4, 1002))
        assert set(spool.manifest.among(["1.2.1", "1.2.2", "1.2.3", "1.2.4"])) == {"1.2.1", "1.2.2", "1.2.3"}

    assert len(files_in(tmp_path)) == 2


def test_a_full_disk_is_named_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_spool(tmp_path) as spool:

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="disk that holds the spool is full"):
            spool.add(an_instance())
        monkeypatch.undo()
        assert files_in(tmp_path) == []
        assert spool.add(an_instance()) is None


def test_a_spool_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "spool").write_bytes(b"a file")

    with pytest.raises(StorageError, match="cannot be written"):
        open_spool(tmp_path)


def test_only_one_retrieves_and_begins_with_what_is_there(tmp_path: Path) -> None:
    with open_spool(tmp_path) as first, open_spool(tmp_path) as second:
        first.add(an_instance(1))
        first.add(an_instance(2, 900))
        first.manifest.mark_complete("1.5", 2, "x")
        files_in(tmp_path)[0].unlink()
        with first.retrieving():
            with pytest.raises(StorageError, match="another process"), second.retrieving():
                pass
            assert len(first.manifest.among(["1.2.1", "1.2.2"])) == 1
            assert not first.manifest.is_complete("1.5", 2, "x")
        with second.retrieving():
            pass


def test_manifest_writes_in_hundreds_and_forgets_nothing(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    for number in range(150):
        manifest.note(Kept(f"1.2.{number}", "ab" * 32, 10))
    other = Manifest(tmp_path)
    assert len(other.among([f"1.2.{number}" for number in range(150)])) == 100
    manifest.close()
    assert len(other.among([f"1.2.{number}" for number in range(150)])) == 150
    other.close()


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    (tmp_path / "manifest.sqlite").write_bytes(b"not a database, by any measure" * 100)

    with pytest.raises(StorageError, match="manifest"):
        Manifest(tmp_path)


def test_a_write_that_fails_changes_nothing(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    manifest.mark_complete("1.2", 3, "x")
    database = sqlite3.connect(tmp_path / "manifest.sqlite")
    database.execute("CREATE TRIGGER no BEFORE INSERT ON instances BEGIN SELECT RAISE(ABORT, 'no'); END")
    manifest.note(Kept("1.2.3", None, 1, Refusal.TOO_LARGE))
    with pytest.raises(StorageError):
        manifest.flush()
    database.execute("DROP TRIGGER no")
    database.close()
    assert manifest.among(["1.2.3"])["1.2.3"].refused is Refusal.TOO_LARGE
    assert manifest.is_complete("1.2", 3, "x")
    manifest.close()


def test_every_refusal_has_a_meaning_and_a_remedy() -> None:
    assert all(refusal.meaning and refusal.remedy.endswith(".") for refusal in Refusal)


def test_a_spool_that_is_being_filled_is_not_purged(tmp_path: Path) -> None:
    with open_spool(tmp_path) as spool:
        spool.add(an_instance())
        with spool.retrieving():
            with pytest.raises(SpoolBusyError):
                purge(tmp_path)
            assert len(files_in(tmp_path)) == 1
    purge(tmp_path)
    assert not (tmp_path / "spool").exists()


def test_a_watch_outlives_a_retrieval_by_somebody_else(tmp_path: Path) -> None:
    nobody = DicomwebConfig(kind="dicomweb", url="http://127.0.0.1:1/", attempts=1, poll_s=0.1)
    with (
        open_spool(tmp_path) as spool,
        closing(watch_source(nobody, tmp_path, lambda: Wanted(XRAYS))) as watch,
    ):
        with spool.retrieving():
            spool.add(an_instance())
            next(watch)
        spool.add(an_instance(2))
        next(watch)


def test_a_receiver_keeps_others_from_purging_what_it_receives_into(tmp_path: Path) -> None:
    node = DimseConfig(
        kind="dimse",
        retrieve="push",
        host="127.0.0.1",
        port=1,
        pacs_ae_title="PACS",
        ae_title="SITE",
        listen=f"127.0.0.1:{free_ports(1)[0]}",
    )
    with receiving(node, tmp_path), pytest.raises(SpoolBusyError):
        purge(tmp_path)


def test_two_processes_do_not_exceed_the_limit_together(tmp_path: Path) -> None:
    with open_spool(tmp_path, max_bytes=3000) as first, open_spool(tmp_path, max_bytes=3000) as second:
        first.add(an_instance(1, 1500))
        with pytest.raises(StorageError, match="spool is full"):
            second.add(an_instance(2, 1501))
        with first.retrieving(), pytest.raises(SpoolBusyError):
            second.add(an_instance(3, 10))

    assert len(files_in(tmp_path)) == 1


def test_where_the_pacs_pushes_and_nothing_came_the_operator_is_told_to_listen(tmp_path: Path) -> None:
    node = DimseConfig.model_validate(
        {
            **{"kind": "dimse", "host": "127.0.0.1", "port": 104, "pacs_ae_title": "PACS", "ae_title": "US"},
            **{"retrieve": "push", "listen": "127.0.0.1:11112"},
        }
    )

    with pytest.raises(CohortError, match="none has come yet") as told:
        refresh_source(node, tmp_path, XRAYS)
    assert "cohort index --watch" in told.value.remedy

    with open_spool(tmp_path) as spool:
        spool.add(an_instance())
    assert refresh_source(node, tmp_path, XRAYS) == Retrieved()
