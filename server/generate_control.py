"""Generate the gRPC modules from `fedward_server/control.proto`: run it from anywhere after an edit."""

from __future__ import annotations

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent
_HEADER = "# mypy: ignore-errors\n"


def generate(folder: Path) -> list[Path]:
    """Write `fedward_server/control_pb2.py`, its types and `control_pb2_grpc.py` below `folder`."""
    from grpc_tools import protoc  # type: ignore[import-untyped]

    status = protoc.main(
        [
            "protoc",
            f"--proto_path={_ROOT}",
            f"--python_out={folder}",
            f"--pyi_out={folder}",
            f"--grpc_python_out={folder}",
            str(_ROOT / "fedward_server" / "control.proto"),
        ]
    )
    if status != 0:
        sys.exit(status)
    names = ("control_pb2.py", "control_pb2.pyi", "control_pb2_grpc.py")
    files = [folder / "fedward_server" / name for name in names]
    for file in files:
        file.write_text(_HEADER + file.read_text(encoding="utf-8"), encoding="utf-8")
    return files


if __name__ == "__main__":
    generate(_ROOT)
