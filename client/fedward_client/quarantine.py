"""What stands in quarantine, as its operator reads it: each study with a reason and a remedy (hop 3).

A study goes by its pseudonym; a file that does not even tell its study goes by its digest. File names are
given only where the operator asks for them at the terminal: a name may be a patient's.
"""

from __future__ import annotations

import os
from collections import defaultdict
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


@dataclass(frozen=True)
class QuarantineRow:
    """One reason for which something of one study is not used.

    Args:
        study: pseudonym; of a file that does not tell its study, the digest of its content; "" when the
            file cannot even be read.
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
        for used, listed in ((False, refused), (True, selected.left_out)):
            for entry in listed:
                study = study_code_of(key, entry.study) if entry.study else entry.content
                groups[study, used, entry.reason, entry.kind].append(entry)
        rows = []
        for (study, used, reason, kind), entries in sorted(groups.items()):
            found = {name for entry in entries for name in (index.names_of(entry.content) if names else ())}
            num_files = sum(entry.num_files for entry in entries)
            rows.append(_row(study, reason, kind, num_files, found, used=used))
        unreadable = index.unreadable_names()
    if unreadable:
        rows.append(_row("", Reason.UNREADABLE, "", len(unreadable), set(unreadable if names else ())))
    return rows


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
