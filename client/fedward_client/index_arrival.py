"""Which series are still arriving, so that no volume is taken for whole while its end is on its way (hop 2).

Three signs, none of them a guess. Files came, or changed, since a first look at the folder: a short while
after the newest file it is looked at again. An archive announces more instances than are here, or was still
receiving the study itself. The images say that their acquisition has more images than are here. A series
with any of these waits in quarantine, by name; a folder in which nothing moves is looked at once.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from fedward_client.dicom.refusal import Reason
from fedward_client.index_database import IndexDatabase, Row
from fedward_client.index_store import CaseIndex
from fedward_client.sources.folder import Candidate
from fedward_client.sources.manifest import Announcements, read_announcements
from fedward_client.sources.settings import spool_root

MAX_WAIT_S = 60.0
"""Nobody is kept waiting longer for the second look; who wants more gets it from the next run."""

MOVING, ANNOUNCED, ACQUIRED = "", "NumberOfSeriesRelatedInstances", "ImagesInAcquisition"
"""What the sign was; the kind that stands beside the reason in quarantine."""

_MANY = 1000
_Place = tuple[int, int, int]


def now_s() -> float:
    """Seconds since 1970."""
    return time.time()


def wait_s(found: Sequence[Candidate], settle_s: float) -> float:
    """How long until the newest file has lain there for `settle_s`; 0 when it has.

    A clock of a file server that is ahead of ours makes nobody wait longer than `settle_s`.
    """
    newest_s = max((each.placed_ns for each in found), default=0) / 1e9
    left_s = newest_s + settle_s - now_s()
    return min(max(0.0, left_s), settle_s)


def recent(found: Sequence[Candidate], settle_s: float, looked_s: float) -> list[bytes]:
    """Names of files that had not lain there for `settle_s` when they were looked at."""
    since_ns = int((looked_s - settle_s) * 1e9)
    return [each.name for each in found if each.placed_ns > since_ns]


def moved(before: Sequence[Candidate], after: Sequence[Candidate]) -> list[bytes]:
    """Names of files that came or changed between two looks."""
    places = {each.name: _place(each) for each in before}
    return [each.name for each in after if places.get(each.name) != _place(each)]


def _place(each: Candidate) -> _Place:
    return each.size, each.mtime_ns, each.placed_ns


def arriving_series(
    index: CaseIndex,
    moving: Collection[bytes],
    announcements: Announcements,
    *,
    count_acquisitions: bool,
) -> dict[str, str]:
    """Find the series that are not whole yet.

    Args:
        index: up to date.
        moving: names of files that came or changed a moment ago.
        announcements: what an archive says there is; empty for a folder.
        count_acquisitions: whether images of an acquisition are counted against ImagesInAcquisition.

    Returns:
        SeriesInstanceUID -> the sign.
    """
    database = index.database
    found = dict.fromkeys(_not_all_acquired(database), ACQUIRED) if count_acquisitions else {}
    found |= dict.fromkeys(_not_all_announced(database, announcements.num_instances), ANNOUNCED)
    found |= dict.fromkeys(_of_studies(database, announcements.growing), MOVING)
    return found | dict.fromkeys(_around(database, moving), MOVING)


def announcements_for(home: Path, dicom: Path) -> Announcements:
    """What an archive announced of the images in this folder; nothing, where it is not the spool's."""
    return read_announcements(home) if dicom == spool_root(home) else Announcements()


def _not_all_announced(database: IndexDatabase, announced: Mapping[str, int]) -> list[str]:
    if not announced:
        return []
    query = "SELECT series, COUNT(DISTINCT sop_instance) FROM contents WHERE series NOT NULL GROUP BY series"
    here: dict[str, int] = dict(database.rows(query))
    return [series for series, number in announced.items() if here.get(series, 0) < number]


def _of_studies(database: IndexDatabase, studies: Collection[str]) -> set[str]:
    if not studies:
        return set()
    rows = database.each("SELECT DISTINCT study, series FROM contents WHERE series NOT NULL")
    return {series for study, series in rows if study in studies}


def _around(database: IndexDatabase, names: Collection[bytes]) -> set[str]:
    """Series of these files; for one that does not tell its series, those of its folder.

    A file that is no DICOM at all does not count: a log file may grow beside the images for ever.
    """
    found: set[str] = set()
    folders: set[bytes] = set()
    for name, series, reason in _contents_of(database, names):
        if series:
            found.add(series)
        elif reason != Reason.NOT_DICOM:
            folders.add(_folder(name))
    if folders:
        rows = database.each(
            "SELECT name, series FROM files JOIN contents USING (content) WHERE series NOT NULL"
        )
        found |= {series for name, series in rows if _folder(name) in folders}
    return found


def _contents_of(database: IndexDatabase, names: Collection[bytes]) -> Iterator[Row]:
    """(name, series, reason) of files; each asked for by itself, unless they are many."""
    query = "SELECT name, series, reason FROM files LEFT JOIN contents USING (content)"
    if len(names) > _MANY:
        wanted = set(names)
        return (row for row in database.each(query) if row[0] in wanted)
    return (row for name in names for row in database.rows(f"{query} WHERE name = ?", name))


def _folder(name: bytes) -> bytes:
    return name.rpartition(b"/")[0]


def _not_all_acquired(database: IndexDatabase) -> list[str]:
    """Series whose images agree on the size of their acquisition, of which there is less in the study.

    An acquisition may have been reconstructed into several series, and its size then is that of all of
    them: so its images are counted in the whole study. Images made of others keep the value of those, so
    only original ones are counted on.
    """
    rows = database.rows(f"WITH here AS ({_ACQUIRED}), said AS ({_SAID}) {_COMPARED}")
    return [series for (series,) in rows]


_ORIGINAL = "images_in_acquisition > 0 AND image_type LIKE 'ORIGINAL%'"
_ACQUIRED = (
    "SELECT study, acquisition_number AS acquisition, images_in_acquisition AS size,"  # noqa: S608
    # Bounded, for a sum that overflows is an error, and what a file says may be anything.
    " SUM(MIN(65536, MAX(1, COALESCE(num_frames, 1)))) AS number"
    f" FROM contents WHERE {_ORIGINAL} GROUP BY 1, 2, 3"
)
_SAID = (
    "SELECT series, MIN(study) AS study, MIN(acquisition_number) AS acquisition,"  # noqa: S608
    f" MIN(images_in_acquisition) AS size FROM contents WHERE {_ORIGINAL} GROUP BY series"
    " HAVING COUNT(DISTINCT images_in_acquisition) = 1 AND COUNT(DISTINCT acquisition_number) <= 1"
    " AND COUNT(DISTINCT study) = 1"
)
_COMPARED = (
    "SELECT series FROM said JOIN here ON here.study = said.study"
    " AND here.acquisition IS said.acquisition AND here.size = said.size WHERE number < said.size"
)
