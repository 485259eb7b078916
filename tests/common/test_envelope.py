"""Instruction and envelope: a closed list of enumerated values, one byte string each, no room for text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from annotated_types import Ge, Le
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedward_common.envelope import (
    MAX_COUNT,
    Envelope,
    Instruction,
    Numbers,
    envelope_bytes,
    job_seed,
    parse_envelope,
    parse_instruction,
    signed_bytes,
)
from fedward_common.errors import PayloadError
from tests.builders import a_plan

INSTRUCTION = Instruction(
    run_id="run-1", plan_digest="a" * 64, action="train", round_index=3, base_digest="b" * 64
)


def an_envelope(**changes: Any) -> Envelope:
    values: dict[str, Any] = {
        "site": "north",
        "run_id": "run-1",
        "plan_digest": "a" * 64,
        "action": "train",
        "round_index": 3,
        "base_digest": "b" * 64,
        "split": "validation",
        "code": 0,
        "numbers": Numbers(num_cases=12, mean_loss=0.25),
        "payload_digest": "c" * 64,
    }
    return Envelope.model_validate(values | changes)


def leaves(annotation: Any, metadata: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Every alternative of a type with the constraints that apply to it."""
    if get_origin(annotation) in (Union, UnionType):
        for part in get_args(annotation):
            yield from leaves(part, metadata)
    elif hasattr(annotation, "__metadata__"):
        yield from leaves(annotation.__origin__, (*metadata, *annotation.__metadata__))
    else:
        yield annotation, metadata


def constraints(metadata: tuple[Any, ...]) -> Iterator[Any]:
    for item in metadata:
        yield from item.metadata if isinstance(item, FieldInfo) else (item,)


def every_field(model: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from every_field(field.annotation)
        else:
            yield name, field


@pytest.mark.parametrize(("name", "field"), list(every_field(Envelope)))
def test_no_field_of_the_envelope_can_hold_a_sentence_a_path_or_an_unbounded_number(
    name: str, field: FieldInfo
) -> None:
    for kind, metadata in leaves(field.annotation, tuple(field.metadata)):
        found = list(constraints(metadata))
        if kind is type(None) or get_origin(kind) is Literal:
            continue
        if kind is str:
            (pattern,) = [item.pattern for item in found if getattr(item, "pattern", None)]
            for text in ("DOE JOHN", "DOE^JOHN", "/data/x.dcm", "a\\b", "", "a\nb", "ä", "<b>", "a" * 200):
                assert re.fullmatch(pattern, text) is None, (name, text)
        else:
            assert kind in (int, float), name
            assert any(isinstance(item, Ge) for item in found), name
            assert any(isinstance(item, Le) for item in found), name


def test_envelope_and_numbers_forbid_unknown_keys_and_are_frozen() -> None:
    for model in (Envelope, Numbers, Instruction):
        assert model.model_config["extra"] == "forbid"
        assert model.model_config["frozen"] is True


def test_envelope_read_back_is_the_one_that_was_written() -> None:
    assert parse_envelope(envelope_bytes(an_envelope())) == an_envelope()


@pytest.mark.parametrize(
    "change",
    [
        {"note": "DOE JOHN"},
        {"version": 2},
        {"site": "North Hospital"},
        {"site": "north\n"},
        {"action": "upload"},
        {"round_index": -1},
        {"round_index": 10_001},
        {"code": 256},
        {"code": True},
        {"payload_digest": "C" * 64},
        {"run_id": "../run"},
        {"split": "train"},
        {"numbers": {"num_cases": MAX_COUNT + 1}},
        {"numbers": {"num_cases": -1}},
        {"numbers": {"num_cases": 1.5}},
        {"numbers": {"age": 71}},
    ],
)
def test_envelope_with_a_value_outside_its_list_or_bounds_is_refused(change: dict[str, Any]) -> None:
    document = json.loads(envelope_bytes(an_envelope())) | change
    raw = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    with pytest.raises(PayloadError) as caught:
        parse_envelope(raw)
    assert caught.value.remedy


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_envelope_with_a_loss_that_is_not_finite_is_refused(number: str) -> None:
    raw = envelope_bytes(an_envelope()).replace(b'"mean_loss":0.25', f'"mean_loss":{number}'.encode())
    assert number.encode() in raw
    with pytest.raises(PayloadError):
        parse_envelope(raw)


@pytest.mark.parametrize(
    "edit",
    [
        lambda raw: raw + b" ",
        lambda raw: raw.replace(b'"code":0', b'"code": 0'),
        lambda raw: raw.replace(b'"code":0', b'"code":0.0'),
        lambda raw: raw.replace(b'"code":0', b'"code":"0"'),
        lambda raw: raw.replace(b'"code":0', b'"code":0,"code":0'),
        lambda raw: raw.replace(b"north", b"\\u006eorth"),
        lambda raw: json.dumps(dict(reversed(json.loads(raw).items())), separators=(",", ":")).encode(),
    ],
)
def test_envelope_has_one_byte_string_and_every_other_spelling_is_refused(edit: Any) -> None:
    changed = edit(envelope_bytes(an_envelope()))
    assert changed != envelope_bytes(an_envelope())
    with pytest.raises(PayloadError):
        parse_envelope(changed)


@given(st.binary(max_size=400) | st.text(max_size=100).map(str.encode) | st.just(b"[" * 100_000))
def test_bytes_that_are_no_document_raise_a_payload_error_and_nothing_else(raw: bytes) -> None:
    with pytest.raises(PayloadError):
        parse_envelope(raw)
    with pytest.raises(PayloadError):
        parse_instruction(raw)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@given(key=st.sampled_from(sorted(Envelope.model_fields)), value=JSON)
def test_any_json_in_any_key_is_either_refused_or_the_canonical_document(key: str, value: Any) -> None:
    document = json.loads(envelope_bytes(an_envelope())) | {key: value}
    raw = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode(
        errors="replace"
    )
    try:
        envelope = parse_envelope(raw)
    except PayloadError:
        return
    assert envelope_bytes(envelope) == raw


@pytest.mark.parametrize(
    "change",
    [
        {"run_id": "run-2"},
        {"plan_digest": "d" * 64},
        {"action": "evaluate"},
        {"round_index": 2},
        {"base_digest": None},
        {"split": "test"},
    ],
)
def test_envelope_answers_only_the_very_instruction_it_was_made_for(change: dict[str, Any]) -> None:
    assert an_envelope().answers(INSTRUCTION)
    assert not an_envelope(**change).answers(INSTRUCTION)


def test_signed_bytes_cannot_be_those_of_another_kind_of_document() -> None:
    body = envelope_bytes(an_envelope())
    assert signed_bytes(body) != body
    assert signed_bytes(body).startswith(b"fedward-update-v1\n")


@pytest.mark.parametrize(
    "change", [{"action": "shell"}, {"extra": 1}, {"round_index": "three"}, {"run_id": "a b"}]
)
def test_instruction_with_an_unknown_key_or_value_is_refused(change: dict[str, Any]) -> None:
    document = json.loads(INSTRUCTION.model_dump_json()) | change
    with pytest.raises(PayloadError) as caught:
        parse_instruction(json.dumps(document).encode())
    assert "a b" not in caught.value.message  # an error may be logged; what arrived may not


def test_job_seed_depends_on_plan_seed_site_round_and_purpose_and_on_nothing_else() -> None:
    plan = a_plan(seed=4)
    seeds = {
        job_seed(plan, "north", 1),
        job_seed(plan, "north", 2),
        job_seed(plan, "south", 1),
        job_seed(plan, "north", 1, "baseline"),
        job_seed(a_plan(seed=5), "north", 1),
    }
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)  # what torch.manual_seed takes
    assert job_seed(a_plan(seed=4, name="other", rounds=9), "north", 1) == job_seed(plan, "north", 1)
