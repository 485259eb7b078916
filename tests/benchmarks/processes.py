"""Processor time and memory of process trees, from /proc: what a benchmark reports beside the clock."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")
_EVERY_S = 0.1


@dataclass(frozen=True)
class Usage:
    """What a command took: seconds, processor seconds of it and its descendants, peak PSS in bytes."""

    wall_s: float
    cpu_s: float
    peak_pss: int
    code: int


def measured(command: Sequence[str], *, env: Mapping[str, str], cwd: Path | None = None) -> tuple[Usage, str]:
    """Run a command to its end; its usage and its standard output."""
    started = time.monotonic()
    process = subprocess.Popen(command, env=dict(env), cwd=cwd, stdout=subprocess.PIPE, text=True)
    watch = Watch({"all": [process.pid]})
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.monotonic() - started
    watch.stop()
    return Usage(wall, used.ru_utime + used.ru_stime, watch.peaks["all"], process.returncode), output


@dataclass
class Watch:
    """Samples groups of process trees in a thread until stopped.

    Attributes:
        roots: group name -> process ids; descendants are counted with them.
        peaks: group name -> peak of the summed PSS, in bytes.
    """

    roots: Mapping[str, Sequence[int]]
    peaks: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._before = self.cpu_s()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        """End sampling; processor seconds of all groups since the beginning."""
        used = self.cpu_s() - self._before
        self._stop.set()
        self._thread.join()
        return used

    def cpu_s(self) -> float:
        """Processor seconds of all processes there are now, with those of children they waited for."""
        total = 0
        for group in self.roots.values():
            for pid in tree(group):
                with suppress(OSError, IndexError):
                    fields = (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()
                    total += sum(int(value) for value in fields[11:15])
        return total / _TICK

    def _sample(self) -> None:
        while True:
            for name, group in self.roots.items():
                self.peaks[name] = max(self.peaks.get(name, 0), sum(pss(pid) for pid in tree(group)))
            if self._stop.wait(_EVERY_S):
                return


def tree(roots: Sequence[int]) -> list[int]:
    """The processes and all their descendants."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, IndexError):
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                parents.setdefault(parent, []).append(int(entry.name))
    found: list[int] = []
    todo = list(roots)
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo += parents.get(pid, [])
    return found


def pss(pid: int) -> int:
    """Proportional set size of one process in bytes, 0 when it is gone."""
    with suppress(OSError, StopIteration):
        lines = (Path("/proc") / str(pid) / "smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return 0
