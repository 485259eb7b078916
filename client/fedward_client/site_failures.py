"""What went wrong at which simulated site, read from the sites' own logs for the researcher at the screen.

A server learns a number. On one machine, researcher and operators are one person, who may also know the
place in the code and, where images or labels cannot be used, what is the matter with them; a file's path or
an image's identifier may stand in that. So these words go to the screen and never into a report.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedward_client.site_data import SiteData
from fedward_common.errors import FederationError, RefusalCode
from fedward_common.plan import ReadinessPlan, TrainingPlan

_FAILURES = frozenset({"instruction_refused", "instruction_malformed", "answer_withheld"})


@dataclass(frozen=True)
class SiteFailure:
    """What failed at one site for one cause.

    Attributes:
        round_index: when it first happened, 0 before the first round and None where that is not known.
        action: what the site was asked to do, or the name of the event.
        code: what the server was told, None if nothing.
        where: class of the error and the last of our own lines that it passed.
        what: the matter in words, where the images or labels are to blame; else empty.
        log: the site's log.
    """

    site: str
    round_index: int | None
    action: str
    code: RefusalCode | None
    where: str
    what: str
    log: Path


class SiteFailures:
    """Failures of simulated sites from now on.

    Args:
        logs: site name -> its log, which need not exist yet.
        data: site name -> its images and labels.
        plan: the plan that they carry out.
    """

    def __init__(
        self, logs: Mapping[str, Path], data: Mapping[str, SiteData], plan: TrainingPlan | ReadinessPlan
    ) -> None:
        self._logs, self._data, self._plan = logs, data, plan
        self._read = {name: log.stat().st_size for name, log in logs.items() if log.exists()}
        self._told: set[tuple[str, object, str]] = set()

    @property
    def sites(self) -> list[str]:
        """Names of all sites."""
        return sorted(self._logs)

    def new(self, site: str) -> list[SiteFailure]:
        """Failures of a site since the last look; one with the same cause, in whatever round, once a run."""
        found = []
        for line in self._lines(site):
            kind = (site, line.get("code"), str(line.get("where")))
            cancelled = line.get("code") == int(RefusalCode.CANCELLED)  # the run was ended: nothing failed
            if kind not in self._told and not cancelled:
                self._told.add(kind)
                found.append(self._failure(site, line))
        return found

    def _lines(self, site: str) -> list[dict[str, Any]]:
        """Events of failures in the complete lines that were added to the log."""
        try:
            with self._logs[site].open("rb") as file:
                file.seek(self._read.get(site, 0))
                added = file.read()
        except OSError:
            return []
        whole = added[: added.rfind(b"\n") + 1]
        self._read[site] = self._read.get(site, 0) + len(whole)
        events: list[dict[str, Any]] = [json.loads(line) for line in whole.splitlines()]
        return [event for event in events if event["event"] in _FAILURES]

    def _failure(self, site: str, line: dict[str, Any]) -> SiteFailure:
        code = None if "code" not in line else RefusalCode(line["code"])
        return SiteFailure(
            site=site,
            round_index=line.get("round"),
            action=str(line.get("action", line["event"])),
            code=code,
            where=str(line.get("where", "unknown")),
            what=self._matter(site) if code is RefusalCode.COHORT_UNUSABLE else "",
            log=self._logs[site],
        )

    def _matter(self, site: str) -> str:
        """What is the matter with a site's images or labels: the worker told only that something is."""
        from fedward_client.cohort import open_cohort
        from fedward_client.cohort_file import read_cohort_file
        from fedward_client.dataset import check_dimensions
        from fedward_client.sources.folder import find_files

        data = self._data[site]
        if self._plan.data.dataset != "dicom_folder":
            return ""
        try:
            if next(iter(find_files(data.dicom)), None) is None:
                return f"{data.dicom} holds no files"
            if isinstance(self._plan, TrainingPlan):
                check_dimensions(self._plan, read_cohort_file(data.home))
            open_cohort(data, self._plan.data, self._plan.task.labels)
        except FederationError as error:
            return error.message
        return ""
