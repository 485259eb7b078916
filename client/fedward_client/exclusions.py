"""Cases that the operator took out by name: `HOME/excluded.json`, a list of case ids.

Pseudonyms alone, so that the file says nothing about anybody; it outlives the index and the cache.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from fedward_client.pseudonyms import CaseId, case_id_of
from fedward_client.site_data import EXCLUSION_FILE as EXCLUSION_FILE
from fedward_client.site_data import SiteData
from fedward_common.errors import CohortError, UsageError
from fedward_common.files import write_atomically

if TYPE_CHECKING:
    from fedward_client.cohort_grouping import CohortUnit

_LEAST_DIGITS = 8
_CASE_ID = re.compile(r"[0-9a-f]{32}")


def read_exclusions(home: Path) -> frozenset[CaseId]:
    """Case ids that are not to be used; none when there is no file.

    Raises:
        CohortError: not a list of case ids. Nothing may be used that the operator may have taken out.
    """
    try:
        document = json.loads((home / EXCLUSION_FILE).read_bytes())
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError, RecursionError):
        document = None
    if not isinstance(document, list) or not all(
        isinstance(each, str) and _CASE_ID.fullmatch(each) for each in document
    ):
        raise CohortError(
            f"HOME/{EXCLUSION_FILE} is not a list of case ids",
            remedy="Restore it from a backup, or delete it and exclude the cases again.",
        )
    return frozenset(map(CaseId, document))


def is_excluded(unit: CohortUnit, key: bytes, excluded: Collection[CaseId]) -> bool:
    """Whether the operator took it out, whatever else its series held then or holds now."""
    return any(case_id_of(key, name) in excluded for name in (unit.name, unit.other_name) if name)


def write_exclusions(home: Path, case_ids: Collection[CaseId]) -> None:
    """Put these case ids in place of what was there."""
    write_atomically(home / EXCLUSION_FILE, json.dumps(sorted(case_ids), indent=1).encode() + b"\n")


def exclude_case(site: SiteData, wanted: str) -> tuple[CaseId, int]:
    """Take a case out.

    Args:
        site: whose.
        wanted: its case id, or at least 8 of its first digits.

    Returns:
        the case id, and how many cases are excluded now.

    Raises:
        UsageError: no case, or several, go by these digits.
    """
    from fedward_client.cohort import unit_ids

    before = read_exclusions(site.home)
    case_id = _the_one(wanted, unit_ids(site) | before)
    write_exclusions(site.home, before | {case_id})
    return case_id, len(before | {case_id})


def include_case(site: SiteData, wanted: str) -> tuple[CaseId, int]:
    """Take a case in again; see `exclude_case`."""
    before = read_exclusions(site.home)
    case_id = _the_one(wanted, before)
    write_exclusions(site.home, before - {case_id})
    return case_id, len(before) - 1


def _the_one(wanted: str, known: Collection[CaseId]) -> CaseId:
    found = [each for each in known if each.startswith(wanted.lower())]
    if len(wanted) < _LEAST_DIGITS or len(found) != 1:
        raise UsageError(
            f"{len(found)} cases go by these digits" if len(wanted) >= _LEAST_DIGITS else "too few digits",
            remedy="Give the case id as the contact sheet shows it: 32 hex digits.",
        )
    return found[0]
