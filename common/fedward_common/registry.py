"""Find a model, task, transform, strategy, dataset or trainer by the name that a plan uses.

A registry maps a name to "module:attribute", so nothing is imported until a plan asks for it. Names
that are not built in are looked up among the entry points of the packages installed on this machine
(group `fedward.<registry>`): an operator adds a part by installing a package, never over the network.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from fedward_common.errors import PlanError


@dataclass(frozen=True)
class Registry:
    """Names of one kind of part and where its code lives.

    Args:
        kind: plural noun, also the last word of the entry-point group, for example "models".
        builtin: name -> "module:attribute".
    """

    kind: str
    builtin: Mapping[str, str]

    def names(self) -> list[str]:
        """Every name known on this machine, sorted."""
        return sorted({*self.builtin, *(point.name for point in _installed(self.kind))})

    def load(self, name: str) -> Any:
        """Import and return the part called `name`.

        Raises:
            PlanError: the name is not known here; the message lists the known ones.
        """
        target = self.builtin.get(name)
        if target is not None:
            module, _, attribute = target.partition(":")
            return getattr(import_module(module), attribute)
        self.check(name)
        offered = _installed(self.kind)
        return next(point for point in offered if point.name == name).load()

    def check(self, name: str) -> None:
        """Raise PlanError, listing the known names, unless `name` is known here; nothing is imported."""
        if name not in self.names():
            raise PlanError(
                f"unknown name {name!r} among {self.kind}; known here: {', '.join(self.names())}",
                remedy=f"Use one of the known names, or install a package that offers fedward.{self.kind}.",
            )


def _installed(kind: str) -> Any:
    """Entry points of installed packages that offer parts of one kind."""
    return _all_installed(tuple(sys.path)).select(group=f"fedward.{kind}")


@lru_cache(maxsize=2)
def _all_installed(path: tuple[str, ...]) -> Any:
    """Every entry point; looked for once a process, because reading all packages takes 50 ms and more."""
    del path  # where installed packages are found: another path is another answer
    return entry_points()


MODELS = Registry(
    "models",
    {
        "cnn2d": "fedward_common.models.cnn2d:MODEL",
        "densenet121": "fedward_common.models.densenet121:MODEL",
    },
)
TASKS = Registry("tasks", {"classification": "fedward_common.tasks.classification:TASK"})
TRANSFORMS = Registry(
    "transforms",
    {
        "chest_xray": "fedward_common.transforms.chest_xray:TRANSFORM",
        "image": "fedward_common.transforms.image:TRANSFORM",
        "colour_image": "fedward_common.transforms.colour_image:TRANSFORM",
        "volume": "fedward_common.transforms.volume:TRANSFORM",
    },
)
STRATEGIES = Registry(
    "strategies",
    {
        "fedavg": "fedward_common.strategies.fedavg:STRATEGY",
        "fedprox": "fedward_common.strategies.fedprox:STRATEGY",
        "fedadam": "fedward_common.strategies.fedadam:STRATEGY",
    },
)
DATASETS = Registry("datasets", {"dicom_folder": "fedward_client.dataset:open_dicom_folder"})
TRAINERS = Registry("trainers", {"local_epochs": "fedward_client.trainer:train"})
