"""The example settings of a site parse, and say what they seem to say."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from fedward_client.cohort_file import COHORT_FILE, read_cohort_file
from fedward_client.config import SiteHome, load_config

EXAMPLES = Path(__file__).resolve().parents[2] / "deploy" / "site"


@pytest.mark.parametrize(("name", "kind"), [("dicomweb", "dicomweb"), ("dimse", "dimse")])
def test_a_site_with_a_pacs_reads_its_settings_and_takes_paths_from_its_home(
    tmp_path: Path, name: str, kind: str
) -> None:
    (tmp_path / "site.toml").write_bytes((EXAMPLES / f"{name}.toml").read_bytes())
    config = load_config(SiteHome(tmp_path))
    assert config.images.kind == kind
    assert config.images.images(tmp_path).is_relative_to(tmp_path)  # the spool
    assert config.source is not None
    assert config.source.tls.ca_file == tmp_path / "pacs-ca.pem"  # type: ignore[union-attr]


def test_the_example_cohort_is_read_with_every_key_it_shows(tmp_path: Path) -> None:
    text = (EXAMPLES / COHORT_FILE).read_text(encoding="utf-8")
    (tmp_path / COHORT_FILE).write_text(text, encoding="utf-8")
    cohort = read_cohort_file(tmp_path)
    assert set(tomllib.loads(text)) == cohort.model_fields_set
    assert cohort.labels.key == "StudyInstanceUID"
    assert cohort.gate.overlays == "quarantine"
