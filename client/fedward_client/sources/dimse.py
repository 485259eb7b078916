"""A PACS over DIMSE: C-FIND to search, study root, from studies down to instances (hop 1).

Keys are matched as few PACS get wrong: one value a query, a date range, or a UID. Whatever a PACS answers is
taken as text of a closed form, or not at all.

Source: DICOM PS3.4 C.4.1 and C.6.2 (study root query).
"""

from __future__ import annotations

from collections.abc import Iterator

from pydicom.dataset import Dataset
from pynetdicom.association import Association

from fedward_client.sources.association import associate
from fedward_client.sources.dimse_retrieve import MAX_CLASSES, GetWay, MoveWay
from fedward_client.sources.dimse_status import PENDING, code_of, failed, hung_up, may_not
from fedward_client.sources.part10 import is_uid
from fedward_client.sources.retrieval import Arrival, Listed, Series, Study
from fedward_client.sources.settings import DimseConfig, Selection

FIND = "1.2.840.10008.5.1.4.1.2.2.1"  # study root
_MAX_MATCHES = 10_000_000


class DimseArchive:
    """A PACS reached over DIMSE, with C-GET or C-MOVE as the settings say.

    Args:
        config: where it is and who we are, paths resolved.

    Raises:
        UsageError: for C-MOVE, the address to listen on cannot be used.
        IdentityError: a certificate named in the settings cannot be used.
    """

    def __init__(self, config: DimseConfig) -> None:
        self._config = config
        self._searching: Association | None = None
        self._was_answered = False  # on this association
        self._way: GetWay | MoveWay = MoveWay(config) if config.retrieve == "move" else GetWay(config)

    def close(self) -> None:
        """End all associations, and stop listening."""
        if self._searching is not None and self._searching.is_established:
            self._searching.release()
        self._way.close()

    def ask_one(self) -> None:
        """Search for a study that cannot exist, to see whether this site may search."""
        list(self._find(_identifier("STUDY", StudyInstanceUID="1.2.3.4.5.6.7.8.9.0")))

    def may_retrieve(self) -> None:
        """See whether the PACS lets this site retrieve in the way of the settings.

        Raises:
            IdentityError: it does not.
        """
        self._way.open(())

    def studies(self, selection: Selection) -> Iterator[Study]:
        """Studies that the selection may take, one query for each value that a query holds one of."""
        for keys in selection.study_keys():
            wanted = {"NumberOfStudyRelatedInstances": None, "NumberOfStudyRelatedSeries": None}
            for row in self._find(_identifier("STUDY", **{"StudyInstanceUID": "", **wanted, **keys})):
                if uid := _uid(row, "StudyInstanceUID"):
                    yield Study(
                        uid,
                        _number(row, "NumberOfStudyRelatedInstances"),
                        _number(row, "NumberOfStudyRelatedSeries"),
                    )

    def series(self, study: Study) -> list[Series]:
        """All series of a study."""
        keys = {"SeriesInstanceUID": "", "Modality": "", "BodyPartExamined": ""}
        rows = self._find(
            _identifier("SERIES", StudyInstanceUID=study.uid, NumberOfSeriesRelatedInstances=None, **keys)
        )
        return [
            Series(
                study=study.uid,
                uid=uid,
                modality=_text(row, "Modality"),
                body_part=_text(row, "BodyPartExamined"),
                num_instances=_number(row, "NumberOfSeriesRelatedInstances"),
            )
            for row in rows
            if (uid := _uid(row, "SeriesInstanceUID"))
        ]

    def instances(self, series: Series) -> list[Listed]:
        """All instances of a series."""
        keys = {"SOPInstanceUID": "", "SOPClassUID": ""}
        rows = self._find(
            _identifier("IMAGE", StudyInstanceUID=series.study, SeriesInstanceUID=series.uid, **keys)
        )
        return [Listed(_uid(row, "SOPClassUID"), uid) for row in rows if (uid := _uid(row, "SOPInstanceUID"))]

    def retrieve_series(self, series: Series, listed: list[Listed], arrival: Arrival) -> None:
        """Have a whole series sent; one of more SOP classes than there are contexts for comes in groups."""
        classes = sorted({each.sop_class for each in listed if each.sop_class})
        query = _identifier("SERIES", StudyInstanceUID=series.study, SeriesInstanceUID=series.uid)
        for start in range(0, max(1, len(classes)), MAX_CLASSES):
            self._way.retrieve(query, classes[start : start + MAX_CLASSES], arrival)

    def retrieve_instance(self, series: Series, listed: Listed, arrival: Arrival) -> None:
        """Have one instance sent."""
        query = _identifier(
            "IMAGE", StudyInstanceUID=series.study, SeriesInstanceUID=series.uid, SOPInstanceUID=listed.uid
        )
        self._way.retrieve(query, [listed.sop_class] if listed.sop_class else [], arrival)

    def _find(self, query: Dataset) -> Iterator[Dataset]:
        """All matches of one query.

        Raises:
            PacsAwayError: the association broke off, or the PACS is out of resources.
            IdentityError: the PACS does not let this site search.
            CohortError: any other refusal.
        """
        if self._searching is None or not self._searching.is_established:
            self._searching, self._was_answered = associate(self._config, [FIND]), False
        if not self._searching.accepted_contexts:
            raise may_not("search", self._config)
        num_matches = 0
        for status, row in self._searching.send_c_find(query, FIND):
            if "Status" not in status and not self._was_answered:
                raise hung_up(self._config)
            code, self._was_answered = code_of(status), True
            if code in PENDING:
                num_matches += 1
                if row is None or num_matches > _MAX_MATCHES:
                    self._searching.abort()
                    raise failed("search", code, self._config)
                yield row
            elif code != 0:
                raise failed("search", code, self._config)


def _identifier(level: str, **keys: str | None) -> Dataset:
    query = Dataset()
    query.QueryRetrieveLevel = level
    for keyword, value in keys.items():
        setattr(query, keyword, value)
    return query


def _text(row: Dataset, keyword: str) -> str:
    try:
        value = row.get(keyword)
    except Exception:  # a value that does not parse: as good as none
        return ""
    return value.strip(" \0") if isinstance(value, str) else ""


def _uid(row: Dataset, keyword: str) -> str:
    text = _text(row, keyword)
    return text if is_uid(text) else ""


def _number(row: Dataset, keyword: str) -> int | None:
    try:
        value = row.get(keyword)
        return int(value) if value is not None and 0 <= int(value) < 2**40 else None
    except Exception:  # the same
        return None
