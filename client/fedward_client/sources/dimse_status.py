"""What the statuses of a C-FIND, C-GET or C-MOVE mean for the operator (PS3.4 C.4, PS3.7 annex C)."""

from __future__ import annotations

from pydicom.dataset import Dataset

from fedward_client.sources.access import PacsAwayError
from fedward_client.sources.association import broken_off
from fedward_client.sources.settings import DimseConfig
from fedward_common.errors import CohortError, FederationError, IdentityError

STORED, OUT_OF_RESOURCES, NOT_UNDERSTOOD, MISMATCH = 0x0000, 0xA700, 0xC000, 0xA900
PENDING = (0xFF00, 0xFF01)
_BUSY = (0xA700, 0xA701, 0xA702)
_NOT_AUTHORISED, _UNKNOWN_DESTINATION = 0x0124, 0xA801


def code_of(status: Dataset) -> int:
    """The status of an answer.

    Raises:
        PacsAwayError: there is none: the association ended, or the PACS said nothing in time.
    """
    code = status.get("Status")
    if code is None:
        raise broken_off()
    return int(code)


def raise_unless_partial(code: int, config: DimseConfig) -> None:
    """Raise when a retrieval failed as a whole; one that failed in part is left to what the spool has.

    0xB000 says so; 0xC000 and above, "unable to process", is also what a PACS ends with that could send some
    objects and not others.
    """
    if code == 0xB000 or 0xC000 <= code <= 0xCFFF or code == 0xFE00:
        return
    raise failed("retrieval", code, config)


def failed(what: str, code: int, config: DimseConfig) -> FederationError:
    """The sentence and the remedy for a search or retrieval that ended with this status."""
    if code in _BUSY:
        return PacsAwayError(
            f"the PACS is out of resources for a {what} (status 0x{code:04X})",
            remedy="Try again later; if it stays, ask the PACS administrator.",
        )
    if code == _NOT_AUTHORISED:
        return may_not(what, config)
    if code == _UNKNOWN_DESTINATION:
        return sends_nothing(code, config)
    return CohortError(
        f"the PACS refuses the {what} (status 0x{code:04X})",
        remedy="Ask the PACS administrator; study root C-FIND and C-GET or C-MOVE are needed.",
    )


def hung_up(config: DimseConfig) -> PacsAwayError:
    """The PACS ended an association at its first search, as some do with whom they do not know."""
    return PacsAwayError(
        f"the PACS hangs up on a search: it may not let this site, {config.ae_title}, search",
        remedy=f"Have {config.ae_title} permitted to query; if the PACS is starting, try again later.",
    )


def sends_nothing(code: int, config: DimseConfig) -> IdentityError:
    """The PACS ended a C-MOVE without having begun to send."""
    return IdentityError(
        f"the PACS sends nothing to {config.ae_title} (status 0x{code:04X}): it may not know its address",
        remedy=f"Have {config.ae_title} entered there, with the address and port of `listen`.",
    )


def may_not(what: str, config: DimseConfig) -> IdentityError:
    """The sentence and the remedy for something that the PACS does not let this site do."""
    return IdentityError(
        f"the PACS does not let this site, {config.ae_title}, {what}",
        remedy=f"Have {config.ae_title} permitted to query and retrieve, or change `retrieve` in [source].",
    )
