"""Errors carry a remedy, and each kind ends a command with its own exit code."""

from __future__ import annotations

import pytest

from fedward_common import errors
from fedward_common.errors import FederationError, RefusalCode


def kinds(base: type[FederationError] = FederationError) -> list[type[FederationError]]:
    direct = [kind for kind in base.__subclasses__() if kind.__module__ == errors.__name__]
    return direct + [deeper for kind in direct for deeper in kinds(kind)]


def test_error_keeps_its_message_and_remedy_apart() -> None:
    error = errors.CohortError("row 3 has no label", remedy="Add a label.")
    assert str(error) == error.message == "row 3 has no label"
    assert error.remedy == "Add a label."


def test_error_without_a_remedy_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="remedy"):
        errors.CohortError("row 3 has no label")  # type: ignore[call-arg]


def test_every_direct_kind_of_error_has_its_own_exit_code() -> None:
    codes = [kind.exit_code for kind in kinds() if FederationError in kind.__bases__]
    assert len(codes) >= 11
    assert len(set(codes)) == len(codes)
    # 0 is success, 1 any other FederationError; from 126 the shell's own codes begin.
    assert all(1 < code < 126 for code in codes)


def test_narrower_errors_share_the_exit_code_of_their_kind() -> None:
    for kind in kinds():
        for base in kind.__bases__:
            if base is not FederationError:
                assert issubclass(base, FederationError)
                assert kind.exit_code == base.exit_code


@pytest.mark.parametrize("code", list(RefusalCode), ids=lambda code: code.name)
def test_every_refusal_has_a_meaning_of_its_own(code: RefusalCode) -> None:
    assert code.meaning
    assert [other for other in RefusalCode if other.meaning == code.meaning] == [code]


def test_a_refusal_travels_as_a_number_and_an_unknown_number_is_not_one() -> None:
    assert RefusalCode(int(RefusalCode.PLAN_EXPIRED)) is RefusalCode.PLAN_EXPIRED
    with pytest.raises(ValueError, match="9999"):
        RefusalCode(9999)
