"""How much one site may leave with the server: Flower's object store takes whatever a node pushes.

The server holds replies in memory until the runner fetches them. A site that pushes without end would fill
it, and every other site's run would end. So each new message to a site allows it a number of bytes; what
is pushed beyond them is refused, and only that site suffers.
"""

from __future__ import annotations

import threading
from collections import defaultdict

PER_MESSAGE = 256 * 2**20  # metric states and Flower's own records, with room for repeated attempts
PER_BYTE_DOWN = 4  # a reply is about as large as what it answers; it may be pushed again after a cut


class Allowances:
    """Bytes that each site (known by its node key) may still push. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left: dict[bytes, int] = {}
        self._renewed_by: defaultdict[bytes, set[str]] = defaultdict(set)

    def renew(self, site: bytes, message_id: str, num_bytes: int) -> None:
        """Note that a message of so many bytes went to `site`; one that goes there again renews nothing."""
        with self._lock:
            if message_id not in self._renewed_by[site]:
                self._renewed_by[site].add(message_id)
                self._left[site] = PER_MESSAGE + PER_BYTE_DOWN * num_bytes

    def spend(self, site: bytes, num_bytes: int) -> bool:
        """Take `num_bytes` off what is left to `site`; False, and nothing taken, when it is not enough."""
        with self._lock:
            left = self._left.get(site, 0) - num_bytes
            if left < 0:
                return False
            self._left[site] = left
            return True
