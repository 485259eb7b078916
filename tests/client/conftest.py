"""Fixtures of the site's tests."""

from __future__ import annotations

import time

import pytest


@pytest.fixture(autouse=True)
def settled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """See the images that a test wrote a moment ago as a folder in which nothing moves.

    Tests of what is still arriving are marked `arriving` and keep the true clock.
    """
    if request.node.get_closest_marker("arriving") is None:
        monkeypatch.setattr("fedward_client.index_arrival.now_s", lambda: time.time() + 3600)
