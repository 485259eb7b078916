"""What every benchmark prints beside its figures: versions, machine, and where the shared folders are."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def bench_folder() -> Path:
    """Folder of the job that all frameworks run: FEDWARD_BENCH, else beside the repository."""
    return Path(os.environ.get("FEDWARD_BENCH", ROOT.parent / "shared" / "bench"))


def pneumoniamnist() -> Path:
    """The radiographs of PneumoniaMNIST: under FEDWARD_DATA, else beside the repository."""
    data = Path(os.environ.get("FEDWARD_DATA", ROOT.parent / "shared" / "data"))
    return data / "pneumoniamnist" / "pneumoniamnist.npz"


def require_shared(*, bench: Path | None = None, data: Path | None = None) -> None:
    """End the benchmark with one sentence when something it needs is not on this machine.

    Raises:
        SystemExit: the sentence; the exit code is 1.
    """
    if bench is not None and not ((bench / "job.py").is_file() and (bench / "floor.py").is_file()):
        raise SystemExit(
            f"{bench} does not hold job.py and floor.py, the job that all frameworks run:"
            " give their folder with --bench, or in FEDWARD_BENCH."
        )
    if data is not None and not data.is_file():
        raise SystemExit(
            f"{data} does not exist: give PneumoniaMNIST's pneumoniamnist.npz with --data,"
            " or the folder above it in FEDWARD_DATA."
        )


def versions() -> dict[str, str]:
    """Versions of what does the work."""
    packages = ("torch", "monai", "flwr", "numpy", "scikit-learn")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def machine() -> dict[str, str | int]:
    """Processor and cores."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(encoding="ascii", errors="replace").splitlines() if listing.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "system": platform.system(),
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count() or 1,
    }
