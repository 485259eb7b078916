"""How much of a site's material stands in quarantine, in a unit that compares with what is used (hop 6).

The unit is the study: files do not compare, since a volume has hundreds, and of who is refused no more is
often known. A study of which nothing can be used counts as one, one that is used in part as its images in
quarantine to each that is used, at most one: a scout beside a volume hardly counts, one of two views does.

None is told as none. Few are told as "fewer than the floor", by the bound that this is, so that a rule about
their share can be shown to hold. What they are compared with, the studies in use, is told roughly: exact,
studies less patients would tell of few patients who have two.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from fedward_client.index_records import QuarantinedContent


def refused_studies(
    quarantined: Iterable[QuarantinedContent], used: Mapping[str, int], spoilt: Collection[str] = ()
) -> int:
    """Studies in quarantine, those used in part by their share, rounded up.

    Args:
        quarantined: every content that is refused; one that does not tell its study counts as one.
        used: study -> contents of it that are used.
        spoilt: studies that count as one in any case.
    """
    refused = Counter(entry.study or entry.content for entry in quarantined)
    shares = (
        1.0 if study in spoilt else min(1.0, count / used[study]) if used.get(study) else 1.0
        for study, count in refused.items()
    )
    return math.ceil(math.fsum(shares) - 1e-9)


def told_refused(num_refused: int, num_used: int, floor: int) -> NDArray[np.int64]:
    """Studies in quarantine if that may be told, else 0; at most how many there are; those in use, roughly.

    >>> [told_refused(number, 64, 5).tolist() for number in (0, 1, 9)]
    [[0, 0, 60], [0, 4, 60], [9, 9, 60]]
    """
    told = num_refused if num_refused >= floor else 0
    most = max(num_refused, floor - 1) if num_refused else 0
    return np.array([told, most, num_used - num_used % floor], dtype=np.int64)
