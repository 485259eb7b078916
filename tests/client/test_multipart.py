"""What a PACS sends, read piece by piece: parts of an answer, and the heads of files."""

from __future__ import annotations

import zlib
from io import BytesIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.data import get_testdata_file

from fedward_client.sources.multipart import BrokenAnswerError, boundary_of, read_parts
from fedward_client.sources.part10 import Instance, NotPart10Error, is_uid, sop_instance_of, split_file
from tests.builders import a_dicom

PARTS = (b"first\r\n--almost", b"", b"\r\n--edge but longer" * 30)


def an_answer(parts: tuple[bytes, ...], *, declared: bool = True) -> bytes:
    heads = [b"Content-Length: %d\r\n" % len(part) if declared else b"" for part in parts]
    body = b"".join(
        b"--edge\r\nContent-Type: application/dicom\r\n%s\r\n%s\r\n" % (head, part)
        for head, part in zip(heads, parts, strict=True)
    )
    return b"preamble\r\n" + body.replace(b"edge but", b"edg3 but") + b"--edge--\r\n"


def cut(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


@pytest.mark.parametrize("size", [1, 2, 7, 64, 100_000])
def test_parts_are_the_same_however_the_answer_is_cut(size: int) -> None:
    found = list(read_parts(cut(an_answer(PARTS), size), b"edge", 10_000))

    assert [bytes(part.content or b"") for part in found] == [
        part.replace(b"edge but", b"edg3 but") for part in PARTS
    ]
    assert all(part.is_whole for part in found)


def test_a_part_over_the_limit_is_read_over() -> None:
    answer = an_answer((b"x" * 5000, b"small"))
    large, small = read_parts(cut(answer, 512), b"edge", 100)

    assert (large.content, large.declared_length, bytes(small.content or b"")) == (None, 5000, b"small")


def test_a_part_with_fewer_bytes_than_announced_is_not_whole() -> None:
    answer = an_answer((b"12345",)).replace(b"Content-Length: 5", b"Content-Length: 9")
    (part,) = read_parts([answer], b"edge", 100)

    assert not part.is_whole


@pytest.mark.parametrize("length", [0, 5, 30, 60, -9, -3])
def test_an_answer_that_ends_early_is_known(length: int) -> None:
    with pytest.raises(BrokenAnswerError):
        list(read_parts([an_answer(PARTS)[:length]], b"edge", 10_000))


def test_a_part_without_a_head_is_refused() -> None:
    with pytest.raises(BrokenAnswerError, match="head"):
        list(read_parts([b"--edge\r\n" + b"x" * 50_000], b"edge", 10**6))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400), st.integers(1, 50))
def test_no_bytes_do_harm(data: bytes, size: int) -> None:
    try:
        for part in read_parts(cut(b"--edge\r\n" + data, size), b"edge", 100):
            assert part.content is None or len(part.content) <= 100
    except BrokenAnswerError:
        pass


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        ('multipart/related; type="application/dicom"; boundary="a b"', b"a b"),
        ("multipart/related", None),
        ("application/dicom", None),
        ("", None),
    ],
)
def test_boundary_is_found(content_type: str, boundary: bytes | None) -> None:
    assert boundary_of(content_type) == boundary


@pytest.mark.parametrize(
    "name", ["CT_small.dcm", "MR_small_RLE.dcm", "image_dfl.dcm", "MR_small_bigendian.dcm"]
)
def test_head_is_taken_off_and_a_new_one_written(name: str) -> None:
    path = get_testdata_file(name, download=False)
    assert path is not None
    with open(path, "rb") as file:  # noqa: PTH123 - pydicom gives a text
        data = file.read()
    instance = split_file(data)
    before, after = dcmread(BytesIO(data)), dcmread(BytesIO(instance.head + bytes(instance.dataset)))

    assert instance.sop_instance == str(before.file_meta.MediaStorageSOPInstanceUID)
    assert sop_instance_of(instance) == str(before.SOPInstanceUID)
    assert after == before
    assert after.file_meta.TransferSyntaxUID == before.file_meta.TransferSyntaxUID
    assert set(after.preamble or b"") == {0}
    assert "SourceApplicationEntityTitle" not in after.file_meta


def test_dataset_without_a_uid_says_nothing() -> None:
    data = a_dicom()
    instance = split_file(data)
    for dataset in (b"", b"\x08\x00", bytes(instance.dataset[:12]), b"\x10" * 100):
        for syntax in ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99"):
            assert sop_instance_of(Instance("1.2", "1.3", syntax, dataset)) is None
    deflated = zlib.compressobj(wbits=-15)
    small = deflated.compress(bytes(10**6)) + deflated.flush()
    assert sop_instance_of(Instance("1.2", "1.3", "1.2.840.10008.1.2.1.99", small)) is None


@pytest.mark.parametrize("length", [0, 100, 131, 140, 180, 250])
def test_a_file_cut_in_its_head_is_refused(length: int) -> None:
    with pytest.raises(NotPart10Error):
        split_file(a_dicom()[:length])


def test_a_head_that_claims_to_be_endless_is_refused() -> None:
    data = bytearray(a_dicom())
    data[140:144] = b"\xff\xff\xff\x7f"
    data[136:140] = b"OB\0\0"
    with pytest.raises(NotPart10Error):
        split_file(bytes(data))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_no_head_does_harm(data: bytes) -> None:
    with pytest.raises(NotPart10Error):
        split_file(bytes(128) + b"DICM" + data)


def test_uids_are_numbers_and_points() -> None:
    assert is_uid("1.2.840")
    for text in ("", "1", "1.2.", "1..2", "1.a", "1.2\n", "1." + "2" * 63, "../1.2"):
        assert not is_uid(text)
