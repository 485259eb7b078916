"""The `[source]` table: what it may say, what it must not, and that a site finds its images either way."""

from __future__ import annotations

import socket
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from fedward_client.config import SiteHome, load_config
from fedward_client.sources import checks
from fedward_client.sources.settings import (
    DicomwebConfig,
    DimseConfig,
    FolderConfig,
    Selection,
    SourceConfig,
    Tls,
)
from fedward_common.errors import UsageError

HEAD = 'name = "north"\nserver = "h:1"\nlabels = "l.csv"\n'
WEB = {"kind": "dicomweb", "url": "https://pacs.example/dicom-web"}
NODE = {"kind": "dimse", "host": "pacs.example", "port": 104, "pacs_ae_title": "PACS", "ae_title": "SITE"}
SOURCE: TypeAdapter[Any] = TypeAdapter(SourceConfig)


def load(home: Path, text: str) -> Any:
    (home / "site.toml").write_text(HEAD + text)
    return load_config(SiteHome(home))


@pytest.mark.parametrize(
    "text",
    ['dicom = "images"\n', '[source]\nkind = "folder"\npath = "images"\n'],
    ids=["dicom", "table"],
)
def test_a_folder_is_named_in_one_of_two_ways(tmp_path: Path, text: str) -> None:
    config = load(tmp_path, text)

    assert config.images == FolderConfig(path=tmp_path / "images")
    data = config.site_data(tmp_path)
    assert (data.home, data.dicom, data.labels) == (tmp_path, tmp_path / "images", tmp_path / "l.csv")


def test_images_of_a_pacs_are_read_from_the_spool(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        '[source]\nkind = "dicomweb"\nurl = "https://pacs.example/dicom-web/"\ntoken_file = "token"\n'
        '[source.tls]\nca_file = "/etc/ca.pem"\ncertificate = "own.pem"\nkey = "own.key"\n',
    )

    assert config.site_data(tmp_path).dicom == tmp_path / "spool" / "files"
    assert isinstance(config.images, DicomwebConfig)
    assert config.images.url == "https://pacs.example/dicom-web"
    assert config.images.token_file == tmp_path / "token"
    assert config.images.tls == Tls(
        ca_file=Path("/etc/ca.pem"), certificate=tmp_path / "own.pem", key=tmp_path / "own.key"
    )
    assert (config.images.host, config.images.port) == ("pacs.example", 443)


@pytest.mark.parametrize("text", ["", 'dicom = "d"\n[source]\nkind = "folder"\npath = "d"\n'])
def test_none_and_two_sources_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="either `dicom`"):
        load(tmp_path, text)


def test_no_secret_can_stand_in_the_settings_and_none_is_quoted(tmp_path: Path) -> None:
    for line in ('password = "hunter2"', 'token = "hunter2"', 'url = "https://me:hunter2@pacs.example/"'):
        url = "" if line.startswith("url") else 'url = "https://pacs.example/"\n'
        with pytest.raises(UsageError) as caught:
            load(tmp_path, f'[source]\nkind = "dicomweb"\n{url}{line}\n')
        assert "hunter2" not in caught.value.message + caught.value.remedy


@pytest.mark.parametrize(
    ("document", "fault"),
    [
        ({**WEB, "url": "ftp://pacs.example"}, "https://"),
        ({**WEB, "url": "https://pacs.example/?a=1"}, "path of the service"),
        ({**WEB, "user": "me"}, "belong together"),
        ({**WEB, "user": "me", "password_file": "p", "token_file": "t"}, "not both"),
        ({**WEB, "url": "http://pacs.example"}, "in the clear"),
        ({**WEB, "url": "http://pacs.example", "tls": {}}, "https://"),
        ({**WEB, "unencrypted": True}, "contradicts"),
        ({**WEB, "tls": {"certificate": "c"}}, "belong together"),
        (NODE, "in the clear"),
        ({**NODE, "unencrypted": True, "retrieve": "move"}, "listen"),
        ({**NODE, "tls": {}, "retrieve": "push", "listen": "h:1"}, "certificate"),
        ({**NODE, "host": "127.0.0.1", "retrieve": "push", "listen": "0.0.0.0:11112"}, "in the clear"),
        ({**NODE, "ae_title": "SEVENTEEN LETTERS"}, "pattern"),
        ({**NODE, "ae_title": "BACK\\SLASH"}, "pattern"),
        ({"kind": "tape"}, "tape"),
    ],
)
def test_what_cannot_work_is_refused_with_a_reason(document: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        SOURCE.validate_python(document)


def test_this_machine_needs_no_encryption() -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        assert not DimseConfig.model_validate({**NODE, "host": host}).unencrypted
    assert DicomwebConfig.model_validate({**WEB, "url": "http://localhost"}).port == 80


def test_limits_are_in_bytes_and_the_pacs_alone_may_push_unless_said() -> None:
    config = DimseConfig.model_validate({**NODE, "unencrypted": True, "max_object_mb": 2, "spool_gb": 3})

    assert (config.max_object_bytes, config.max_spool_bytes) == (2 * 2**20, 3_000_000_000)
    assert config.allowed_senders == ("PACS",)
    assert config.model_copy(update={"senders": ("A", "B")}).allowed_senders == ("A", "B")


def test_selection_says_what_it_takes() -> None:
    wanted = Selection(modalities=("CT",), body_parts=("CHEST",), date_from=date(2020, 1, 2))

    assert wanted.date_range == "20200102-"
    assert Selection(date_to=date(2020, 1, 2)).date_range == "-20200102"
    assert wanted.takes_series("CT", "chest")
    assert wanted.takes_series("", "")  # the PACS does not say: the header will
    assert not wanted.takes_series("MR", "CHEST")
    assert not wanted.takes_series("CT", "HEAD")
    assert Selection(body_parts=("CHEST",)).is_everything
    assert wanted.digest != Selection(modalities=("CT",)).digest


@pytest.mark.parametrize(
    "document",
    [
        {"date_from": "2020-01-02", "date_to": "2020-01-01"},
        {"accessions": ["A*"]},
        {"studies": ["1.2.a"]},
        {"modalities": ["ct\\mr"]},
    ],
)
def test_a_selection_that_would_ask_for_something_else_is_refused(document: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Selection.model_validate(document)


@pytest.mark.parametrize(
    ("changes", "is_said"),
    [
        ({}, True),
        ({"sender_hosts": ["127.0.0.1"]}, False),
        ({"retrieve": "move"}, False),
    ],
)
def test_doctor_says_when_an_ae_title_alone_lets_somebody_push(
    tmp_path: Path, changes: dict[str, Any], is_said: bool
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    document = {**NODE, "host": "127.0.0.1", "retrieve": "push", "listen": f"127.0.0.1:{port}", **changes}
    config = DimseConfig.model_validate(document)
    assert ("sender_hosts" in checks._listen(config)) is is_said
