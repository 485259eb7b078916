"""Processor time and memory of process trees, from /proc: what a benchmark reports beside the clock.

A benchmark leaves no process behind: commands end with it, and SIGTERM ends it as Ctrl-C does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_TICK = os.sysconf("SC_CLK_TCK")
_EVERY_S = 0.1
_PATIENCE_S = 120.0
# of one core, for each tree; what a heartbeat takes is well below, any start-up well above
_QUIET_SHARE = 0.05


@dataclass(frozen=True)
class Usage:
    """What a command took: seconds, processor seconds of it and its descendants, peak PSS in bytes."""

    wall_s: float
    cpu_s: float
    peak_pss: int
    code: int


def measured(command: Sequence[str], *, env: Mapping[str, str], cwd: Path | None = None) -> tuple[Usage, str]:
    """Run a command to its end; its usage and its standard output. It ends with the benchmark."""
    started = time.monotonic()
    process = subprocess.Popen(command, env=dict(env), cwd=cwd, stdout=subprocess.PIPE, text=True)
    watch = Watch({"all": [process.pid]})
    try:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.monotonic() - started
    finally:
        watch.stop()
        if process.returncode is None:
            end(process)
    return Usage(wall, used.ru_utime + used.ru_stime, watch.peaks["all"], process.returncode), output


def end(process: subprocess.Popen[Any], patience_s: float = 20.0) -> None:
    """SIGTERM, and SIGKILL if that does not help."""
    process.terminate()
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def stop_on_sigterm() -> None:
    """Have SIGTERM end the benchmark as an exception does, so that its processes end with it."""

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut the tidying short
        sys.exit(143)

    signal.signal(signal.SIGTERM, stop)


def settle(roots: Sequence[int]) -> None:
    """Wait until these process trees have nothing left to do: a second of hardly any processor time.

    Raises:
        SystemExit: they still work after two minutes.
    """
    until = time.monotonic() + _PATIENCE_S
    while time.monotonic() < until:
        used, before = -cpu_s(roots), time.monotonic()
        time.sleep(1)
        used += cpu_s(roots)
        if used <= _QUIET_SHARE * len(roots) * (time.monotonic() - before):
            return
    raise SystemExit(f"processes {list(roots)} did not come to rest within {_PATIENCE_S:.0f} s")


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
        self._before = self._cpu_s()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        """End sampling; processor seconds of all groups since the beginning."""
        used = self._cpu_s() - self._before
        self._stop.set()
        self._thread.join()
        return used

    def _cpu_s(self) -> float:
        return cpu_s([pid for group in self.roots.values() for pid in group])

    def _sample(self) -> None:
        while True:
            for name, group in self.roots.items():
                self.peaks[name] = max(self.peaks.get(name, 0), memory(group).pss)
            if self._stop.wait(_EVERY_S):
                return


def cpu_s(roots: Sequence[int]) -> float:
    """Processor seconds of the trees' processes so far, with those of children they waited for."""
    total = 0
    for pid in tree(roots):
        with suppress(OSError, IndexError):
            fields = (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()
            total += sum(int(value) for value in fields[11:15])
    return total / _TICK


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


@dataclass(frozen=True)
class Memory:
    """Bytes of a process tree.

    Attributes:
        rss: sum over processes; pages that several share count several times.
        pss: shared pages count once over all processes of the machine.
        private: pages of one process alone (USS): what ending the tree would free.
    """

    rss: int
    pss: int
    private: int


def memory(roots: Sequence[int]) -> Memory:
    """Memory of the trees now."""
    return memory_of(tree(roots))


def memory_of(pids: Sequence[int]) -> Memory:
    """Memory of these processes, without their descendants; one that has gone counts nothing."""
    sums = {"Rss": 0, "Pss": 0, "Private_Clean": 0, "Private_Dirty": 0}
    for pid in pids:
        with suppress(OSError):
            for line in (Path("/proc") / str(pid) / "smaps_rollup").read_text().splitlines():
                name, _, rest = line.partition(":")
                if name in sums:
                    sums[name] += int(rest.split()[0]) * 1024
    return Memory(sums["Rss"], sums["Pss"], sums["Private_Clean"] + sums["Private_Dirty"])
