"""Run a plan as its users do, simulated or on real processes, and say what it took.

Shared by the benchmarks of the common job. The sites' processes write a trace (`plugin/fedward_bench.py`):
when each begins and ends training and, within the worker, evaluation.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks.processes import Usage, Watch, measured, settle
from tests.benchmarks.surroundings import bench_folder, pneumoniamnist, require_shared
from tests.integration.deployment import NAMES, SERVER, Deployment, a_deployment

PLUGIN = Path(__file__).resolve().parent / "plugin"
AUC_SERIES = [0.7147, 0.5501, 0.7834, 0.8598, 0.9267, 0.9266]  # untrained, then after each round
_TRACE = "FEDWARD_BENCH_TRACE"


def arguments(parser: argparse.ArgumentParser, *, reps: int) -> argparse.Namespace:
    """Parse the options that the benchmarks of the common job share; see that the shared files are there.

    Raises:
        SystemExit: they are not.
    """
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--reps", type=int, default=reps)
    parser.add_argument("--bench", type=Path, default=bench_folder(), help="folder with job.py and floor.py")
    parser.add_argument("--data", type=Path, default=pneumoniamnist(), help="pneumoniamnist.npz")
    given = parser.parse_args()
    if given.reps < 1:
        parser.error(f"--reps {given.reps}: at least 1 is needed")
    given.bench, given.data = given.bench.resolve(), given.data.resolve()
    require_shared(bench=given.bench, data=given.data)
    return given


def environment(bench: Path, data: Path) -> dict[str, str]:
    """Environment in which every process finds the plugin and the job, and uses one thread."""
    return {
        **os.environ,
        "PYTHONPATH": str(PLUGIN),
        "FEDWARD_BENCH": str(bench),
        "FEDWARD_BENCH_DATA": str(data),
        "OMP_NUM_THREADS": "1",
    }


def floor(bench: Path, data: Path, env: dict[str, str]) -> dict[str, Any]:
    """Run the bare loop, one core; its AUC is that of the last round."""
    used, output = measured([sys.executable, str(bench / "floor.py"), str(data)], env=env, cwd=bench)
    figures = _usage(used, output)
    document = json.loads(output.strip().splitlines()[-1])
    return {**figures, "first_step_s": document["startup"], "auc": document["auc"]}


def simulated(plan: Path, out: Path, env: dict[str, str], *, data: Path | None = None) -> dict[str, Any]:
    """Run `fedward simulate` with three sites, as a user types it.

    Args:
        plan: in TOML.
        out: its --out; a folder used before holds prepared images already.
        env: see `environment`.
        data: its --data.
    """
    trace = out.parent / "trace.jsonl"
    started = time.time()
    command = [str(Path(sys.executable).with_name("fedward")), "simulate", str(plan), "--sites", "3"]
    if data is not None:
        command += ["--data", str(data)]
    used, output = measured([*command, "--out", str(out), "--json"], env={**env, _TRACE: str(trace)})
    figures = _usage(used, output)
    report = json.loads((out / "report.json").read_text())
    return {**figures, **timing(trace, started), "auc": auc(report)}


@dataclass(frozen=True)
class Federation:
    """A deployment whose server and daemons are warm: PyTorch is loaded, as after an earlier run."""

    place: Deployment
    env: dict[str, str]
    groups: dict[str, list[int]]
    idle_pss: dict[str, int]
    known: set[str] = field(default_factory=set)

    def run(self, plan: Path) -> dict[str, Any]:
        """Sign and approve a plan, then measure from `fedward run start` to its end."""
        signed = self.place.sign(plan)
        self.place.approve(signed)
        watch = Watch(self.groups)
        started = time.time()
        command = [*SERVER, "run", "start", str(signed), "--identity", str(self.place.coordinator), "--json"]
        try:
            used, output = measured(command, env=self.env)
        finally:
            cpu = watch.stop()
        figures = _usage(used, output)
        return {
            "wall_s": figures["wall_s"],
            "cpu_s": round(cpu + used.cpu_s, 2),
            "site_pss_mb": [watch.peaks[name] >> 20 for name in NAMES],
            "server_pss_mb": watch.peaks["server"] >> 20,
            "idle_warm_site_pss_mb": [self.idle_pss[name] >> 20 for name in NAMES],
            **timing(Path(self.env[_TRACE]), started),
            "auc": auc(self._report()),
        }

    def _report(self) -> dict[str, Any]:
        """Report of the run that was not there before."""
        with self.place.client() as client:
            (run_id,) = {run.run_id for run in client.runs()} - self.known
            self.known.add(run_id)
            return dict(json.loads(client.report(run_id)))


@contextmanager
def a_warm_federation(
    folder: Path, env: dict[str, str], *, images: Path | None = None
) -> Iterator[Federation]:
    """Start a server and three daemons over mutual TLS, and wait until they are warm and idle.

    Args:
        folder: new; everything is made in it.
        env: see `environment`.
        images: a folder with SITE/dicom and SITE/labels.csv to have instead of a few phantoms.
    """
    env = {**env, _TRACE: str(folder / "trace.jsonl")}
    os.environ.update(env)  # a deployment's processes inherit it
    with a_deployment(folder, cases_per_site=40) as place:
        if images is not None:
            for name in NAMES:
                shutil.rmtree(place.images(name))
                shutil.copytree(images / name, place.images(name))
        place.start_server()
        for name in NAMES:
            place.start_site(name, "--warm")
        place.await_sites(*NAMES)
        groups = {name: [process.pid] for name, process in place.processes.items()}
        settle([pid for group in groups.values() for pid in group])
        idle = Watch(groups)
        idle.stop()
        yield Federation(place, env, groups, idle.peaks)


def timing(trace: Path, started: float) -> dict[str, Any]:
    """First step and gaps between rounds, in seconds, from the trace lines since `started`.

    A gap lasts from the end of training at a round's last site to its beginning at the next round's first
    site. In it the server aggregates and writes the checkpoint, and the sites evaluate the new model: from
    the first site's beginning of that to the last one's end is `evaluation_s`, what is left of the gap is
    `gap_without_evaluation_s`. Where sites evaluate in turn, what the framework does between two of them
    counts as evaluation. Each is the median over the rounds.
    """
    events = [event for event in map(json.loads, trace.read_text().splitlines()) if event["t"] >= started]
    starts, ends = _by_round(events, "fit_start"), _by_round(events, "fit_end")
    gaps, evaluations = [], []
    for index in sorted(starts):
        if index > 0:
            begin, end = max(ends[index - 1]), min(starts[index])
            gaps.append(end - begin)
            evaluations.append(_evaluation_within(events, begin, end))
    return {
        "first_step_s": round(min(starts[0]) - started, 2),
        "gap_s": _median(gaps),
        "gap_without_evaluation_s": _median(
            [gap - evaluation for gap, evaluation in zip(gaps, evaluations, strict=True)]
        ),
        "evaluation_s": _median(evaluations),
        "gaps_s": [round(gap, 3) for gap in gaps],
    }


def _by_round(events: Sequence[dict[str, Any]], kind: str) -> dict[int, list[float]]:
    times: dict[int, list[float]] = {}
    for event in events:
        if event["ev"] == kind:
            times.setdefault(event["r"], []).append(event["t"])
    return times


def _evaluation_within(events: Sequence[dict[str, Any]], begin: float, end: float) -> float:
    within = [event for event in events if begin <= event["t"] <= end]
    first = min((event["t"] for event in within if event["ev"] == "eval_start"), default=None)
    last = max((event["t"] for event in within if event["ev"] == "eval_end"), default=None)
    if first is None or last is None:
        raise SystemExit("the trace has no evaluation between two rounds: the plugin's hook did not work")
    return float(last - first)


def _median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 3)


def auc(report: dict[str, Any]) -> list[float]:
    """AUC on the held-out images after each round, the untrained model's first."""
    return [round(each["validation"]["auroc"], 4) for each in report["rounds"]]


def median_of(rows: Sequence[dict[str, Any]], key: str) -> float:
    """Median of one figure over the repetitions."""
    return round(float(statistics.median(row[key] for row in rows)), 3)


def _usage(used: Usage, output: str) -> dict[str, Any]:
    if used.code != 0:
        # the last events: why the run failed
        raise SystemExit(f"{output[-2000:]}\na command ended with exit code {used.code}")
    return {
        "wall_s": round(used.wall_s, 2),
        "cpu_s": round(used.cpu_s, 2),
        "peak_pss_mb": used.peak_pss >> 20,
    }
