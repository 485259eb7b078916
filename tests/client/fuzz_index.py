"""Damage real DICOM files at random, and have the header reader and the index take them (for the night).

`python tests/client/fuzz_index.py --minutes 10 --seed 7` goes on until the time is over and ends with exit
code 1 at the first file that raises anything, is written differently than it was read, or when memory
grows; the file is kept. A test runs it for a few seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import pydicom.data

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from fedward_client.cohort_file import CohortFile  # noqa: E402
from fedward_client.cohort_units import select_units  # noqa: E402
from fedward_client.index_reading import examine, found_from, found_message  # noqa: E402
from fedward_client.index_records import FileRecord  # noqa: E402
from fedward_client.index_store import CaseIndex  # noqa: E402
from fedward_client.sources.folder import Candidate  # noqa: E402
from tests.client.fuzzing import faults_shown, with_odd_element  # noqa: E402

MAX_GROWTH_BYTES = 64 * 2**20
_MAX_FILE = 64 * 2**10
_BATCH = 200
_TOKENS = (
    *(b"SQ", b"UN", b"OB", b"\\", b"\0\0\0\0", b"\xff\xff\xff\xff"),
    *(b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"),
)


def corpus() -> list[bytes]:
    """Headers of pydicom's own files, and a little of what follows."""
    folder = Path(pydicom.data.__file__).parent / "test_files"
    return [path.read_bytes()[:_MAX_FILE] for path in sorted(folder.rglob("*")) if path.is_file()]


def damaged(data: bytes, others: Sequence[bytes], random: np.random.Generator) -> bytes:
    """A file with an odd element, or a few bytes changed, left out, put in, or a piece of another in it."""
    kind = int(random.integers(0, 4))
    if kind < 2:
        data = with_odd_element(data, Random(int(random.integers(0, 2**32))))
    if kind == 0:
        return data
    changed = bytearray(data)
    for _ in range(int(random.integers(1, 8))):
        place = int(random.integers(0, max(len(changed), 1)))
        match int(random.integers(0, 5)):
            case 0 if changed:
                changed[place] = int(random.integers(0, 256))
            case 1:
                changed[place : place + int(random.integers(1, 64))] = b""
            case 2:
                token = _TOKENS[int(random.integers(0, len(_TOKENS)))]
                changed[place : place + len(token)] = token
            case 3:
                other = others[int(random.integers(0, len(others)))]
                start = int(random.integers(0, max(len(other), 1)))
                changed[place:place] = other[start : start + int(random.integers(1, 256))]
            case _:
                del changed[max(place, 132) :]
    return bytes(changed)


def fuzz(seconds: float, seed: int, keep: Path) -> tuple[int, int]:
    """Damage files for so long.

    Args:
        seconds: of wall time.
        seed: of the damage.
        keep: gets the file at which it ends.

    Returns:
        Number of files, and bytes by which memory grew after the first quarter.
    """
    warnings.simplefilter("error")
    random, sound = np.random.default_rng(seed), corpus()
    started, settled, num_files = time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        while (gone := time.monotonic() - started) < seconds:
            records = []
            with CaseIndex(Path(folder)) as index:
                for _ in range(_BATCH):
                    data = damaged(sound[int(random.integers(0, len(sound)))], sound, random)
                    keep.write_bytes(data)
                    content = hashlib.sha256(data).hexdigest()
                    with faults_shown():
                        found = examine(data, content)
                    again = found_from(json.loads(json.dumps(found_message(found))), str)
                    assert again == found
                    records.append(FileRecord(Candidate(content[:16].encode(), 1, 1), content, again))
                index.record(records)
                index.settle({record.file.name for record in records}, "fuzz")
                for file in (CohortFile(), CohortFile(unit="volume")):
                    select_units(index, file, ("CR", "DX", "CT", "MR", "US"))
                    index.quarantined(file.rule(("CT",)))
            num_files += len(records)
            if not settled and gone > seconds / 4:
                settled = _resident_bytes()
    keep.unlink()
    return num_files, _resident_bytes() - settled


def _resident_bytes() -> int:
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Fuzz, and say how it went."""
    parser = argparse.ArgumentParser(description="Damaged files for the header reader and the index.")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4)))
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "fedward-fuzz.dcm")
    given = parser.parse_args()
    num_files, growth = fuzz(given.minutes * 60, given.seed, given.keep)
    sys.stdout.write(f"{num_files} files, seed {given.seed}; memory grew by {growth / 2**20:.1f} MiB\n")
    sys.exit(growth > MAX_GROWTH_BYTES)


if __name__ == "__main__":
    main()
