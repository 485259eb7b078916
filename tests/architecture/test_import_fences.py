"""Who may import what: the two sides never meet, and each dangerous library has few doors."""

from __future__ import annotations

import ast
import json
import subprocess
import sys

import pytest

from tests.architecture.source_tree import Module, imports, imports_by_string, modules

SIDES_APART = {
    "fedward_common": ("fedward_client", "fedward_server"),
    "fedward_client": ("fedward_server",),
    "fedward_server": ("fedward_client",),
}

# Library -> modules that may import it; "package.*" allows a whole folder.
FENCES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("pydicom", "pynetdicom", "highdicom", "dicomweb_client", "requests", "dicomanonymizer"): (
        "fedward_client.sources.*",
        "fedward_client.dicom.*",
    ),
    ("flwr",): (
        "fedward_common.protocol",
        "fedward_client.app",
        "fedward_client.node",
        "fedward_client.ray_sites",
        "fedward_client.simulated",
        "fedward_server.app",
        "fedward_server.link",
        "fedward_server.rounds",
        "fedward_server.fleet",  # the part of the rounds that talks to sites
        "fedward_server.bundles",  # routes of the link
        "fedward_server.grid",  # Flower's Grid between runner and link
        "fedward_server.local_grid",  # the same for the simulation
        "fedward_server.ray_engine",  # and for its second engine
        "fedward_server.runner",
        "fedward_server.simulation",
    ),
    ("ray",): ("fedward_server.ray_session",),
    ("cryptography",): (
        "fedward_common.identity",
        "fedward_common.certificates",
        "fedward_common.audit",
        "fedward_client.node",
        "fedward_server.link",
        "fedward_server.provisioning",
        "fedward_server.authority",  # the certificate authority behind provisioning
    ),
    ("grpc", "grpc_health", "grpc_status"): (
        "fedward_server.control",
        "fedward_server.control_access",
        "fedward_server.control_client",
        "fedward_server.control_gate",
        "fedward_server.cli",
    ),
}
# A name that is not literal could import anything: only the registry may, from its own fixed table.
DYNAMIC_IMPORTS = ("fedward_common.registry",)

# The simulation and the demo play the sites' part on one machine: they find that part by a string,
# which nothing imports until it is asked for. Nothing else of the server may know the client's names.
BY_STRING = {
    "fedward_server.simulation": "fedward_client.simulated",
    "fedward_server.ray_engine": "fedward_client.ray_sites",
    "fedward_server.site_folders": "fedward_client.dicom.synthetic",
}

HEAVY = ("torch", "monai", "flwr", "sklearn", "pydicom", "pynetdicom", "dicomweb_client", "highdicom", "ray")


def crossings(module: str, tree: ast.AST) -> list[str]:
    """Imports that the fences forbid in a module of this name, as `line: name`."""
    by_statement = [entry for entry in imports(tree) if not _allowed(module, entry[1])]
    by_string = [entry for entry in imports_by_string(tree) if not _allowed_by_string(module, entry[1])]
    return [f"{line}: {name}" for line, name in by_statement + by_string]


def _allowed(module: str, name: str) -> bool:
    top = name.split(".")[0]
    if not top:  # relative: an import always says which side it belongs to
        return False
    return top not in SIDES_APART.get(module.partition(".")[0], ()) and _may_import(module, top)


def _allowed_by_string(module: str, name: str | None) -> bool:
    if name is None:
        return module in DYNAMIC_IMPORTS
    return BY_STRING.get(module) == name or _allowed(module, name)


def _may_import(module: str, library: str) -> bool:
    for libraries, allowed in FENCES.items():
        if library in libraries:
            return any(
                module == entry or (entry.endswith(".*") and f"{module}.".startswith(entry[:-1]))
                for entry in allowed
            )
    return True


@pytest.mark.parametrize("module", modules(), ids=lambda module: module.name)
def test_module_imports_only_what_its_place_allows(module: Module) -> None:
    assert crossings(module.name, module.tree) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fedward_common.weights", "import fedward_client.node"),
        ("fedward_common.weights", "from fedward_server import rounds"),
        ("fedward_client.node", "def f():\n    from fedward_server.link import serve"),
        ("fedward_server.rounds", "from fedward_client import trainer"),
        ("fedward_server.rounds", "import importlib\nimportlib.import_module('fedward_client.trainer')"),
        ("fedward_server.rounds", "from importlib import import_module\nimport_module(name)"),
        ("fedward_server.rounds", "__import__('fedward_client')"),
        ("fedward_server.simulation", "from fedward_client import simulated"),
        (
            "fedward_server.simulation",
            "from importlib import import_module\nimport_module('fedward_client.node')",
        ),
        ("fedward_client.trainer", "import pydicom.uid as uid"),
        ("fedward_client.dicomweb", "import pydicom"),
        ("fedward_common.audit", "from pydicom import dcmread"),
        ("fedward_client.outbound", "import flwr"),
        ("fedward_client.cli", "import grpc"),
        ("fedward_client.outbound", "from cryptography import x509"),
        ("fedward_client.ray_sites", "import ray"),
        ("fedward_client.node", "from . import app"),
        ("fedward_client.node", "if TYPE_CHECKING:\n    from fedward_server import app"),
    ],
)
def test_fence_catches_a_planted_import(module: str, source: str) -> None:
    assert len(crossings(module, ast.parse(source))) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fedward_client.node", "from fedward_common import weights\nimport flwr.app"),
        ("fedward_client.dicom.parser", "import pydicom"),
        ("fedward_client.sources", "from pydicom import dcmread"),
        ("fedward_common.registry", "from importlib import import_module\nimport_module(name)"),
        ("fedward_server.cli", "import grpc"),
        (
            "fedward_server.simulation",
            "from importlib import import_module\nimport_module('fedward_client.simulated')",
        ),
    ],
)
def test_fence_lets_an_allowed_import_through(module: str, source: str) -> None:
    assert crossings(module, ast.parse(source)) == []


def test_every_module_that_a_fence_names_exists() -> None:
    """A door left open for a module that is gone would let the next one of that name through."""
    names = {module.name for module in modules()}
    named = {entry.removesuffix(".*") for allowed in FENCES.values() for entry in allowed}
    named |= {*DYNAMIC_IMPORTS, *BY_STRING, *BY_STRING.values()}
    assert sorted(named - names) == []


def loaded_after(statements: str) -> list[str]:
    """Which heavy libraries a fresh process has imported after the statements."""
    code = f"{statements}\nimport json, sys\nprint(json.dumps([n for n in {HEAVY!r} if n in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [str(name) for name in json.loads(done.stdout.splitlines()[-1])]


@pytest.mark.parametrize("module", ["fedward_server.cli", "fedward_client.cli"])
def test_help_of_a_command_imports_nothing_heavy(module: str) -> None:
    help_page = (
        f"import sys; sys.argv = ['command', '--help']\nfrom {module} import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code"
    )
    assert loaded_after(help_page) == []


def test_site_daemon_imports_neither_torch_nor_dicom() -> None:
    """It holds the keys and the network; what reads patients' files runs in the worker."""
    assert not {"torch", "monai", "pydicom"} & set(loaded_after("import fedward_client.daemon"))


def test_worker_imports_neither_network_nor_keys() -> None:
    code = "import fedward_client.worker, sys\nassert not {'flwr', 'grpc', 'cryptography'} & set(sys.modules)"
    loaded_after(code)


def test_aggregation_needs_numpy_only() -> None:
    strategies = (
        "from fedward_common.registry import STRATEGIES\n[STRATEGIES.load(n) for n in STRATEGIES.names()]"
    )
    assert loaded_after(f"import fedward_common.aggregation\n{strategies}") == []


def test_check_of_heavy_libraries_notices_one() -> None:
    assert loaded_after("import pydicom") == ["pydicom"]
