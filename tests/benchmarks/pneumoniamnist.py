"""PneumoniaMNIST, three sites, deploy/plans/pneumonia.toml: test AUROC and accuracy, mean of three seeds.

Runs `fedward simulate` once per seed, DICOM and all; the official training, validation and test images are
divided evenly among the sites, and the round is chosen by validation AUROC alone. Beside it: the same plan
with one site that holds everything, which is centralised training with the same budget. Reference:
ResNet-18 at 28 pixels in MedMNIST v2 (Yang et al. 2023, Table 3).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks.processes import stop_on_sigterm  # noqa: E402
from tests.benchmarks.surroundings import machine, pneumoniamnist, require_shared, versions  # noqa: E402

PLAN = ROOT / "deploy" / "plans" / "pneumonia.toml"
PUBLISHED = {"auroc": 0.944, "accuracy": 0.854}


def plan_for(seed: int, sites: int) -> str:
    """The plan in the repository with another seed and quorum, and without each site's own model."""
    text = PLAN.read_text(encoding="utf-8")
    for pattern, line in (
        (r"^seed = .*$", f"seed = {seed}"),
        (r"^quorum = .*$", f"quorum = {sites}"),
        (r"^compare_local = .*$", "compare_local = false"),
    ):
        text, count = re.subn(pattern, line, text, flags=re.MULTILINE)
        if count != 1:
            raise SystemExit(f"{PLAN.name}: expected one line like {line!r}, found {count}")
    return text


def simulate(seed: int, sites: int, data: Path) -> dict[str, Any]:
    """One run; figures of the chosen round on the test images of all sites."""
    with tempfile.TemporaryDirectory(prefix="fedward-bench-") as folder:
        plan, out = Path(folder) / "plan.toml", Path(folder) / "out"
        plan.write_text(plan_for(seed, sites), encoding="utf-8")
        command = [
            str(Path(sys.executable).with_name("fedward")),
            "simulate",
            str(plan),
            "--sites",
            str(sites),
        ]
        started = time.perf_counter()
        done = subprocess.run(
            [*command, "--data", str(data), "--out", str(out), "--threads", "1", "--json"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise SystemExit(f"fedward simulate ended with {done.returncode}: {done.stderr[-2000:]}")
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    chosen = report["selected_round"]
    validation = next(each["validation"] for each in report["rounds"] if each["round_index"] == chosen)
    return {
        "seed": seed,
        "round": chosen,
        "validation_auroc": round(validation["auroc"], 4),
        "auroc": round(report["test"]["auroc"], 4),
        "accuracy": round(report["test"]["accuracy"], 4),
        "num_test_cases": report["test"]["num_cases"],
        "seconds": round(time.perf_counter() - started, 1),
    }


def over_seeds(runs: list[dict[str, Any]]) -> dict[str, Any]:
    figures: dict[str, Any] = {"runs": runs}
    for name in PUBLISHED:
        values = [run[name] for run in runs]
        figures[name] = round(mean(values), 4)
        figures[f"{name}_sd"] = round(stdev(values), 4) if len(values) > 1 else None
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="kept for uniformity: JSON is all there is")
    parser.add_argument("--data", type=Path, default=pneumoniamnist(), help="pneumoniamnist.npz")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--no-central", action="store_true", help="leave centralised training out")
    arguments = parser.parse_args()
    require_shared(data=arguments.data)
    stop_on_sigterm()
    federated = over_seeds([simulate(seed, 3, arguments.data) for seed in arguments.seeds])
    reference: dict[str, Any] = {"published_resnet18_28px": PUBLISHED}
    if not arguments.no_central:
        reference["centralised"] = over_seeds([simulate(seed, 1, arguments.data) for seed in arguments.seeds])
    print(
        json.dumps(
            {
                "benchmark": "pneumoniamnist",
                "figures": federated,
                "reference": reference,
                "ratio": {name: round(federated[name] / value, 4) for name, value in PUBLISHED.items()},
                "versions": versions(),
                "machine": machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
