"""The common job once more, through DICOM files and our own trainer, in float32 and in our default setting.

The federation of `common_job.py` and its hyperparameters, but nothing plugged in: each site's images are
written out as DICOM, the sites index, decode and cache them, and fedward's `cnn2d` (420,610 parameters) is
trained by fedward's trainer. Beside the bare loop (`floor.py`) in the same repetition, each plan runs in
`fedward simulate` and on real processes over mutual TLS with warm sites:

* `float32_first`: the first run, in which the sites read their DICOM folders;
* `float32`: the same plan again, prepared images at hand, as in every later run;
* `auto`: `precision = "auto"`, the default: bfloat16 and channels-last where the machine is fast at it.

Same as in the published series: pixels (x / 255 - 0.5) / 0.5, no augmentation, the division among sites, the
initial weights (seed 0), SGD 0.01 with momentum 0.9, batches of 64, the images measured on. Different: a site
keeps its cases in the order of their files' digests, draws its batches from a seed of its own, and AUC is
counted on a grid of 4096 scores. So the series differ as those of two seeds do. `matched`, a simulation only,
gives our trainer the job's order and seeds: there the series must be the published one.

The job's test images are the sites' validation split, which is measured after every round; PneumoniaMNIST's
validation images, which the job leaves out, are their test split, measured once at the end. Writing the DICOM
files is not measured. A trace of training is written through a plugin that wraps the trainer. For the two
figures of the time between rounds see `common_job.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from fedward_client.dicom.synthetic import write_npz_sites  # noqa: E402
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
from tests.integration.deployment import NAMES  # noqa: E402

PLAN = PLUGIN / "common_job_dicom.toml"
VARIANTS = {"float32_first": {}, "float32": {}, "auto": {'precision = "float32"': 'precision = "auto"'}}
MATCHED = {
    'dataset = "dicom_folder"': 'dataset = "dicom_in_job_order"',
    'trainer = "traced"': 'trainer = "traced_with_job_seeds"',
}
Row = dict[str, Any]


def main() -> None:
    """Run the repetitions and print one JSON object."""
    given = arguments(argparse.ArgumentParser(description=__doc__), reps=3)
    stop_on_sigterm()
    env = environment(given.bench, given.data)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="fedward-bench-") as name:
        images, plans = Path(name) / "images", _plans(Path(name))
        write_images(given.bench, given.data, images)
        for number in range(given.reps):
            row: Row = {"floor": floor(given.bench, given.data, env)}
            row["simulate"] = simulate(Path(name) / f"simulate-{number}", plans, images, env)
            row["deploy"] = deploy(Path(name) / f"deploy-{number}", plans, images, env)
            rows.append(row)
            if not given.json:
                print(json.dumps(row), flush=True)
    print(json.dumps(summary(rows), indent=None if given.json else 2))


def write_images(bench: Path, data: Path, out: Path) -> None:
    """Write SITE/dicom and SITE/labels.csv: part i of the job's division, every third held-out image."""
    sys.path.insert(0, str(bench))
    import job  # type: ignore[import-not-found]  # not part of the project

    with np.load(data) as arrays:
        given = {name: arrays[name] for name in arrays.files}
    parts = job.split(given["train_labels"].ravel(), len(NAMES))
    for index, (name, part) in enumerate(zip(NAMES, parts, strict=True)):
        share: dict[str, Any] = {}
        for kind in ("images", "labels"):
            share[f"train_{kind}"] = given[f"train_{kind}"][part]
            # the writer's "val" becomes the split that is measured after every round
            share[f"val_{kind}"] = given[f"test_{kind}"][index :: len(NAMES)]
            share[f"test_{kind}"] = given[f"val_{kind}"][index :: len(NAMES)]
        npz = out.with_name(f"{name}.npz")
        np.savez(npz, **share)
        write_npz_sites(npz, out, [name])


def simulate(folder: Path, plans: dict[str, Path], images: Path, env: dict[str, str]) -> Row:
    """Every plan in turn, in one folder: from the second on, the sites have their prepared images."""
    folder.mkdir()
    runs = {name: simulated(plans[name], folder / "out", env, data=images) for name in VARIANTS}
    return {**runs, "matched": simulated(plans["matched"], folder / "out", env)}


def deploy(folder: Path, plans: dict[str, Path], images: Path, env: dict[str, str]) -> Row:
    """Every plan in turn, on the same processes; each is measured from `fedward run start` on."""
    folder.mkdir()
    with a_warm_federation(folder, env, images=images) as federation:
        return {name: federation.run(plans[name]) for name in VARIANTS}


def summary(rows: list[Row]) -> Row:
    """Medians over the repetitions, their ratios to the bare loop of the same repetition, and the AUC."""
    series = {
        f"{kind}_{name}": run["auc"]
        for kind in ("simulate", "deploy")
        for name, run in rows[-1][kind].items()
    }
    ratios = [
        {
            f"{kind}_{name}_{key}": row[kind][name][f"{key}_s"] / row["floor"][f"{key}_s"]
            for kind in ("simulate", "deploy")
            for name in VARIANTS
            for key in ("wall", "cpu")
        }
        for row in rows
    ]
    return {
        "benchmark": "common_job_dicom",
        "figures": {
            kind: {name: _figures([row[kind][name] for row in rows]) for name in VARIANTS}
            for kind in ("simulate", "deploy")
        },
        "reference": {
            "floor_wall_s": median_of([row["floor"] for row in rows], "wall_s"),
            "floor_cpu_s": median_of([row["floor"] for row in rows], "cpu_s"),
            "floor_peak_pss_mb": median_of([row["floor"] for row in rows], "peak_pss_mb"),
            "floor_auc_last_round": rows[-1]["floor"]["auc"],
            "auc_series": AUC_SERIES,
        },
        "ratio": {name: round(median_of(ratios, name), 2) for name in ratios[0]},
        "auc": series,
        "simulated_auc_equals_deployed": all(
            series[f"simulate_{name}"] == series[f"deploy_{name}"] for name in VARIANTS
        ),
        "auc_less_published_last_round": {
            name: round(found[-1] - AUC_SERIES[-1], 4) for name, found in series.items()
        },
        "largest_auc_difference_matched": round(
            max(
                abs(ours - theirs)
                for ours, theirs in zip(series["simulate_matched"], AUC_SERIES, strict=True)
            ),
            4,
        ),
        "repetitions": rows,
        "versions": versions(),
        "machine": machine(),
    }


def _figures(runs: list[Row]) -> Row:
    """Medians, and the largest memory of any site and of the server."""
    keys = ("wall_s", "cpu_s", "peak_pss_mb", "first_step_s", "gap_s", "gap_without_evaluation_s")
    figures: Row = {key: median_of(runs, key) for key in (*keys, "evaluation_s") if key in runs[0]}
    if "site_pss_mb" in runs[0]:
        figures["site_pss_mb"] = max(max(run["site_pss_mb"]) for run in runs)
        figures["server_pss_mb"] = max(run["server_pss_mb"] for run in runs)
    return figures


def _plans(folder: Path) -> dict[str, Path]:
    """The plan in its variants, one file each."""
    plans = {}
    for name, changes in {**VARIANTS, "matched": MATCHED}.items():
        text = PLAN.read_text(encoding="utf-8")
        for old, new in changes.items():
            if text.count(old) != 1:
                raise SystemExit(f"{PLAN.name}: expected one line {old!r}, found {text.count(old)}")
            text = text.replace(old, new)
        plans[name] = folder / f"{name}.toml"
        plans[name].write_text(text, encoding="utf-8")
    return plans


if __name__ == "__main__":
    main()
