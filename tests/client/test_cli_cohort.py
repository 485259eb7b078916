"""`fedward-site cohort`: index, show, quarantine, exclude, purge, for people and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedward_client import cli
from fedward_client.cohort import open_cohort
from fedward_client.cohort_file import COHORT_FILE
from fedward_client.exclusions import EXCLUSION_FILE, read_exclusions
from fedward_client.index_records import FileRecord
from fedward_client.index_store import INDEX_FILE, CaseIndex
from fedward_client.pseudonyms import KEY_FILE
from fedward_client.purging import purge, purgeable
from fedward_client.site_data import SiteData
from fedward_client.sources.folder import Candidate
from fedward_common.errors import CohortError, UsageError
from tests.builders import a_dicom, a_site, a_uid


@dataclass(frozen=True)
class Said:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Said]


@pytest.fixture
def site(tmp_path: Path) -> SiteData:
    """A site of 16 images, 2 of each patient, that has settings."""
    site = a_site(tmp_path / "CNRYPLACE", PatientSex="F", Manufacturer="Maker", ManufacturerModelName="One")
    settings = f'name = "north"\nserver = "localhost:1"\ndicom = "{site.dicom}"\nlabels = "{site.labels}"\n'
    (site.home / "site.toml").write_text(settings)
    return site


@pytest.fixture
def run(site: SiteData, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Type a cohort command."""
    monkeypatch.setenv("COLUMNS", "200")

    def typed(*arguments: str) -> Said:
        with pytest.raises(SystemExit) as ended:
            cli.main(["cohort", arguments[0], "--home", str(site.home), *arguments[1:]])
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Said(ended.value.code, out, err)

    return typed


def damage(site: SiteData) -> dict[str, str]:
    """Damage one file in each of three ways; file name -> reason."""
    cut = site.dicom / "0-0.dcm"
    cut.write_bytes(cut.read_bytes()[:-20])
    (site.dicom / "burned.dcm").write_bytes(a_dicom(PatientID="b", BurnedInAnnotation="YES"))
    (site.dicom / "notes.txt").write_bytes(b"CNRY no image")
    return {"0-0.dcm": "truncated", "burned.dcm": "burned_in", "notes.txt": "not_dicom"}


def test_index_says_what_it_read_and_what_is_refused(run: Run, site: SiteData) -> None:
    damage(site)
    (site.dicom / "copy.dcm").write_bytes((site.dicom / "1-0.dcm").read_bytes())

    said = run("index")
    document = run("index", "--json").json

    assert said.code == 0
    assert "19 files, 19 of them new or changed" in said.out
    assert "15 usable images\n" in said.out
    assert "15 labelled images make up the cohort" in said.out
    assert document["copies"] == 1
    assert document["quarantined"] == {"truncated": 1, "burned_in": 1, "not_dicom": 1}
    assert (document["read"], document["labelled_cases"]) == (0, 15)


def test_index_says_what_it_read_also_when_the_labels_do_not_fit(run: Run, site: SiteData) -> None:
    with site.labels.open("a") as file:
        file.write("1.2.3.4,0\n")

    said = run("index")

    assert said.code == CohortError.exit_code
    assert "16 files, 16 of them new or changed" in said.out
    assert "row 18: SOPInstanceUID matches no image" in said.err
    assert "rows_without_image under [labels.limits] in HOME/cohort.toml" in said.err
    assert json.loads(run("index", "--json").err)["exit_code"] == said.code


def test_show_counts_by_what_a_header_says_and_hides_small_numbers(run: Run, site: SiteData) -> None:
    damage(site)
    run("index")

    document = run("show", "--json").json

    assert document["counts"]["sex"] == {"F": "15"}
    assert document["counts"]["scanner"] == {"MAKER ONE": "15"}
    assert document["left_over"] == {
        "label rows whose image is in quarantine": "<5",
        "studies in quarantine": "<5",
    }
    assert "MAKER ONE" in run("show").out


def test_quarantine_lists_reason_and_remedy_by_study_and_names_only_on_request(
    run: Run, site: SiteData
) -> None:
    expected = damage(site)
    run("index")

    said, listed = run("quarantine"), run("quarantine", "--json").json
    with_names = run("quarantine", "--names", "--json").json

    assert {row["reason"] for row in listed} == set(expected.values())
    assert all(row["remedy"] and row["meaning"] and row["files"] == 1 for row in listed)
    assert {name: row["reason"] for row in with_names for name in row["names"]} == expected
    assert not any(name in said.out or name in json.dumps(listed) for name in expected)
    assert a_uid("study") not in said.out
    assert "0-0.dcm" in run("quarantine", "--names").out
    assert run("quarantine").out == said.out


def test_files_that_cannot_be_read_are_listed_with_their_remedy(run: Run, site: SiteData) -> None:
    (site.dicom / "locked.dcm").touch()
    with CaseIndex(site.home) as index:
        index.record([FileRecord(Candidate(b"locked.dcm", 1, 1), None, None)])

    (row,) = run("quarantine", "--names", "--json").json

    assert (row["reason"], row["files"], row["names"]) == ("unreadable", 1, ["locked.dcm"])
    assert "permissions" in row["remedy"]


def test_quarantine_needs_no_labels_and_may_be_empty(run: Run, site: SiteData) -> None:
    run("index")
    site.labels.unlink()

    assert run("quarantine").out == "Nothing is in quarantine.\n"


def test_quarantine_of_a_cohort_that_cannot_be_opened_still_says_why(run: Run, site: SiteData) -> None:
    (site.home / COHORT_FILE).write_text("[gate]\nidentity_removed = true\n")

    assert run("index").code == CohortError.exit_code
    listed = run("quarantine", "--json").json

    assert [(row["reason"], row["files"]) for row in listed] == [("identity_kept", 16)]


def test_an_excluded_case_is_not_used_until_it_is_taken_in_again(run: Run, site: SiteData) -> None:
    run("index")
    case = open_cohort(site).cases[3]

    said = run("exclude", case.case_id[:8])
    left = open_cohort(site)

    assert said.code == 0
    assert case.case_id in said.out
    assert case.case_id not in {each.case_id for each in left.cases}
    assert (len(left.cases), left.num_excluded) == (15, 1)
    assert run("show", "--json").json["left_over"] == {"excluded cases": "<5"}
    assert case.content not in (site.home / EXCLUSION_FILE).read_text()

    assert run("exclude", case.case_id, "--undo", "--json").json == {
        "case": case.case_id,
        "excluded": False,
        "num_excluded": 0,
    }
    assert len(open_cohort(site).cases) == 16


@pytest.mark.parametrize("digits", ["", "abc", "0" * 32, "../../etc"])
def test_a_case_that_is_none_is_not_excluded(run: Run, site: SiteData, digits: str) -> None:
    run("index")

    said = run("exclude", digits)

    assert said.code == UsageError.exit_code
    assert "remedy" in said.err
    assert read_exclusions(site.home) == frozenset()


@pytest.mark.parametrize("text", ["{}", "[1]", '["abc"]', "not json", "[" * 100_000])
def test_a_damaged_list_of_exclusions_stops_the_cohort(run: Run, site: SiteData, text: str) -> None:
    run("index")
    (site.home / EXCLUSION_FILE).write_text(text)

    with pytest.raises(CohortError, match=EXCLUSION_FILE):
        open_cohort(site)


def test_purge_deletes_what_can_be_made_again_and_nothing_else(run: Run, site: SiteData) -> None:
    run("index")
    case_ids = [case.case_id for case in open_cohort(site).cases]
    for folder in ("cache", "spool"):
        (site.home / folder / "deep").mkdir(parents=True)
        (site.home / folder / "deep" / "file").write_bytes(b"x" * 1000)
    kept = sorted(path.name for path in site.dicom.iterdir())

    refused = run("purge")
    document = run("purge", "--yes", "--json").json

    assert refused.code == UsageError.exit_code
    assert "index" in refused.out
    by_what = {each["what"]: (each["files"], each["bytes"]) for each in document["deleted"]}
    assert by_what["prepared images"] == (1, 1000)
    assert by_what["images fetched from an archive"] == (1, 1000)
    assert by_what["index"][0] == 1
    assert not any((site.home / name).exists() for name in ("cache", "spool", INDEX_FILE))
    assert (site.home / KEY_FILE).exists()
    assert sorted(path.name for path in site.dicom.iterdir()) == kept
    assert "Deleted" in run("purge", "--yes").out
    assert run("index").code == 0
    assert [case.case_id for case in open_cohort(site).cases] == case_ids


def test_purge_follows_no_link(site: SiteData, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "image").write_bytes(b"x")
    (site.home / "cache").symlink_to(elsewhere)

    assert sum(each.num_files for each in purgeable(site.home)) == 1
    purge(site.home)

    assert not (site.home / "cache").exists()
    assert (elsewhere / "image").exists()


def test_what_cannot_be_deleted_is_said(site: SiteData, monkeypatch: pytest.MonkeyPatch) -> None:
    (site.home / "cache").mkdir()

    def refuse(path: Path) -> None:
        raise PermissionError(path)

    monkeypatch.setattr("fedward_client.purging.shutil.rmtree", refuse)

    with pytest.raises(CohortError, match="not everything"):
        purge(site.home)


def test_no_command_prints_a_place_or_an_identifier(run: Run, site: SiteData) -> None:
    damage(site)
    for command in (["index"], ["show"], ["quarantine"], ["exclude", "0" * 8], ["purge"]):
        for option in ([], ["--json"]):
            said = run(*command, *option)
            text = said.out + said.err
            assert "CNRY" not in text
            assert a_uid("study") not in text
            assert "P1" not in text
