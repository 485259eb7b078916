"""A plan is read once, refused by the name of its fault, and stands for exactly one byte string."""

from __future__ import annotations

import hashlib
import json
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedward_common.errors import PlanError
from fedward_common.plan import (
    PlanBody,
    SignedPlan,
    TrainingPlan,
    canonical_bytes,
    check_names,
    parse_plan,
    parse_signed_plan,
    read_plan,
)
from fedward_common.weights import TensorSpec

PLAN = """
name = "lungs"
description = "Pneumonie oder nicht: größere Läsionen"
expires = 2030-01-01T12:00:00+02:00
rounds = 5

[participation]
quorum = 2

[task]
labels = ["normal", "pneumonia"]

[transforms]
size = [28, 28]
[transforms.augmentation]
rotate_degrees = 10

[model]
name = "cnn2d"

[training]
learning_rate = 0.01

[strategy]
name = "fedprox"
options = { mu = 1 }
"""
NOW = datetime(2029, 1, 1, tzinfo=UTC)


def a_document() -> dict[str, Any]:
    return tomllib.loads(PLAN)


def changed(path: str, value: object) -> dict[str, Any]:
    """The document with the value at a dotted path replaced."""
    document = table = a_document()
    *tables, key = path.split(".")
    for name in tables:
        table = table.setdefault(name, {})
    table[key] = value
    return document


def a_signed_plan(**changes: Any) -> SignedPlan:
    body = PlanBody(
        plan=parse_plan(a_document()),
        layout=(TensorSpec(name="dense.weight", shape=(2, 3), kind="parameter"),),
        nonce="0123456789abcdef" * 2,
        signed_at=NOW,
    )
    return SignedPlan(body=body.model_copy(update=changes), signer="lead", signature="ab" * 64)


def test_plan_file_is_read_with_defaults_for_what_it_leaves_out(tmp_path: Path) -> None:
    path = tmp_path / "lungs.toml"
    path.write_text(PLAN, encoding="utf-8")
    plan = read_plan(path)
    assert (plan.rounds, plan.training.optimizer, plan.privacy.min_cases) == (5, "sgd", 5)
    assert plan.strategy.options == {"mu": 1}
    assert plan == parse_plan(a_document())


@pytest.mark.parametrize(
    "content", [b"name = ", b"\xff\xfe", b"rounds = 5\nrounds = 6"], ids=["cut", "encoding", "twice"]
)
def test_file_that_is_not_toml_is_refused_by_its_name_without_its_path(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "lungs.toml"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=r"plan lungs\.toml") as refusal:
        read_plan(path)
    assert str(tmp_path) not in refusal.value.message


def test_file_that_is_absent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"plan lungs\.toml"):
        read_plan(tmp_path / "lungs.toml")


@pytest.mark.parametrize(
    "path",
    [
        "learning_rate",
        "participation.min_sites",
        "task.classes",
        "data.path",
        "transforms.resize",
        "transforms.augmentation.blur",
        "model.file",
        "training.lr",
        "strategy.code",
        "privacy.epsilon",
        "evaluation.metrics",
    ],
)
def test_unknown_key_is_refused_by_name_at_every_level(path: str) -> None:
    with pytest.raises(PlanError, match=f"{path}: Extra inputs are not permitted"):
        parse_plan(changed(path, 1))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("name", "Lungs and more"),
        ("name", "../lungs"),
        ("name", "x" * 64),
        ("description", "x" * 2001),
        ("expires", "2030-01-01T12:00:00"),
        ("rounds", 0),
        ("rounds", 10_001),
        ("seed", -1),
        ("seed", 2**32),
        ("participation.quorum", 0),
        ("participation.quorum", 1001),
        ("participation.deadline_s", 0),
        ("participation.gather_s", 8 * 86400),
        ("task.labels", ["normal"]),
        ("data.validation_fraction", 1),
        ("data.test_fraction", -0.1),
        ("transforms.size", [28]),
        ("transforms.size", [28, 0]),
        ("transforms.size", [28, 28, 28, 28]),
        ("transforms.window", "screen"),
        ("transforms.percentiles", [0.0, 101.0]),
        ("transforms.augmentation.rotate_degrees", 181),
        ("transforms.augmentation.probability", 0),
        ("model.name", "fedward_common.models.cnn2d:MODEL"),
        ("model.options", {"layers": {"deep": 1}}),
        ("training.learning_rate", 0),
        ("training.learning_rate", float("nan")),
        ("training.optimizer", "lbfgs"),
        ("training.precision", "float16"),
        ("training.batch_size", 4097),
        ("training.local_epochs", 0),
        ("strategy.options", {"mu": float("inf")}),
        ("privacy.min_cases", 0),
        ("privacy.max_cases", 2**24 + 1),
        ("privacy.max_abs", 1025),
        ("privacy.max_norm", float("inf")),
        ("evaluation.score_bins", 8),
        ("evaluation.threshold", 1),
    ],
)
def test_value_out_of_bounds_is_refused_by_name(path: str, value: object) -> None:
    with pytest.raises(PlanError, match=f"plan is not valid: {path}"):
        parse_plan(changed(path, value))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"window": [100.0, -100.0]}, "window: the first value must be below"),
        ({"percentiles": [99.0, 1.0]}, "percentiles: the first must be below"),
        ({"spacing_mm": [1.0, 1.0, 1.0]}, "size needs three numbers"),
        ({"view": "axial"}, "size needs three numbers"),
    ],
)
def test_transforms_that_contradict_themselves_are_refused(values: dict[str, Any], said: str) -> None:
    document = a_document()
    with pytest.raises(PlanError, match=said):
        parse_plan(document | {"transforms": {"size": (28, 28)} | values})


def test_every_fault_is_named_at_once() -> None:
    document = a_document() | {"rounds": 0, "colour": "blue"}
    del document["task"]
    with pytest.raises(PlanError) as refusal:
        parse_plan(document)
    for fault in ("rounds:", "colour:", "task: Field required"):
        assert fault in refusal.value.message


def test_values_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(PlanError, match="labels must differ"):
        parse_plan(changed("task.labels", ["normal", "normal"]))
    with pytest.raises(PlanError, match="positive = 'tumour' is not among the labels"):
        parse_plan(changed("task.positive", "tumour"))
    halves = changed("data", {"validation_fraction": 0.5, "test_fraction": 0.5})
    with pytest.raises(PlanError, match="must be below 1"):
        parse_plan(halves)


def test_positive_class_is_the_last_label_unless_named() -> None:
    assert parse_plan(a_document()).task.positive_index == 1
    assert parse_plan(changed("task.positive", "normal")).task.positive_index == 0


def test_plan_cannot_be_changed_once_it_is_read() -> None:
    plan = parse_plan(a_document())
    with pytest.raises(ValidationError, match="frozen"):
        plan.rounds = 6  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        plan.training.learning_rate = 1.0  # type: ignore[misc]


def test_names_and_options_of_the_parts_are_checked() -> None:
    check_names(parse_plan(a_document()))
    for path, value, fault in (
        ("task.name", "segmentation", "among tasks"),
        ("data.dataset", "pacs", "among datasets"),
        ("transforms.name", "ct_volume", "among transforms"),
        ("model.name", "unet", "among models"),
        ("training.trainer", "remote", "among trainers"),
        ("strategy.name", "krum", "among strategies"),
        ("strategy.options", {"mu": -1}, "mu"),
    ):
        with pytest.raises(PlanError, match=fault):
            check_names(parse_plan(changed(path, value)))


def test_canonical_bytes_are_sorted_compact_utf8_json() -> None:
    canonical = canonical_bytes(parse_plan(a_document()))
    document = json.loads(canonical)
    again = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert canonical == again.encode()
    assert "größere Läsionen".encode() in canonical


def test_canonical_bytes_do_not_depend_on_the_order_in_the_file() -> None:
    document = a_document()
    assert canonical_bytes(parse_plan(dict(reversed(document.items())))) == canonical_bytes(
        parse_plan(document)
    )


@given(
    options=st.dictionaries(
        st.text(max_size=8),
        st.one_of(
            st.booleans(),
            st.integers(-(2**53), 2**53),
            st.floats(allow_nan=False, allow_infinity=False),
            st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
            st.lists(st.integers(-(2**31), 2**31), max_size=3),
        ),
        max_size=4,
    ),
    expires=st.datetimes(datetime(2026, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC)),
    learning_rate=st.floats(1e-9, 10),
)
def test_canonical_bytes_give_back_the_same_plan_and_the_same_bytes(
    options: dict[str, Any], expires: datetime, learning_rate: float
) -> None:
    document = a_document() | {"model": {"name": "cnn2d", "options": options}, "expires": expires}
    document["training"] = {"learning_rate": learning_rate}
    plan = parse_plan(document)
    again = TrainingPlan.model_validate_json(canonical_bytes(plan))
    assert again == plan
    assert canonical_bytes(again) == canonical_bytes(plan)


def test_signed_plan_is_read_back_from_its_bytes() -> None:
    signed = a_signed_plan()
    again = parse_signed_plan(signed.to_bytes())
    assert again == signed
    assert again.plan == parse_plan(a_document())
    assert again.digest == hashlib.sha256(canonical_bytes(signed.body)).hexdigest()


def test_digest_changes_with_plan_layout_and_nonce_but_not_with_the_signature() -> None:
    signed = a_signed_plan()
    others = [
        a_signed_plan(nonce="f" * 32),
        a_signed_plan(layout=()),
        a_signed_plan(plan=parse_plan(changed("rounds", 6))),
        a_signed_plan(signed_at=NOW + timedelta(seconds=1)),
    ]
    assert len({signed.digest, *(other.digest for other in others)}) == 5
    assert signed.model_copy(update={"signature": "cd" * 64}).digest == signed.digest


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text + b"\n",
        lambda text: text.replace(b":", b": ", 1),
        lambda text: json.dumps(
            json.loads(text), separators=(",", ":"), ensure_ascii=False, indent=0
        ).encode(),
        lambda text: json.dumps(json.loads(text), sort_keys=True, separators=(",", ":")).encode(),
        lambda text: text.replace(b'"rounds":5', b'"rounds":5.0'),
        lambda text: text.replace(b'"rounds":5', b'"rounds":"5"'),
        lambda text: text.replace(b'"rounds":5', b'"rounds":6,"rounds":5'),
        lambda text: text.replace(b'"seed":0,', b""),
    ],
    ids=["newline", "space", "indent", "ascii", "float", "text", "repeated key", "default left out"],
)
def test_signed_plan_in_any_other_form_is_refused(change: Any) -> None:
    document = a_signed_plan().to_bytes()
    other = change(document)
    assert other != document
    with pytest.raises(PlanError, match=r"not in canonical form|not a signed plan"):
        parse_signed_plan(other)


@pytest.mark.parametrize(
    "change",
    [
        lambda document: b"",
        lambda document: b"[]",
        lambda document: document[:-1],
        lambda document: document.replace(b'"rounds"', b'"Rounds"'),
        lambda document: document.replace(b'"signer"', b'"extra":1,"signer"'),
        lambda document: document.replace(b"ab" * 64, b"ab" * 63),
        lambda document: document.replace(b"ab" * 64, b"AB" * 64),
        lambda document: document.replace(b"0123456789abcdef" * 2, b"0123"),
        lambda document: document.replace(b'"rounds":5', b'"rounds":NaN'),
        lambda document: document.replace(b"+02:00", b""),
        lambda document: document.replace("ß".encode(), b"\xff"),
    ],
)
def test_document_that_is_not_a_signed_plan_is_refused(change: Any) -> None:
    with pytest.raises(PlanError, match="not a signed plan") as refusal:
        parse_signed_plan(change(a_signed_plan().to_bytes()))
    assert "fedward plan sign" in refusal.value.remedy


def test_signed_plan_beyond_the_size_limit_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(PlanError, match="4000001 bytes, 4,000,000 at most"):
        parse_signed_plan(b" " * 4_000_001)


def test_plan_expires_at_its_time_and_without_one_counts_as_expired() -> None:
    signed = a_signed_plan()
    expires = signed.plan.expires
    assert expires is not None
    assert not signed.expired(expires - timedelta(microseconds=1))
    assert signed.expired(expires)
    assert not signed.expired(NOW)
    assert a_signed_plan(plan=signed.plan.model_copy(update={"expires": None})).expired(NOW)
