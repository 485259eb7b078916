"""The project's own source, parsed: what the architecture tests look at."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SIDES = ("common", "client", "server")


@dataclass(frozen=True)
class Module:
    """One module: its dotted name, where it lies, and its syntax tree."""

    name: str
    path: Path
    source: str = field(repr=False)
    tree: ast.Module = field(repr=False)

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]


@cache
def modules() -> tuple[Module, ...]:
    """Every module of the three packages; what protoc generates is not ours to judge."""
    found = []
    for side in SIDES:
        root = ROOT / side
        for path in sorted((root / f"fedward_{side}").rglob("*.py")):
            if path.stem.endswith(("_pb2", "_pb2_grpc")):
                continue
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            source = path.read_text(encoding="utf-8")
            found.append(Module(name, path, source, ast.parse(source)))
    return tuple(found)


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a statement imports, at any depth.

    `from a import b` gives "a.b": b may be a module. A relative import keeps its dots.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def imports_by_string(tree: ast.AST) -> Iterator[tuple[int, str | None]]:
    """Line and name of every `import_module` or `__import__`; None for a name that is computed."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if dotted_name(node.func).split(".")[-1] in ("import_module", "__import__"):
            given = node.args[0] if node.args else None
            literal = given.value if isinstance(given, ast.Constant) else None
            yield node.lineno, literal if isinstance(literal, str) else None


def dotted_name(node: ast.AST) -> str:
    """`a.b.c` for a chain of names; "" for anything else, such as a call's result."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted_name(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""
