"""Put payloads into Flower messages and take them out again (hop 7).

A message has a fixed form: one byte string with the instruction or envelope, the signed plan on the way
down, a signature on the way up, and at most one flat payload. Flower's own array serialisation is not
used: the tensor is raw little-endian memory whose length and dtype both sides know from the signed
plan, so nothing is allocated on the word of a header.
"""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedward_common.errors import PayloadError

_STYPE = "fedward.flat.v1"
_REMEDY = "Both sides must run the same version of fedward."
_MAX_DOCUMENT = 4_000_000
_INLINE = 4 * 2**20  # larger payloads go in pieces


@dataclass(frozen=True)
class Down:
    """What goes to a site: instruction and signed plan as bytes, and the packed weights, if any."""

    instruction: bytes
    signed_plan: bytes
    payload: bytes | None


@dataclass(frozen=True)
class Up:
    """What comes from a site: the envelope's bytes, its signature (hex), and the payload, if any."""

    envelope: bytes
    signature: str
    payload: bytes | None


def down_content(down: Down) -> RecordDict:
    """Records of a message to a site."""
    return _records("instruction", {"body": down.instruction, "plan": down.signed_plan}, down.payload)


def up_content(up: Up) -> RecordDict:
    """Records of a message from a site."""
    return _records("envelope", {"body": up.envelope, "signature": up.signature}, up.payload)


def read_down(message: Message, *, max_payload: int) -> Down:
    """Take a server's message apart; PayloadError unless it has exactly the fixed form."""
    record = _record(message, "instruction", {"body", "plan"})
    return Down(
        instruction=_document(record["body"]),
        signed_plan=_document(record["plan"]),
        payload=_payload(message.content, record, max_payload),
    )


def read_up(message: Message, *, max_payload: int) -> Up:
    """Take a site's message apart; PayloadError unless it has exactly the fixed form."""
    record = _record(message, "envelope", {"body", "signature"})
    signature = record["signature"]
    if not isinstance(signature, str) or len(signature) != 128:
        raise PayloadError("message carries no signature", remedy=_REMEDY)
    return Up(
        envelope=_document(record["body"]),
        signature=signature,
        payload=_payload(message.content, record, max_payload),
    )


def _records(name: str, documents: dict[str, bytes | str], payload: bytes | None) -> RecordDict:
    """One record with everything; a large payload in a record of its own, which Flower sends in pieces.

    Every record, array and piece is a request of its own, and a request costs the server more than
    moving a small tensor does.
    """
    if payload is None or len(payload) > _INLINE:
        content = RecordDict({name: ConfigRecord(dict(documents))})
        if payload is not None:
            flat = Array(dtype="uint8", shape=(len(payload),), stype=_STYPE, data=payload)
            content["payload"] = ArrayRecord({"flat": flat})
        return content
    return RecordDict({name: ConfigRecord({**documents, "payload": payload})})


def _record(message: Message, name: str, keys: set[str]) -> ConfigRecord:
    if not message.has_content():
        raise PayloadError("message has no content", remedy=_REMEDY)
    names = set(message.content.keys())
    if not {name} <= names <= {name, "payload"}:
        raise PayloadError(f"message has {len(names)} records, expected {name}", remedy=_REMEDY)
    record = message.content[name]
    if not isinstance(record, ConfigRecord) or not keys <= set(record.keys()) <= keys | {"payload"}:
        raise PayloadError(f"record {name} does not have the fixed keys", remedy=_REMEDY)
    return record


def _document(body: object) -> bytes:
    if not isinstance(body, bytes) or len(body) > _MAX_DOCUMENT:
        raise PayloadError("a record holds no document of at most 4 MB", remedy=_REMEDY)
    return body


def _payload(content: RecordDict, record: ConfigRecord, max_payload: int) -> bytes | None:
    if "payload" in record and "payload" in content:
        raise PayloadError("message has two payloads", remedy=_REMEDY)
    data: object = record.get("payload")
    if "payload" in content:
        data = _flat(content["payload"])
    elif "payload" not in record:
        return None
    if not isinstance(data, bytes):
        raise PayloadError("payload is not bytes", remedy=_REMEDY)
    if len(data) > max_payload:
        raise PayloadError(f"payload of {len(data)} bytes, {max_payload} at most", remedy=_REMEDY)
    return data


def _flat(record: object) -> bytes:
    array = record.get("flat") if isinstance(record, ArrayRecord) else None
    if array is None or len(record) != 1 or array.stype != _STYPE or array.dtype != "uint8":  # type: ignore[arg-type]
        raise PayloadError("payload is not one flat tensor", remedy=_REMEDY)
    if tuple(array.shape) != (len(array.data),):
        raise PayloadError(f"payload of {len(array.data)} bytes is not as declared", remedy=_REMEDY)
    return bytes(array.data)
