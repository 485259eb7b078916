"""An export goes on where it stopped, in several processes; nothing unproven is ever in its folder."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file

from fedward_client import export_copies, export_folder, label_sources, safe_export, text_sampling
from fedward_client.dicom.deidentify import ExportOptions, make_copy
from fedward_client.dicom.refusal import Reason
from fedward_client.export_copies import ExportFile
from fedward_client.export_folder import EXPORTS_FOLDER, ExportFolder
from fedward_client.index import index_folder
from fedward_client.index_store import CaseIndex
from fedward_client.labels import LabelConfig
from fedward_client.pseudonyms import load_pseudonym_key
from fedward_client.safe_export import (
    ExportReport,
    export,
    export_cohort,
    files_of_cohort,
    settings_digest,
)
from fedward_client.site_data import SiteData
from fedward_common.errors import CohortError, StorageError, UsageError
from fedward_common.files import write_atomically
from fedward_common.home_lock import lock_home
from tests.builders import a_dicom, a_site

KEY = bytes(32)
UNFINISHED = ".unfinished"
OPTIONS = ExportOptions()
NAMED: dict[str, Any] = {"PatientName": "Kowalczyk^Bronislawa", "BurnedInAnnotation": "NO"}


def a_cohort(folder: Path, num_patients: int = 6, **elements: Any) -> SiteData:
    site = a_site(folder, num_patients=num_patients, images_per_patient=1, **NAMED | elements)
    index_folder(site)
    return site


def exported(site: SiteData, out: Path, files: list[ExportFile] | None = None, **how: Any) -> ExportReport:
    chosen = files_of_cohort(site) if files is None else files
    with ExportFolder(site.home, out, settings_digest(KEY, OPTIONS)) as folder:
        return export(chosen, site.dicom, folder, KEY, OPTIONS, **how)


def in_folder(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def left_by_a_power_failure(site: SiteData, out: Path, key: bytes = KEY) -> None:
    """Export all, and leave the folder as it is when nothing was tidied up."""
    with ExportFolder(site.home, out, settings_digest(key, OPTIONS)) as folder:
        export(files_of_cohort(site), site.dicom, folder, key, OPTIONS)
        shutil.copytree(out / UNFINISHED, out.with_name("as it was"))
    shutil.move(out.with_name("as it was"), out / UNFINISHED)


def cut_off_ledger(site: SiteData) -> None:
    (ledger,) = (site.home / EXPORTS_FOLDER).glob("*.jsonl")
    ledger.write_text(ledger.read_text()[:-40])


def stop_after(count: int) -> Callable[[int, int], None]:
    def progress(done: int, _total: int) -> None:
        if done == count:
            raise KeyboardInterrupt

    return progress


def test_stopped_export_goes_on_and_ends_as_one_that_was_not_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, out = a_cohort(tmp_path / "data"), tmp_path / "out"
    first = exported(site, out, progress=stop_after(2))
    assert (first.stopped, len(first.written), len(in_folder(out))) == (True, 2, 2)
    made: list[int] = []

    def noted(data: bytes, *rest: Any) -> Any:
        made.append(len(data))
        return make_copy(data, *rest)

    monkeypatch.setattr(export_copies, "make_copy", noted)
    second = exported(site, out, num_processes=0)
    assert (second.stopped, second.num_kept, len(second.written), len(made)) == (False, 2, 6, 4)
    exported(site, tmp_path / "whole")
    assert in_folder(out) == in_folder(tmp_path / "whole")
    made.clear()
    assert exported(site, out, num_processes=0).num_kept == 6
    assert made == []


def test_copy_that_changed_or_vanished_is_made_again(tmp_path: Path) -> None:
    site, out = a_cohort(tmp_path / "data"), tmp_path / "out"
    exported(site, out)
    whole = in_folder(out)
    spoiled, gone = sorted(out.rglob("*.dcm"))[:2]
    spoiled.write_bytes(b"Kowalczyk")
    gone.unlink()
    assert exported(site, out).num_kept == 4
    assert in_folder(out) == whole


def test_copies_of_files_that_left_the_cohort_are_deleted(tmp_path: Path) -> None:
    site, out = a_cohort(tmp_path / "data"), tmp_path / "out"
    exported(site, out)
    report = exported(site, out, files_of_cohort(site)[2:])
    assert (report.num_withdrawn, report.num_kept) == (2, 4)
    assert len(in_folder(out)) == 4
    assert len([path for path in out.iterdir() if path.is_dir()]) == 4  # no patient's empty folder


def test_copies_of_different_exports_are_not_mixed(tmp_path: Path) -> None:
    site, out = a_cohort(tmp_path / "data"), tmp_path / "out"
    export_cohort(site, out, OPTIONS)
    with pytest.raises(StorageError, match="other options"):
        export_cohort(site, out, ExportOptions(keep_times=True))
    (site.home / "cohort.toml").write_text('[gate]\nfaces = "quarantine"\n')
    with pytest.raises(StorageError, match="other options"):
        export_cohort(site, out, OPTIONS)
    (site.home / "cohort.toml").unlink()
    (out / "notes.txt").touch()
    with pytest.raises(StorageError, match="other files"):
        export_cohort(site, out, OPTIONS)
    (out / "notes.txt").unlink()
    assert export_cohort(site, out, OPTIONS).num_kept == 6
    other = a_cohort(tmp_path / "other")
    with pytest.raises(StorageError, match="not empty"):
        export_cohort(other, out, OPTIONS)


def test_settings_have_one_digest_in_every_process() -> None:
    sets = "burned_in_no=frozenset({'CT', 'MR', 'PT', 'NM'})"
    program = (
        "from fedward_client.safe_export import settings_digest\n"
        "from fedward_client.dicom.deidentify import ExportOptions\n"
        "from fedward_client.dicom.gate import GatePolicy\n"
        f"print(settings_digest(bytes(32), ExportOptions(gate=GatePolicy({sets}))))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1


def test_ledger_stays_at_home_and_survives_a_line_cut_off(tmp_path: Path) -> None:
    site, out = a_cohort(tmp_path / "data"), tmp_path / "out"
    left_by_a_power_failure(site, out)
    (ledger,) = (site.home / EXPORTS_FOLDER).glob("*.jsonl")
    assert ledger.stat().st_mode & 0o777 == 0o600
    originals = {file.content for file in files_of_cohort(site)}
    assert {json.loads(line)["content"] for line in ledger.read_text().splitlines()[1:]} == originals
    everything_there = in_folder(out)
    everything = b"".join(everything_there.values()) + repr(sorted(everything_there)).encode()
    assert not any(content.encode() in everything for content in originals)
    cut_off_ledger(site)
    assert exported(site, out).num_kept == 5  # the copy without a note is deleted, and made again
    assert in_folder(out).keys() == {name for name in everything_there if not name.startswith(UNFINISHED)}


def test_a_copy_without_a_note_is_deleted_though_its_original_has_left_the_cohort(tmp_path: Path) -> None:
    site, out = a_cohort(tmp_path / "data"), tmp_path / "out"
    left_by_a_power_failure(site, out)
    (ledger,) = (site.home / EXPORTS_FOLDER).glob("*.jsonl")
    lost = json.loads(ledger.read_text().splitlines()[-1])
    cut_off_ledger(site)

    report = exported(site, out, [each for each in files_of_cohort(site) if each.content != lost["content"]])

    assert (report.num_kept, report.num_withdrawn) == (5, 0)
    assert len(in_folder(out)) == 5
    assert lost["copy"] not in in_folder(out)


def test_copies_of_another_home_are_refused_and_stay(tmp_path: Path) -> None:
    site, other = a_cohort(tmp_path / "data", 3), a_cohort(tmp_path / "other", 4)
    out = tmp_path / "out"
    export_cohort(site, out, OPTIONS)
    shutil.move(out, tmp_path / "delivered")
    export_cohort(other, out, OPTIONS)
    whole = in_folder(out)

    with pytest.raises(StorageError, match="holds other files too"):
        export_cohort(site, out, OPTIONS)

    assert in_folder(out) == whole
    assert not (out / UNFINISHED).exists()
    assert export_cohort(other, out, OPTIONS).num_kept == 4


def test_what_another_home_left_when_it_was_killed_is_refused_and_stays(tmp_path: Path) -> None:
    site, other = a_cohort(tmp_path / "data", 3), a_cohort(tmp_path / "other", 4)
    out = tmp_path / "out"
    exported(site, out)
    shutil.move(out, tmp_path / "delivered")
    left_by_a_power_failure(other, out, load_pseudonym_key(other.home))
    (out / UNFINISHED / "draft").write_bytes(b"half a copy")
    whole = in_folder(out)
    del whole[f"{UNFINISHED}/lock"]

    with pytest.raises(StorageError, match="holds other files too"):
        exported(site, out)

    assert in_folder(out) == whole
    assert export_cohort(other, out, OPTIONS).num_kept == 4
    assert not (out / UNFINISHED).exists()


def test_two_homes_do_not_export_into_one_folder_at_a_time(tmp_path: Path) -> None:
    site, other, out = a_cohort(tmp_path / "data", 2), a_cohort(tmp_path / "other", 2), tmp_path / "out"
    with ExportFolder(site.home, out, settings_digest(KEY, OPTIONS)) as folder:
        with pytest.raises(UsageError, match="another export"):
            exported(other, out)
        export(files_of_cohort(site), site.dicom, folder, KEY, OPTIONS)
    assert len(in_folder(out)) == 2
    assert not (out / UNFINISHED).exists()


def test_a_lock_that_its_holder_has_just_deleted_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, out = a_cohort(tmp_path / "data", 2), tmp_path / "out"

    def too_late(file: Path, **how: Any) -> int:
        lock = lock_home(file, **how)
        if file.parent.name == UNFINISHED:
            file.unlink()
        return lock

    with monkeypatch.context() as patch:
        patch.setattr(export_folder, "lock_home", too_late)
        with pytest.raises(UsageError, match="another export"):
            exported(site, out)
    assert exported(site, out).num_kept == 0
    assert len(in_folder(out)) == 2


def test_a_link_in_place_of_the_drafts_leads_nowhere(tmp_path: Path) -> None:
    site, out, elsewhere = a_cohort(tmp_path / "data", 2), tmp_path / "out", tmp_path / "elsewhere"
    exported(site, out)
    elsewhere.mkdir()
    (elsewhere / "lock").write_text("somebody's")
    (out / UNFINISHED).symlink_to(elsewhere)
    with pytest.raises(StorageError, match="holds other files too"):
        exported(site, out)
    assert (elsewhere / "lock").read_text() == "somebody's"
    assert (out / UNFINISHED).is_symlink()


def test_copies_are_withdrawn_when_everything_has_left_the_cohort(tmp_path: Path) -> None:
    site, out = a_cohort(tmp_path / "data"), tmp_path / "out"
    export_cohort(site, out, OPTIONS)
    (site.home / "cohort.toml").write_text('views = ["LL"]\n')

    with pytest.raises(CohortError, match=r"no image to export; 6 copies .* were deleted"):
        export_cohort(site, out, OPTIONS)

    assert list(out.iterdir()) == []
    with pytest.raises(CohortError, match=r"no image to export$"):
        export_cohort(site, tmp_path / "new", OPTIONS)
    assert not (tmp_path / "new").exists()


def test_full_disk_while_copies_are_withdrawn_is_named_and_the_next_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, out = a_cohort(tmp_path / "data"), tmp_path / "out"
    exported(site, out)
    some = files_of_cohort(site)[2:]
    done: list[Path] = []

    def full_at_the_second(path: Path, data: bytes) -> None:
        if done:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_atomically(path, data)
        done.append(path)

    with monkeypatch.context() as patch:
        patch.setattr(export_folder, "write_atomically", full_at_the_second)
        with pytest.raises(StorageError, match="cannot be noted: No space left"):
            exported(site, out, some)
    report = exported(site, out, some)
    assert (report.num_kept, len(in_folder(out))) == (4, 4)


def test_two_exports_into_one_folder_at_a_time_are_refused(tmp_path: Path) -> None:
    site, out = a_cohort(tmp_path / "data"), tmp_path / "out"
    with ExportFolder(site.home, out, "same"), pytest.raises(UsageError, match="another export"):
        exported(site, out)


def a_large_cohort(folder: Path) -> SiteData:
    """Enough files for processes of their own, one of which has to be decoded, and one that is refused."""
    site = a_site(folder, num_patients=90, images_per_patient=1, **NAMED)
    index_folder(site)
    return site


def test_several_processes_make_the_same_copies_as_one(tmp_path: Path) -> None:
    site = a_large_cohort(tmp_path / "data")
    compressed = dcmread(str(get_testdata_file("MR_small_RLE.dcm")))
    compressed.BitsStored, compressed.HighBit, compressed.BurnedInAnnotation = 12, 11, "NO"
    compressed.add_new(0x60000010, "US", 64)
    compressed.add_new(0x60000100, "US", 16)
    compressed.add_new(0x60000102, "US", 12)  # an overlay in the pixels' unused bits
    compressed.save_as(site.dicom / "overlay.dcm")
    (site.dicom / "report.dcm").write_bytes(a_dicom(PatientName="", PatientID="", StudyInstanceUID=""))
    (site.home / "cohort.toml").write_text('modalities = ["CR", "MR"]\n')
    index_folder(site)
    files = files_of_cohort(site)
    gone = files[0]
    (site.dicom / os.fsdecode(gone.name)).unlink()
    one = exported(site, tmp_path / "one", num_processes=0)
    two = exported(site, tmp_path / "two", num_processes=2)
    assert two.files == one.files
    assert "cleared" in {each.pixels for each in two.written}
    assert [each.reason for each in two.refused] == [Reason.CHANGED]
    assert in_folder(tmp_path / "two") == in_folder(tmp_path / "one")


def test_process_says_which_identifier_was_left_and_how(tmp_path: Path) -> None:
    """Of an image whose ImageType, which cannot be emptied, repeats the name."""
    site = a_cohort(
        tmp_path / "data", 2, ImageType=["ORIGINAL", "PRIMARY", "AXIALER"], PatientName="Axialer^B"
    )
    one = exported(site, tmp_path / "one", num_processes=0)
    two = exported(site, tmp_path / "two", num_processes=1)
    assert two.files == one.files
    assert {leak.keyword for each in two.refused for leak in each.leaks} == {"PatientName"}
    assert in_folder(tmp_path / "two") == {}


PROGRAM = """
import sys
from pathlib import Path
from fedward_client.dicom.deidentify import ExportOptions
from fedward_client.safe_export import export_cohort
from fedward_client.site_data import SiteData

def progress(done, total):
    print(done, flush=True)

if __name__ == "__main__":
    data, out = map(Path, sys.argv[1:])
    site = SiteData(data / "home", data / "dicom", data / "labels.csv")
    report = export_cohort(site, out, ExportOptions(), progress)
    print("stopped" if report.stopped else "whole", len(report.written), flush=True)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_export_that_is_interrupted_or_killed_leaves_whole_copies_and_goes_on(
    tmp_path: Path, how: signal.Signals
) -> None:
    site, out = a_large_cohort(tmp_path / "data"), tmp_path / "out"
    path = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "data"), str(out)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= 30:
                process.send_signal(how)
                break
        said = process.stdout.read().split("\n")
    if how is signal.SIGINT:
        assert any(line.startswith("stopped") for line in said)
        assert not (out / ".unfinished").exists()
    there = {path for path in out.rglob("*.dcm")}
    assert 30 <= len(there) < 90
    for path_of_copy in there:
        assert dcmread(path_of_copy).PatientIdentityRemoved == "YES"
        assert np.asarray(dcmread(path_of_copy).pixel_array).size == 256
    report = export_cohort(site, out, OPTIONS)
    assert report.num_kept >= len(there) - 1  # the one being noted when it was killed
    assert len(report.written) == len(list(out.rglob("*.dcm"))) == 90


# The folder changes between the index and the use of it.


def vanishing(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, site: SiteData, gone: str) -> None:
    """Have a file deleted, and the folder indexed by another process, right after this was asked."""
    honest = getattr(module, name)

    def and_then(*args: Any, **kwargs: Any) -> Any:
        found = honest(*args, **kwargs)
        (site.dicom / gone).unlink(missing_ok=True)
        index_folder(site)
        return found

    monkeypatch.setattr(module, name, and_then)


def test_file_that_vanishes_while_the_cohort_is_selected_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = a_cohort(tmp_path / "data", 3)
    vanishing(monkeypatch, safe_export, "select_units", site, "1-0.dcm")
    report = export_cohort(site, tmp_path / "out", OPTIONS)
    assert [each.reason for each in report.refused] == [Reason.CHANGED]
    assert len(report.written) == 2


@pytest.mark.needs("tesseract")
def test_picture_that_vanishes_while_the_sample_is_drawn_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = a_cohort(tmp_path / "data", 3)
    vanishing(monkeypatch, text_sampling, "select_units", site, "1-0.dcm")
    assert len(text_sampling.sample_text(site, 10)) == 2


@pytest.mark.data
def test_label_object_that_vanishes_while_labels_are_gathered_is_named(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shared_data / "dicom-varied" / "dcmqi" / "segmentations"
    site = SiteData(tmp_path / "home", tmp_path / "dicom", tmp_path / "labels.csv")
    site.home.mkdir()
    site.dicom.mkdir()
    for path in [*(folder / "ct-3slice").glob("*.dcm"), folder / "liver.dcm"]:
        (site.dicom / path.name).write_bytes(path.read_bytes())
    (site.home / "cohort.toml").write_text('modalities = ["CT"]\n')
    index_folder(site)
    vanishing(monkeypatch, label_sources, "_digest", site, "liver.dcm")
    config = LabelConfig.model_validate({"source": "segmentations", "mask": {"segment": 1}})
    with CaseIndex(site.home) as index, pytest.raises(CohortError, match="changed or vanished"):
        label_sources.gather_labels(site, index, config)
