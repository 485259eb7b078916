"""No module and no function grows past what one reads in one go."""

from __future__ import annotations

import ast

import pytest

from tests.architecture.source_tree import Module, modules

MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 60


def long_functions(tree: ast.AST) -> list[str]:
    """Functions beyond the limit, as `name: lines`, from `def` to the last line."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            lines = node.end_lineno - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                found.append(f"{node.name}: {lines}")
    return found


@pytest.mark.parametrize("module", modules(), ids=lambda module: module.name)
def test_module_and_its_functions_are_short_enough(module: Module) -> None:
    assert len(module.source.splitlines()) <= MAX_MODULE_LINES
    assert long_functions(module.tree) == []


def test_modules_are_found() -> None:
    assert {module.package for module in modules()} == {"fedward_common", "fedward_client", "fedward_server"}
    assert len(modules()) > 50


def test_a_function_one_line_too_long_is_noticed() -> None:
    body = "    x = 1\n" * MAX_FUNCTION_LINES
    assert long_functions(ast.parse(f"class A:\n  def short():\n    pass\ndef long():\n{body}")) == [
        "long: 61"
    ]
