"""Names lead to code that is installed here, and to nothing else."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from fedward_common.errors import PlanError
from fedward_common.registry import MODELS, STRATEGIES, Registry

PACKAGE = "fedward_example_strategies"


@pytest.fixture
def installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package as pip leaves it: a module, and a dist-info that names an entry point."""
    (tmp_path / f"{PACKAGE}.py").write_text("STRATEGY = 'from the package'\nFEDAVG = 'an impostor'\n")
    info = tmp_path / f"{PACKAGE}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[fedward.strategies]\nmedian = {PACKAGE}:STRATEGY\nfedavg = {PACKAGE}:FEDAVG\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, PACKAGE, raising=False)
    return "median"


def test_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        PlanError, match=r"unknown name 'krum' among strategies.*fedadam, fedavg, fedprox"
    ) as refusal:
        STRATEGIES.load("krum")
    assert "fedward.strategies" in refusal.value.remedy


def test_name_that_is_a_module_path_is_refused() -> None:
    for name in ("os:system", "fedward_common.strategies.fedavg:STRATEGY", "../fedavg", ""):
        with pytest.raises(PlanError, match="unknown name"):
            STRATEGIES.load(name)


def test_an_installed_package_adds_a_name(installed_package: str) -> None:
    assert STRATEGIES.names() == ["fedadam", "fedavg", "fedprox", installed_package]
    assert STRATEGIES.load(installed_package) == "from the package"


@pytest.mark.usefixtures("installed_package")
def test_an_installed_package_adds_nothing_to_other_registries() -> None:
    assert "median" not in MODELS.names()
    with pytest.raises(PlanError, match="among models"):
        MODELS.load("median")


@pytest.mark.usefixtures("installed_package")
def test_an_installed_package_cannot_replace_a_built_in_name() -> None:
    assert STRATEGIES.load("fedavg").name == "fedavg"
    assert STRATEGIES.names().count("fedavg") == 1


def test_nothing_is_imported_before_a_name_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fedward_example_lazy.py").write_text("PART = object()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = Registry("examples", {"lazy": "fedward_example_lazy:PART"})
    assert registry.names() == ["lazy"]
    assert "fedward_example_lazy" not in sys.modules
    part = registry.load("lazy")
    assert part is sys.modules.pop("fedward_example_lazy").PART
