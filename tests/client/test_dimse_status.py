"""What a PACS answers, and what the operator reads."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydicom.dataset import Dataset

from fedward_client.sources.access import PacsAwayError, read_secret
from fedward_client.sources.dimse_status import code_of, failed, raise_unless_partial
from fedward_client.sources.settings import DimseConfig
from fedward_common.errors import CohortError, IdentityError

CONFIG = DimseConfig(
    kind="dimse", host="127.0.0.1", port=104, pacs_ae_title="PACS", ae_title="SITE", retrieve="get"
)


@pytest.mark.parametrize(
    ("code", "kind", "word"),
    [
        (0xA701, PacsAwayError, "out of resources"),
        (0x0124, IdentityError, "does not let this site"),
        (0xA801, IdentityError, "sends nothing to SITE"),
        (0xA900, CohortError, "0xA900"),
    ],
)
def test_each_status_has_its_sentence(code: int, kind: type[Exception], word: str) -> None:
    error = failed("search", code, CONFIG)

    assert type(error) is kind
    assert word in error.message
    assert error.remedy
    with pytest.raises(kind):
        raise_unless_partial(code, CONFIG)


@pytest.mark.parametrize("code", [0xB000, 0xC000, 0xCFFF, 0xFE00])
def test_a_retrieval_that_failed_in_part_is_left_to_what_came(code: int) -> None:
    raise_unless_partial(code, CONFIG)


def test_no_status_means_that_the_association_ended() -> None:
    with pytest.raises(PacsAwayError, match="broke off"):
        code_of(Dataset())


@pytest.mark.parametrize("content", [b"", b"\n", b"two\nlines", b"\xff\xfe", b"x" * 20_000])
def test_a_secret_is_one_line_of_text_and_never_quoted(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("home") / "token"
    path.write_bytes(content)
    path.chmod(0o600)

    with pytest.raises(IdentityError) as caught:
        read_secret(path)
    assert "lines" not in caught.value.message + caught.value.remedy


def test_a_secret_that_is_not_there_is_named(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(IdentityError, match="No such file"):
        read_secret(tmp_path_factory.mktemp("home") / "token")


@pytest.mark.parametrize(
    ("owner", "name"),
    [("transport.AssociationSocket", "recv"), ("dimse.DIMSEServiceProvider", "receive_primitive")],
)
def test_another_build_of_pynetdicom_is_refused_and_not_left_without_limits(owner: str, name: str) -> None:
    module, _, kind = owner.partition(".")
    code = (
        f"import pynetdicom.{module} as module\n"
        f"delattr(module.{kind}, {name!r})\n"
        "import fedward_client.sources.association"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: this version of pynetdicom is built differently" in done.stderr
