"""Flower messages in the one fixed form; every other message is a PayloadError, never another exception."""

from __future__ import annotations

from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from hypothesis import given
from hypothesis import strategies as st

from fedward_common.errors import PayloadError
from fedward_common.protocol import Down, Up, down_content, read_down, read_up, up_content
from tests.messages import a_message

UP = Up(envelope=b'{"site":"north"}', signature="ab" * 64, payload=b"\x00\x01\x02\x03")
DOWN = Down(instruction=b"{}", signed_plan=b'{"body":1}', payload=b"1234")
STYPE = "fedward.flat.v1"


def flat(data: bytes, **changes: Any) -> ArrayRecord:
    form: dict[str, Any] = {"dtype": "uint8", "shape": (len(data),), "stype": STYPE, "data": data}
    return ArrayRecord({"flat": Array(**(form | changes))})


@pytest.mark.parametrize("payload", [None, b"", b"\xff" * 1000])
def test_what_was_put_into_a_message_comes_out_again(payload: bytes | None) -> None:
    up = Up(UP.envelope, UP.signature, payload)
    down = Down(DOWN.instruction, DOWN.signed_plan, payload)
    assert read_up(a_message(up_content(up)), max_payload=1000) == up
    assert read_down(a_message(down_content(down)), max_payload=1000) == down


@pytest.mark.parametrize("payload", [None, b"", bytes(30_000_000)])  # the last is sent in pieces, all alike
def test_content_survives_flowers_own_serialisation(payload: bytes | None) -> None:
    message = a_message(up_content(Up(UP.envelope, UP.signature, payload)))
    contents = {key: part.deflate() for key, part in get_all_nested_objects(message).items()}
    again = inflate_object_from_contents(message.object_id, contents)
    assert isinstance(again, Message)
    assert read_up(again, max_payload=30_000_000) == Up(UP.envelope, UP.signature, payload)


def test_payload_of_exactly_the_largest_size_passes_and_one_byte_more_does_not() -> None:
    content = up_content(UP)
    assert read_up(a_message(content), max_payload=4).payload == UP.payload
    with pytest.raises(PayloadError, match="payload of 4 bytes, 3 at most"):
        read_up(a_message(content), max_payload=3)


MALFORMED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "no envelope": {"payload": flat(b"1234")},
    "record too many": {"envelope": None, "note": ConfigRecord({"body": b"DOE"})},
    "envelope is an array": {"envelope": flat(b"1234")},
    "envelope is a metric": {"envelope": MetricRecord({"body": 1.0})},
    "no signature": {"envelope": ConfigRecord({"body": b"{}"})},
    "signature is a number": {"envelope": ConfigRecord({"body": b"{}", "signature": 5})},
    "signature too short": {"envelope": ConfigRecord({"body": b"{}", "signature": "ab"})},
    "body is text": {"envelope": ConfigRecord({"body": "{}", "signature": "ab" * 64})},
    "body is a list": {"envelope": ConfigRecord({"body": [1], "signature": "ab" * 64})},
    "body too large": {"envelope": ConfigRecord({"body": bytes(4_000_001), "signature": "ab" * 64})},
    "a word beside the envelope": {
        "envelope": ConfigRecord({"body": b"{}", "signature": "ab" * 64, "note": "DOE JOHN"})
    },
    "two payloads": {
        "envelope": ConfigRecord({"body": b"{}", "signature": "ab" * 64, "payload": b"1"}),
        "payload": flat(b"1234"),
    },
    "payload is text": {
        "envelope": ConfigRecord({"body": b"{}", "signature": "ab" * 64, "payload": "DOE JOHN"})
    },
    "payload is a number": {"envelope": ConfigRecord({"body": b"{}", "signature": "ab" * 64, "payload": 7})},
    "payload too large": {
        "envelope": ConfigRecord({"body": b"{}", "signature": "ab" * 64, "payload": bytes(1001)})
    },
    "payload is a config": {"envelope": None, "payload": ConfigRecord({"flat": b"1234"})},
    "payload has another name": {
        "envelope": None,
        "payload": ArrayRecord({"x": flat(b"1234")["flat"]}),
    },
    "two tensors": {
        "envelope": None,
        "payload": ArrayRecord({"flat": flat(b"1234")["flat"], "more": flat(b"5")["flat"]}),
    },
    "pickled numpy": {"envelope": None, "payload": flat(b"1234", stype="numpy.ndarray")},
    "another dtype": {"envelope": None, "payload": flat(b"1234", dtype="float32")},
    "declared longer": {"envelope": None, "payload": flat(b"1234", shape=(5,))},
    "declared in two dimensions": {"envelope": None, "payload": flat(b"1234", shape=(2, 2))},
    "declared as a number": {"envelope": None, "payload": flat(b"1234", shape=())},
}


@pytest.mark.parametrize("case", MALFORMED)
def test_message_of_any_other_form_is_refused(case: str) -> None:
    fine = up_content(Up(UP.envelope, UP.signature, None))
    records = {name: fine[name] if record is None else record for name, record in MALFORMED[case].items()}
    with pytest.raises(PayloadError) as caught:
        read_up(a_message(RecordDict(records)), max_payload=1000)
    assert "DOE" not in caught.value.message


def test_message_to_a_site_with_a_word_too_many_is_refused() -> None:
    content = down_content(DOWN)
    content["instruction"] = ConfigRecord({"body": b"{}", "plan": b"{}", "code": "import os"})
    with pytest.raises(PayloadError):
        read_down(a_message(content), max_payload=1000)
    content["instruction"] = ConfigRecord({"body": b"{}"})
    with pytest.raises(PayloadError):
        read_down(a_message(content), max_payload=1000)
    content = down_content(DOWN)
    content["code"] = ConfigRecord({"body": b"import os"})
    with pytest.raises(PayloadError):
        read_down(a_message(content), max_payload=1000)


def test_a_form_without_payload_is_read_so_that_the_cases_above_fail_for_their_own_reason() -> None:
    assert read_up(a_message(up_content(Up(UP.envelope, UP.signature, None))), max_payload=0).payload is None
    large = RecordDict({**up_content(Up(UP.envelope, UP.signature, None)), "payload": flat(b"1234")})
    assert read_up(a_message(large), max_payload=4).payload == b"1234"
    with pytest.raises(PayloadError, match="4 bytes, 3 at most"):
        read_up(a_message(large), max_payload=3)


def test_message_that_carries_an_error_instead_of_content_is_refused() -> None:
    question = a_message(up_content(UP))
    with pytest.raises(PayloadError, match="no content"):
        read_up(Message(Error(1, "DOE JOHN"), reply_to=question), max_payload=10)


VALUES = st.one_of(
    st.integers(-(2**63), 2**63 - 1), st.floats(), st.text(max_size=5), st.binary(max_size=5), st.booleans()
)
RECORDS = st.one_of(
    st.dictionaries(st.sampled_from(["body", "signature", "plan", "payload", "x"]), VALUES, max_size=4).map(
        lambda values: ConfigRecord(dict(values))
    ),
    st.dictionaries(st.sampled_from(["body", "flat"]), st.integers(0, 9), max_size=2).map(
        lambda values: MetricRecord(dict(values))
    ),
    st.binary(max_size=8).map(flat),
)


@given(st.dictionaries(st.sampled_from(["envelope", "payload", "instruction", "plan", "x"]), RECORDS))
def test_any_content_is_read_or_refused_with_a_payload_error(records: dict[str, Any]) -> None:
    for read in (read_up, read_down):
        try:
            read(a_message(RecordDict(records)), max_payload=4)
        except PayloadError:
            continue
