"""Say on standard error what failed at which simulated site, as soon as the run's events show that it did.

The run's record and report hold a number for each failure, as in a real federation. The rest is in the
sites' own logs, which the client's package reads.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from fedward_common.console import plain
from fedward_common.errors import RefusalCode
from fedward_server.run_records import Event

_MOST_SHOWN = 20


class Failure(Protocol):
    """See `fedward_client.site_failures.SiteFailure`."""

    @property
    def site(self) -> str: ...  # noqa: D102
    @property
    def round_index(self) -> int | None: ...  # noqa: D102
    @property
    def action(self) -> str: ...  # noqa: D102
    @property
    def code(self) -> RefusalCode | None: ...  # noqa: D102
    @property
    def where(self) -> str: ...  # noqa: D102
    @property
    def what(self) -> str: ...  # noqa: D102
    @property
    def log(self) -> Path: ...  # noqa: D102


class Failures(Protocol):
    """See `fedward_client.site_failures.SiteFailures`."""

    @property
    def sites(self) -> list[str]:
        """Names of all sites."""

    def new(self, site: str) -> Sequence[Failure]:
        """Failures of a site since the last look."""


def tell_failures(events: Iterable[Event], failures: Failures, *, as_json: bool) -> Iterator[Event]:
    """Pass events on, and after those that mention a site's failure say what it was.

    Args:
        events: of one run, until it ends.
        failures: what the sites wrote down.
        as_json: one JSON object a line instead of words.
    """
    teller = _Teller(failures, as_json)
    for event in events:
        yield event
        teller.tell(_mentioned(event))
    teller.tell(failures.sites)
    teller.end()


def _mentioned(event: Event) -> list[str]:
    """Sites that failed according to an event."""
    if event.kind == "site_refused":
        return [str(event.fields["site"])]
    waiting = event.fields.get("waiting") if event.kind == "sites" else None
    return sorted(waiting) if isinstance(waiting, dict) else []


class _Teller:
    def __init__(self, failures: Failures, as_json: bool) -> None:
        self._failures, self._as_json = failures, as_json
        self._num_told = 0

    def tell(self, sites: Iterable[str]) -> None:
        known = set(self._failures.sites)
        for site in sites:
            for failure in self._failures.new(site) if site in known else ():
                self._num_told += 1
                if self._as_json:
                    sys.stderr.write(_document(failure) + "\n")
                elif self._num_told <= _MOST_SHOWN:
                    sys.stderr.write(_words(failure))

    def end(self) -> None:
        left_out = self._num_told - _MOST_SHOWN
        if left_out > 0 and not self._as_json:
            sys.stderr.write(f"and {left_out} more failures; see the sites' logs\n")


def _words(failure: Failure) -> str:
    when = "" if failure.round_index is None else f", round {failure.round_index}"
    meaning = "no answer was given" if failure.code is None else failure.code.meaning
    lines = [f"{failure.site}{when}, {failure.action}: {meaning}"]
    lines += [f"  {failure.what}"] if failure.what else []
    lines += [f"  at {failure.where}; more in {failure.log}"]
    return "".join(plain(line) + "\n" for line in lines)


def _document(failure: Failure) -> str:
    return json.dumps(
        {
            "site": failure.site,
            "round": failure.round_index,
            "action": failure.action,
            "code": None if failure.code is None else int(failure.code),
            "where": failure.where,
            "what": failure.what,
            "log": str(failure.log),
        }
    )
