"""What left the site, read back from the audit log and put into plain words."""

from __future__ import annotations

from pathlib import Path

from fedward_common.audit import AuditEntry, AuditLog
from fedward_common.errors import AuditError, RefusalCode

_WHAT = {
    "prepare": "how many cases the site has for this plan",
    "train": "a weight update",
    "evaluate": "counts for the global model's metrics",
    "baseline": "counts for the metrics of the model trained here alone",
    "survey": "counts of a survey of the site's cases, small ones held back",
}


def sent_messages(audit: Path, *, run_id: str | None, round_index: int | None) -> list[AuditEntry]:
    """Audit entries of messages that left, oldest first, of one run or round or of all.

    Raises:
        AuditError: the log is damaged (the line is named) or gone: `fedward-site join` began it.
    """
    if not audit.exists():
        raise AuditError(
            f"{audit}: no such audit log, so what left is not known",
            remedy="Find out who removed it, and tell your security officer.",
        )
    return [
        entry
        for entry in AuditLog(audit).entries()
        if entry.event == "outbound"
        and run_id in (None, entry.fields.get("run_id"))
        and round_index in (None, entry.fields.get("round"))
    ]


_NUMBERS = ("num_train", "num_validation", "num_test", "num_cases", "mean_loss", "num_quarantined")


def explain(entry: AuditEntry) -> str:
    """One message in a sentence and its numbers."""
    fields = entry.fields
    code = RefusalCode(int(fields["code"]))
    head = f"{entry.time[:19]}  run {fields['run_id']}, round {fields['round']}: "
    if code is not RefusalCode.OK:
        return f"{head}a refusal ({fields['action']}): {code.meaning} [code {int(code)}]"
    numbers = ", ".join(f"{name.replace('_', ' ')} {fields[name]}" for name in _NUMBERS if name in fields)
    size = int(fields["payload_bytes"])
    digest = str(fields["payload_digest"])
    body = f"; {size:,} bytes, SHA-256 {digest[:16]}" if size else ""
    return f"{head}{_WHAT[str(fields['action'])]}; numbers released: {numbers or 'none'}{body}"
