"""What the researcher is told about a failure at a simulated site."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedward_client.simulated import SimulatedSites, simulated_session, simulated_settings
from fedward_client.site_failures import SiteFailures
from fedward_client.worker_process import WorkError
from fedward_common.errors import RefusalCode
from fedward_common.identity import new_signer
from fedward_common.plan import canonical_bytes
from fedward_common.protocol import Down
from tests.builders import write_labels
from tests.client.site_workers import a_divided_site, a_small_plan
from tests.messages import an_instruction, signed

PLAN = a_small_plan()


class FailingWorker:
    """Fails at whatever it is asked, for one reason."""

    pid = 7

    def __init__(self, code: RefusalCode, where: str) -> None:
        self.error = WorkError(code, where)

    def start(self) -> bool:
        return False

    def call(
        self, request: dict[str, Any], payload: bytes | memoryview = b""
    ) -> tuple[dict[str, Any], bytes]:
        raise self.error

    def kill(self) -> None:
        pass

    def stop(self) -> None:
        pass


class Site:
    """A simulated site in a folder, and the reader of its log."""

    def __init__(self, folder: Path, worker: FailingWorker) -> None:
        a_divided_site(folder)
        settings = simulated_settings("north", folder, threads=1, device="cpu")
        self.data = settings.data
        self.log = settings.data.home / "site.log"
        sign, _ = new_signer()
        self.session = simulated_session(settings, sign, worker)
        self.failures = SimulatedSites(()).failures({"north": folder}, PLAN)

    def ask(self, **changes: Any) -> None:
        plan = signed(PLAN)
        instruction = an_instruction(plan, "prepare", **changes)
        assert self.session.handle(Down(canonical_bytes(instruction), plan.to_bytes(), None)) is not None


def a_site(folder: Path, code: RefusalCode = RefusalCode.TRAINING_FAILED) -> Site:
    return Site(folder / "north", FailingWorker(code, "RuntimeError:fedward_client.trainer:120"))


def test_place_of_an_error_at_a_simulated_site_is_in_its_log_and_is_told(tmp_path: Path) -> None:
    site = a_site(tmp_path)
    site.ask(round_index=2)

    (failure,) = site.failures.new("north")

    assert (failure.site, failure.round_index, failure.action) == ("north", 2, "prepare")
    assert failure.code is RefusalCode.TRAINING_FAILED
    assert failure.where == "RuntimeError:fedward_client.trainer:120"
    assert (failure.what, failure.log) == ("", site.log)
    (line,) = [json.loads(line) for line in site.log.read_text().splitlines()]
    assert (line["event"], line["site"], line["where"]) == ("instruction_refused", "north", failure.where)
    assert site.log.stat().st_mode & 0o777 == 0o600


def test_same_cause_is_told_once_and_another_one_too(tmp_path: Path) -> None:
    site = a_site(tmp_path)
    for index in (0, 1, 2):
        site.ask(round_index=index)
    assert [failure.round_index for failure in site.failures.new("north")] == [0]
    site.ask(round_index=3)
    assert site.failures.new("north") == []

    site.session._worker = FailingWorker(RefusalCode.OUT_OF_MEMORY, "killed-by-system")
    site.ask(round_index=4)

    assert [failure.round_index for failure in site.failures.new("north")] == [4]
    assert len(site.log.read_text().splitlines()) == 5


def test_failures_of_an_earlier_run_in_the_same_folder_are_not_told_again(tmp_path: Path) -> None:
    site = a_site(tmp_path)
    site.ask()

    later = SimulatedSites(()).failures({"north": tmp_path / "north"}, PLAN)

    assert later.new("north") == []
    site.ask(round_index=5)
    assert [failure.round_index for failure in later.new("north")] == [5]


def test_work_that_was_cancelled_has_not_failed(tmp_path: Path) -> None:
    site = a_site(tmp_path, RefusalCode.CANCELLED)
    site.ask()

    assert site.failures.new("north") == []
    assert site.log.exists()


def test_line_that_is_not_complete_yet_is_told_when_it_is(tmp_path: Path) -> None:
    site = a_site(tmp_path)
    site.ask()
    whole = site.log.read_bytes()
    site.log.write_bytes(whole[:-20])
    assert site.failures.new("north") == []

    site.log.write_bytes(whole)

    assert len(site.failures.new("north")) == 1


def test_site_that_has_written_nothing_has_not_failed(tmp_path: Path) -> None:
    failures = SiteFailures({"north": tmp_path / "absent.log"}, {}, PLAN)

    assert failures.sites == ["north"]
    assert failures.new("north") == []


def labels_twice(site: Site) -> str:
    write_labels(site.data.labels, [["2.25.1", 0], ["2.25.1", 1]])
    return "row 3: duplicate"


def no_images(site: Site) -> str:
    for path in site.data.dicom.iterdir():
        path.unlink()
    return "holds no files"


def volumes_wanted(site: Site) -> str:
    (site.data.home / "cohort.toml").write_text('unit = "volume"\n')
    return "transforms.size has 2 numbers, and a case of this site is one volume"


@pytest.mark.parametrize("spoil", [labels_twice, no_images, volumes_wanted])
def test_what_is_the_matter_with_images_or_labels_is_told_in_words(tmp_path: Path, spoil: Any) -> None:
    site = a_site(tmp_path, RefusalCode.COHORT_UNUSABLE)
    expected = spoil(site)
    site.ask()

    (failure,) = site.failures.new("north")

    assert expected in failure.what
    assert expected not in site.log.read_text()


def test_a_full_disk_for_the_log_does_not_stop_a_site(tmp_path: Path) -> None:
    site = a_site(tmp_path)
    site.log.mkdir()

    site.ask()

    assert site.failures.new("north") == []
