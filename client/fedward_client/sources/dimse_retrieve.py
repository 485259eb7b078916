"""The two ways to have a PACS send objects over DIMSE: C-GET, and C-MOVE to our own listener (hop 1).

For a C-GET each (SOP class, transfer syntax) is proposed in a presentation context of its own, because a PACS
picks one syntax of a context, often an uncompressed one, and then fails to send what it has compressed. There
is room for 128 contexts, so that the SOP classes come from the C-FIND in front of it. The final status of a
C-GET or C-MOVE only says whether to ask again; what is here and what is missing, the spool says.

Source: DICOM PS3.4 C.4.2 and C.4.3, PS3.8 9.3.2.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from pydicom.dataset import Dataset
from pynetdicom import build_context, build_role, evt
from pynetdicom.association import Association

from fedward_client.sources.association import associate, received
from fedward_client.sources.dimse_status import (
    NOT_UNDERSTOOD,
    OUT_OF_RESOURCES,
    PENDING,
    STORED,
    code_of,
    may_not,
    raise_unless_partial,
    sends_nothing,
)
from fedward_client.sources.manifest import Refusal
from fedward_client.sources.meter import Meter
from fedward_client.sources.part10 import Instance, is_uid
from fedward_client.sources.receiver import Receiver
from fedward_client.sources.retrieval import Arrival
from fedward_client.sources.settings import DimseConfig
from fedward_client.sources.syntaxes import TRANSFER_SYNTAXES
from fedward_common.errors import FederationError

GET, MOVE = "1.2.840.10008.5.1.4.1.2.2.3", "1.2.840.10008.5.1.4.1.2.2.2"  # study root

_MAX_CONTEXTS = 128
MAX_CLASSES = (_MAX_CONTEXTS - 1) // len(TRANSFER_SYNTAXES)
"""SOP classes that one C-GET can bring."""


class GetWay:
    """C-GET: what is asked for comes back over the same association."""

    def __init__(self, config: DimseConfig) -> None:
        self._config = config
        self._association: Association | None = None
        self._classes: frozenset[str] = frozenset()
        self._arrival: Arrival | None = None
        self._fault: FederationError | None = None
        self._meter = Meter(0, 0, 1.0)

    def open(self, classes: Sequence[str]) -> Association:
        """An association that can bring these SOP classes; the present one if it can."""
        if self._association is not None and self._association.is_established:
            if set(classes) <= self._classes:
                return self._association
            self._association.release()
        together = self._classes | set(classes)
        self._classes = together if len(together) <= MAX_CLASSES else frozenset(classes)
        proposed = [build_context(uid, [each]) for uid in sorted(self._classes) for each in TRANSFER_SYNTAXES]
        self._meter = Meter(
            self._config.max_object_bytes, self._config.max_association_bytes, self._config.timeout_s
        )
        self._association = associate(
            self._config,
            [GET, *proposed],
            roles=[build_role(uid, scp_role=True) for uid in sorted(self._classes)],
            handlers=[(evt.EVT_C_STORE, self._store)],
            meter=self._meter,
        )
        if all(each.abstract_syntax != GET for each in self._association.accepted_contexts):
            self._association.release()
            raise may_not("retrieve with C-GET", self._config)
        return self._association

    def retrieve(self, query: Dataset, classes: Sequence[str], arrival: Arrival) -> None:
        """Send one C-GET and wait for its end."""
        association = self.open(classes)
        self._arrival, self._fault = arrival, None
        try:
            for status, _ in association.send_c_get(query, GET):
                code = code_of(status)
                if self._fault is not None:
                    association.abort()
                    raise self._fault
                if code not in (*PENDING, 0):
                    raise_unless_partial(code, self._config)
        except ValueError:  # the context was not accepted after all
            raise may_not("retrieve with C-GET", self._config) from None
        finally:
            self._arrival = None

    def close(self) -> None:
        """End the association."""
        if self._association is not None and self._association.is_established:
            self._association.release()

    def _store(self, event: evt.Event) -> int:
        """Take one object that the C-GET brings; returns the status that the PACS is told."""
        arrival, instance = self._arrival, received(event)
        num_bytes = self._meter.take_oversize()
        if arrival is None or not (is_uid(instance.sop_instance) and is_uid(instance.sop_class)):
            return NOT_UNDERSTOOD
        if num_bytes:
            arrival.refuse(instance.sop_instance, num_bytes, Refusal.TOO_LARGE)
            return OUT_OF_RESOURCES
        try:
            refusal = arrival.keep(instance)
        except FederationError as error:  # a full spool: the run must end, not only this object
            self._fault = error
            return OUT_OF_RESOURCES
        return STORED if refusal is None else NOT_UNDERSTOOD


class MoveWay:
    """C-MOVE: what is asked for comes to our own listener."""

    def __init__(self, config: DimseConfig) -> None:
        self._config = config
        self._association: Association | None = None
        self._arrival: Arrival | None = None
        self._fault: FederationError | None = None
        self._came = threading.Condition()
        self._num_came = 0
        self._ever_came = False
        self._receiver = Receiver(config, self._take, self._too_large)
        self._receiver.__enter__()

    def open(self, classes: Sequence[str]) -> Association:
        """An association that can carry a C-MOVE; the present one if there is one."""
        del classes  # the PACS negotiates them with our listener
        if self._association is None or not self._association.is_established:
            self._association = associate(self._config, [MOVE])
        if not self._association.accepted_contexts:
            raise may_not("retrieve with C-MOVE", self._config)
        return self._association

    def retrieve(self, query: Dataset, classes: Sequence[str], arrival: Arrival) -> None:
        """Send one C-MOVE and wait for its end, and for the objects that it says were delivered."""
        association = self.open(classes)
        with self._came:
            self._arrival, self._fault, self._num_came = arrival, None, 0
        num_delivered, num_failed, failure = 0, 0, None
        try:
            for status, _ in association.send_c_move(query, self._config.ae_title, MOVE):
                code = code_of(status)
                num_delivered = max(num_delivered, _number(status, "Completed"))
                num_failed = max(num_failed, _number(status, "Failed"), _number(status, "Warning"))
                if code not in (*PENDING, 0):
                    failure = code
            with self._came:
                # Some PACS answer before their last object has gone out.
                self._came.wait_for(lambda: self._num_came >= num_delivered, self._config.timeout_s)
        finally:
            with self._came:
                self._arrival = None
        if self._fault is not None:
            raise self._fault
        if failure is not None:
            raise_unless_partial(failure, self._config)
            if not (num_delivered or num_failed or self._ever_came):
                raise sends_nothing(failure, self._config)

    def close(self) -> None:
        """End the association and stop listening."""
        if self._association is not None and self._association.is_established:
            self._association.release()
        self._receiver.__exit__(None, None, None)

    def _take(self, instance: Instance) -> Refusal | None:
        with self._came:
            self._ever_came = True
            self._num_came += 1
            self._came.notify_all()
            if self._arrival is None:
                return Refusal.OTHER_INSTANCE
            try:
                return self._arrival.keep(instance)
            except FederationError as error:
                self._fault = error
                raise

    def _too_large(self, sop_instance: str, num_bytes: int) -> None:
        with self._came:
            self._ever_came = True
            self._num_came += 1
            self._came.notify_all()
            if self._arrival is not None:
                self._arrival.refuse(sop_instance, num_bytes, Refusal.TOO_LARGE)


def _number(status: Dataset, which: str) -> int:
    """How many sub-operations there were; 0 when the PACS does not say."""
    try:
        return int(status.get(f"NumberOf{which}Suboperations") or 0)
    except (TypeError, ValueError):
        return 0
