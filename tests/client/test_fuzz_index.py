"""Damaged files, for a few seconds; `fuzz_index.py` goes on all night."""

from __future__ import annotations

from pathlib import Path

from tests.client.fuzz_index import MAX_GROWTH_BYTES, fuzz


def test_no_damaged_file_raises_anything_or_makes_memory_grow(tmp_path: Path) -> None:
    num_files, growth = fuzz(6, 20261123, tmp_path / "last.dcm")

    assert num_files >= 200
    assert growth < MAX_GROWTH_BYTES
