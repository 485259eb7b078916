"""Bring a spool up to date with a PACS: ask what there is, fetch what is new, account for the rest (hop 1).

The same for every way to reach a PACS; an `Archive` knows one way. What an archive claims to have sent
counts for nothing: an instance is here when the spool has it. What is listed but does not come is asked for
once more by itself, then counted as missing and tried again in the next run. A PACS that goes away is waited
for, a little longer each time; then the run ends with an error, and all that had arrived is kept.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

from fedward_client.sources.access import PacsAwayError
from fedward_client.sources.manifest import Kept, Refusal
from fedward_client.sources.part10 import Instance, sop_instance_of
from fedward_client.sources.settings import Selection
from fedward_client.sources.spool import Spool
from fedward_common.errors import UsageError

Progress = Callable[[int, int], None]
"""Called with (studies done, studies in all)."""

_MAX_SILENT_FAILURES = 3
_MAX_WAIT_S = 120.0
MAX_SETTLE_WAIT_S = 60.0
"""Longer than this nobody is kept waiting for a second look: the next run is the second look."""

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Study:
    """One study that the PACS lists.

    Args:
        num_instances: as the PACS counts them; None when it does not say.
    """

    uid: str = field(repr=False)
    num_instances: int | None = None
    num_series: int | None = None


@dataclass(frozen=True)
class Series:
    """One series that the PACS lists; `modality` and `body_part` are "" when it does not say."""

    study: str = field(repr=False)
    uid: str = field(repr=False)
    modality: str = ""
    body_part: str = ""
    num_instances: int | None = None


@dataclass(frozen=True)
class Listed:
    """One instance that the PACS lists."""

    sop_class: str
    uid: str = field(repr=False)


class Arrival:
    """What of one series is wanted, and what has come of it; an archive hands everything to this.

    Args:
        spool: where it goes.
        listed: by SOPInstanceUID, what the PACS says there is.
    """

    def __init__(self, spool: Spool, listed: Mapping[str, Listed]) -> None:
        self._spool = spool
        known = spool.manifest.among(list(listed))
        self.refused: dict[str, Refusal] = {
            uid: entry.refused for uid, entry in known.items() if self._is_final(entry) and entry.refused
        }
        self.wanted = {
            uid for uid in listed if uid not in known or (known[uid].refused and uid not in self.refused)
        }
        self.num_new = self.num_bytes = 0

    def keep(self, instance: Instance) -> Refusal | None:
        """Put an instance into the spool if it was asked for.

        Returns:
            None when it is kept; else why not.

        Raises:
            StorageError: the spool or the disk is full.
        """
        if instance.sop_instance not in self.wanted:
            return Refusal.OTHER_INSTANCE
        if sop_instance_of(instance) not in (None, instance.sop_instance):
            self.refuse(instance.sop_instance, len(instance.dataset), Refusal.OTHER_INSTANCE)
            return Refusal.OTHER_INSTANCE
        refusal = self._spool.add(instance)
        self.wanted.discard(instance.sop_instance)
        if refusal is not None:
            self.refused[instance.sop_instance] = refusal
        else:
            self.num_new += 1
            self.num_bytes += len(instance.dataset)
        return refusal

    def refuse(self, sop_instance: str, size: int, refusal: Refusal) -> None:
        """Account for an instance that came but cannot be kept."""
        if sop_instance in self.wanted:
            self.wanted.discard(sop_instance)
            self.refused[sop_instance] = refusal
            self._spool.refuse(sop_instance, size, refusal)

    def _is_final(self, entry: Kept) -> bool:
        return entry.refused is Refusal.TOO_LARGE and entry.size > self._spool.max_object_bytes


class Archive(Protocol):
    """One way to reach a PACS. Each method raises `PacsAwayError` when trying again may help."""

    def studies(self, selection: Selection) -> Iterator[Study]:
        """Studies that the selection may take; more than it takes does no harm, less would."""
        ...

    def series(self, study: Study) -> list[Series]:
        """All series of a study."""
        ...

    def instances(self, series: Series) -> list[Listed]:
        """All instances of a series."""
        ...

    def retrieve_series(self, series: Series, listed: list[Listed], arrival: Arrival) -> None:
        """Have the PACS send a whole series; what does not come is not an error here."""
        ...

    def retrieve_instance(self, series: Series, listed: Listed, arrival: Arrival) -> None:
        """Have the PACS send one instance; the same holds."""
        ...

    def close(self) -> None:
        """End all connections."""
        ...


@dataclass(frozen=True)
class Retrieved:
    """What a retrieval did.

    Args:
        num_studies: that the selection took.
        num_instances: that belong to them, as far as they were listed anew.
        num_new: fetched now.
        num_bytes: of those.
        missing: why instances are not here -> how many; all but `TOO_LARGE` are tried again next time.
    """

    num_studies: int = 0
    num_instances: int = 0
    num_new: int = 0
    num_bytes: int = 0
    missing: Mapping[Refusal, int] = field(default_factory=dict)

    @property
    def num_missing(self) -> int:
        """Instances that the PACS lists and the spool does not have."""
        return sum(self.missing.values())


@dataclass(frozen=True)
class Patience:
    """How often and how long to wait for a PACS that is away.

    Args:
        attempts: in all, at least 1.
        first_wait_s: before the second; doubled for each that follows.
    """

    attempts: int
    first_wait_s: float

    def run(self, step: Callable[[], _T]) -> _T:
        """Do a step, again and again while the PACS is away.

        Raises:
            PacsAwayError: it is still away after the last attempt.
        """
        for attempt in range(1, self.attempts):
            try:
                return step()
            except PacsAwayError as error:
                wait_s = min(self.first_wait_s * 2 ** (attempt - 1), _MAX_WAIT_S)
                # A hospital's sites must not all come back in the same second.
                wait_s = max(error.retry_after_s or 0.0, wait_s * random.uniform(0.75, 1.25))  # noqa: S311
                _log.info("pacs_away", extra={"attempt": attempt, "delay_s": round(wait_s, 2)})
                time.sleep(wait_s)
        return step()


class Retrieval:
    """One run over one archive.

    Args:
        archive: where from.
        spool: where to.
        selection: what of it.
        patience: with a PACS that is away.
        settle_s: a study that has as many instances as it had so long ago is taken to be whole; 0 takes
            it as it is found.
    """

    def __init__(
        self,
        archive: Archive,
        spool: Spool,
        selection: Selection,
        patience: Patience,
        *,
        settle_s: float = 0.0,
    ) -> None:
        self._archive, self._spool, self._selection, self._patience = archive, spool, selection, patience
        self._settle_s = settle_s
        self._missing: dict[str, Refusal] = {}
        self._num_studies = self._num_instances = self._num_new = self._num_bytes = 0
        self._silent_failures = 0

    def run(self, *, full: bool = False, progress: Progress | None = None) -> Retrieved:
        """Fetch what is new.

        Args:
            full: list every study anew, also those that were complete and have as many instances as then.
            progress: told after each study.

        Raises:
            UsageError: the selection is the whole archive.
            PacsAwayError: the PACS went away; what arrived is kept and the next run continues.
            StorageError: the spool or the disk is full.
            FederationError: the PACS refuses this site; see the archive.
        """
        if self._selection.is_everything:
            raise UsageError(
                "nothing limits the retrieval: it would copy the whole archive of the hospital",
                remedy="Name modalities, dates, accession numbers or studies in the cohort's file.",
            )
        started = time.monotonic()
        with self._spool.retrieving():
            try:
                self._fetch_all(full, progress)
            except PacsAwayError as error:
                if not self._num_new:
                    raise
                raise PacsAwayError(
                    f"{error.message}; {self._num_new} new instances of {self._num_studies} studies are kept",
                    remedy=f"{error.remedy} The next run fetches only what is missing.",
                ) from None
            finally:
                num_missing = len(self._missing)
                if self._num_new or num_missing:
                    _log.info(
                        "source_retrieved",
                        extra={
                            "num_instances": self._num_new,
                            "num_bytes": self._num_bytes,
                            "count": num_missing,
                            "seconds": round(time.monotonic() - started, 1),
                        },
                    )
        return Retrieved(
            self._num_studies,
            self._num_instances,
            self._num_new,
            self._num_bytes,
            dict(Counter(self._missing.values())),
        )

    def _fetch_all(self, full: bool, progress: Progress | None) -> None:
        studies = self._look()
        for number, study in enumerate(studies.values(), start=1):
            self._num_studies += 1
            known = study.num_instances
            if full or known is None or not self._is_complete(study.uid, known):
                self._fetch_study(study)
            if progress is not None:
                progress(number, len(studies))
        self._look_again(studies)

    def _look(self) -> dict[str, Study]:
        """List the studies, and let those settle that have not grown for long enough.

        So does one that is no longer listed, or without a count: it cannot be seen to grow, and would wait
        for ever. A series of which less is here than was announced still waits for that reason.
        """
        listed = self._patience.run(lambda: list(self._archive.studies(self._selection)))
        studies = {study.uid: study for study in listed}
        growing, now_s = self._spool.manifest.growing(), time.time()
        self._spool.manifest.grows_no_more(
            [
                uid
                for uid, (num_instances, since_s) in growing.items()
                if abs(now_s - since_s) >= self._settle_s
                and (uid not in studies or studies[uid].num_instances in (None, num_instances))
            ]
        )
        return studies

    def _look_again(self, studies: Mapping[str, Study]) -> None:
        """See which studies grew while they were fetched: a PACS may be receiving them itself.

        What it has by now is fetched too; whether that is all, the next run will tell.
        """
        since_s = [since_s for uid, (_, since_s) in self._spool.manifest.growing().items() if uid in studies]
        if not since_s or not 0 < self._settle_s <= MAX_SETTLE_WAIT_S:
            return
        time.sleep(min(max(0.0, max(since_s) + self._settle_s - time.time()), self._settle_s))
        for uid, study in self._look().items():
            if uid in studies and studies[uid].num_instances != study.num_instances:
                self._fetch_study(study)

    def _is_complete(self, study: str, num_instances: int) -> bool:
        return self._spool.manifest.is_complete(study, num_instances, self._selection.digest)

    def _fetch_study(self, study: Study) -> None:
        num_listed, num_new = self._num_instances, self._num_new
        may_have_grown = study.uid in self._spool.manifest.growing()
        if self._settle_s and study.num_instances is not None:
            self._spool.manifest.may_grow(study.uid, study.num_instances, time.time())
        listed = self._patience.run(lambda: self._archive.series(study))
        taken = [each for each in listed if self._selection.takes_series(each.modality, each.body_part)]
        is_here = all([self._fetch_series(series) for series in taken])
        if self._num_new == num_new and not may_have_grown:
            self._spool.manifest.grows_no_more([study.uid])
        num_listed = self._num_instances - num_listed
        if study.num_instances is None or (len(taken) == len(listed) and num_listed < study.num_instances):
            return  # some of what it has was not listed: to be looked at again
        if is_here:
            self._spool.manifest.mark_complete(study.uid, study.num_instances, self._selection.digest)

    def _fetch_series(self, series: Series) -> bool:
        """Fetch what is new of one series; whether all that the PACS lists is here now."""
        listed = {each.uid: each for each in self._patience.run(lambda: self._archive.instances(series))}
        self._num_instances += len(listed)
        self._spool.manifest.announce(series.uid, max(series.num_instances or 0, len(listed)))
        arrival = Arrival(self._spool, listed)

        def all_at_once() -> None:
            if 2 * len(arrival.wanted) >= len(listed):
                self._archive.retrieve_series(series, list(listed.values()), arrival)

        self._try(arrival, all_at_once)
        for uid in list(arrival.wanted):
            self._try(arrival, partial(self._archive.retrieve_instance, series, listed[uid], arrival))
        for uid in arrival.wanted:
            arrival.refused.setdefault(uid, Refusal.ABSENT)
        self._missing |= arrival.refused
        return not arrival.refused

    def _try(self, arrival: Arrival, step: Callable[[], None]) -> None:
        """Have something sent, and take what comes of it, also when the PACS breaks off."""
        before = arrival.num_new, arrival.num_bytes

        def once() -> None:
            if arrival.wanted:  # an attempt that broke off may have brought all there is
                step()

        try:
            self._patience.run(once)
            self._silent_failures = 0
        except PacsAwayError as error:
            # One object that a PACS cannot read from its disk must not end the run; a PACS that is gone must.
            self._silent_failures += 1
            nothing_came = arrival.num_new == before[0]
            if error.unreachable or (nothing_came and self._silent_failures >= _MAX_SILENT_FAILURES):
                raise
        finally:
            self._num_new += arrival.num_new - before[0]
            self._num_bytes += arrival.num_bytes - before[1]
