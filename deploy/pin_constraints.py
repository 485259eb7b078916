"""Write deploy/constraints.txt: the exact version of everything fedward and its tests need.

Run by `make constraints` in an environment whose versions have passed the tests. Only what the
dependency tree of `fedward[dev]` reaches is listed, so what somebody installed by hand stays out. What
PyTorch's own CUDA build brings is left to PyTorch, which pins it itself and per platform.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

CONSTRAINTS = Path(__file__).with_name("constraints.txt")
PINNED_BY_TORCH = ("nvidia-", "cuda-", "triton")
_HEADER = """\
# Exact versions of everything fedward and its tests need; made by `make constraints`, tried out together.
"""


def pins(root: str = "fedward[dev]") -> dict[str, str]:
    """Exact public version of every installed distribution that `root` needs, by name, sorted.

    Args:
        root: a requirement; it must be installed, extras included.

    Raises:
        LookupError: something that it needs is not installed.
    """
    start = Requirement(root)
    found: dict[str, str] = {}
    done: set[tuple[str, frozenset[str]]] = set()
    todo = [start]
    while todo:
        requirement = todo.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in done or name.startswith(PINNED_BY_TORCH):
            continue
        done.add((name, extras))
        try:
            installed = distribution(name)
        except PackageNotFoundError as error:
            raise LookupError(f"{name} is not installed: make setup-dev") from error
        found[name] = Version(installed.version).public
        todo += _needed(installed.requires or [], extras)
    del found[canonicalize_name(start.name)]
    return dict(sorted(found.items()))


def _needed(requirements: list[str], extras: frozenset[str]) -> list[Requirement]:
    """Requirements that hold on this machine with these extras."""
    parsed = [Requirement(text) for text in requirements]
    return [
        one
        for one in parsed
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in extras | {""})
    ]


def main() -> None:
    """Write the file."""
    try:
        lines = [f"{name}=={version}\n" for name, version in pins().items()]
    except LookupError as error:
        sys.exit(str(error))
    CONSTRAINTS.write_text(_HEADER + "".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
