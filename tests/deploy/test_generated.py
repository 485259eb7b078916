"""Generated modules belong to the `.proto` files beside them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _generator() -> object:
    file = ROOT / "deploy" / "generate_protobuf.py"
    specification = importlib.util.spec_from_file_location("generate_protobuf", file)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_generator_knows_every_proto_file() -> None:
    files = {
        str(file.relative_to(ROOT))
        for part in ("common", "server", "client")
        for file in (ROOT / part).rglob("*.proto")
    }
    assert files == set(_generator()._SOURCES)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "source", ["server/fedward_server/control.proto", "common/fedward_common/transfer.proto"]
)
def test_generated_modules_belong_to_the_proto_file(source: str, tmp_path: Path) -> None:
    generator = _generator()
    package = (ROOT / source).parent
    (tmp_path / package.name).mkdir()
    endings = generator._SOURCES[source]  # type: ignore[attr-defined]

    files = generator.generate(ROOT / source, tmp_path, endings)  # type: ignore[attr-defined]

    assert len(files) == len(endings)
    for file in files:
        assert file.read_text() == (package / file.name).read_text(), file.name
