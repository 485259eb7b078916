"""Case ids: keyed, stable, and the key is the site's alone."""

from __future__ import annotations

import hashlib
import hmac
import stat
from pathlib import Path

import pytest

from fedward_client.pseudonyms import KEY_FILE, case_id_of, load_pseudonym_key, patient_code_of, study_code_of
from fedward_common.errors import IdentityError


def test_the_key_is_made_once_private_and_random(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()

    key = load_pseudonym_key(first)

    assert len(key) == 32
    assert load_pseudonym_key(first) == key != load_pseudonym_key(second)
    assert [path.name for path in first.iterdir()] == [KEY_FILE]
    assert stat.S_IMODE((first / KEY_FILE).stat().st_mode) == 0o600


def test_a_key_that_others_may_read_or_that_was_cut_is_refused(tmp_path: Path) -> None:
    load_pseudonym_key(tmp_path)
    (tmp_path / KEY_FILE).chmod(0o640)
    with pytest.raises(IdentityError, match="other users"):
        load_pseudonym_key(tmp_path)

    (tmp_path / KEY_FILE).chmod(0o600)
    (tmp_path / KEY_FILE).write_bytes(b"short")
    with pytest.raises(IdentityError, match="5 bytes"):
        load_pseudonym_key(tmp_path)


def test_a_case_id_is_the_hmac_of_the_uid() -> None:
    key = bytes(range(32))

    assert case_id_of(key, "1.2.3") == hmac.digest(key, b"case|1.2.3", "sha256").hex()[:32]
    assert case_id_of(key, "1.2.3") not in hashlib.sha256(b"case|1.2.3").hexdigest()


def test_a_case_a_patient_and_a_study_of_one_identifier_have_nothing_in_common() -> None:
    key = bytes(32)
    codes = {case_id_of(key, "1.2.3"), patient_code_of(key, "1.2.3"), study_code_of(key, "1.2.3")}

    assert len(codes) == 3
    assert all(len(code) == 32 for code in codes)
    assert patient_code_of(b"k" * 32, "1.2.3") not in codes


def test_an_identifier_that_is_no_text_of_unicode_has_a_pseudonym_too() -> None:
    assert patient_code_of(bytes(32), "\udcff") != patient_code_of(bytes(32), "\udcfe")
