"""The SQLite file behind the index: which file holds which content, and what is known of it.

Mode 0600, in the site's home. It is the only place where file names, UIDs and patient numbers are
kept. A file holds a content (SHA-256); a content is a usable image, or stands in quarantine with a
reason. So copies of one image count once, and a bad file is known by what it holds. What is long and
seldom asked for, the places of slices and the signs that the gate weighs, lies in tables of its own.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from fedward_client import index_schema
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.index_database import INDEX_FILE as INDEX_FILE
from fedward_client.index_database import IndexDatabase
from fedward_client.index_records import (
    IMAGE_COLUMNS,
    ContentRecord,
    FileRecord,
    IndexedImage,
    QuarantinedContent,
    Rule,
)
from fedward_client.labels import LabelKey, columns_of, join_key
from fedward_client.sources.folder import Candidate

_REASON: Mapping[Rule, str] = {"radiograph": "radiograph_reason", "image": "reason"}
_KIND: Mapping[Rule, str] = {"radiograph": "radiograph_kind", "image": "kind"}
_COLUMN = {
    "SOPInstanceUID": "sop_instance",
    "SeriesInstanceUID": "series",
    "StudyInstanceUID": "study",
    "PatientID": "patient",
    "AccessionNumber": "accession",
    "StudyDate": "study_date",
}
# Found when an image is prepared: another window, or single images for volumes, may have a use for it.
_DEPEND_ON_PLAN = (
    *(Reason.DISPLAY_VALUES, Reason.NO_COMMON_WINDOW, Reason.NOT_HOUNSFIELD),
    *(Reason.COLOUR, Reason.MULTI_FRAME),
    *(Reason.DIMENSIONS, Reason.REPEATED_POSITION),
)
# How files of images are called that no longer look like DICOM inside: with the usual endings, without
# any, or after a UID, whose last number then is the ending.
_IMAGE_ENDINGS = (b"", b".dcm", b".dicom", b".ima", b".img")


class CaseIndex:
    """The index of one site; open it with `with`.

    Attributes:
        database: for the queries of `index_arrival`.

    Args:
        home: the site's home; the file is created in it when absent.

    Raises:
        CohortError: the file is not an index, or the disk is full.
    """

    def __init__(self, home: Path) -> None:
        self.database = IndexDatabase(home)

    def __enter__(self) -> CaseIndex:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.database.close()

    def forget_if_outdated(self, decoders: str) -> None:
        """Drop all when the schema changed, and the quarantine when decoders were installed or updated.

        See `index_schema.SCHEMA_VERSION` for when that is.
        """
        known = {name: self.setting(name) for name in ("schema", "decoders")}
        if known == {"schema": index_schema.SCHEMA_VERSION, "decoders": decoders}:
            return
        with self.database.transaction():
            self._forget("reason NOT NULL OR radiograph_reason NOT NULL")
            self._set({"schema": index_schema.SCHEMA_VERSION, "decoders": decoders, "listing": ""})

    def forget_other_plans(self, recipe: str) -> None:
        """Drop what may have been refused only because of another plan's window, size or kind of case.

        Args:
            recipe: digest of what decides now how an image is prepared.
        """
        if self.setting("recipe") == recipe:
            return
        marks = ", ".join("?" * len(_DEPEND_ON_PLAN))
        with self.database.transaction():
            self._forget(f"reason IN ({marks})", *_DEPEND_ON_PLAN)
            self._set({"recipe": recipe, "listing": ""})

    def setting(self, name: str) -> str:
        """A text remembered with the index; "" when there is none."""
        rows = self.database.rows("SELECT value FROM settings WHERE name = ?", name)
        return str(rows[0][0]) if rows else ""

    def remember(self, name: str, value: str) -> None:
        """Remember a text; it is lost with the index."""
        with self.database.transaction():
            self._set({name: value})

    def known_files(self) -> dict[bytes, Candidate]:
        """Files that were read and may be passed over when their size and time are unchanged."""
        rows = self.database.rows("SELECT name, size, mtime_ns FROM files WHERE content IS NOT NULL")
        return {name: Candidate(name, size, mtime_ns) for name, size, mtime_ns in rows}

    def knows(self, content: str) -> bool:
        """Whether a content was parsed before."""
        return bool(self.database.rows("SELECT 1 FROM contents WHERE content = ?", content))

    def record(self, records: Sequence[FileRecord]) -> None:
        """Remember what files hold and what was found in contents not seen before, all or nothing."""
        files = [(each.file.name, each.file.size, each.file.mtime_ns, each.content) for each in records]
        news = [(each.content, each.found) for each in records if each.found is not None]
        contents = [(content, *found.record, found.signs) for content, found in news]
        slices = [(content, found.slices) for content, found in news if found.slices is not None]
        signs = {(found.signs,) for _, found in news if found.signs is not None}
        marks = ", ".join("?" * (1 + len(ContentRecord._fields)))
        write = self.database.write_all
        with self.database.transaction():
            write("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", files)
            write("INSERT OR IGNORE INTO signs (facts) VALUES (?)", sorted(signs))
            # A content met before keeps what was found out since, such as pixels that cannot be decoded.
            write(
                f"INSERT OR IGNORE INTO contents VALUES ({marks}, "  # noqa: S608
                "(SELECT id FROM signs WHERE facts = ?))",
                contents,
            )
            write("INSERT OR IGNORE INTO slices VALUES (?, ?)", slices)

    def settle(self, present: Collection[bytes], listing: str) -> None:
        """Drop files that are gone, contents that no file holds, and judge shared UIDs afresh.

        Args:
            present: names of all files.
            listing: remembered as the setting of this name if all of them are known and were read, so
                that the same listing needs no further look. Another process may be indexing too, with an
                older or newer listing: what it took away is missed here, and the other way round.
        """
        known = (name for (name,) in self.database.rows("SELECT name FROM files"))
        gone = [(name,) for name in known if name not in present]
        kept = "SELECT content FROM files WHERE content NOT NULL"
        with self.database.transaction():
            self.database.write_all("DELETE FROM files WHERE name = ?", gone)
            for table in ("contents", "slices"):
                self.database.write(f"DELETE FROM {table} WHERE content NOT IN ({kept})")  # noqa: S608
            for rule in _REASON:
                self._judge_shared_uids(rule)
            (known_and_read,) = self.database.rows("SELECT COUNT(*), COUNT(content) FROM files")
            whole = known_and_read == (len(present), len(present))
            self._set({"listing": listing if whole else ""})

    def quarantine(self, content: str, error: UnusableImageError) -> None:
        """Take one image out of use until its file, the rules or the decoders change."""
        found = (error.reason.value, error.kind)
        with self.database.transaction():
            self.database.write(
                "UPDATE contents SET reason = ?, kind = ?, radiograph_reason = ?, radiograph_kind = ?"
                " WHERE content = ?",
                *found,
                *found,
                content,
            )

    def images(self, rule: Rule = "radiograph", *, refused: bool = False) -> list[IndexedImage]:
        """Every usable image, or else what of the refused ones is known; in the order of the digest."""
        return self._images(f"{_REASON[rule]} {'NOT NULL' if refused else 'IS NULL'}")

    def objects(self, sop_classes: Collection[str]) -> list[IndexedImage]:
        """Objects of these classes, usable as images or not: segmentations, reports, structures."""
        marks = ", ".join("?" * len(sop_classes))
        return self._images(f"sop_class IN ({marks})", *sop_classes)

    def num_contents(self) -> int:
        """Number of distinct contents, usable or not."""
        return self.database.count("SELECT COUNT(*) FROM contents")

    def num_copies(self) -> int:
        """Files whose content another file, counted already, has too."""
        return self.database.count("SELECT COUNT(content) - COUNT(DISTINCT content) FROM files")

    def quarantined(
        self,
        rule: Rule = "radiograph",
        modalities: Sequence[str] | None = None,
        but: Collection[str] = (),
    ) -> list[QuarantinedContent]:
        """Everything in quarantine, in the order of its content digest.

        Args:
            rule: which refusals count.
            modalities: of these only, and what does not tell its modality; None for all.
            but: SOP classes that are passed over.
        """
        wanted, values = "", [*but]
        if but:
            wanted = f" AND (sop_class IS NULL OR sop_class NOT IN ({', '.join('?' * len(but))}))"
        if modalities is not None:
            marks = ", ".join([*"?" * len(modalities), "''"])
            wanted += f" AND (modality IN ({marks}) OR modality IS NULL)"
            values += modalities
        reason = _REASON[rule]
        rows = self.database.rows(
            f"SELECT content, {reason}, {_KIND[rule]}, COUNT(*), sop_instance, study"  # noqa: S608
            f" FROM contents JOIN files USING (content) WHERE {reason} IS NOT NULL{wanted}"
            " GROUP BY content ORDER BY content",
            *values,
        )
        return [
            QuarantinedContent(content, Reason(reason), kind, count, instance or "", study or "")
            for content, reason, kind, count, instance, study in rows
        ]

    def count_quarantined(self, rule: Rule = "radiograph") -> dict[str, int]:
        """Number of contents in quarantine, by reason."""
        reason = _REASON[rule]
        return dict(
            self.database.rows(
                f"SELECT {reason}, COUNT(*) FROM contents WHERE {reason} NOT NULL"  # noqa: S608
                f" GROUP BY {reason}"
            )
        )

    def count_by_signs(self, rule: Rule = "radiograph") -> dict[int | None, int]:
        """Number of usable images that have the same facts for the gate, by `IndexedImage.signs_id`."""
        return dict(
            self.database.rows(
                f"SELECT signs_id, COUNT(*) FROM contents WHERE {_REASON[rule]} IS NULL"  # noqa: S608
                " GROUP BY signs_id"
            )
        )

    def quarantined_keys(self, key: LabelKey, rule: Rule = "radiograph") -> set[str]:
        """Keys of images in quarantine whose header could be read; their label rows are no mistake."""
        keywords = columns_of(key)
        columns = ", ".join(_COLUMN[keyword] for keyword in keywords)
        rows = self.database.rows(
            f"SELECT DISTINCT {columns} FROM contents WHERE {_REASON[rule]} IS NOT NULL"  # noqa: S608
        )
        found = (join_key(dict(zip(keywords, map(_text, row), strict=True)), key) for row in rows)
        return {value for value in found if value}

    def num_unidentified(self, rule: Rule = "radiograph") -> int:
        """Files that may be images but whose UID cannot be read: as many label rows may be theirs."""
        rows = self.database.rows(
            f"SELECT files.name, contents.{_REASON[rule]} FROM files"  # noqa: S608
            " LEFT JOIN contents USING (content)"
            f" WHERE files.content IS NULL OR (contents.{_REASON[rule]} IS NOT NULL"
            " AND contents.sop_instance IS NULL)"
        )
        stray = Reason.NOT_DICOM.value
        return sum(reason != stray or _called_like_an_image(name) for name, reason in rows)

    def num_unreadable(self) -> int:
        """Files that could not be read at all."""
        return self.database.count("SELECT COUNT(*) FROM files WHERE content IS NULL")

    def file_names(self) -> dict[str, bytes]:
        """For each content, the first file that holds it. Only for reading that file."""
        rows = self.database.rows(
            "SELECT content, MIN(name) FROM files WHERE content NOT NULL GROUP BY content"
        )
        return dict(rows)

    def num_files_of(self, contents: Collection[str]) -> dict[str, int]:
        """Number of files that hold each of these contents, where it is more than one."""
        rows = self.database.rows(
            "SELECT content, COUNT(*) FROM files WHERE content NOT NULL GROUP BY content HAVING COUNT(*) > 1"
        )
        return {content: count for content, count in rows if content in contents}

    def refused(self, reasons: Mapping[str, Reason]) -> list[QuarantinedContent]:
        """Contents that something else than the index refused, in the order of their digest."""
        marks = ", ".join("?" * len(reasons))
        rows = self.database.rows(
            f"SELECT content, COUNT(*), sop_instance, study FROM contents JOIN files USING (content)"  # noqa: S608
            f" WHERE content IN ({marks}) GROUP BY content ORDER BY content",
            *reasons,
        )
        return [
            QuarantinedContent(content, reasons[content], "", count, instance or "", study or "")
            for content, count, instance, study in rows
        ]

    def studies(self) -> dict[str, str]:
        """StudyInstanceUID of each content that tells it. For counting, nowhere else."""
        return dict(self.database.rows("SELECT content, study FROM contents WHERE study NOT NULL"))

    def names_of(self, content: str) -> list[bytes]:
        """Every file that holds a content, for the operator who asks for names."""
        return [name for (name,) in self.database.rows("SELECT name FROM files WHERE content = ?", content)]

    def unreadable_names(self) -> list[bytes]:
        """Files that could not be read, likewise."""
        return [
            name
            for (name,) in self.database.rows("SELECT name FROM files WHERE content IS NULL ORDER BY name")
        ]

    def signs(self) -> dict[int, str]:
        """Facts for the gate as JSON, by `IndexedImage.signs_id`."""
        return dict(self.database.rows("SELECT id, facts FROM signs"))

    def note_arriving(self, series: Mapping[str, str]) -> None:
        """Remember which series are not whole yet, and by what sign; all others are."""
        if series == self.arriving():
            return
        with self.database.transaction():
            self.database.write("DELETE FROM arriving")
            self.database.write_all("INSERT INTO arriving VALUES (?, ?)", series.items())

    def arriving(self) -> dict[str, str]:
        """Series that are not whole yet, and the sign of it; see `index_arrival`."""
        return dict(self.database.rows("SELECT series, kind FROM arriving"))

    def slices_of_series(self, series: str) -> list[tuple[str, str]]:
        """(content, places of its slices as JSON) of the usable images of one series."""
        return self.database.rows(
            "SELECT content, facts FROM contents JOIN slices USING (content)"
            " WHERE series = ? AND reason IS NULL ORDER BY content",
            series,
        )

    def _judge_shared_uids(self, rule: Rule) -> None:
        """Two usable images of one UID: nobody knows which is right. Usually there are none."""
        reason, same = _REASON[rule], Reason.SAME_UID.value
        self.database.write(
            f"UPDATE contents SET {reason} = NULL WHERE {reason} = ?",  # noqa: S608
            same,
        )
        self.database.write(
            f"UPDATE contents SET {reason} = ? WHERE {reason} IS NULL AND sop_instance IN ("  # noqa: S608
            f" SELECT sop_instance FROM contents WHERE {reason} IS NULL"
            " GROUP BY sop_instance HAVING COUNT(*) > 1)",
            same,
        )

    def _images(self, condition: str, *values: str) -> list[IndexedImage]:
        query = f"SELECT content, {', '.join(IMAGE_COLUMNS)} FROM contents WHERE {condition} ORDER BY content"  # noqa: S608
        same: dict[Any, Any] = {}  # one text for each patient, study and scanner, not one for each image
        return [
            IndexedImage(content, *(same.setdefault(value, value) for value in row))
            for content, *row in self.database.each(query, *values)
        ]

    def _forget(self, condition: str, *values: str) -> None:
        """Drop contents, and their files so that they are read again."""
        some = f"SELECT content FROM contents WHERE {condition}"  # noqa: S608
        for table in ("files", "slices", "contents"):
            self.database.write(f"DELETE FROM {table} WHERE content IN ({some})", *values)  # noqa: S608

    def _set(self, values: Mapping[str, str]) -> None:
        self.database.write_all("INSERT OR REPLACE INTO settings VALUES (?, ?)", values.items())


def _text(value: str | None) -> str:
    return value or ""


def _called_like_an_image(name: bytes) -> bool:
    _, ending = os.path.splitext(name)  # noqa: PTH122 - names are bytes
    return ending.lower() in _IMAGE_ENDINGS or ending[1:].isdigit()
