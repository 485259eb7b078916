"""Pseudonyms of cases, patients and studies that mean something to this site alone.

A case id is HMAC-SHA256 of the image's SOPInstanceUID under a random key that never leaves the site's
home; patients and studies have pseudonyms of their own kind, so that none can be taken for another. A
plain hash would not do: UIDs and record numbers can be enumerated. Nothing that decides the training
(order of cases, division of patients) depends on this key.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import NewType

from fedward_common.errors import IdentityError
from fedward_common.files import flush_directory, write_new

CaseId = NewType("CaseId", str)

KEY_FILE = "pseudonym.key"
_KEY_BYTES = 32


def load_pseudonym_key(home: Path) -> bytes:
    """Read the site's pseudonym key, or make one (32 random bytes, mode 0600) if there is none.

    Raises:
        IdentityError: others may read the key, or it does not have 32 bytes.
    """
    path = home / KEY_FILE
    if not path.exists():
        draft = home / f".{KEY_FILE}.{secrets.token_hex(4)}"
        write_new(draft, secrets.token_bytes(_KEY_BYTES))
        with suppress(FileExistsError):  # another process was first: its key is the site's key
            os.link(draft, path)
        draft.unlink()
        flush_directory(home)
    return _read_key(path)


def _read_key(path: Path) -> bytes:
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise IdentityError(
            f"{KEY_FILE} may be read by other users of this machine", remedy=f"chmod 600 HOME/{KEY_FILE}"
        )
    key = path.read_bytes()
    if len(key) != _KEY_BYTES:
        raise IdentityError(
            f"{KEY_FILE} has {len(key)} bytes, {_KEY_BYTES} expected",
            remedy="Restore it from a backup; without one, delete it and accept new case ids.",
        )
    return key


def case_id_of(key: bytes, sop_instance: str) -> CaseId:
    """Pseudonym of one image: the first 128 bits of the HMAC, as 32 hex digits.

    >>> case_id_of(bytes(32), "1.2.3") == case_id_of(bytes(32), "1.2.3")
    True
    >>> case_id_of(bytes(32), "1.2.3") == case_id_of(b"k" * 32, "1.2.3")
    False
    """
    return CaseId(_code(key, b"case|", sop_instance))


def patient_code_of(key: bytes, patient: str) -> str:
    """Pseudonym of one patient, which groups cases and says nothing else.

    >>> patient_code_of(bytes(32), "1.2.3") == case_id_of(bytes(32), "1.2.3")
    False
    """
    return _code(key, b"patient|", patient)


def study_code_of(key: bytes, study: str) -> str:
    """Pseudonym of one study, for lists that an operator may pass on."""
    return _code(key, b"study|", study)


def _code(key: bytes, kind: bytes, identifier: str) -> str:
    return hmac.new(key, kind + identifier.encode("utf-8", "backslashreplace"), hashlib.sha256).hexdigest()[
        :32
    ]
