"""Every part has a name, every name leads to a part, and every part has a test."""

from __future__ import annotations

import ast
import re
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from fedward_common import registry
from fedward_common.registry import Registry
from tests.architecture.source_tree import ROOT, imports, modules

REGISTRIES = [value for value in vars(registry).values() if isinstance(value, Registry)]
BUILTINS = [(found, name) for found in REGISTRIES for name in found.builtin]
# Folder of common/ -> what a module in it calls its part.
FOLDERS = {"models": "MODEL", "strategies": "STRATEGY", "tasks": "TASK", "transforms": "TRANSFORM"}


def test_registries_are_all_here() -> None:
    assert {found.kind for found in REGISTRIES} >= {*FOLDERS, "datasets", "trainers"}


@pytest.mark.parametrize(("found", "name"), BUILTINS, ids=[f"{f.kind}-{n}" for f, n in BUILTINS])
def test_built_in_name_loads_and_the_part_knows_its_name(found: Registry, name: str) -> None:
    part = found.load(name)
    if found.kind in FOLDERS:
        assert part.name == name
    else:
        assert callable(part)


@pytest.mark.parametrize(("folder", "attribute"), FOLDERS.items())
def test_every_module_of_a_part_folder_is_registered_or_used_by_one_that_is(
    folder: str, attribute: str
) -> None:
    [found] = [each for each in REGISTRIES if each.kind == folder]
    package = f"fedward_common.{folder}"
    registered = {target.partition(":")[0] for target in found.builtin.values()}
    inside = {module.name: module.tree for module in modules() if module.name.startswith(f"{package}.")}
    assert registered <= inside.keys()
    used = {name for module in registered for _, name in imports(inside[module])}
    for name, tree in inside.items():
        defines = any(
            isinstance(node, ast.Assign | ast.AnnAssign) and attribute in ast.unparse(node).split("=")[0]
            for node in tree.body
        )
        if name in registered:
            assert f"{name}:{attribute}" in found.builtin.values()
            assert defines, f"{name} defines no {attribute}"
        else:
            assert not defines, f"{name} defines {attribute} but is not registered"
            assert any(each.startswith(f"{name}.") for each in used), f"nothing registered uses {name}"


@pytest.mark.parametrize(("found", "name"), BUILTINS, ids=[f"{f.kind}-{n}" for f, n in BUILTINS])
def test_every_registered_part_is_named_in_a_test_of_its_own(found: Registry, name: str) -> None:
    module = found.builtin[name].partition(":")[0]
    package, *_, stem = module.split(".")
    folder = ROOT / "tests" / package.removeprefix("fedward_")
    files = [
        folder / f"test_{stem}.py",
        folder / f"test_{found.kind}.py",
        folder / found.kind / f"test_{stem}.py",
    ]
    assert any(_mentions(file, name, stem) for file in files), f"no test names {name}: {files}"


def _mentions(file: Path, name: str, stem: str) -> bool:
    if not file.is_file():
        return False
    return bool(re.search(rf"\b({re.escape(name)}|{re.escape(stem)})\b", file.read_text(encoding="utf-8")))


def test_every_command_of_the_package_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(project["scripts"]) >= {"fedward", "fedward-site"}
    for target in project["scripts"].values():
        module, _, function = target.partition(":")
        assert callable(getattr(import_module(module), function))
