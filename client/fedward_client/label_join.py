"""Join label rows and images by the declared key (hop 3), and say what does not fit.

`join_labels` is a pure function: it counts and sorts, and decides nothing. `check_join` compares the
counts with the site's limits: below, a warning; above, a refusal. Both name rows by their number in the
label file and never an identifier. No row is ever guessed: a key that finds images of several patients,
or of several studies where the key stands for one study, labels none of them.

How a cohort is labelled, whatever the labels come from (`cohort.py`):

    gathered = gather_labels(site, index, config.labels, unit)          # label_sources.py
    join = join_labels(gathered.labels, wanted, elsewhere=others, quarantined=keys)
    warnings = check_join(join, config.labels.limits, num_unidentified=index.num_unidentified())
    row = join.rows.get(image.content)                                  # None: this image has no label

`wanted` and `others` are anything with `content` and `keys` (`Joinable`): indexed images, or volumes, whose
`keys` leave out SOPInstanceUID. `len(join.unmatched)` and `len(join.ambiguous)` are the counts to show.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fedward_client.labels import (
    JoinLimits,
    LabelFile,
    LabelKey,
    LabelRow,
    join_key,
    list_rows,
    refuse_rows,
)
from fedward_common.errors import CohortError

# A key stands for one object of each of these levels. The accession number and the patient's date are
# what a report has in place of a study's UID: where they find two studies, a label fits one of them.
_LEVELS_OF_ONE: dict[LabelKey, tuple[str, ...]] = {
    "SOPInstanceUID": ("PatientID", "StudyInstanceUID", "SeriesInstanceUID"),
    "SeriesInstanceUID": ("PatientID", "StudyInstanceUID"),
    "StudyInstanceUID": ("PatientID",),
    "AccessionNumber": ("PatientID", "StudyInstanceUID"),
    "PatientID+StudyDate": ("StudyInstanceUID",),
    "PatientID": (),
}
_NOUNS = {"PatientID": "patients", "StudyInstanceUID": "studies", "SeriesInstanceUID": "series"}
_REMEDY_OF_AMBIGUITY = "Use a more specific key: StudyInstanceUID, SeriesInstanceUID or SOPInstanceUID."


class Joinable(Protocol):
    """An image that labels can be joined to."""

    @property
    def content(self) -> str:
        """SHA-256 of its file, hex."""
        ...

    @property
    def keys(self) -> Mapping[Any, str]:
        """DICOM keyword -> identifier: the columns of every key of the label file that it has."""
        ...


@dataclass(frozen=True)
class AmbiguousRow:
    """A row that is not used because it does not say which image it means.

    Args:
        row: the row.
        found: what its key finds, for the screen: "images of 2 studies".
    """

    row: LabelRow
    found: str


@dataclass(frozen=True)
class LabelJoin:
    """Which row belongs to which image, and everything that belongs nowhere.

    Args:
        key_column: the key.
        num_rows: rows of the label file.
        num_images: wanted images.
        rows: content of an image -> its row.
        unmatched: rows that find no image at all.
        quarantined: rows whose image stands in quarantine.
        elsewhere: rows that find only images which this cohort does not want.
        ambiguous: rows that find too much.
        without_row: contents of wanted images that no row finds.
        undecided: contents of wanted images that only ambiguous rows find.
        num_zeros_lost: unmatched rows that would fit if leading zeros or a final .0 were ignored.
    """

    key_column: LabelKey
    num_rows: int
    num_images: int
    rows: Mapping[str, LabelRow] = field(repr=False)
    unmatched: tuple[LabelRow, ...]
    quarantined: tuple[LabelRow, ...]
    elsewhere: tuple[LabelRow, ...]
    ambiguous: tuple[AmbiguousRow, ...]
    without_row: tuple[str, ...]
    undecided: tuple[str, ...]
    num_zeros_lost: int

    @property
    def num_matched_rows(self) -> int:
        """Rows that label at least one image."""
        return len({row.number for row in self.rows.values()})


def join_labels(
    labels: LabelFile,
    images: Iterable[Joinable],
    *,
    elsewhere: Iterable[Joinable] = (),
    quarantined: Collection[str] = (),
) -> LabelJoin:
    """Find the images of each row.

    Args:
        labels: rows and the key that was declared for them.
        images: the wanted images.
        elsewhere: usable images that are not wanted; their rows are no mistake.
        quarantined: keys (`join_key`) of images in quarantine; neither are theirs.
    """
    key = labels.key_column
    images_of: dict[str, list[Joinable]] = defaultdict(list)
    for image in images:
        images_of[join_key(image.keys, key)].append(image)
    num_images = sum(map(len, images_of.values()))
    without_row = [image.content for image in images_of.pop("", [])]
    others = {join_key(image.keys, key) for image in elsewhere}

    contradictory = _contradictory(labels.rows)
    rows: dict[str, LabelRow] = {}
    ambiguous: list[AmbiguousRow] = []
    undecided: list[str] = []
    sorted_out: dict[str, list[LabelRow]] = {"unmatched": [], "quarantined": [], "elsewhere": []}
    seen: set[str] = set()
    for row in labels.rows:
        found = images_of.get(row.key, [])
        if not found:
            known = "elsewhere" if row.key in others else "unmatched"
            sorted_out["quarantined" if row.key in quarantined else known].append(row)
            continue
        fault = "several labels" if row.key in contradictory else _too_much(found, key)
        if fault:
            ambiguous.append(AmbiguousRow(row, fault))
            undecided += () if row.key in seen else (image.content for image in found)
        else:
            rows.update((image.content, row) for image in found)
        seen.add(row.key)
    for value, found in images_of.items():
        without_row += () if value in seen else (image.content for image in found)
    return LabelJoin(
        key_column=key,
        num_rows=len(labels.rows),
        num_images=num_images,
        rows=rows,
        unmatched=tuple(sorted_out["unmatched"]),
        quarantined=tuple(sorted_out["quarantined"]),
        elsewhere=tuple(sorted_out["elsewhere"]),
        ambiguous=tuple(ambiguous),
        without_row=tuple(without_row),
        undecided=tuple(undecided),
        num_zeros_lost=_num_zeros_lost(sorted_out["unmatched"], images_of),
    )


def check_join(
    join: LabelJoin, limits: JoinLimits | None = None, *, num_unidentified: int = 0
) -> tuple[str, ...]:
    """Compare a join with the limits.

    Args:
        join: what was found.
        limits: the site's; by default nothing may be left over.
        num_unidentified: files too damaged to tell their UID: as many rows may miss their image.

    Returns:
        One warning for each kind of misfit within the limits; rows by number.

    Raises:
        CohortError: too many rows without an image, images without a row, or ambiguous rows.
    """
    limits = limits or JoinLimits()
    warnings = []
    ambiguous = [(each.row.number, f"{join.key_column} finds {each.found}") for each in join.ambiguous]
    if len(ambiguous) > limits.ambiguous_rows * join.num_rows:
        refuse_rows(ambiguous, remedy=_REMEDY_OF_AMBIGUITY)
    if ambiguous:
        warnings.append(f"{len(ambiguous)} rows are not used: {list_rows(ambiguous)}")
    unmatched = [(row.number, f"{join.key_column} matches no image") for row in join.unmatched]
    # A file too damaged to tell its UID has a row all the same: as many rows as such files may miss.
    if len(unmatched) > num_unidentified + limits.rows_without_image * join.num_rows:
        refuse_rows(unmatched, remedy=_remedy_of_unmatched(join))
    if unmatched:
        warnings.append(f"{len(unmatched)} rows are not used: {list_rows(unmatched)}")
    if len(join.without_row) > limits.images_without_row * join.num_images:
        raise CohortError(
            f"{len(join.without_row)} of {join.num_images} images have no row in the label file",
            remedy="Add their rows, or move the images away and run: fedward-site cohort index;"
            " or allow a share of them: images_without_row under [labels.limits] in HOME/cohort.toml",
        )
    if join.without_row:
        warnings.append(f"{len(join.without_row)} of {join.num_images} images have no row and are not used")
    return tuple(warnings)


def _contradictory(rows: Sequence[LabelRow]) -> set[str]:
    """Keys that have several rows with different labels; the label file has none, reports may."""
    label_of: dict[str, str] = {}
    return {row.key for row in rows if label_of.setdefault(row.key, row.label) != row.label}


def _too_much(images: Sequence[Joinable], key: LabelKey) -> str:
    for keyword in _LEVELS_OF_ONE[key]:
        distinct = {image.keys.get(keyword) for image in images}
        if len(distinct) > 1:
            return f"images of {len(distinct)} {_NOUNS[keyword]}"
    return ""


def _num_zeros_lost(unmatched: Sequence[LabelRow], images_of: Mapping[str, object]) -> int:
    """Count rows whose number a program for tables may have changed: 00123 becomes 123 or 123.0."""
    if not unmatched:
        return 0
    shortened = {key.lstrip("0") for key in images_of}
    return sum(row.key.removesuffix(".0").lstrip("0") in shortened for row in unmatched)


def _remedy_of_unmatched(join: LabelJoin) -> str:
    remedy = (
        "Remove these rows, or add their images and run: fedward-site cohort index;"
        " or allow a share of them: rows_without_image under [labels.limits] in HOME/cohort.toml"
    )
    if not join.num_zeros_lost:
        return remedy
    return (
        f"{join.num_zeros_lost} of these rows fit if leading zeros or a final .0 are ignored, which a "
        f"spreadsheet may have changed: format the key column as text. Else: {remedy[0].lower()}{remedy[1:]}"
    )
