"""Where the server keeps its things, and the few settings it has.

A server's folder is made by `fedward provision` and holds its identity; what the server itself writes
goes into `state/` inside it. In a container the keys are mounted read-only as `identity/` instead.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedward_common.errors import UsageError


class ServerConfig(BaseModel):
    """Settings in `server.toml`; without the file the defaults hold.

    Attributes:
        max_runs: runs that may be going at the same time; each has a process of its own.
        stop_grace_s: seconds a run has to stop by itself before its process is ended.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_runs: int = Field(default=1, ge=1, le=16)
    stop_grace_s: float = Field(default=30, gt=0, le=600)


@dataclass(frozen=True)
class ServerHome:
    """The server's folder.

    Args:
        directory: the server's own folder, or the federation's folder that holds it as `server/`.
    """

    directory: Path

    @property
    def root(self) -> Path:
        """The server's own folder."""
        inner = self.directory / "server"
        return inner if inner.is_dir() else self.directory

    @property
    def identity(self) -> Path:
        """The identity directory."""
        mounted = self.root / "identity"
        return mounted if mounted.is_dir() else self.root

    @property
    def federation(self) -> Path:
        """The roster; it may change while the server runs."""
        return self.identity / "federation.json"

    @property
    def state(self) -> Path:
        """Everything the server writes; on a local disk, readable by the server alone."""
        return self.root / "state"

    @property
    def runs(self) -> Path:
        """The record of runs."""
        return self.state / "runs.sqlite"

    @property
    def audit(self) -> Path:
        """The audit log."""
        return self.state / "audit.jsonl"

    @property
    def lock(self) -> Path:
        """Held by the server and by its runs' processes for as long as they live."""
        return self.state / "server.lock"

    def checkpoints(self, run_id: str) -> Path:
        """The model versions of one run."""
        return self.state / "checkpoints" / run_id

    def prepare(self) -> None:
        """Make the folder for what the server writes.

        Raises:
            UsageError: the server's folder does not exist, or is not writable.
        """
        try:
            self.state.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"{self.state} cannot be made: {error.strerror}",
                remedy="Give the folder that `fedward provision` made, and let the server write to it.",
            ) from error

    def config(self) -> ServerConfig:
        """Read `server.toml`.

        Raises:
            UsageError: not readable, not TOML, an unknown key, or a value out of bounds.
        """
        path = self.root / "server.toml"
        if not path.exists():
            return ServerConfig()
        remedy = f"Correct {path}; known keys: {', '.join(ServerConfig.model_fields)}."
        try:
            return ServerConfig.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise UsageError(f"{path.name}: {error}", remedy=remedy) from error
        except ValidationError as error:
            faults = "; ".join(
                f"{'.'.join(str(step) for step in fault['loc'])}: {fault['msg']}" for fault in error.errors()
            )
            raise UsageError(f"{path.name}: {faults}", remedy=remedy) from error
