"""A PACS whose answers have no end, or swell: over a real connection, in little memory and time."""

from __future__ import annotations

import gzip
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, BinaryIO, cast

import pytest

from fedward_client.sources.dicomweb import DicomwebArchive
from fedward_client.sources.retrieval import Arrival, Listed, Series
from fedward_client.sources.settings import DicomwebConfig
from fedward_common.errors import FederationError

MIB = 2**20
PART = b"--b\r\nContent-Type: application/dicom\r\n\r\nno image\r\n"


@contextmanager
def a_pacs(
    body: Callable[[BinaryIO], None], content_type: str, encoding: str = "identity"
) -> Iterator[DicomwebArchive]:
    """A PACS that answers everything with the same."""

    class Answering(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Encoding", encoding)
            self.end_headers()
            with suppress(OSError):  # the site has seen enough
                body(cast(BinaryIO, self.wfile))

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        config = DicomwebConfig(
            kind="dicomweb", url=f"http://127.0.0.1:{server.server_port}", max_object_mb=8, timeout_s=5
        )
        archive = DicomwebArchive(config)
        try:
            yield archive
        finally:
            archive.close()
            server.shutdown()
            thread.join()


def for_ever(sink: BinaryIO) -> None:
    while True:
        sink.write(PART * 1000)


def swelling(sink: BinaryIO) -> None:
    """Half a gigabyte of zeros in half a megabyte."""
    block = gzip.compress(bytes(64 * MIB))
    for _ in range(8):
        sink.write(block)


SERIES = Series(study="1.2.3", uid="1.2.3.4")


class Nowhere:
    """A spool that gets nothing, for nothing that comes was asked for."""

    def __init__(self) -> None:
        self.manifest = self

    def among(self, _uids: object) -> dict[str, object]:
        return {}


def test_a_series_without_end_is_read_only_as_far_as_it_can_be_one() -> None:
    listed = [Listed("", f"1.2.3.4.{number}") for number in range(3)]
    arrival = Arrival(cast(Any, Nowhere()), {each.uid: each for each in listed})
    with a_pacs(for_ever, 'multipart/related; type="application/dicom"; boundary=b') as archive:
        archive.retrieve_series(SERIES, listed, arrival)

    assert arrival.wanted == {each.uid for each in listed}


@pytest.mark.parametrize("content_type", ["application/dicom+json", "application/dicom"])
def test_an_answer_that_swells_fills_no_memory(content_type: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    arrival = Arrival(cast(Any, Nowhere()), {"1.2.3.4.5": Listed("", "1.2.3.4.5")})
    with a_pacs(swelling, content_type, "gzip") as archive, suppress(FederationError):
        if content_type.endswith("json"):
            archive.instances(SERIES)
        else:
            archive.retrieve_series(SERIES, [Listed("", "1.2.3.4.5")], arrival)

    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 256 * MIB
