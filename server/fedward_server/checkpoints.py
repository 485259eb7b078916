"""Model versions of a run on disk: the global weights and the strategy's state after each round.

A round's checkpoint is two files: tensors in safetensors (never a pickle), named after their content,
and a small JSON record that names them with their SHA-256. The record is renamed into place last, after
everything is on the disk, so a crash or a full disk at any moment leaves the previous checkpoint whole.
Reading verifies both files; a damaged one is named and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from fedward_common.errors import CheckpointError, FederationError
from fedward_common.weights import Weights

KEEP_LAST = 5
_RECORD_NAME = re.compile(r"^round-(\d{5})\.json$")
_TENSORS_NAME = re.compile(r"^round-\d{5}-[0-9a-f]{12}\.safetensors$")


@dataclass(frozen=True)
class CheckpointRef:
    """Which file holds a checkpoint's tensors, and its SHA-256 (hex)."""

    file: str
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        weights: global weights, float32, in the plan's layout.
        strategy_state: the strategy's server state, any dtype that safetensors knows.
        record: the document given to `write`.
        bad: when older ones were tried after newer ones failed, what was wrong with each of those.
    """

    round_index: int
    weights: Weights
    strategy_state: dict[str, NDArray[Any]]
    record: dict[str, JsonValue]
    ref: CheckpointRef
    bad: tuple[str, ...] = ()


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    round_index: int
    file: str
    sha256: str
    record: dict[str, JsonValue]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: made if absent; nothing else may write there. One writer at a time.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def write(
        self,
        round_index: int,
        weights: Mapping[str, NDArray[np.float32]],
        strategy_state: Mapping[str, NDArray[Any]],
        record: Mapping[str, JsonValue],
        *,
        keep: Collection[int] = (),
    ) -> CheckpointRef:
        """Make a checkpoint durable, then remove old ones.

        Args:
            keep: rounds to keep besides the last five, for example the best one so far.

        Raises:
            CheckpointError: no space or no permission; every earlier checkpoint is as it was.
        """
        from safetensors.numpy import save_file

        # safetensors reads each array's memory from its start to its end: views must be laid out first
        tensors = {f"weights/{name}": np.asarray(array, order="C") for name, array in weights.items()}
        tensors |= {f"state/{name}": np.asarray(array, order="C") for name, array in strategy_state.items()}
        draft = self._directory / f"round-{round_index:05d}.safetensors.tmp"
        record_file = self._record_file(round_index)
        with self._writing(draft, sum(array.nbytes for array in tensors.values())):
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            save_file(tensors, draft)
            _flush(draft)
            sha256 = _sha256(draft)
            ref = CheckpointRef(f"round-{round_index:05d}-{sha256[:12]}.safetensors", sha256)
            draft.replace(self._directory / ref.file)
            body = _Body(round_index=round_index, file=ref.file, sha256=sha256, record=dict(record))
            _write_record(record_file, body)
            _flush(self._directory)
        self.prune(keep=keep)
        return ref

    def rounds(self) -> list[int]:
        """Rounds that have a checkpoint record, oldest first; whether they are whole is not checked."""
        if not self._directory.is_dir():
            return []
        names = (_RECORD_NAME.match(path.name) for path in self._directory.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def read(self, round_index: int) -> Checkpoint:
        """Read and verify one checkpoint.

        Raises:
            CheckpointError: absent, or its bytes are not those that were written; names the file.
        """
        body = self._read_body(self._record_file(round_index), round_index)
        path = self._directory / body.file
        try:
            found = _sha256(path)
        except OSError as error:
            raise _damaged(path, f"cannot be read ({error.strerror})") from error
        if found != body.sha256:
            raise _damaged(path, f"has SHA-256 {found[:12]}..., its record says {body.sha256[:12]}...")
        weights, state = _load(path)
        return Checkpoint(round_index, weights, state, body.record, CheckpointRef(body.file, body.sha256))

    def latest_good(self, at_most: int | None = None) -> Checkpoint | None:
        """Read the newest whole checkpoint; its `bad` says what was wrong with newer ones.

        Args:
            at_most: ignore rounds after this one.

        Returns:
            None when nothing was ever written.

        Raises:
            CheckpointError: there are checkpoints and none is whole.
        """
        bad: list[str] = []
        for round_index in reversed(self.rounds()):
            if at_most is not None and round_index > at_most:
                continue
            try:
                return replace(self.read(round_index), bad=tuple(bad))
            except CheckpointError as error:
                bad.append(error.message)
        if bad:
            raise CheckpointError(
                f"none of {len(bad)} checkpoints is whole: {'; '.join(bad)}",
                remedy="Restore the run's checkpoints from a backup, or sign the plan again and start anew.",
            )
        return None

    def prune(self, *, keep: Collection[int] = ()) -> None:
        """Remove all but the last five checkpoints and those in `keep`, and what crashes left behind."""
        rounds = self.rounds()
        kept = {*rounds[-KEEP_LAST:], *keep}
        for round_index in rounds:
            if round_index not in kept:
                self._record_file(round_index).unlink(missing_ok=True)
        self._remove_surplus()

    def _remove_surplus(self) -> None:
        # a record that cannot be read names no file, so with one present nothing is known to be surplus
        try:
            bodies = [self._read_body(self._record_file(index), index) for index in self.rounds()]
        except CheckpointError:
            return
        named = {body.file for body in bodies}
        for path in self._directory.iterdir():
            surplus = _TENSORS_NAME.match(path.name) and path.name not in named
            if surplus or path.name.endswith(".tmp"):
                path.unlink(missing_ok=True)

    def _record_file(self, round_index: int) -> Path:
        return self._directory / f"round-{round_index:05d}.json"

    def _read_body(self, path: Path, round_index: int) -> _Body:
        try:
            document = json.loads(path.read_bytes())
            body = _Body.model_validate(document["body"])
            expected = document["sha256"]
        except FileNotFoundError as error:
            raise _damaged(path, "does not exist") from error
        except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
            raise _damaged(path, "is not a checkpoint record") from error
        if _body_digest(body) != expected or body.round_index != round_index:
            raise _damaged(path, "was changed after it was written")
        if not _TENSORS_NAME.match(body.file):
            raise _damaged(path, "names a file that is not a checkpoint")
        return body

    @contextmanager
    def _writing(self, draft: Path, num_bytes: int) -> Iterator[None]:
        from safetensors import SafetensorError

        try:
            yield
        except FederationError:
            raise
        except (OSError, SafetensorError) as error:
            existing = next(path for path in (self._directory, *self._directory.parents) if path.exists())
            with suppress(OSError):
                self._remove_surplus()
            free = shutil.disk_usage(existing).free
            raise CheckpointError(
                f"checkpoint {draft.stem} of {num_bytes:,} bytes could not be written to "
                f"{self._directory} ({free:,} bytes free): {error}",
                remedy="Free space on that disk or make the folder writable, then: fedward run resume. "
                "Earlier checkpoints are intact.",
            ) from error


def _load(path: Path) -> tuple[Weights, dict[str, NDArray[Any]]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise _damaged(path, "is not a safetensors file") from error

    def part(prefix: str) -> dict[str, NDArray[Any]]:
        return {
            name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)
        }

    return part("weights/"), part("state/")


def _write_record(path: Path, body: _Body) -> None:
    draft = path.with_suffix(".json.tmp")
    document = {"body": body.model_dump(mode="json"), "sha256": _body_digest(body)}
    try:
        with draft.open("w", encoding="utf-8") as file:
            json.dump(document, file, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    draft.replace(path)


def _body_digest(body: _Body) -> str:
    canonical = json.dumps(body.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint file {path} {what}",
        remedy="fedward run resume continues from the newest whole checkpoint; check that disk for errors.",
    )
