"""Run a service of docker-compose.yml as plain processes, confined as the file says, without an engine.

A namespace of its own stands in for the container: a root file system that holds the programs, read-only;
the file's mounts, secrets, tmpfs, user and command; the image's environment; no capabilities, no new
privileges. All services share one network namespace with nothing but loopback, where every service's
name leads: reading the file is tried out here, isolating sites from each other is not.
Needs root, as an engine does.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.checkers import ROOT

_PROGRAMS = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/nsswitch.conf")
_DEVICES = ("null", "zero", "full", "random", "urandom")
_LIFETIME_S = 300  # whatever happens to the tests, the network ends then


def skip_unless_possible() -> None:
    """Skip with the reason where namespaces cannot be made."""
    missing = [
        name for name in ("unshare", "nsenter", "setpriv", "ip", "chroot") if shutil.which(name) is None
    ]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (Debian packages util-linux, iproute2)")
    attempt = subprocess.run(
        ["unshare", "--mount", "--net", "true"], capture_output=True, text=True, check=False
    )
    if attempt.returncode != 0:
        pytest.skip(f"namespaces cannot be made here: {attempt.stderr.strip()}")


@contextmanager
def network() -> Iterator[int]:
    """Hold a network that has loopback only; yields the process id to enter it by."""
    holder = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", f"ip link set lo up && echo up && exec sleep {_LIFETIME_S}"],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    with holder:
        try:
            assert holder.stdout.readline() == b"up\n"
            yield holder.pid
        finally:
            holder.kill()


def environment_of(dockerfile: Path) -> dict[str, str]:
    """What an image sets, with this environment's programs in place of the image's."""
    text = re.sub(r"\\\n\s*", "", dockerfile.read_text(encoding="utf-8"))
    settings = re.findall(r"^ENV (.*)$", text, re.MULTILINE)[-1].split()
    found = dict(setting.split("=", 1) for setting in settings)
    found["PATH"] = f"{sys.prefix}/bin:/usr/bin:/bin"
    return found


@dataclass
class Confined:
    """One service, stopped when left.

    Args:
        name: in the compose file.
        document: the compose file, parsed.
        folder: takes its root, its volume, its log, and `federation` and `data` as on the host.
        network: process id of the network.
    """

    name: str
    document: dict[str, Any]
    folder: Path
    network: int
    process: subprocess.Popen[bytes] | None = field(default=None)

    @property
    def service(self) -> dict[str, Any]:
        """Its part of the compose file."""
        return dict(self.document["services"][self.name])

    @property
    def volume(self) -> Path:
        """What the service writes, seen from the host."""
        return self.folder / "volumes" / self.name

    @property
    def log(self) -> Path:
        """What the service printed."""
        return self.folder / f"{self.name}.log"

    def start(self) -> None:
        """Start the service's command."""
        self._make_volume()
        script = "\n".join(["set -e", *self._root_lines(), *self._mount_lines(), self._exec_line()])
        enter = [
            "nsenter",
            f"--target={self.network}",
            "--net",
            "unshare",
            "--mount",
            "--propagation=private",
        ]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*enter, "sh", "-c", script], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def run(self, *command: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """Run a command in the started service, as `docker compose exec` does."""
        assert self.process is not None
        enter = ["nsenter", f"--target={self.process.pid}", "--mount", "--net", "--root", "--wd=/"]
        return subprocess.run(
            [*enter, *self._as_user(command)], input=given, capture_output=True, timeout=120, check=False
        )

    def is_healthy(self) -> bool:
        """Run the service's health check."""
        kind, *command = self.service["healthcheck"]["test"]
        assert kind == "CMD"
        return self.run(*command).returncode == 0

    def stop(self) -> int:
        """SIGTERM, the service's grace period, SIGKILL; returns the exit code."""
        assert self.process is not None
        self.process.terminate()
        try:
            return self.process.wait(float(self.service["stop_grace_period"].removesuffix("s")))
        finally:
            self.process.kill()
            self.process.wait()

    @property
    def _root(self) -> Path:
        return self.folder / "roots" / self.name

    def _make_volume(self) -> None:
        """As an engine fills a new volume: with what the image has at its place."""
        user, group = map(int, self.service["user"].split(":"))
        self._root.mkdir(parents=True, exist_ok=True)
        (self.volume / "identity").mkdir(parents=True, exist_ok=True)
        for path in (self.volume, self.volume / "identity"):
            path.chmod(0o700)
            os.chown(path, user, group)

    def _root_lines(self) -> Iterator[str]:
        root = self._root
        yield f"mount -t tmpfs -o mode=0755 tmpfs {root}"
        yield f"mkdir -p {root}/etc {root}/dev/shm {root}/proc"
        hosts = " ".join(["localhost", *self.document["services"]])
        yield f"echo 127.0.0.1 {hosts} > {root}/etc/hosts"
        # before the programs: the repository or its environment may itself lie in such a folder
        for entry in self.service["tmpfs"]:
            target, _, options = entry.partition(":")
            yield f"mkdir -p {root}{target} && mount -t tmpfs -o {options} tmpfs {root}{target}"
        programs = [
            *_PROGRAMS,
            sys.base_prefix,
            sys.prefix,
            *(str(ROOT / part) for part in ("common", "client", "server")),
        ]
        for path in map(Path, programs):
            if path.is_symlink():
                yield f"cp -P {path} {root}{path}"
            elif path.exists():
                yield from self._bind(path, str(path), read_only=True)
        for device in _DEVICES:
            yield from self._bind(Path("/dev") / device, f"/dev/{device}", read_only=False)
        yield f"mount -t tmpfs -o mode=1777 tmpfs {root}/dev/shm"
        yield f"mount --rbind /proc {root}/proc"

    def _mount_lines(self) -> Iterator[str]:
        mounts = [
            (mount["target"], self._source(mount), mount.get("read_only", False))
            for mount in self.service["volumes"]
        ]
        for secret in self.service["secrets"]:
            source = self._on_host(self.document["secrets"][secret["source"]]["file"])
            os.chown(source, int(secret["uid"]), int(secret["gid"]))  # step 2 in the file's head
            mounts.append((secret["target"], source, True))
        for target, source, read_only in sorted(mounts, key=lambda mount: str(mount[0])):
            yield from self._bind(source, target, read_only=read_only)
        if self.service["read_only"]:
            yield f"mount -o remount,bind,ro {self._root}"

    def _bind(self, source: Path, target: str, *, read_only: bool) -> Iterator[str]:
        place = f"{self._root}{target}"
        yield (
            f"mkdir -p {place}"
            if source.is_dir()
            else f"mkdir -p {Path(place).parent}; [ -e {place} ] || touch {place}"
        )
        yield f"mount --bind {source} {place}"
        if read_only:
            yield f"mount -o remount,bind,ro {place}"

    def _exec_line(self) -> str:
        return f"exec chroot {self._root} {shlex.join(self._as_user(self.service['command']))}"

    def _as_user(self, command: tuple[str, ...] | list[str]) -> list[str]:
        assert self.service["cap_drop"] == ["ALL"]
        assert self.service["security_opt"] == ["no-new-privileges:true"]
        user, group = self.service["user"].split(":")
        drop = ["--clear-groups", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
        settings = environment_of(ROOT / self.service["build"]["dockerfile"])
        return [
            "/usr/bin/setpriv", f"--reuid={user}", f"--regid={group}", *drop, "--",
            "/usr/bin/env", "-i", *(f"{key}={value}" for key, value in settings.items()), *command,
        ]  # fmt: skip

    def _source(self, mount: dict[str, Any]) -> Path:
        return self.volume if mount["type"] == "volume" else self._on_host(mount["source"])

    def _on_host(self, source: str) -> Path:
        """Where something lies here: the project's own files in the repository, the rest in `folder`."""
        path = Path(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", source))
        return (ROOT if path.parts[0] == "deploy" else self.folder) / path
