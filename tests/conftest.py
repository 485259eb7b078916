"""Fixtures shared by all tests: the real data, when it is there."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Run in the background, a shell ignores SIGINT, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the real images; a skip names its absence, and under CI it is a failure."""
    folder = Path(os.environ.get("FEDWARD_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        reason = f"real data not found at {folder}; set FEDWARD_DATA"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder
