"""Hostile headers: whatever the bytes, a result or one of the declared errors, and memory stays as it was.

A few seconds in the suite. `FEDWARD_FUZZ_S=600` goes on for ten minutes: a nightly target.
"""

from __future__ import annotations

import gc
import os
import random
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from fedward_client.dicom import header
from fedward_client.dicom.frames import decode_frames
from fedward_client.dicom.functional_groups import read_frame_facts
from fedward_client.dicom.header import Header, image_refusal_of, pixel_refusal_of, read_header, refusal_of
from fedward_client.dicom.refusal import Reason, UnusableImageError
from tests.builders import a_dataset, canary_elements, encode
from tests.client.fuzzing import UndeclaredError, faults_shown, with_odd_element

FUZZ_S = float(os.environ.get("FEDWARD_FUZZ_S", "5"))
MIB = 2**20

SYNTAXES = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian)
SEEDS = [encode(a_dataset(np.zeros((16, 16), np.uint8)), syntax) for syntax in SYNTAXES]
SEEDS += [encode(a_dataset(None, **canary_elements()), ExplicitVRLittleEndian)]
SEEDS += [encode(a_dataset(), DeflatedExplicitVRLittleEndian)]
_BAITS = (
    *(b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\xff\xff\xff\x7f", b"SQ\x00\x00", b"UN\x00\x00"),
    *(b"\xfe\xff\x00\xe0\xff\xff\xff\xff", b"\xfe\xff\x0d\xe0\x00\x00\x00\x00", b"\xfe\xff\xdd\xe0"),
    *(b"\xe0\x7f\x10\x00", b"1e999\\-0", b"\\\\\\\\", b"\x1b$B", b"NaN", b"999999999999"),
)
_TAGS = st.sampled_from(
    (
        *(0x00080016, 0x00080060, 0x00100020, 0x00280002, 0x00280008, 0x00280010, 0x00280011, 0x00280100),
        *(0x00281050, 0x00281051, 0x00283000, 0x00283010, 0x52009229, 0x52009230, 0x00291010, 0x7FE00010),
    )
)
READERS = (read_header, read_frame_facts, decode_frames)


def try_all(data: bytes) -> None:
    """Read as the product does; anything but a result or a declared error goes through."""
    for read in READERS:
        try:
            with faults_shown():
                found: Any = read(data)
        except UnusableImageError as error:
            texts = f"{error} {error.remedy} {error!r}"
            if error.__cause__ is not None or "CNRY" in texts:
                pytest.fail("the refusal quotes the file")
            continue
        assert "CNRY" not in repr(found)
        if isinstance(found, Header):
            for judge in (refusal_of, image_refusal_of, pixel_refusal_of):
                judge(found)


def an_rle_that_panics() -> bytes:
    """Its second segment runs past the end of the image inside a run: the decoder, in Rust, panics."""
    segments = [b"\x81\0" * 4, b"\x82\0" * 4 + b"\xf0\0" * 40]
    frame = struct.pack("<16I", 2, 64, 64 + len(segments[0]), *[0] * 13) + b"".join(segments)
    return encode(a_dataset(np.zeros((16, 32), np.uint16), PixelData=encapsulate([frame])), RLELossless)


def an_odd_delimiter() -> bytes:
    """An item that ends with a delimiter nobody knows, of which pydicom makes an element without value."""
    numbers = (0xE000, 0xFFFFFFFF), (0xE0FF, 0), (0xE00D, 0)
    item = b"".join(struct.pack("<HHL", 0xFFFE, number, length) for number, length in numbers)
    sequence = struct.pack("<HH2sHL", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF) + item
    data = SEEDS[1]
    place = data.index(b"\x10\0\x20\0LO")
    return data[:place] + sequence + struct.pack("<HHL", 0xFFFE, 0xE0DD, 0) + data[place:]


def a_name_for_a_syntax() -> bytes:
    """A transfer syntax that is the patient's, for the index to describe and never to show."""
    meta = b"".join(
        struct.pack("<HH2sH", 2, number, b"UI", len(uid)) + uid
        for number, uid in ((0x02, b"1.2.CNRY00741\0"), (0x10, b"1.2.840.1CNRY0074123"))
    )
    return bytes(128) + b"DICM" + meta


@pytest.mark.parametrize("make", [an_rle_that_panics, an_odd_delimiter, a_name_for_a_syntax])
def test_what_was_found_once_stays_harmless(make: Callable[[], bytes]) -> None:
    try_all(make())


def test_a_panic_of_a_decoder_is_a_refusal(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnusableImageError) as caught:
        decode_frames(an_rle_that_panics())

    assert "panicked" in capfd.readouterr().err  # which a decoder process writes nowhere
    assert caught.value.reason == Reason.DECODE_FAILED


def test_faults_of_our_own_are_seen_behind_their_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fuzzers are not blind: a fault that hides is shown, one of a damaged file or of pydicom is not."""

    def broken(*_: object) -> None:
        raise KeyError

    with faults_shown(), pytest.raises(UnusableImageError):
        read_header(b"no DICOM" * 50)
    monkeypatch.setattr(header, "_year", broken)
    with pytest.raises(UnusableImageError):
        read_header(SEEDS[1])
    monkeypatch.setattr(broken, "__code__", broken.__code__.replace(co_filename=str(header.__file__)))
    with faults_shown(), pytest.raises(UndeclaredError, match="KeyError"):
        read_header(SEEDS[1])


@st.composite
def elements(draw: st.DrawFn, depth: int = 0) -> bytes:
    """A dataset in explicit or implicit form that is well formed here and there."""
    explicit = draw(st.booleans())
    parts = []
    for tag in sorted(draw(st.lists(_TAGS | st.integers(0, 2**32 - 1), max_size=8))):
        vr = draw(st.sampled_from((b"US", b"DS", b"SQ", b"UN", b"OW", b"LO", b"CS", b"??")))
        value = draw(st.binary(max_size=24))
        if depth < 3 and vr == b"SQ":
            inner = draw(elements(depth=depth + 1))
            value = struct.pack("<HHL", 0xFFFE, 0xE000, len(inner)) + inner
        length = draw(st.just(len(value)) | st.sampled_from((0xFFFFFFFF, 0xFFFF, 0)))
        start = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
        if not explicit:
            start += struct.pack("<L", length)
        elif vr in (b"SQ", b"UN", b"OW"):
            start += vr + struct.pack("<HL", 0, length)
        else:
            start += vr + struct.pack("<H", length & 0xFFFF)
        parts.append(start + value)
    return b"".join(parts)


@settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(body=elements(), syntax=st.sampled_from((*SYNTAXES, DeflatedExplicitVRLittleEndian, "1.2", "")))
def test_made_up_datasets_raise_nothing_undeclared(body: bytes, syntax: str) -> None:
    uid = syntax.encode() + b"\0" * (len(syntax) % 2)
    meta = struct.pack("<HH2sH", 2, 0x10, b"UI", len(uid)) + uid
    if syntax == DeflatedExplicitVRLittleEndian:
        body = zlib.compress(body)[2:-4]

    try_all(bytes(128) + b"DICM" + meta + body)


@settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=300), seed=st.sampled_from(range(len(SEEDS))), at=st.integers(0, 2000))
def test_bytes_put_into_files_raise_nothing_undeclared(data: bytes, seed: int, at: int) -> None:
    good = SEEDS[seed]

    try_all(data)
    try_all(good[:at] + data)
    try_all(good[:at] + data + good[at:])


def mutated(random_: random.Random, data: bytes) -> bytes:
    if random_.random() < 0.5:
        data = with_odd_element(data, random_)
        if random_.random() < 0.5:
            return data
    changed = bytearray(data)
    for _ in range(random_.randrange(1, 8)):
        at = random_.randrange(len(changed) + 1)
        kind = random_.randrange(4)
        if kind == 0 and changed:
            changed[at % len(changed)] = random_.randrange(256)
        elif kind == 1:
            bait = random_.choice(_BAITS)
            changed[at : at + len(bait)] = bait
        elif kind == 2:
            del changed[at : at + random_.randrange(1, 64)]
        else:
            start = random_.randrange(len(data))
            changed[at:at] = data[start : start + random_.randrange(1, 256)]
    return bytes(changed)


@pytest.mark.data
def test_damaged_files_raise_nothing_undeclared_and_leave_no_memory(shared_data: Path) -> None:
    """Real headers as seeds, each with up to seven injuries; the seed of the generator is in the failure."""
    folder = shared_data / "dicom-varied"
    real = sorted(folder.rglob("*.dcm"), key=lambda path: path.stat().st_size)[:40]
    seeds = [*SEEDS, *(path.read_bytes()[: 64 * 1024] for path in real)]
    first = int(os.environ.get("FEDWARD_FUZZ_SEED", time.time_ns() % 10**9))
    end = time.monotonic() + FUZZ_S
    number, settled = 0, 0
    tracemalloc.start()
    try:
        while time.monotonic() < end or number < 60:
            random_ = random.Random(first + number)
            data = mutated(random_, random_.choice(seeds))
            try:
                try_all(data)
            except BaseException as error:
                error.add_note(f"FEDWARD_FUZZ_SEED={first + number}")
                raise
            number += 1
            if number == 30:
                gc.collect()
                settled = tracemalloc.get_traced_memory()[0]
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - settled
    finally:
        tracemalloc.stop()

    assert grown < 2 * MIB
