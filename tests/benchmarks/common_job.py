"""The job every framework runs, beside a bare loop: wall, processor time, memory, first step, gaps.

Each repetition runs, in turn: the bare loop (`floor.py`), `fedward simulate`, and real processes over
mutual TLS with warm sites. The site's training is `job.fit`, plugged in; only the framework differs, so
the AUC after every round must agree with the bare loop's.

Two figures stand for the time between rounds. `gap_s` is all of it, from the end of training at the last
site to its beginning at the first site of the next round, and holds the sites' evaluation of the new model.
`gap_without_evaluation_s` leaves out the stretch from the first site's beginning of that evaluation to the
last one's end, `evaluation_s`: this is what stands for Flower, whose server evaluates, in the baselines.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.job_runs import (  # noqa: E402
    AUC_SERIES,
    PLUGIN,
    a_warm_federation,
    arguments,
    environment,
    floor,
    median_of,
    simulated,
)
from tests.benchmarks.processes import stop_on_sigterm  # noqa: E402
from tests.benchmarks.surroundings import machine, versions  # noqa: E402

PLAN = PLUGIN / "common_job.toml"


def main() -> None:
    """Run the repetitions and print one JSON object."""
    given = arguments(argparse.ArgumentParser(description=__doc__), reps=3)
    stop_on_sigterm()
    env = environment(given.bench, given.data)
    rows: list[dict[str, Any]] = []
    for _ in range(given.reps):
        row: dict[str, Any] = {"floor": floor(given.bench, given.data, env)}
        with tempfile.TemporaryDirectory(prefix="fedward-bench-") as folder:
            row["simulate"] = simulated(PLAN, Path(folder) / "out", env)
        with tempfile.TemporaryDirectory(prefix="fedward-bench-") as folder:
            row["deploy"] = deploy(Path(folder), env)
        rows.append(row)
        if not given.json:
            print(json.dumps(row), flush=True)
    print(json.dumps(summary(rows), indent=None if given.json else 2))


def deploy(folder: Path, env: dict[str, str]) -> dict[str, Any]:
    """Server and three daemons as processes, mutual TLS; measured from `fedward run start` on."""
    with a_warm_federation(folder, env) as federation:
        plan = folder / "plan.toml"
        plan.write_text(PLAN.read_text())
        return federation.run(plan)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the repetitions, and their ratios to the bare loop of the same repetition."""

    def median(kind: str, key: str) -> float:
        return median_of([row[kind] for row in rows], key)

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
                "gap_without_evaluation_s": median("simulate", "gap_without_evaluation_s"),
                "evaluation_s": median("simulate", "evaluation_s"),
            },
            "deploy": {
                "wall_s": median("deploy", "wall_s"),
                "cpu_s": median("deploy", "cpu_s"),
                "first_step_s": median("deploy", "first_step_s"),
                "gap_s": median("deploy", "gap_s"),
                "gap_without_evaluation_s": median("deploy", "gap_without_evaluation_s"),
                "evaluation_s": median("deploy", "evaluation_s"),
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


if __name__ == "__main__":
    main()
