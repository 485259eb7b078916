"""A PACS over DICOMweb: QIDO-RS to search, WADO-RS to retrieve whole instances as they are stored (hop 1).

Searches go through dicomweb-client. Retrieval does not: it would parse each object and write another, and
the bytes of the PACS are what the cohort is known by. A series is one request, read as it arrives. No frame
is ever asked for, and no transfer syntax but the stored one: decoding is ours, in its sandbox.

Source: DICOM PS3.18 8.6 (media types), 10.4 (retrieve), 10.6 (search).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from typing import Any

from dicomweb_client.uri import URI
from dicomweb_client.web import DICOMwebClient

from fedward_client.sources.access import PacsAwayError
from fedward_client.sources.manifest import Refusal
from fedward_client.sources.multipart import BrokenAnswerError, Part, boundary_of, read_parts
from fedward_client.sources.part10 import Instance, NotPart10Error, is_uid, split_file
from fedward_client.sources.retrieval import Arrival, Listed, Series, Study
from fedward_client.sources.settings import DicomwebConfig, Selection
from fedward_client.sources.web_session import AnswerError, PacsSession

_PAGE = 500
_SPARE_PARTS = 16
_STORED_AS_IS = {"Accept": 'multipart/related; type="application/dicom"; transfer-syntax=*'}
_NUM_STUDY_SERIES, _NUM_STUDY_INSTANCES, _NUM_SERIES_INSTANCES = "00201206", "00201208", "00201209"
_STUDY, _SERIES, _INSTANCE, _SOP_CLASS = "0020000D", "0020000E", "00080018", "00080016"
_MODALITY, _BODY_PART = "00080060", "00180015"

Row = dict[str, dict[str, Any]]
"""One match in DICOM JSON (PS3.18 F.2): tag -> value representation and values."""


class DicomwebArchive:
    """A PACS reached over DICOMweb.

    Args:
        config: its address and our credentials, paths resolved.

    Raises:
        IdentityError: a secret or certificate named in the settings cannot be used.
    """

    def __init__(self, config: DicomwebConfig) -> None:
        self._url = config.url
        self._max_object_bytes = config.max_object_bytes
        self._session = PacsSession(config)
        self._client = DICOMwebClient(config.url, session=self._session, timeout=config.timeout_s)
        self._client.set_http_retry_params(retry=False)  # retrieval.py waits, for every kind of source

    def close(self) -> None:
        """End all connections."""
        self._session.close()

    def ask_one(self) -> None:
        """Search for one study, to see whether this site may."""
        self._page(self._client.search_for_studies, 0, limit=1)

    def studies(self, selection: Selection) -> Iterator[Study]:
        """Studies that the selection may take, one query for each value that a query holds one of."""
        fields = ["NumberOfStudyRelatedSeries", "NumberOfStudyRelatedInstances"]
        for filters in selection.study_keys():
            search = partial(self._client.search_for_studies, fields=fields, search_filters=filters)
            for uid, row in self._pages(search, _STUDY, None):
                yield Study(uid, _number(row, _NUM_STUDY_INSTANCES), _number(row, _NUM_STUDY_SERIES))

    def series(self, study: Study) -> list[Series]:
        """All series of a study."""
        fields = ["NumberOfSeriesRelatedInstances", "BodyPartExamined"]
        search = partial(self._client.search_for_series, study.uid, fields=fields)
        return [
            Series(
                study=study.uid,
                uid=uid,
                modality=_text(row, _MODALITY),
                body_part=_text(row, _BODY_PART),
                num_instances=_number(row, _NUM_SERIES_INSTANCES),
            )
            for uid, row in self._pages(search, _SERIES, study.num_series)
        ]

    def instances(self, series: Series) -> list[Listed]:
        """All instances of a series."""
        search = partial(self._client.search_for_instances, series.study, series.uid)
        found = self._pages(search, _INSTANCE, series.num_instances)
        return [Listed(_text(row, _SOP_CLASS), uid) for uid, row in found]

    def retrieve_series(self, series: Series, listed: list[Listed], arrival: Arrival) -> None:
        """Read a whole series in one answer; what is too large or odd is left to `retrieve_instance`."""
        most = 2 * len(listed) + _SPARE_PARTS  # or an answer without end would never be over
        with closing(self._parts(URI(self._url, series.study, series.uid))) as parts:
            for part in islice(parts, most):
                if part.content is not None and part.is_whole:
                    self._keep(part.content, arrival)

    def retrieve_instance(self, series: Series, listed: Listed, arrival: Arrival) -> None:
        """Read one instance, and account for it when it cannot be kept."""
        for part in self._parts(URI(self._url, series.study, series.uid, listed.uid)):
            size = part.declared_length or 0
            if part.content is None:
                arrival.refuse(listed.uid, max(size, self._max_object_bytes + 1), Refusal.TOO_LARGE)
            elif not part.is_whole:
                arrival.refuse(listed.uid, size, Refusal.INCOMPLETE)
            else:
                refusal = self._keep(part.content, arrival)
                if refusal is not None:
                    arrival.refuse(listed.uid, len(part.content), refusal)

    def _keep(self, content: bytearray, arrival: Arrival) -> Refusal | None:
        try:
            instance: Instance = split_file(content)
        except NotPart10Error:
            return Refusal.NOT_DICOM
        return arrival.keep(instance)

    def _parts(self, uri: URI) -> Generator[Part, None, None]:
        """Parts of an answer; none when the PACS has no such object, or not in this form."""
        try:
            with self._session.open(str(uri), dict(_STORED_AS_IS)) as answer:
                pieces = self._session.pieces(answer)
                boundary = boundary_of(answer.headers.get("Content-Type", ""))
                if boundary is None:  # a PACS may send one instance by itself (PS3.18 8.7.3.3)
                    yield _whole(pieces, answer.headers.get("Content-Length", ""), self._max_object_bytes)
                else:
                    yield from read_parts(pieces, boundary, self._max_object_bytes)
        except AnswerError:
            return
        except BrokenAnswerError:
            raise PacsAwayError(
                "the PACS broke off in the middle of an answer",
                remedy="Run it again; if it stays, ask the PACS administrator.",
            ) from None

    def _pages(
        self, search: Callable[..., list[Row]], key: str, num_expected: int | None
    ) -> Iterator[tuple[str, Row]]:
        """Every match with a valid UID, once.

        A PACS may give fewer than it was asked for, or ignore what it was asked for: so it is asked until
        it says nothing new, or until there are as many as it said there were.
        """
        seen: set[str] = set()
        offset = 0
        while True:
            rows = self._page(search, offset)
            offset += len(rows)
            fresh = [(uid, row) for row in rows if is_uid(uid := _text(row, key)) and uid not in seen]
            for uid, row in fresh:
                if uid not in seen:
                    seen.add(uid)
                    yield uid, row
            if not fresh or (num_expected is not None and len(seen) >= num_expected):
                return

    def _page(self, search: Callable[..., list[Row]], offset: int, limit: int = _PAGE) -> list[Row]:
        try:
            rows = search(limit=limit, offset=offset)
        except (ValueError, RecursionError):  # not JSON, or not of this form; the text may quote the answer
            raise _not_dicomweb() from None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise _not_dicomweb()
        return rows


def _whole(pieces: Iterator[bytes], declared: str, limit: int) -> Part:
    content: bytearray | None = bytearray()
    for piece in pieces:
        if content is not None:
            content += piece
            if len(content) > limit:
                content = None
    return Part(content, int(declared) if declared.isdigit() and len(declared) < 19 else None)


def _text(row: Row, tag: str) -> str:
    element = row.get(tag)
    values = element.get("Value") if isinstance(element, dict) else None
    value = values[0] if isinstance(values, list) and values else ""
    return value.strip(" \0") if isinstance(value, str) else ""


def _number(row: Row, tag: str) -> int | None:
    element = row.get(tag)
    values = element.get("Value") if isinstance(element, dict) else None
    value = values[0] if isinstance(values, list) and values else None
    if isinstance(value, str):  # IS comes as a number or, from some, as text
        value = int(value) if value.isascii() and value.isdigit() and len(value) < 12 else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _not_dicomweb() -> AnswerError:
    return AnswerError(
        "the answer to a search is not what a DICOMweb service sends",
        remedy="Check `url` in [source]: the address in front of /studies.",
        status=200,
    )
