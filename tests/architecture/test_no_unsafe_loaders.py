"""Nothing in the packages runs bytes as code, starts a shell, or talks TLS without checking the peer."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.architecture.source_tree import Module, dotted_name, modules

MODULES = ("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle")
BUILTINS = ("eval", "exec", "compile", "__import__")
FUNCTIONS = (
    "builtins.eval",
    "builtins.exec",
    "os.popen",
    "os.system",
    "pandas.read_pickle",
    "ssl._create_unverified_context",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "tempfile.mktemp",
    "torch.hub.load",
    "torch.load",
    "torch.save",
    "yaml.full_load",
    "yaml.load",
    "yaml.unsafe_load",
)
# Keyword -> the only literal it may be given. An SSL context may stand for verify=True.
KEYWORDS = {"shell": False, "verify": True, "allow_pickle": False, "check_hostname": True}
# It asks the server's own listeners on loopback; the certificate must still be the federation's.
EXCEPTIONS = {"fedward_server.health": "check_hostname = False"}


def unsafe_uses(tree: ast.AST) -> list[str]:
    """Every forbidden import, call or setting, as `line: what`."""
    names = dict(_imported_names(tree))
    found = []
    for node in ast.walk(tree):
        found += [f"{node.lineno}: {what}" for what in _faults(node, names)]  # type: ignore[attr-defined]
    return found


def _imported_names(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Local name -> what it stands for, so that an alias hides nothing."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname:
                    yield alias.asname, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _faults(node: ast.AST, names: dict[str, str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
    elif isinstance(node, ast.ImportFrom):
        if (node.module or "").split(".")[0] in MODULES:
            yield str(node.module)
        full = (f"{node.module}.{alias.name}" for alias in node.names)
        yield from (name for name in full if name in FUNCTIONS)
    elif isinstance(node, ast.Name) and node.id in BUILTINS and node.id not in names:
        yield node.id
    elif isinstance(node, ast.Attribute):
        name = _resolved(node, names)
        if name in FUNCTIONS or name.endswith(".CERT_NONE") or name.split(".")[0] in MODULES:
            yield name
    elif isinstance(node, ast.keyword) and node.arg in KEYWORDS:
        if not _harmless(node.arg, node.value):
            yield f"{node.arg}={ast.unparse(node.value)}"
    elif isinstance(node, ast.Assign):
        yield from _weakened_settings(node)


def _weakened_settings(node: ast.Assign) -> Iterator[str]:
    for target in node.targets:
        setting = target.attr if isinstance(target, ast.Attribute) else ""
        if setting == "check_hostname" and not _harmless(setting, node.value):
            yield f"{setting} = {ast.unparse(node.value)}"


def _harmless(setting: str, value: ast.expr) -> bool:
    if isinstance(value, ast.Constant):
        return value.value is KEYWORDS[setting]
    return setting == "verify" and dotted_name(value).split(".")[-1] in ("context", "ssl_context")


def _resolved(node: ast.AST, names: dict[str, str]) -> str:
    first, dot, rest = dotted_name(node).partition(".")
    return names.get(first, first) + dot + rest


@pytest.mark.parametrize("module", modules(), ids=lambda module: module.name)
def test_module_uses_nothing_unsafe(module: Module) -> None:
    found = [use for use in unsafe_uses(module.tree) if use.partition(": ")[2] != EXCEPTIONS.get(module.name)]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib as j",
        "def f():\n    import dill",
        "import torch\ntorch.load(path)",
        "import torch as t\nt.load(path, weights_only=True)",
        "from torch import load",
        "import torch\nread = torch.load",
        "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
        "eval('1')",
        "f = exec",
        "compile(source, 'x', 'exec')",
        "import builtins\nbuiltins.exec('1')",
        "import os\nos.system('ls')",
        "from os import system",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import subprocess\nsubprocess.run('ls', shell=flag)",
        "import requests\nrequests.get(url, verify=False)",
        "import requests\nrequests.get(url, verify=flag)",
        "import requests\nrequests.get(url, verify=None)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import ssl\ncontext.verify_mode = ssl.CERT_NONE",
        "context.check_hostname = False",
        "from ssl import VerifyMode\nx = VerifyMode.CERT_NONE",
    ],
)
def test_checker_catches_a_planted_use(source: str) -> None:
    assert unsafe_uses(ast.parse(source)) != []


@pytest.mark.parametrize(
    "source",
    [
        "import re\nre.compile('a')",
        "model.eval()",
        "import json\njson.load(file)",
        "import numpy as np\nnp.load(path, allow_pickle=False)",
        "import subprocess\nsubprocess.run(['ls'], shell=False)",
        "import yaml\nyaml.safe_load(text)",
        "context.check_hostname = True",
        "import httpx\nhttpx.Client(verify=context)",
        "STRATEGIES.load('fedavg')",
    ],
)
def test_checker_lets_harmless_code_through(source: str) -> None:
    assert unsafe_uses(ast.parse(source)) == []
