"""The scan of raw bytes: what is hidden is found, what is not there is not, bombs end it."""

from __future__ import annotations

import gzip
import io
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)

from fedward_client.dicom import byte_scan
from fedward_client.dicom.byte_scan import Leak, scan
from fedward_client.dicom.deidentify import ExportOptions, make_copy
from fedward_client.dicom.identifiers import Identifier, SourceText
from fedward_client.dicom.needles import NeedleSet, needles_of
from fedward_client.dicom.refusal import Reason, UnusableImageError
from tests.builders import a_dataset, a_dicom, encode

NAME = "Kowalczyk^Bronislawa"


def needles(*identifiers: Identifier) -> NeedleSet:
    return needles_of(SourceText(identifiers or (Identifier("PatientName", "name", NAME),), frozenset(), 0))


def notations(data: bytes, *identifiers: Identifier) -> set[tuple[str, str]]:
    return {(leak.notation, leak.zone) for leak in scan(data, needles(*identifiers))}


def with_text(text: bytes, syntax: str = ImplicitVRLittleEndian) -> bytes:
    """A file that holds these bytes in an element in front of its pixels."""
    dataset = a_dataset()
    dataset.add_new(0x00091001, "UN", text.ljust(40, b" "))
    return encode(dataset, syntax)


@pytest.mark.parametrize(
    ("hidden", "notation"),
    [
        (b"KOWALCZYK", "text"),
        (b"Bronislawa Kowalczyk", "text"),
        ("Kowalczyk".encode("utf-16-le"), "utf-16"),
        ("KOWALCZYK".encode("utf-16-be"), "utf-16"),
        (b"S293YWxjenlrXkJyb25pc2xhd2E", "base64"),
        (b"4B6F77616C637A796B", "hex"),
        (b"kyzclawok", "reversed"),
        (zlib.compress(b"a long text about Kowalczyk, compressed " * 3), "text"),
        (gzip.compress(b"a long text about Kowalczyk, compressed " * 3), "text"),
    ],
)
def test_name_is_found_in_front_of_the_pixels(hidden: bytes, notation: str) -> None:
    assert (notation, "header") in notations(with_text(hidden))


def test_name_is_found_in_files_that_are_deflated_or_no_dicom() -> None:
    assert ("text", "header") in notations(with_text(b"Kowalczyk", DeflatedExplicitVRLittleEndian))
    assert ("text", "header") in notations(b"a letter about Mrs Kowalczyk")
    assert notations(b"") == set()


def test_name_among_pixels_is_found_even_across_fragments() -> None:
    plain = a_dicom(np.frombuffer(b"Kowalczyk".ljust(256, b"\x80"), np.uint8).reshape(16, 16))
    assert ("text", "pixels") not in notations(plain[:-256] + bytes(256))
    assert ("text", "pixels") in notations(plain.replace(b"Kowalczyk", b"Kowalczyk"))
    dataset = dcmread(io.BytesIO(plain))
    dataset.PixelData = encapsulate([b"\x01Kowal", b"czyk\x03\x04"], has_bot=False)
    dataset["PixelData"].is_undefined_length = True
    assert ("text", "pixels") in notations(encode(dataset, RLELossless))


@pytest.mark.parametrize(
    ("start", "marker", "end"),
    [
        (b"\xff\xd8", b"\xff\xfe", b"\xff\xda"),
        (b"\xff\xd8", b"\xff\xe1", b"\xff\xda"),
        (b"\xff\x4f", b"\xff\x64", b"\xff\x90"),
    ],
    ids=["JPEG comment", "JPEG Exif", "JPEG 2000 comment"],
)
def test_short_name_in_a_comment_of_the_codestream_is_found(start: bytes, marker: bytes, end: bytes) -> None:
    short = Identifier("PatientName", "name", "Kowal^Ann")
    text = b"made for Kowal"
    stream = (
        start + marker + (len(text) + 2).to_bytes(2, "big") + text + end + b"\x00\x04\x01Kowal\x02\x03\x04"
    )
    dataset = a_dataset()
    dataset.PixelData = encapsulate([stream], has_bot=False)
    dataset["PixelData"].is_undefined_length = True
    assert notations(encode(dataset, JPEG2000Lossless), short) == {("text", "header")}
    dataset.PixelData = encapsulate([stream.replace(text, b"made for whom?")], has_bot=False)
    assert notations(encode(dataset, JPEG2000Lossless), short) == set()


def test_own_words_of_the_exporter_do_not_condemn_a_patient_called_like_them() -> None:
    clean = Identifier("PatientName", "name", "Clean^Option")
    data = with_text(b"Clean Pixel Data Option")
    assert scan(data, needles(clean))
    assert scan(data, needles(clean), [b"Clean Pixel Data Option"]) == ()


@pytest.mark.parametrize(
    ("kind", "text", "hidden"),
    [
        ("date", "19531122", b"22.11.1953"),
        ("date", "19531122", b"Nov 22, 1953"),
        ("date", "19531122", b"22-Nov-53"),
        ("date", "1953.11.22", b"19531122"),
        ("time", "101137.25", b"101137"),
        ("uid", "1.2.826.0.1.98765", b"1.2.826.0.1.98765"),
        ("text", "MRN-0048151623", b"48151623"),
        ("text", "Marienhospital Witten", b"MARIENHOSPITAL WITTEN"),
    ],
)
def test_other_kinds_are_found_in_their_spellings(kind: str, text: str, hidden: bytes) -> None:
    identifier = Identifier("Some", kind, text)  # type: ignore[arg-type]
    assert scan(with_text(b"x " + hidden + b" x"), needles(identifier))
    assert scan(with_text(b"nothing of the kind"), needles(identifier)) == ()


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("text", "1"),
        ("text", "11111"),
        ("text", "HEAD"),
        ("text", "0042"),
        ("name", "Anonymous"),
        ("name", "^"),
    ],
)
def test_what_is_too_short_or_too_common_is_counted_not_searched(kind: str, text: str) -> None:
    found = needles(Identifier("Some", kind, text))  # type: ignore[arg-type]
    assert (found.num_searched, found.num_not_searched) == (0, 1)


def test_part_of_a_longer_word_or_number_is_no_find() -> None:
    assert scan(with_text(b"Leeward Islands"), needles(Identifier("PatientName", "name", "Lee^Ann"))) == ()
    assert scan(with_text(b"1234567890"), needles(Identifier("PatientID", "text", "34567"))) == ()


def test_more_than_may_be_inflated_is_not_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_scan, "MAX_INFLATED_BYTES", 2**16)
    for bomb in (
        with_text(zlib.compress(bytes(2**20))),
        encode(a_dataset(PixelData=bytes(2**20)), DeflatedExplicitVRLittleEndian),
    ):
        with pytest.raises(UnusableImageError) as caught:
            scan(bomb, needles())
        assert caught.value.reason is Reason.OVER_LIMIT


def test_deflated_bomb_is_refused_before_it_is_inflated() -> None:
    """256 MiB of zeros in 260 KB; a parser that inflates it whole takes that and more."""
    small = encode(a_dataset(BurnedInAnnotation="NO"), DeflatedExplicitVRLittleEndian)
    start = small.index(b"\x02\x00\x10\x00")
    body_at = start + 8 + len(DeflatedExplicitVRLittleEndian) + len(DeflatedExplicitVRLittleEndian) % 2
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    head = b"\x09\x00\x01\x10OB\x00\x00" + (2**28).to_bytes(4, "little")
    bomb = b"".join((deflater.compress(head), *(deflater.compress(bytes(2**20)) for _ in range(256))))
    with pytest.raises(UnusableImageError):
        make_copy(small[:body_at] + bomb + deflater.flush(), bytes(32), ExportOptions())


def test_deflated_file_is_copied_plainly_and_proven() -> None:
    data = encode(a_dataset(PatientName=NAME, BurnedInAnnotation="NO"), DeflatedExplicitVRLittleEndian)
    copy = make_copy(data, bytes(32), ExportOptions())
    dataset = dcmread(io.BytesIO(copy.data))
    assert dataset.file_meta.TransferSyntaxUID.is_deflated is False
    assert dataset.PixelData == a_dataset().PixelData
    assert scan(copy.data, needles()) == ()


@given(
    st.text(
        st.characters(codec="utf-8", exclude_categories=("Cc", "Cf", "Cn", "Co")), min_size=4, max_size=40
    ),
    st.binary(max_size=60),
    st.binary(max_size=60),
)
def test_every_text_that_is_searched_for_is_found(text: str, before: bytes, behind: bytes) -> None:
    wanted = needles(Identifier("PatientComments", "text", text.strip()))
    if wanted.num_searched:
        assert scan(before + b" " + text.strip()[:64].encode() + b" " + behind, wanted)


@given(st.binary(max_size=400))
def test_no_bytes_make_the_scan_raise_anything_else(data: bytes) -> None:
    assert isinstance(scan(data, needles()), tuple)


def test_leak_says_nothing_about_the_value() -> None:
    (leak, *_) = scan(with_text(b"Kowalczyk"), needles())
    assert leak == Leak("PatientName", "text", "header")
    assert "owalczyk" not in f"{leak} {needles()} {needles().needles[0][0]}".lower()


def test_more_values_than_any_real_file_has_cannot_be_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedward_client.dicom.identifiers.MAX_IDENTIFIERS", 2)
    data = a_dicom(PatientName=NAME, PatientComments="one more", AccessionNumber="and another")
    with pytest.raises(UnusableImageError) as caught:
        make_copy(data, bytes(32), ExportOptions())
    assert caught.value.reason is Reason.MALFORMED
