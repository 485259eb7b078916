"""The process's sandbox: started when files must be read, ended when none have been for a while.

Starting it takes about a second. A simulation indexes and opens a hundred small cohorts one after the
other in one process; they use the same one.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedward_client.dicom.sandbox import DecodeSandbox

_IDLE_S = 20.0


class _Decoders:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sandbox: DecodeSandbox | None = None
        self._timer: threading.Timer | None = None

    @contextmanager
    def use(self, wanted: int) -> Iterator[DecodeSandbox]:
        from fedward_client.dicom.sandbox import DecodeSandbox

        with self._lock:
            self._stop_timer()
            if self._sandbox is not None and len(self._sandbox.pids) < wanted:
                self._end()
            if self._sandbox is None:
                self._sandbox = DecodeSandbox(wanted)
            try:
                yield self._sandbox
            except BaseException:  # it may hold answers that nobody takes any more
                self._end()
                raise
            self._timer = threading.Timer(_IDLE_S, self.close)
            self._timer.daemon = True
            self._timer.start()

    def close(self) -> None:
        with self._lock:
            self._stop_timer()
            self._end()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self) -> None:
        if self._sandbox is not None:
            self._sandbox.close()
            self._sandbox = None


_decoders = _Decoders()
atexit.register(_decoders.close)


@contextmanager
def decoders(wanted: int) -> Iterator[DecodeSandbox]:
    """Have a sandbox of so many processes, or more; one thread at a time.

    Raises:
        CohortError: it does not start.
    """
    with _decoders.use(wanted) as sandbox:
        yield sandbox
