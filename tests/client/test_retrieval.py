"""What a retrieval remembers of studies that an archive is still receiving, and when it lets go of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from fedward_client.sources.retrieval import Arrival, Listed, Patience, Retrieval, Series, Study
from fedward_client.sources.settings import Selection
from fedward_client.sources.spool import Spool

CT = Selection(modalities=("CT",))
SETTLE_S = 10.0


class AnArchive:
    """It lists these studies, and nothing in them."""

    def __init__(self, *studies: Study) -> None:
        self._studies = studies

    def studies(self, selection: Selection) -> Iterator[Study]:
        return iter(self._studies)

    def series(self, study: Study) -> list[Series]:
        return []

    def instances(self, series: Series) -> list[Listed]:
        return []

    def retrieve_series(self, series: Series, listed: Sequence[Listed], arrival: Arrival) -> None:
        pytest.fail("nothing is listed")

    def retrieve_instance(self, series: Series, listed: Listed, arrival: Arrival) -> None:
        pytest.fail("nothing is listed")

    def close(self) -> None: ...


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    with Spool(tmp_path, max_bytes=10**9, max_object_bytes=10**8) as mine:
        yield mine


def growing_after(spool: Spool, *listed: Study, settle_s: float = SETTLE_S) -> set[str]:
    Retrieval(AnArchive(*listed), spool, CT, Patience(1, 0.1), settle_s=settle_s)._look()
    return set(spool.manifest.growing())


@pytest.mark.parametrize(
    "listed", [[], [Study("9.9", 3)], [Study("1.2.3")]], ids=["none", "others", "uncounted"]
)
def test_a_study_that_cannot_be_seen_to_grow_any_more_is_let_go_of(spool: Spool, listed: list[Study]) -> None:
    """Deleted at the archive, no longer selected, or an archive that stopped counting."""
    spool.manifest.may_grow("1.2.3", 8, time.time() - SETTLE_S - 1)

    assert growing_after(spool, *listed) == set()


def test_a_study_that_is_not_listed_is_waited_for_as_long_as_any(spool: Spool) -> None:
    spool.manifest.may_grow("1.2.3", 8, time.time())

    assert growing_after(spool) == {"1.2.3"}


def test_a_study_that_was_seen_to_grow_is_not_let_go_of(spool: Spool) -> None:
    spool.manifest.may_grow("1.2.3", 8, time.time() - SETTLE_S - 1)

    assert growing_after(spool, Study("1.2.3", 9)) == {"1.2.3"}
    assert growing_after(spool, Study("1.2.3", 8)) == set()


def test_a_whole_run_that_lists_nothing_leaves_nothing_growing(spool: Spool) -> None:
    spool.manifest.may_grow("1.2.3", 8, time.time() - SETTLE_S - 1)

    Retrieval(AnArchive(), spool, CT, Patience(1, 0.1), settle_s=SETTLE_S).run()

    assert spool.manifest.growing() == {}
