"""Generate Python modules from the `.proto` files beside them: run it from anywhere after an edit."""

from __future__ import annotations

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_HEADER = "# mypy: ignore-errors\n"
_SOURCES = {
    "server/fedward_server/control.proto": ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py"),
    "common/fedward_common/transfer.proto": ("_pb2.py", "_pb2.pyi"),
}


def generate(source: Path, folder: Path, endings: tuple[str, ...]) -> list[Path]:
    """Write the modules of `source` (below a source root) into the same package below `folder`."""
    from grpc_tools import protoc  # type: ignore[import-untyped]

    root = source.parents[1]
    outputs = {"_pb2.py": "python_out", "_pb2.pyi": "pyi_out", "_pb2_grpc.py": "grpc_python_out"}
    options = [f"--{outputs[ending]}={folder}" for ending in endings]
    status = protoc.main(["protoc", f"--proto_path={root}", *options, str(source)])
    if status != 0:
        sys.exit(status)
    files = [folder / source.parent.name / f"{source.stem}{ending}" for ending in endings]
    for file in files:
        file.write_text(_HEADER + file.read_text(encoding="utf-8"), encoding="utf-8")
    return files


if __name__ == "__main__":
    for name, wanted in _SOURCES.items():
        generate(_ROOT / name, (_ROOT / name).parents[1], wanted)
