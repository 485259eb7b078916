"""docker-compose.yml: what the schema allows, and what this project promises beyond it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # comes without types

from fedward_client.config import SiteHome, load_config
from fedward_common.identity import IDENTITY_FILES, PRIVATE_FILES
from tests.deploy.checkers import ROOT, check_compose

FILE = ROOT / "docker-compose.yml"
GPU_FILE = ROOT / "deploy" / "compose" / "gpu.yml"
SITES = ("site-a", "site-b", "site-c")
HOMES = {"server": "/var/lib/fedward"} | dict.fromkeys(SITES, "/var/lib/fedward-site")
DOCUMENT: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = DOCUMENT["services"]

every_service = pytest.mark.parametrize("name", HOMES)


def host_path(source: str) -> str:
    """A path with its variables at their defaults."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", source)


def files_in(name: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(path in the container, path on the host, entry) of every bind mount and secret of a service."""
    for mount in SERVICES[name]["volumes"]:
        if mount["type"] == "bind":
            yield mount["target"], host_path(mount["source"]), mount
    for secret in SERVICES[name]["secrets"]:
        yield secret["target"], host_path(DOCUMENT["secrets"][secret["source"]]["file"]), secret


def test_compose_files_follow_the_compose_schema() -> None:
    result = check_compose(FILE, GPU_FILE)
    assert result.returncode == 0, result.stdout


def test_compose_schema_check_catches_a_misspelt_key(tmp_path: Path) -> None:
    text = FILE.read_text(encoding="utf-8")
    assert "read_only: true\n  cap_drop" in text
    (tmp_path / "docker-compose.yml").write_text(
        text.replace("read_only: true\n  cap_drop", "read_onyl: true\n  cap_drop")
    )
    result = check_compose(tmp_path / "docker-compose.yml")
    assert result.returncode != 0
    assert "read_onyl" in result.stdout


def test_services_are_one_server_and_three_sites() -> None:
    assert set(SERVICES) == set(HOMES)


@every_service
def test_service_is_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["user"] == "10001:10001"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    (tmpfs,) = service["tmpfs"]
    assert tmpfs.startswith("/tmp:")
    assert {"noexec", "nosuid", "nodev"} <= set(tmpfs.partition(":")[2].split(","))
    opened = {"privileged", "cap_add", "devices", "network_mode", "pid", "ipc", "userns_mode", "volumes_from"}
    assert not opened & set(service)


@every_service
def test_service_is_limited_watched_and_restarted(name: str) -> None:
    service = SERVICES[name]
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}
    assert service["healthcheck"]["test"][:3] == ["CMD", "python", "-m"]
    assert service["restart"] == "unless-stopped"
    assert "stop_grace_period" in service


def test_only_the_control_port_is_published_and_only_on_loopback() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"server": ["127.0.0.1:${CONTROL_PORT:-8444}:8444"]}


def test_a_site_shares_a_network_with_the_server_alone_and_it_has_no_way_out() -> None:
    for site in SITES:
        (network,) = SERVICES[site]["networks"]
        members = {name for name, service in SERVICES.items() if network in service["networks"]}
        assert members == {"server", site}
        assert DOCUMENT["networks"][network] == {"internal": True}


def test_gpu_file_adds_a_gpu_to_every_site_and_nothing_else() -> None:
    services = yaml.safe_load(GPU_FILE.read_text(encoding="utf-8"))["services"]
    assert set(services) == set(SITES)
    for service in services.values():
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["driver"] == "nvidia"
        assert set(service) == {"deploy"}


@every_service
def test_everything_from_the_host_is_read_only_and_must_exist(name: str) -> None:
    binds = [mount for mount in SERVICES[name]["volumes"] if mount["type"] == "bind"]
    assert binds
    for mount in binds:
        assert mount["read_only"] is True
        assert mount["bind"] == {"create_host_path": False}


@every_service
def test_the_only_writable_place_is_the_service_s_own_volume(name: str) -> None:
    (volume,) = (mount for mount in SERVICES[name]["volumes"] if mount["type"] != "bind")
    assert volume == {"type": "volume", "source": name, "target": HOMES[name]}
    assert name in DOCUMENT["volumes"]


@every_service
def test_identity_is_complete_and_its_keys_are_secrets_for_the_service_s_user_alone(name: str) -> None:
    found = {}
    for inside, outside, entry in files_in(name):
        if inside.startswith(f"{HOMES[name]}/identity/"):
            found[Path(inside).name] = entry
            folder = "server" if name == "server" else f"sites/{name}"
            assert outside == f"./federation/{folder}/{Path(inside).name}"
    assert set(found) == set(IDENTITY_FILES)
    for file, entry in found.items():
        is_secret = "uid" in entry
        assert is_secret == (file in PRIVATE_FILES)
        if is_secret:
            assert (entry["uid"], entry["gid"], int(entry["mode"], 0)) == ("10001", "10001", 0o400)


@pytest.mark.parametrize("name", SITES)
def test_site_s_settings_name_what_the_compose_file_mounts(name: str, tmp_path: Path) -> None:
    mounted = {inside: outside for inside, outside, _ in files_in(name)}
    assert mounted["/data"] == f"./data/{name}"
    settings = ROOT / mounted["/var/lib/fedward-site/site.toml"]
    (tmp_path / "site.toml").write_bytes(settings.read_bytes())
    config = load_config(SiteHome(tmp_path))
    assert config.name == name
    assert config.server == "server:8443"
    assert config.site_data(tmp_path).dicom.is_relative_to("/data")
    assert config.site_data(tmp_path).labels.is_relative_to("/data")
    assert config.threads == float(SERVICES[name]["deploy"]["resources"]["limits"]["cpus"])


def test_commands_use_the_ports_and_homes_of_the_mounts() -> None:
    command = SERVICES["server"]["command"]
    assert command[:3] == ["fedward", "serve", HOMES["server"]]
    assert command[command.index("--port") + 1] == "8443"
    assert command[command.index("--control-port") + 1] == "8444"
    for site in SITES:
        assert SERVICES[site]["command"] == ["fedward-site", "run", "--home", HOMES[site]]
