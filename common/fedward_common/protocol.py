"""Put payloads into Flower messages and take them out again (hop 7).

A message has a fixed form: one byte string with the instruction or envelope, the signed plan on the way
down, a signature on the way up, and at most one flat tensor. Flower's own array serialisation is not
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
    content = RecordDict(
        {
            "instruction": ConfigRecord({"body": down.instruction}),
            "plan": ConfigRecord({"body": down.signed_plan}),
        }
    )
    if down.payload is not None:
        content["payload"] = _flat(down.payload)
    return content


def up_content(up: Up) -> RecordDict:
    """Records of a message from a site."""
    content = RecordDict(
        {"envelope": ConfigRecord({"body": up.envelope, "signature": up.signature})},
    )
    if up.payload is not None:
        content["payload"] = _flat(up.payload)
    return content


def read_down(message: Message, *, max_payload: int) -> Down:
    """Take a server's message apart; PayloadError unless it has exactly the fixed form."""
    content = _content(message, {"instruction", "plan"})
    return Down(
        instruction=_document(content, "instruction", {"body"}),
        signed_plan=_document(content, "plan", {"body"}),
        payload=_payload(content, max_payload),
    )


def read_up(message: Message, *, max_payload: int) -> Up:
    """Take a site's message apart; PayloadError unless it has exactly the fixed form."""
    content = _content(message, {"envelope"})
    envelope = _document(content, "envelope", {"body", "signature"})
    signature = content["envelope"]["signature"]
    if not isinstance(signature, str) or len(signature) != 128:
        raise PayloadError("message carries no signature", remedy=_REMEDY)
    return Up(
        envelope=envelope,
        signature=signature,
        payload=_payload(content, max_payload),
    )


def _flat(payload: bytes) -> ArrayRecord:
    return ArrayRecord({"flat": Array(dtype="uint8", shape=(len(payload),), stype=_STYPE, data=payload)})


def _content(message: Message, required: set[str]) -> RecordDict:
    if not message.has_content():
        raise PayloadError("message has no content", remedy=_REMEDY)
    names = set(message.content.keys())
    if not required <= names <= required | {"payload"}:
        raise PayloadError(f"message has {len(names)} records, expected {sorted(required)}", remedy=_REMEDY)
    return message.content


def _document(content: RecordDict, record: str, keys: set[str]) -> bytes:
    config = content[record]
    is_form = isinstance(config, ConfigRecord) and set(config.keys()) == keys
    body = config["body"] if is_form else None
    if not isinstance(body, bytes) or len(body) > _MAX_DOCUMENT:
        raise PayloadError(f"record {record} holds no document of at most 4 MB", remedy=_REMEDY)
    return body


def _payload(content: RecordDict, max_payload: int) -> bytes | None:
    if "payload" not in content:
        return None
    record = content["payload"]
    array = record.get("flat") if isinstance(record, ArrayRecord) else None
    if array is None or len(record) != 1 or array.stype != _STYPE or array.dtype != "uint8":
        raise PayloadError("payload is not one flat tensor", remedy=_REMEDY)
    if len(array.data) > max_payload or tuple(array.shape) != (len(array.data),):
        raise PayloadError(
            f"payload of {len(array.data)} bytes, {max_payload} at most and as declared", remedy=_REMEDY
        )
    return array.data
