"""Checkpoints: bits come back, damage is named, and a failure never costs what was there before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from fedward_common.errors import CheckpointError
from fedward_common.weights import Weights
from fedward_server.checkpoints import Checkpoints


def some_weights(seed: int) -> Weights:
    generator = np.random.default_rng(seed)
    return {
        "conv.weight": generator.standard_normal((4, 3, 3, 3), dtype=np.float32),
        "scale": np.asarray(generator.standard_normal(), dtype=np.float32),
        "empty": np.zeros((0, 2), dtype=np.float32),
    }


def some_state(seed: int) -> dict[str, NDArray[Any]]:
    return {"second_moment/conv.weight": np.full((4, 3, 3, 3), seed / 7), "step": np.asarray(seed)}


def write(checkpoints: Checkpoints, *rounds: int, **options: Any) -> None:
    for index in rounds:
        checkpoints.write(index, some_weights(index), some_state(index), {"round": index}, **options)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run")
    ref = checkpoints.write(3, some_weights(3), some_state(3), {"digest": "ab", "n": 1})

    found = checkpoints.read(3)

    assert found.ref == ref
    assert found.record == {"digest": "ab", "n": 1}
    for given, read in ((some_weights(3), found.weights), (some_state(3), found.strategy_state)):
        assert given.keys() == read.keys()
        for name, array in given.items():
            assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)
            assert read[name].tobytes() == array.tobytes()


def test_views_are_written_as_they_look_not_as_they_lie_in_memory(tmp_path: Path) -> None:
    base = np.arange(12, dtype=np.float32).reshape(3, 4)
    checkpoints = Checkpoints(tmp_path)

    checkpoints.write(1, {"turned": base.T, "every_second": base[:, ::2]}, {"back": base[::-1]}, {})

    found = checkpoints.read(1)
    np.testing.assert_array_equal(found.weights["turned"], base.T)
    np.testing.assert_array_equal(found.weights["every_second"], base[:, ::2])
    np.testing.assert_array_equal(found.strategy_state["back"], base[::-1])


def test_tensors_are_plain_safetensors_for_other_programs(tmp_path: Path) -> None:
    ref = Checkpoints(tmp_path).write(1, some_weights(1), {}, {})

    tensors = load_file(tmp_path / ref.file)

    np.testing.assert_array_equal(tensors["weights/conv.weight"], some_weights(1)["conv.weight"])


def test_nothing_written_is_none(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "absent").latest_good() is None
    assert Checkpoints(tmp_path / "absent").rounds() == []


def test_latest_is_the_newest_or_the_newest_not_after_a_round(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    write(checkpoints, 1, 2, 3)

    newest, earlier = checkpoints.latest_good(), checkpoints.latest_good(at_most=2)

    assert newest is not None
    assert earlier is not None
    assert (newest.round_index, newest.bad, earlier.round_index) == (3, (), 2)


@pytest.mark.parametrize("victim", ["tensors", "record", "tensors_gone", "record_emptied"])
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path, victim: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    write(checkpoints, 1, 2)
    tensors = tmp_path / checkpoints.read(2).ref.file
    record = tmp_path / "round-00002.json"
    if victim == "tensors":
        damage(tensors)
    elif victim == "record":
        record.write_text(record.read_text().replace('"round": 2', '"round": 7'))
    elif victim == "tensors_gone":
        tensors.unlink()
    else:
        record.write_bytes(b"")
    bad_file = tensors if victim.startswith("tensors") else record

    with pytest.raises(CheckpointError, match=bad_file.name) as caught:
        checkpoints.read(2)
    found = checkpoints.latest_good()

    assert "resume" in caught.value.remedy
    assert found is not None
    assert found.round_index == 1
    assert len(found.bad) == 1
    assert bad_file.name in found.bad[0]


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    write(checkpoints, 1, 2)
    for path in tmp_path.glob("*.safetensors"):
        damage(path)

    with pytest.raises(CheckpointError, match="none of 2 checkpoints"):
        checkpoints.latest_good()


def test_record_cannot_name_a_file_outside_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    checkpoints = Checkpoints(folder)
    write(checkpoints, 1)
    document = json.loads((folder / "round-00001.json").read_text())
    document["body"]["file"] = "../secret"
    (folder / "round-00001.json").write_text(json.dumps(document))

    with pytest.raises(CheckpointError, match=r"round-00001\.json"):
        checkpoints.read(1)


def test_last_five_and_the_kept_one_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)

    write(checkpoints, *range(1, 10), keep={2})

    assert checkpoints.rounds() == [2, 5, 6, 7, 8, 9]
    assert len(list(tmp_path.glob("*.safetensors"))) == 6
    assert checkpoints.read(2).record == {"round": 2}


def test_what_a_crash_left_behind_is_removed_by_the_next_write(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    write(checkpoints, 1)
    for name in ("round-00002.safetensors.tmp", "round-00002-0123456789ab.safetensors"):
        (tmp_path / name).write_bytes(b"half")

    write(checkpoints, 2)

    assert {path.name.partition("-0")[0] for path in tmp_path.glob("*.tmp")} == set()
    assert len(list(tmp_path.iterdir())) == 4


def test_round_written_again_replaces_the_first(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    write(checkpoints, 1)

    checkpoints.write(1, some_weights(9), {}, {"again": True})

    assert checkpoints.read(1).record == {"again": True}
    np.testing.assert_array_equal(checkpoints.read(1).weights["scale"], some_weights(9)["scale"])
    assert len(list(tmp_path.iterdir())) == 2


_FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy as np
from fedward_common.errors import CheckpointError
from fedward_server.checkpoints import Checkpoints
num_floats, num_letters = int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
weights, record = {"w": np.ones(num_floats, np.float32)}, {"note": "n" * num_letters}
try:
    Checkpoints(Path(sys.argv[1])).write(2, weights, {}, record)
except CheckpointError as error:
    print(error.message, "|", error.remedy)
"""


@pytest.mark.parametrize(
    ("num_floats", "num_letters"), [(1_000_000, 1), (1_000, 200_000)], ids=["tensors", "record"]
)
def test_full_disk_is_a_clear_error_and_leaves_the_folder_as_it_was(
    tmp_path: Path, num_floats: int, num_letters: int
) -> None:
    """RLIMIT_FSIZE fails a write in the middle, as a full disk does."""
    checkpoints = Checkpoints(tmp_path)
    write(checkpoints, 1)
    before = listing(tmp_path)

    child = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, str(tmp_path), str(num_floats), str(num_letters)],
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert child.returncode == 0, child.stderr
    assert "could not be written" in child.stdout
    assert "Free space" in child.stdout
    assert listing(tmp_path) == before
    found = checkpoints.latest_good()
    assert found is not None
    assert found.round_index == 1


def test_folder_that_is_a_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")

    with pytest.raises(CheckpointError, match="could not be written"):
        write(Checkpoints(tmp_path / "run"), 1)
