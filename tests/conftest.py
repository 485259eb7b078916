"""Fixtures shared by all tests: the real data, when it is there."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.absence import do_without

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = Path("/usr/bin/chromium")
# Run in the background, a shell ignores SIGINT, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the real images; a skip names its absence, and under CI it is a failure."""
    folder = Path(os.environ.get("FEDWARD_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        do_without(f"real data not found at {folder}; set FEDWARD_DATA")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium. Not for the whole session: its event loop would be in the way of others' tests."""
    from playwright.sync_api import sync_playwright

    if not CHROMIUM.exists():
        do_without(f"{CHROMIUM} is not installed")
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield started
        started.close()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """See that what a test `needs` is installed."""
    wanted = [program for mark in item.iter_markers("needs") for program in mark.args]
    missing = [program for program in wanted if shutil.which(program) is None]
    if missing:
        do_without(f"not installed: {', '.join(missing)}")
