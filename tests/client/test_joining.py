"""Joining: a kit becomes a complete, private home, or nothing is left behind."""

from __future__ import annotations

import shutil
import stat
import tomllib
from pathlib import Path

import pytest

from fedward_client.config import SiteConfig, SiteHome, load_config
from fedward_client.joining import join
from fedward_client.sources.settings import DicomwebConfig
from fedward_common.audit import AuditLog
from fedward_common.errors import IdentityError, UsageError
from fedward_common.identity import IDENTITY_FILES, load_identity
from tests.federations import a_federation

EXAMPLES = Path(__file__).resolve().parents[2] / "deploy" / "site"


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_federation(tmp_path_factory.mktemp("federation") / "ours")


@pytest.fixture
def kit(federation: Path, tmp_path: Path) -> Path:
    """A site's directory as it comes from a stick that knows no file modes."""
    kit = shutil.copytree(federation / "sites" / "north", tmp_path / "kit")
    for path in kit.iterdir():
        path.chmod(0o777)
    return kit


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, Path]:
    """A DICOM folder and a label file."""
    (tmp_path / "dicom").mkdir()
    (tmp_path / "labels.csv").write_text("key,label\n")
    return tmp_path / "dicom", tmp_path / "labels.csv"


def content_of(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_home_is_complete_and_private(kit: Path, data: tuple[Path, Path], tmp_path: Path) -> None:
    home = SiteHome(tmp_path / "home")

    config = join(kit, home.root, *data, 2, "cpu")

    assert config == load_config(home)
    assert config == SiteConfig(
        name="north", server="127.0.0.1:8443", dicom=data[0], labels=data[1], threads=2, device="cpu"
    )
    assert load_identity(home.identity).peer.name == "north"
    assert {path.name for path in home.identity.iterdir()} == set(IDENTITY_FILES)
    for path in [home.root, *home.root.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert len(home.pseudonym_key.read_bytes()) == 32
    assert [entry.event for entry in AuditLog(home.audit).entries()] == ["joined"]


def test_every_home_has_its_own_pseudonym_key(kit: Path, data: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        join(kit, tmp_path / name, *data)

    keys = {SiteHome(tmp_path / name).pseudonym_key.read_bytes() for name in ("one", "two")}
    assert len(keys) == 2


def test_relative_folders_are_written_as_absolute_ones(
    kit: Path, data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    join(Path("kit"), Path("home"), Path("dicom"), Path("labels.csv"))

    document = tomllib.loads((tmp_path / "home" / "site.toml").read_text())
    assert (document["dicom"], document["labels"]) == (str(data[0]), str(data[1]))


@pytest.mark.parametrize("name", ['quote " and \\ backslash', "Übung 東京", "tab\there"])
def test_folder_with_an_unusual_name_survives_the_settings_file(kit: Path, tmp_path: Path, name: str) -> None:
    dicom, labels = tmp_path / name, tmp_path / f"{name}.csv"
    dicom.mkdir()
    labels.write_text("key,label\n")

    config = join(kit, tmp_path / "home", dicom, labels)

    assert (config.dicom, config.labels) == (dicom, labels)


def test_existing_home_is_refused_and_left_as_it_is(
    kit: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    join(kit, tmp_path / "home", *data)
    before = content_of(tmp_path / "home")

    with pytest.raises(UsageError, match="exists and is not an empty folder"):
        join(kit, tmp_path / "home", *data)
    with pytest.raises(UsageError):
        join(kit, data[1], *data)

    assert content_of(tmp_path / "home") == before


def test_empty_folder_becomes_a_home(kit: Path, data: tuple[Path, Path], tmp_path: Path) -> None:
    """A container's mounted volume: it exists, and it cannot be replaced by a rename."""
    (tmp_path / "home").mkdir(mode=0o755)

    join(kit, tmp_path / "home", *data)

    assert stat.S_IMODE((tmp_path / "home").stat().st_mode) == 0o700


@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize("missing", IDENTITY_FILES)
def test_incomplete_kit_is_refused_and_nothing_is_left(
    kit: Path, data: tuple[Path, Path], tmp_path: Path, missing: str, existed: bool
) -> None:
    (kit / missing).unlink()
    home = tmp_path / "home"
    if existed:
        home.mkdir()

    with pytest.raises(IdentityError, match=missing):
        join(kit, home, *data)

    assert home.exists() == existed
    assert not existed or list(home.iterdir()) == []


def test_kit_with_another_site_s_key_is_refused(
    federation: Path, kit: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copy(federation / "sites" / "south" / "tls.key", kit / "tls.key")

    with pytest.raises(IdentityError, match="is not the key of"):
        join(kit, tmp_path / "home", *data)

    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("member", ["coordinators/anna", "observers/otto", "server"])
def test_identity_of_another_role_is_refused(
    federation: Path, data: tuple[Path, Path], tmp_path: Path, member: str
) -> None:
    with pytest.raises(IdentityError, match="not of a site"):
        join(federation / member, tmp_path / "home", *data)


def test_absent_data_is_refused(kit: Path, data: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a folder"):
        join(kit, tmp_path / "home", tmp_path / "nowhere", data[1])
    with pytest.raises(UsageError, match="is not a file"):
        join(kit, tmp_path / "home", data[0], tmp_path / "nowhere.csv")

    assert not (tmp_path / "home").exists()


def test_setting_out_of_bounds_is_refused_and_nothing_is_left(
    kit: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="threads"):
        join(kit, tmp_path / "home", *data, -1)

    assert not (tmp_path / "home").exists()


def test_home_below_a_file_is_refused(kit: Path, data: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="Not a directory"):
        join(kit, data[1] / "home", *data)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (None, "No such file"),
        ("name = ", "is not TOML"),
        ('name = "north"\n', "server: Field required"),
        ('nam = "north"\n', "nam: Extra inputs"),
        ('name = "north"\nserver = "no port"\ndicom = "d"\nlabels = "l"\n', "server: "),
        ('name = "north"\nserver = "h:1"\ndicom = "d"\nlabels = "l"\ndevice = "tpu"\n', "device: "),
    ],
)
def test_faulty_settings_are_refused_and_the_fault_named(
    tmp_path: Path, text: str | None, fault: str
) -> None:
    home = SiteHome(tmp_path)
    if text is not None:
        home.config.write_text(text)

    with pytest.raises(UsageError) as caught:
        load_config(home)

    assert fault in caught.value.message


@pytest.mark.parametrize("example", ["dicomweb.toml", "dimse.toml"])
def test_a_site_with_a_pacs_joins_with_its_settings(
    kit: Path, data: tuple[Path, Path], tmp_path: Path, example: str
) -> None:
    home = SiteHome(tmp_path / "home")

    config = join(kit, home.root, None, data[1], source=EXAMPLES / example)

    example_site = SiteHome(tmp_path / "example")
    example_site.root.mkdir()
    example_site.config.write_bytes((EXAMPLES / example).read_bytes())
    asked = load_config(example_site).images
    assert config == load_config(home)
    assert (config.name, config.dicom, config.labels) == ("north", None, data[1])
    assert config.images.model_dump(exclude={"tls", "token_file"}) == asked.model_dump(
        exclude={"tls", "token_file"}
    )
    written = tomllib.loads(home.config.read_text())["source"]
    assert written["tls"]["key"] == "pacs-client.key"  # in the home, wherever that is moved
    assert "timeout_s" not in written


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('name = "north"', "no table"),
        ("[source", "not TOML"),
        ('[source]\nkind = "ftp"', "source"),
        ('source = "pacs"', "source"),
        (None, "No such file"),
    ],
)
def test_faulty_settings_of_a_pacs_are_refused_and_nothing_is_left(
    kit: Path, data: tuple[Path, Path], tmp_path: Path, text: str | None, fault: str
) -> None:
    source = tmp_path / "pacs.toml"
    if text is not None:
        source.write_text(text)

    with pytest.raises(UsageError, match=fault):
        join(kit, tmp_path / "home", None, data[1], source=source)

    assert not (tmp_path / "home").exists()


def test_images_are_in_one_place(kit: Path, data: tuple[Path, Path], tmp_path: Path) -> None:
    for dicom, source in ((None, None), (data[0], EXAMPLES / "dimse.toml")):
        with pytest.raises(UsageError, match="one way"):
            join(kit, tmp_path / "home", dicom, data[1], source=source)


def test_a_home_named_from_where_one_stands_is_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    home = SiteHome(Path("north"))
    home.root.mkdir()
    home.config.write_text(
        'name = "north"\nserver = "h:1"\nlabels = "l.csv"\n[source]\nkind = "dicomweb"\n'
        'url = "https://pacs.example/dicom-web"\ntoken_file = "token"\n'
    )

    config = load_config(home)

    assert config.site_data(home.root).labels == tmp_path / "north" / "l.csv"
    resolved = config.images.resolved(home.root)
    assert isinstance(resolved, DicomwebConfig)
    assert resolved.token_file == tmp_path / "north" / "token"


def test_relative_folders_in_the_settings_are_taken_from_the_home(tmp_path: Path) -> None:
    home = SiteHome(tmp_path)
    home.config.write_text('name = "north"\nserver = "h:1"\ndicom = "images"\nlabels = "/l.csv"\n')

    config = load_config(home)

    assert (config.dicom, config.labels) == (tmp_path / "images", Path("/l.csv"))


def test_a_site_may_join_without_a_label_file(kit: Path, data: tuple[Path, Path], tmp_path: Path) -> None:
    config = join(kit, tmp_path / "home", data[0])

    assert config.labels is None
    assert config.site_data(tmp_path / "home").label_file is None
    assert load_config(SiteHome(tmp_path / "home")) == config
