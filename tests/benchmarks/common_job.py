"""The job every framework runs, beside a bare loop: wall, processor time, memory, first step, gaps.

Each repetition runs, in turn: the bare loop (`floor.py`), `fedward simulate`, and real processes over
mutual TLS with warm sites. The site's training is `job.fit`, plugged in; only the framework differs, so
the AUC after every round must agree with the bare loop's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.processes import Usage, Watch, measured  # noqa: E402
from tests.benchmarks.surroundings import bench_folder, machine, pneumoniamnist, versions  # noqa: E402

PLUGIN = Path(__file__).resolve().parent / "plugin"
PLAN = PLUGIN / "common_job.toml"
AUC_SERIES = [0.7147, 0.5501, 0.7834, 0.8598, 0.9267, 0.9266]


def main() -> None:
    """Run the repetitions and print one JSON object."""
    given = _arguments()
    env = {
        **os.environ,
        "PYTHONPATH": str(PLUGIN),
        "FEDWARD_BENCH": str(given.bench),
        "FEDWARD_BENCH_DATA": str(given.data),
        "OMP_NUM_THREADS": "1",
    }
    rows: list[dict[str, Any]] = []
    for _ in range(given.reps):
        row: dict[str, Any] = {"floor": floor(given, env)}
        with tempfile.TemporaryDirectory() as folder:
            row["simulate"] = simulate(Path(folder), env)
        with tempfile.TemporaryDirectory() as folder:
            row["deploy"] = deploy(Path(folder), env)
        rows.append(row)
        if not given.json:
            print(json.dumps(row), flush=True)
    print(json.dumps(summary(rows), indent=None if given.json else 2))


def floor(given: argparse.Namespace, env: dict[str, str]) -> dict[str, Any]:
    """The bare loop, one core."""
    used, output = measured(
        [sys.executable, str(given.bench / "floor.py"), str(given.data)], env=env, cwd=given.bench
    )
    document = json.loads(output.strip().splitlines()[-1])
    return {**_usage(used), "first_step_s": document["startup"], "auc": document["auc"]}


def simulate(folder: Path, env: dict[str, str]) -> dict[str, Any]:
    """`fedward simulate`, as a user types it."""
    trace = folder / "trace.jsonl"
    started = time.time()
    command = [str(Path(sys.executable).parent / "fedward"), "simulate", str(PLAN), "--sites", "3"]
    used, _ = measured(
        [*command, "--out", str(folder / "out"), "--json"], env={**env, "FEDWARD_BENCH_TRACE": str(trace)}
    )
    report = json.loads((folder / "out" / "report.json").read_text())
    return {**_usage(used), **_traced(trace, started), "auc": _auc(report)}


def deploy(folder: Path, env: dict[str, str]) -> dict[str, Any]:
    """Server and three daemons as processes, mutual TLS; measured from `fedward run start` on."""
    from tests.integration.deployment import NAMES, SERVER, a_deployment

    trace = folder / "trace.jsonl"
    os.environ.update({**env, "FEDWARD_BENCH_TRACE": str(trace)})
    with a_deployment(folder) as place:
        place.start_server()
        for name in NAMES:
            place.start_site(name, "--warm")
        place.await_sites(*NAMES)
        plan = folder / "plan.toml"
        plan.write_text(PLAN.read_text())
        signed = place.sign(plan)
        place.approve(signed)
        time.sleep(5)  # warm: PyTorch is loaded everywhere, as after an earlier run
        groups = {name: [process.pid] for name, process in place.processes.items()}
        idle = Watch(groups)
        time.sleep(1)
        idle.stop()
        watch = Watch(groups)
        started = time.time()
        used, _ = measured(
            [*SERVER, "run", "start", str(signed), "--identity", str(place.coordinator), "--json"], env=env
        )
        cpu = watch.stop()
        with place.client() as client:
            (run,) = client.runs()
            report = json.loads(client.report(run.run_id))
    return {
        "wall_s": round(used.wall_s, 2),
        "cpu_s": round(cpu + used.cpu_s, 2),
        "site_pss_mb": [watch.peaks[name] >> 20 for name in NAMES],
        "server_pss_mb": watch.peaks["server"] >> 20,
        "idle_warm_site_pss_mb": [idle.peaks[name] >> 20 for name in NAMES],
        **_traced(trace, started),
        "auc": _auc(report),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the repetitions, and their ratios to the bare loop of the same repetition."""

    def median(kind: str, key: str) -> float:
        return round(float(statistics.median(row[kind][key] for row in rows)), 2)

    def ratio(kind: str, key: str) -> float:
        return round(float(statistics.median(row[kind][key] / row["floor"][key] for row in rows)), 2)

    series = {kind: rows[-1][kind]["auc"] for kind in ("simulate", "deploy")}
    return {
        "figures": {
            "simulate": {
                "wall_s": median("simulate", "wall_s"),
                "cpu_s": median("simulate", "cpu_s"),
                "peak_pss_mb": median("simulate", "peak_pss_mb"),
                "first_step_s": median("simulate", "first_step_s"),
                "gap_s": median("simulate", "gap_s"),
            },
            "deploy": {
                "wall_s": median("deploy", "wall_s"),
                "cpu_s": median("deploy", "cpu_s"),
                "first_step_s": median("deploy", "first_step_s"),
                "gap_s": median("deploy", "gap_s"),
                "site_pss_mb": max(max(row["deploy"]["site_pss_mb"]) for row in rows),
                "server_pss_mb": max(row["deploy"]["server_pss_mb"] for row in rows),
            },
        },
        "reference": {
            "floor_wall_s": median("floor", "wall_s"),
            "floor_cpu_s": median("floor", "cpu_s"),
            "auc_series": AUC_SERIES,
        },
        "ratio": {
            f"{kind}_{key}": ratio(kind, f"{key}_s")
            for kind in ("simulate", "deploy")
            for key in ("wall", "cpu")
        },
        "auc": series,
        "largest_auc_difference": max(
            abs(ours - theirs)
            for found in series.values()
            for ours, theirs in zip(found, AUC_SERIES, strict=True)
        ),
        "repetitions": rows,
        "versions": versions(),
        "machine": machine(),
    }


def _usage(used: Usage) -> dict[str, Any]:
    if used.code != 0:
        raise SystemExit(f"a run ended with exit code {used.code}")
    return {
        "wall_s": round(used.wall_s, 2),
        "cpu_s": round(used.cpu_s, 2),
        "peak_pss_mb": used.peak_pss >> 20,
    }


def _traced(trace: Path, started: float) -> dict[str, Any]:
    """First step, and the time between a round's last site and the next round's first."""
    events = [json.loads(line) for line in trace.read_text().splitlines()]
    starts: dict[int, list[float]] = {}
    ends: dict[int, list[float]] = {}
    for event in events:
        (starts if event["ev"] == "fit_start" else ends).setdefault(event["r"], []).append(event["t"])
    gaps = [min(starts[index]) - max(ends[index - 1]) for index in sorted(starts) if index > 0]
    return {
        "first_step_s": round(min(starts[0]) - started, 2),
        "gap_s": round(statistics.median(gaps), 3),
        "gaps_s": [round(gap, 3) for gap in gaps],
    }


def _auc(report: dict[str, Any]) -> list[float]:
    return [round(each["validation"]["auroc"], 4) for each in report["rounds"]]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--bench", type=Path, default=bench_folder())
    parser.add_argument("--data", type=Path, default=pneumoniamnist())
    return parser.parse_args()


if __name__ == "__main__":
    main()
