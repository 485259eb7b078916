"""What stands in quarantine, as its operator reads it: each study with a reason and a remedy (hop 3).

A study goes by its pseudonym; a file that does not even tell its study goes by its digest. File names are
given only where the operator asks for them at the terminal: a name may be a patient's.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fedward_client.cohort import asked_modalities
from fedward_client.cohort_file import CohortFile, read_cohort_file
from fedward_client.cohort_units import Selected, select_units
from fedward_client.dicom.refusal import Reason
from fedward_client.index_records import QuarantinedContent
from fedward_client.index_store import CaseIndex
from fedward_client.label_sources import gather_labels
from fedward_client.pseudonyms import load_pseudonym_key, study_code_of
from fedward_client.site_data import SiteData
from fedward_common.errors import CohortError

_MANY_STRAYS = 20
"""More files than these that do not tell their study make one line for each reason."""


@dataclass(frozen=True)
class QuarantineRow:
    """One reason for which something of one study is not used.

    Args:
        study: pseudonym; of a file that does not tell its study, the digest of its content; "" when the
            file cannot even be read, or when there are many of the kind.
        used: other images of these series are used all the same.
        reason: from the closed list.
        meaning: in one sentence.
        num_files: for this reason.
        remedy: what the operator can do.
        names: of these files, sorted, where they were asked for.
    """

    study: str
    used: bool
    reason: Reason
    meaning: str
    num_files: int
    remedy: str
    names: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Standing:
    """What a site's files amount to, in numbers.

    Args:
        num_images: distinct usable images, whether or not the cohort wants them.
        quarantined: reason -> files that are not used.
        left_out: reason -> files that are left out of volumes that are used.
    """

    num_images: int
    quarantined: Mapping[str, int]
    left_out: Mapping[str, int]

    @property
    def num_quarantined(self) -> int:
        """Files that are not used."""
        return sum(self.quarantined.values())

    @property
    def num_left_out(self) -> int:
        """Files that are left out of volumes that are used."""
        return sum(self.left_out.values())


def standing_of(site: SiteData) -> Standing:
    """Count what `quarantine_rows` lists.

    Raises:
        CohortError: the index cannot be read.
        UsageError: HOME/cohort.toml is not sound.
    """
    file = read_cohort_file(site.home)
    with CaseIndex(site.home) as index:
        selected = select_units(index, file, asked_modalities(file, None))
        refused = [*selected.quarantined, *_refused_labels(site, index, file, selected)]
        unread = _unread(site, index)
    used = {content for unit in selected.units for content, _ in unit.parts}
    quarantined = _count(refused)
    for reason, names in unread.items():
        quarantined[reason.value] += len(names)
    return Standing(len(used) + len(selected.others), quarantined, _count(selected.left_out))


def _count(entries: Iterable[QuarantinedContent]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for entry in entries:
        counts[entry.reason.value] += entry.num_files
    return counts


def quarantine_rows(site: SiteData, *, names: bool = False) -> list[QuarantineRow]:
    """Everything that is refused, by the index, the gate or the geometry of a series.

    Args:
        site: whose.
        names: also look up the files' names.

    Raises:
        CohortError: the index cannot be read.
        UsageError: HOME/cohort.toml is not sound.
    """
    file = read_cohort_file(site.home)
    key = load_pseudonym_key(site.home)
    groups: dict[tuple[str, bool, Reason, str], list[QuarantinedContent]] = defaultdict(list)
    with CaseIndex(site.home) as index:
        selected = select_units(index, file, asked_modalities(file, None))
        refused = (*selected.quarantined, *_refused_labels(site, index, file, selected))
        strays = Counter(entry.reason for entry in refused if not entry.study)
        for used, listed in ((False, refused), (True, selected.left_out)):
            for entry in listed:
                study = study_code_of(key, entry.study) if entry.study else entry.content
                if not entry.study and strays[entry.reason] > _MANY_STRAYS:
                    study = ""
                groups[study, used, entry.reason, entry.kind].append(entry)
        rows = []
        for (study, used, reason, kind), entries in sorted(groups.items()):
            found = {name for entry in entries for name in (index.names_of(entry.content) if names else ())}
            num_files = sum(entry.num_files for entry in entries)
            rows.append(_row(study, reason, kind, num_files, found, used=used))
        unread = _unread(site, index)
    rows += [
        _row("", reason, "", len(found), set(found if names else ())) for reason, found in unread.items()
    ]
    return rows


def _unread(site: SiteData, index: CaseIndex) -> dict[Reason, list[bytes]]:
    """Names of files that could not be read: some may not be, others are no longer there."""
    found: dict[Reason, list[bytes]] = {}
    for name in index.unreadable_names():
        is_there = os.path.lexists(os.path.join(os.fsencode(site.dicom), name))  # noqa: PTH118 - bytes
        found.setdefault(Reason.UNREADABLE if is_there else Reason.CHANGED, []).append(name)
    return found


def _row(
    study: str, reason: Reason, kind: str, num_files: int, names: set[bytes], *, used: bool = False
) -> QuarantineRow:
    return QuarantineRow(
        study=study,
        used=used,
        reason=reason,
        meaning=f"{reason.meaning} ({kind})" if kind else reason.meaning,
        num_files=num_files,
        remedy=reason.remedy,
        names=tuple(os.fsdecode(name) for name in sorted(names)),
    )


def _refused_labels(
    site: SiteData, index: CaseIndex, file: CohortFile, selected: Selected
) -> list[QuarantinedContent]:
    """Reports, segmentations and structure sets that label nothing; a label file has no such thing."""
    if file.labels.source == "csv":
        return []
    volumes = [unit.geometry for unit in selected.units if unit.geometry is not None]
    try:
        gathered = gather_labels(site, index, file.labels, volumes if file.unit == "volume" else None)
    except CohortError:  # told by `cohort index`; what is refused is listed all the same
        return []
    return index.refused(dict(gathered.refused))
