"""What stands in a safe copy in place of an identifier: pseudonyms, new UIDs and shifted dates.

All of it comes from HMAC-SHA256 under the site's key, so that the same patient, study or reference gets
the same replacement in every file and on every day, and nobody without the key can go back or guess.
The key is separated by purpose: nothing here equals a case id or a pseudonym used elsewhere.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from datetime import date, timedelta

MAX_SHIFT_DAYS = 365

_DATE = re.compile(r"(\d{4})\.?(\d\d)\.?(\d\d)", re.ASCII)
_DATE_TIME = re.compile(r"(\d{8})(\d{0,6}(?:\.\d{1,6})?(?:[+-]\d{4})?)", re.ASCII)


class Replacements:
    """Replacements for one patient's files.

    Args:
        key: secret of the site, 32 bytes.
        patient: what tells the patient apart: PatientID; in its absence a name or a study's UID.
    """

    def __init__(self, key: bytes, patient: str) -> None:
        self._key = hmac.new(key, b"fedward|deidentified export|1", hashlib.sha256).digest()
        self.patient = "P" + self._digest("patient", patient).hex()[:15].upper()
        self.shift_days = shift_of(self._digest("days", patient))
        self.written: set[str] = set()
        """Every date and UID handed out: what the byte scan must not mistake for an original."""

    def uid(self, original: str) -> str:
        """Return the new UID of an object or reference, the same for all patients: 2.25. and 128 bits."""
        number = int.from_bytes(self._digest("uid", original)[:16], "big")
        return self._noted(f"2.25.{number}")

    def name(self, kind: str, original: str) -> str:
        """Name for a file or folder, 16 hex digits."""
        return self._digest(kind, original).hex()[:16]

    def date(self, original: str) -> str:
        """Shift a DA value; "" when it is no date of the calendar.

        >>> shifted = Replacements(bytes(32), "P1")
        >>> shifted.date("20240229") == shifted.date("2024.02.29") != "20240229"
        True
        >>> shifted.date("20230229")
        ''
        >>> len(shifted.date("20201230"))
        8
        """
        match = _DATE.fullmatch(original.strip(" \0"))
        try:
            if match is None:
                return ""
            day = date(int(match[1]), int(match[2]), int(match[3])) + timedelta(days=self.shift_days)
        except (ValueError, OverflowError):
            return ""
        return self._noted(day.strftime("%Y%m%d").rjust(8, "0"))

    def date_time(self, original: str, *, keep_time: bool) -> str:
        """Shift a DT value; "" when it does not name a day, which alone can be shifted."""
        match = _DATE_TIME.fullmatch(original.strip(" \0"))
        day = self.date(match[1]) if match else ""
        if not day or match is None:
            return ""
        return self._noted(day + match[2]) if keep_time else day

    def _digest(self, purpose: str, original: str) -> bytes:
        message = f"{purpose}|{original}".encode("utf-8", "surrogatepass")
        return hmac.new(self._key, message, hashlib.sha256).digest()

    def _noted(self, replacement: str) -> str:
        self.written.add(replacement)
        return replacement


def shift_of(digest: bytes) -> int:
    """Days within +-365, never 0, each as likely.

    >>> shift_of(bytes(32)), shift_of(b"\\xff" * 32) != 0
    (-365, True)
    """
    number = int.from_bytes(digest[:8], "big") % (2 * MAX_SHIFT_DAYS)
    return number - MAX_SHIFT_DAYS if number < MAX_SHIFT_DAYS else number - MAX_SHIFT_DAYS + 1
