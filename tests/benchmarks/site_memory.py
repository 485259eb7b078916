"""Memory of a site's daemon: idle before PyTorch is needed, after a run, and after the worker was let go.

Three daemons beside a server, mutual TLS, started as an operator does, without --warm. Measured once they
have nothing left to do:

* `idle`: connected, no plan has arrived; one process, which never loads PyTorch;
* `after_run`: a small plan on DICOM has run; the worker process stays, PyTorch loaded, for the next round;
* `worker_ended`: the daemon has ended its worker for want of work. It does so after a quarter of an hour;
  one of the three is told five seconds, so that nobody waits.

`private_mb` is memory of the process alone, `pss_mb` counts a page that n processes share as 1/n, `rss_mb` as
if nobody shared it: a site that is alone on its machine lies between the last two. Beside it, in the same
run: a bare Python, a Python that imported PyTorch, and Flower's SuperNode, connected and idle.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.processes import (  # noqa: E402
    Memory,
    end,
    memory,
    memory_of,
    settle,
    stop_on_sigterm,
    tree,
)
from tests.benchmarks.surroundings import machine, versions  # noqa: E402
from tests.integration.deployment import (  # noqa: E402
    NAMES,
    Deployment,
    a_deployment,
    a_plan_file,
    alive,
    children,
    free_ports,
    wait_for,
)

# The time has no setting; a name that is gone from the daemon ends this one, and with it the benchmark.
IMPATIENT = """
from fedward_client import cli, daemon
for name, seconds in {"_IDLE_WORKER_S": 5.0, "_HEALTH_S": 1.0}.items():
    getattr(daemon, name)
    setattr(daemon, name, seconds)
cli.main()
"""
*PATIENT_SITES, IMPATIENT_SITE = NAMES
Figures = dict[str, float]


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="kept for uniformity: JSON is all there is")
    parser.add_argument("--no-flower", action="store_true", help="leave Flower's SuperNode out")
    given = parser.parse_args()
    stop_on_sigterm()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="fedward-bench-") as name:
        reference = {"python": interpreter(""), "python_with_torch": interpreter("import torch")}
        if not given.no_flower:
            reference["flower_supernode_idle"] = flower_supernode(Path(name))
        figures = sites(Path(name) / "federation")
    ratio = {
        f"{state}_over_{other}": round(figures[state]["rss_mb"] / reference[other]["rss_mb"], 2)
        for state in ("idle", "after_run")
        for other in reference
    }
    document = {"benchmark": "site_memory", "figures": figures, "reference": reference, "ratio_of_rss": ratio}
    print(json.dumps({**document, "versions": versions(), "machine": machine()}))


def sites(folder: Path) -> dict[str, Figures]:
    """Memory of the daemons, worker included, in each state; the median where several are in it."""
    folder.mkdir()
    with a_deployment(folder, cases_per_site=40) as place:
        place.start_server()
        for name in PATIENT_SITES:
            place.start_site(name)
        place.processes[IMPATIENT_SITE] = _impatient_daemon(place)
        place.await_sites(*NAMES)
        pids = {name: place.processes[name].pid for name in NAMES}
        figures = {"idle": _at_rest([pids[name] for name in NAMES])}
        _run_a_plan(place)
        wait_for(lambda: not children(pids[IMPATIENT_SITE]), "the worker to be ended")
        patient = [pids[name] for name in PATIENT_SITES]
        if not all(len(children(pid)) == 1 for pid in patient):
            raise SystemExit("a daemon has no worker right after a run: the figures would mean nothing")
        figures["after_run"] = _at_rest(patient)
        figures["after_run_daemon_alone"] = _figures([memory_of([pid]) for pid in patient])
        figures["worker_ended"] = _at_rest([pids[IMPATIENT_SITE]])
    return figures


def interpreter(statement: str) -> Figures:
    """Memory of a Python that has executed one statement."""
    code = f"import sys\n{statement}\nprint(flush=True)\nsys.stdin.read()"
    with _running([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        return _figures([memory([process.pid])])


def flower_supernode(folder: Path) -> Figures:
    """Memory of Flower's SuperNode and its executor beside a SuperLink, without TLS, before any run."""
    port, node_port = free_ports(2)
    programs = Path(sys.executable).parent
    env = {
        **os.environ,
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_HOME": str(folder / "flower"),
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",  # they start each other by name
    }
    link = ["flower-superlink", "--insecure", "--disable-runtime-dependency-installation"]
    node = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}"]
    with (folder / "flower.log").open("wb") as log, ExitStack() as stack:
        pids = []
        for (program, *options), own in ((link, port), (node, node_port)):
            command = [str(programs / program), *options, "--host", "127.0.0.1", "--port", str(own)]
            process = stack.enter_context(
                _running(command, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            )
            wait_for(lambda pid=process.pid: bool(children(pid)), f"the executor of {program}")  # type: ignore[misc]
            settle([process.pid])
            pids.append(process.pid)
        figures = _figures([memory(pids[1:])])
        if not all(alive(pid) and children(pid) for pid in pids):
            raise SystemExit("Flower's SuperNode or SuperLink ended; --no-flower leaves it out")
        return figures


def _impatient_daemon(place: Deployment) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", IMPATIENT, "run", "--home", str(place.home(IMPATIENT_SITE))]
    with (place.root / f"{IMPATIENT_SITE}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def _run_a_plan(place: Deployment) -> None:
    plan = a_plan_file(place.root / "plan.toml", rounds=2, participation={"quorum": len(NAMES)})
    signed = place.sign(plan)
    place.approve(signed)
    report = place.finish(place.launch(signed))
    if report["verdict"] != "completed":
        raise SystemExit(f"the run ended {report['verdict']}: {report.get('reason', '')}")


def _at_rest(pids: Sequence[int]) -> Figures:
    settle(pids)
    return _figures([memory([pid]) for pid in pids])


def _figures(found: Sequence[Memory]) -> Figures:
    def median(values: Iterator[int]) -> float:
        return round(statistics.median(values) / 2**20, 1)

    return {
        "rss_mb": median(each.rss for each in found),
        "pss_mb": median(each.pss for each in found),
        "private_mb": median(each.private for each in found),
    }


@contextmanager
def _running(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program while the context lasts; what it started ends with it."""
    process = subprocess.Popen(command, **options)
    try:
        yield process
    finally:
        _, *started = tree([process.pid])
        end(process)
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
        for pid in started:  # Flower's executor lives on for some seconds
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            wait_for(lambda pid=pid: not alive(pid), f"process {pid} to end")  # type: ignore[misc]


if __name__ == "__main__":
    main()
