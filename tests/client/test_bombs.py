"""Files made to fill a memory or keep a processor busy: each ends as a refusal, quickly and small.

One process of its own decodes all of them through the sandbox, so that what it and its decoders ever held
in memory can be read from the system.
"""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import (
    JPEG2000,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

from fedward_client.dicom.refusal import Reason
from fedward_client.dicom.syntaxes import DEFLATED_IMAGE_FRAME
from tests.builders import a_dataset, encode

MIB = 2**20
MAX_SECONDS = 2.0
MAX_MEMORY = 512 * MIB

MEASURE = """
import json, resource, sys, time
from pathlib import Path
from fedward_client.dicom.refusal import UnusableImageError
from fedward_client.dicom.sandbox import DecodeSandbox, SiteFile

folder, what = Path(sys.argv[1]), sys.argv[2]
names = sorted(path.name for path in folder.iterdir())
found = {}
with DecodeSandbox() as sandbox:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in names:
        start = time.monotonic()
        (outcome,) = sandbox.map([SiteFile(folder, name.encode())], what)
        reason = getattr(outcome, "reason", None)
        if what == "facts" and reason is None:
            reason = outcome.found.record.reason
        found[name] = (reason, time.monotonic() - start)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
decoders = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps({"found": found, "site_grew": grown * 1024, "decoders": decoders * 1024}))
"""


def grey(rows: int, columns: int, bits: int = 16, **elements: Any) -> dict[str, Any]:
    own = {"Rows": rows, "Columns": columns, "BitsAllocated": bits, "BitsStored": bits, "HighBit": bits - 1}
    return own | {"SOPClassUID": CTImageStorage, "Modality": "CT"} | elements


def compressed(frames: list[bytes], syntax: str, **elements: Any) -> bytes:
    return encode(a_dataset(PixelData=encapsulate(frames), **elements), syntax)


def a_jpeg2000(rows: int, columns: int) -> bytes:
    """Codestream of one blank tile, of about 150 bytes whatever size it announces."""
    dataset = a_dataset(np.zeros((64, 64), np.uint16))
    dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
    start = dataset.PixelData.index(b"\xff\x4f\xff\x51")
    codestream = bytearray(dataset.PixelData[start : dataset.PixelData.index(b"\xff\xd9") + 2])
    struct.pack_into(">2I", codestream, 8, columns, rows)
    siz_tiles = 8 + 16
    struct.pack_into(">2I", codestream, siz_tiles, columns, rows)
    return bytes(codestream)


def an_rle(segment: bytes, num_segments: int = 2) -> bytes:
    offsets = [64 + number * len(segment) for number in range(num_segments)]
    return struct.pack("<16I", num_segments, *offsets, *[0] * (15 - num_segments)) + segment * num_segments


def deflated(start: bytes, repeated: bytes, count: int, level: int = 9) -> bytes:
    """Deflated file whose dataset is `start` and then `repeated` again and again, never held as a whole."""
    meta = encode(a_dataset(), DeflatedExplicitVRLittleEndian)
    (length,) = struct.unpack_from("<L", meta, 140)
    parts = []
    for part in (start, repeated):
        compressor = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS)
        # Flushed so that it ends with a byte and refers to nothing before it: it can be repeated as it is.
        parts.append(compressor.compress(part) + compressor.flush(zlib.Z_FULL_FLUSH))
    return meta[: 144 + length] + parts[0] + parts[1] * count + b"\x03\x00"


def endless_text() -> bytes:
    """A private element of 1.2 GB of zeros, in front of everything else."""
    return deflated(struct.pack("<HH2sHL", 0x0009, 0x1001, b"OB", 0, 1200 * MIB), bytes(16 * MIB), 75)


def endless_elements() -> bytes:
    """Two million empty elements with rising tags, eight bytes each."""
    tags = np.arange(2**21, dtype=np.uint32)
    elements = np.zeros(len(tags), [("group", "<u2"), ("number", "<u2"), ("vr", "S2"), ("length", "<u2")])
    elements["group"], elements["number"] = 9 + 2 * (tags >> 12), 0x1000 + (tags & 0xFFF)
    elements["vr"] = b"LO"
    return deflated(b"", elements.tobytes(), 1, level=1)


def nested(depth: int) -> bytes:
    """Items within items, none of them ever ended."""
    level = struct.pack("<HHL", 0x0040, 0xA730, 0xFFFFFFFF) + struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF)
    return encode(a_dataset(**grey(16, 16, PixelData=None)), ImplicitVRLittleEndian) + level * depth


def many_items() -> bytes:
    """Thirty megabytes of empty items, which cost a reader that keeps them a hundred times as much."""
    items = struct.pack("<HHL", 0xFFFE, 0xE000, 0) * (4 * MIB)
    sequence = struct.pack("<HHL", 0x0040, 0xA730, len(items)) + items
    return encode(a_dataset(PixelData=None, **grey(16, 16)), ImplicitVRLittleEndian) + sequence


def many_fragments() -> bytes:
    fragments = struct.pack("<HHL", 0xFFFE, 0xE000, 0) * (4 * MIB)
    return compressed([a_jpeg2000(64, 64)], JPEG2000Lossless, **grey(64, 64)).replace(
        b"\xfe\xff\xdd\xe0\x00\x00\x00\x00", fragments + b"\xfe\xff\xdd\xe0\x00\x00\x00\x00"
    )


def tiny_tiles() -> bytes:
    """A codestream of a large image in tiles of one pixel: millions of them, and next to no data."""
    codestream = bytearray(a_jpeg2000(4096, 4096))
    struct.pack_into(">2I", codestream, 24, 1, 1)
    return compressed([bytes(codestream) + bytes(64 * 1024)], JPEG2000Lossless, **grey(4096, 4096))


def a_jpeg_ls(rows: int, columns: int) -> bytes:
    dataset = a_dataset(np.zeros((64, 64), np.uint16))
    dataset.compress(JPEGLSLossless, generate_instance_uid=False)
    start = dataset.PixelData.index(b"\xff\xd8")
    codestream = bytearray(dataset.PixelData[start : dataset.PixelData.index(b"\xff\xd9") + 2])
    struct.pack_into(">2H", codestream, codestream.index(b"\xff\xf7") + 5, rows, columns)
    return bytes(codestream)


def a_jpeg(rows: int, columns: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(stream, "JPEG")
    codestream = bytearray(stream.getvalue())
    struct.pack_into(">HH", codestream, codestream.index(b"\xff\xc0") + 5, rows, columns)
    return bytes(codestream)


def in_front_of_pixels(inserted: bytes, **elements: Any) -> bytes:
    data = encode(a_dataset(PixelData=bytes(8192), **grey(64, 64, **elements)))
    place = data.index(b"\xe0\x7f\x10\x00")
    return data[:place] + inserted + data[place:]


def a_sequence(tag: int, num_items: int, *, ended: bool = True) -> bytes:
    items = struct.pack("<HHL", 0xFFFE, 0xE000, 0) * num_items
    length = len(items) if ended else 0xFFFFFFFF
    head = struct.pack("<HH2sHL", tag >> 16, tag & 0xFFFF, b"SQ" if ended else b"UN", 0, length)
    return head + items + (b"" if ended else b"\xfe\xff\xdd\xe0\0\0\0\0")


def a_million_elements() -> bytes:
    """Empty elements with rising tags, behind those that name the file."""
    tags = np.arange(10**6, dtype=np.uint32)
    elements = np.zeros(len(tags), [("group", "<u2"), ("number", "<u2"), ("vr", "S2"), ("length", "<u2")])
    elements["group"], elements["number"] = 0x29 + 2 * (tags >> 12), 0x1000 + (tags & 0xFFF)
    elements["vr"] = b"LO"
    return in_front_of_pixels(elements.tobytes())


BOMBS: dict[str, tuple[Callable[[], bytes], set[Reason]]] = {
    "jpeg_expands": (
        lambda: compressed([a_jpeg(8000, 8000) + bytes(140_000)], JPEGBaseline8Bit, **grey(8000, 8000, 8)),
        {Reason.DECODE_FAILED, Reason.OVER_LIMIT},
    ),
    "htj2k_expands": (
        lambda: compressed([a_jpeg2000(8000, 8000) + bytes(140_000)], HTJ2KLossless, **grey(8000, 8000)),
        {Reason.DECODE_FAILED, Reason.OVER_LIMIT},
    ),
    "frames_that_are_not_there": (
        lambda: compressed([a_jpeg2000(64, 64)], JPEG2000Lossless, **grey(64, 64, NumberOfFrames=65536)),
        {Reason.TRUNCATED, Reason.OVER_LIMIT},
    ),
    "functional_groups_by_the_hundred_thousand": (
        lambda: in_front_of_pixels(a_sequence(0x52009230, 10**5)),
        {Reason.FRAME_FACTS, Reason.OVER_LIMIT, Reason.MALFORMED},
    ),
    "private_sequence_without_end": (
        lambda: in_front_of_pixels(a_sequence(0x00291010, 10**6, ended=False)),
        {Reason.OVER_LIMIT},
    ),
    "elements_by_the_million": (a_million_elements, {Reason.OVER_LIMIT}),
    "look_up_tables_by_the_million": (
        lambda: in_front_of_pixels(a_sequence(0x00283010, 10**6)),
        {Reason.DISPLAY_VALUES, Reason.OVER_LIMIT, Reason.MALFORMED},
    ),
    "jpeg2000_of_other_size": (
        lambda: compressed([a_jpeg2000(30000, 30000)], JPEG2000Lossless, **grey(64, 64)),
        {Reason.CODESTREAM},
    ),
    "jpeg2000_beyond_bounds": (
        lambda: compressed([a_jpeg2000(30000, 30000)], JPEG2000Lossless, **grey(30000, 30000)),
        {Reason.DIMENSIONS},
    ),
    "jpeg2000_too_many_pixels": (
        lambda: compressed([a_jpeg2000(16000, 16000)], JPEG2000Lossless, **grey(16000, 16000)),
        {Reason.OVER_LIMIT},
    ),
    "jpeg2000_expands": (
        lambda: compressed([a_jpeg2000(8000, 8000)], JPEG2000Lossless, **grey(8000, 8000)),
        {Reason.OVER_LIMIT},
    ),
    "jpeg2000_expands_padded": (
        lambda: compressed([a_jpeg2000(8000, 8000) + bytes(140_000)], JPEG2000Lossless, **grey(8000, 8000)),
        {Reason.OVER_LIMIT, Reason.DECODE_FAILED, Reason.CODESTREAM},
    ),
    "jpeg2000_tiles_of_one_pixel": (tiny_tiles, {Reason.OVER_LIMIT, Reason.DECODE_FAILED, Reason.CODESTREAM}),
    "jpeg_ls_expands": (
        lambda: compressed([a_jpeg_ls(8000, 8000)], JPEGLSLossless, **grey(8000, 8000)),
        {Reason.OVER_LIMIT},
    ),
    "rle_expands": (
        lambda: compressed([an_rle(b"\x81\x00" * 2048)], RLELossless, **grey(8000, 8000)),
        {Reason.OVER_LIMIT},
    ),
    "rle_runs_on": (
        lambda: compressed([an_rle(b"\x81\x00" * 4_000_000)], RLELossless, **grey(64, 64)),
        {Reason.DECODE_FAILED, Reason.OVER_LIMIT, Reason.CODESTREAM, Reason.TRUNCATED},
    ),
    "deflated_text": (endless_text, {Reason.DEFLATED}),
    "deflated_elements": (endless_elements, {Reason.DEFLATED}),
    "deflated_frame": (
        lambda: compressed([zlib.compress(bytes(64 * MIB))[2:]], JPEG2000, **grey(8000, 8000)).replace(
            JPEG2000.encode(), DEFLATED_IMAGE_FRAME.encode() + b"\0"
        ),
        {Reason.OVER_LIMIT},
    ),
    "frames_by_the_billion": (
        lambda: encode(a_dataset(**grey(16, 16, NumberOfFrames=2**31 - 1))),
        {Reason.DIMENSIONS, Reason.OVER_LIMIT, Reason.TRUNCATED},
    ),
    "frames_of_one_pixel_with_many_windows": (
        lambda: encode(
            a_dataset(
                PixelData=bytes(2 * 65536),
                WindowCenter=["1"] * 4000,
                WindowWidth=["2"] * 4000,
                **grey(1, 1, NumberOfFrames=65536),
            )
        ),
        {Reason.FRAME_FACTS, Reason.OVER_LIMIT, Reason.DISPLAY_VALUES},
    ),
    "pixels_that_grow_as_floats": (
        lambda: encode(a_dataset(PixelData=bytes(100_000_000), **grey(10_000, 10_000, 8))),
        {Reason.OVER_LIMIT},
    ),
    "nested_sequences": (lambda: nested(100_000), {Reason.DECODE_FAILED, Reason.OVER_LIMIT}),
    "many_items": (many_items, {Reason.MALFORMED, Reason.OVER_LIMIT, Reason.NO_PIXELS}),
    "many_fragments": (many_fragments, {Reason.OVER_LIMIT, Reason.TRUNCATED, Reason.CODESTREAM}),
}


@pytest.fixture(scope="module")
def bombs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bombs")
    for name, (make, _) in BOMBS.items():
        (folder / name).write_bytes(make())
    return folder


def measured(folder: Path, what: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), what], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def decoded(bombs: Path) -> dict[str, Any]:
    return measured(bombs, "frames")


@pytest.fixture(scope="module")
def indexed(bombs: Path) -> dict[str, Any]:
    return measured(bombs, "facts")


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_is_refused_in_time_when_it_is_decoded(decoded: dict[str, Any], name: str) -> None:
    reason, seconds = decoded["found"][name]

    assert reason in BOMBS[name][1]
    assert seconds < MAX_SECONDS


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_costs_the_index_little_time(indexed: dict[str, Any], name: str) -> None:
    _, seconds = indexed["found"][name]

    assert seconds < MAX_SECONDS


def test_deflated_bombs_are_refused_by_the_index(indexed: dict[str, Any]) -> None:
    assert indexed["found"]["deflated_text"][0] == indexed["found"]["deflated_elements"][0] == "deflated"


def test_bombs_fill_no_memory(decoded: dict[str, Any], indexed: dict[str, Any]) -> None:
    for figures in (decoded, indexed):
        assert figures["decoders"] < MAX_MEMORY
        assert figures["site_grew"] < 32 * MIB


def test_bombs_are_as_small_as_announced(bombs: Path) -> None:
    assert len(a_jpeg2000(30000, 30000)) < 200
    assert (bombs / "deflated_text").stat().st_size < 2 * MIB
