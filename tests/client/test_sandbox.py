"""The decoder processes: same pixels as in this process, limits, dying ones, and what they leave behind."""

from __future__ import annotations

import dataclasses
import errno
import gc
import hashlib
import json
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.uid import CTImageStorage, JPEG2000Lossless, RLELossless

from fedward_client.decoders import _decoders as process_wide
from fedward_client.dicom import sandbox as module
from fedward_client.dicom import sandbox_worker
from fedward_client.dicom.decode import decode_image
from fedward_client.dicom.frames import Frames, decode_frames
from fedward_client.dicom.refusal import Reason, UnusableImageError
from fedward_client.dicom.sandbox import DecodeSandbox, Outcome, SiteFile
from fedward_client.dicom.sandbox_answers import outcomes_of
from fedward_client.dicom.sandbox_files import SiteFolders
from fedward_client.dicom.sandbox_process import DecoderProcess, Pace
from fedward_client.dicom.sandbox_wire import (
    DEPTH,
    Take,
    WireError,
    close_all,
    frames_from,
    frames_message,
    receive,
    send,
)
from fedward_client.dicom.shared_pixels import (
    MEMORIES,
    PIECE_BYTES,
    Memories,
    SharedArray,
    borrowed,
    lend_file,
)
from fedward_client.dicom.stored_pixels import decode_stored
from fedward_common.errors import CohortError
from tests.builders import a_dataset, a_dicom, encode

NOISE = np.random.default_rng(1).integers(0, 4096, (64, 48), dtype=np.uint16)
CT: dict[str, Any] = {
    "SOPClassUID": CTImageStorage,
    "Modality": "CT",
    "RescaleSlope": "2",
    "RescaleIntercept": "-1000",
    "ImagePositionPatient": [1, 2, 3],
    "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
    "PixelSpacing": [0.5, 0.25],
    "WindowCenter": ["40", "50"],
    "WindowWidth": ["400", "500"],
}


@pytest.fixture(scope="module")
def decoders() -> Iterator[DecodeSandbox]:
    with DecodeSandbox(2) as started:
        yield started


def put(folder: Path, **files: bytes) -> list[SiteFile]:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return [SiteFile(folder, name.encode()) for name in files]


def reason_of(outcome: Outcome) -> Reason | None:
    return outcome.reason if isinstance(outcome, UnusableImageError) else None


def assert_same(one: Frames, other: Frames) -> None:
    for field in dataclasses.fields(Frames):
        found, expected = getattr(one, field.name), getattr(other, field.name)
        if field.name == "facts":
            for fact in dataclasses.fields(type(expected)):
                np.testing.assert_equal(getattr(found, fact.name), getattr(expected, fact.name))
        elif field.name == "voi_lut" and expected is not None:
            assert (found.first_mapped, found.bits) == (expected.first_mapped, expected.bits)
            assert np.array_equal(found.entries, expected.entries)
        else:
            np.testing.assert_equal(found, expected)
            assert type(found) is type(expected)


def slow_file(side: int = 1500) -> bytes:
    """Takes JPEG 2000 about a second of processor time: noise does not compress."""
    noise = np.random.default_rng(2).integers(0, 2**16, (side, side), dtype=np.uint16)
    dataset = a_dataset(noise, **CT)
    dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
    return encode(dataset, JPEG2000Lossless)


def test_frames_from_the_sandbox_equal_those_decoded_here(decoders: DecodeSandbox, tmp_path: Path) -> None:
    (file,) = put(tmp_path, ct=a_dicom(NOISE, **CT))

    assert_same(
        decoders.decode_frames(file.root, file.name),
        decode_frames((tmp_path / "ct").read_bytes()),
    )


@pytest.mark.data
def test_real_files_from_the_sandbox_equal_those_decoded_here(
    decoders: DecodeSandbox, shared_data: Path
) -> None:
    paths = sorted((shared_data / "dicom-varied").rglob("*.dcm"))
    files = [SiteFile(path.parent, path.name.encode()) for path in paths]

    num_same = 0
    for path, outcome in zip(paths, decoders.map(files, "frames"), strict=True):
        try:
            expected = decode_frames(path.read_bytes())
        except UnusableImageError as error:
            assert reason_of(outcome) == error.reason  # noqa: PT017 - both must say the same
            continue
        assert isinstance(outcome, Frames)
        assert_same(outcome, expected)
        num_same += 1
    assert num_same > 80


def test_radiograph_from_the_sandbox_equals_the_one_decoded_here(
    decoders: DecodeSandbox, tmp_path: Path
) -> None:
    (file,) = put(tmp_path, cr=a_dicom(NOISE, WindowCenter="2000", WindowWidth="3000"))

    image = decoders.decode_image(file.root, file.name)

    np.testing.assert_array_equal(image, decode_image((tmp_path / "cr").read_bytes()))
    assert image.flags.writeable


def test_stored_values_from_the_sandbox_equal_those_decoded_here(
    decoders: DecodeSandbox, tmp_path: Path
) -> None:
    files = put(
        tmp_path,
        grey=a_dicom(NOISE.astype(np.int16) - 2000, **CT),
        colour=a_dicom(
            np.zeros((16, 16), np.uint8),
            SamplesPerPixel=3,
            PhotometricInterpretation="RGB",
            PlanarConfiguration=0,
            PixelData=bytes(range(256)) * 3,
        ),
    )

    for file, outcome in zip(files, decoders.map(files, "stored"), strict=True):
        expected = decode_stored((file.root / file.name.decode()).read_bytes())
        assert isinstance(outcome, np.ndarray)
        assert outcome.dtype == expected.dtype
        np.testing.assert_array_equal(outcome, expected)


def test_many_files_come_back_in_their_order_and_refusals_in_their_place(
    decoders: DecodeSandbox, tmp_path: Path
) -> None:
    good = {f"a{number:02}": a_dicom(NOISE + np.uint16(number), **CT) for number in range(20)}
    files = put(tmp_path, **good, broken=good["a00"][:-100], text=b"no image")
    files = [*files[:7], files[20], *files[7:20], files[21]]

    outcomes = list(decoders.map(files, "frames"))

    assert [reason_of(each) for each in outcomes if not isinstance(each, Frames)] == [
        Reason.TRUNCATED,
        Reason.NOT_DICOM,
    ]
    firsts = [each.values[0, 0, 0] for each in outcomes if isinstance(each, Frames)]
    assert firsts == [2.0 * (int(NOISE[0, 0]) + number) - 1000 for number in range(20)]


def test_refusals_are_raised_with_their_reason_and_kind(decoders: DecodeSandbox, tmp_path: Path) -> None:
    (file,) = put(tmp_path, ct=a_dicom(NOISE, **CT))

    with pytest.raises(UnusableImageError) as caught:
        decoders.decode_image(file.root, file.name)

    assert (caught.value.reason, caught.value.kind) == (Reason.SOP_CLASS, "CT Image Storage")


def test_a_file_that_changed_or_vanished_is_no_image_error(decoders: DecodeSandbox, tmp_path: Path) -> None:
    data = a_dicom(NOISE, **CT)
    put(tmp_path, ct=data)
    content = hashlib.sha256(data).hexdigest()

    assert decoders.decode_frames(tmp_path, b"ct", content).values.shape == (1, 64, 48)
    for name, expected in ((b"ct", "0" * 64), (b"gone", None)):
        with pytest.raises(CohortError) as caught:
            decoders.decode_frames(tmp_path, name, expected)
        assert not isinstance(caught.value, UnusableImageError)
        assert "vanished" in caught.value.message


def test_links_pipes_and_folders_are_never_opened(decoders: DecodeSandbox, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    put(tmp_path, outside=a_dicom(NOISE, **CT))
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "way").symlink_to(tmp_path)
    os.mkfifo(root / "pipe")

    for name in (b"link", b"way/outside", b"../outside", b"pipe", b"folder"):
        with pytest.raises(CohortError, match="vanished"):
            decoders.decode_frames(root, name)


def test_files_that_others_have_under_way_cost_no_image(tmp_path: Path) -> None:
    put(tmp_path, ct=a_dicom(NOISE, **CT))
    ours, theirs = socket.socketpair()
    with ours, theirs, Path(os.devnull).open("rb") as file:
        for _ in range(4):
            socket.send_fds(ours, [b"x"], [file.fileno()] * 50)
        with DecodeSandbox() as sandbox:
            assert sandbox.decode_frames(tmp_path, b"ct").values.shape == (1, 64, 48)


def test_a_crowd_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    crowded, send_fds = iter((True, True, False)), socket.send_fds

    def sometimes(*given: Any) -> int:
        if next(crowded):
            raise OSError(errno.ETOOMANYREFS, "crowded")
        return send_fds(*given)

    monkeypatch.setattr(socket, "send_fds", sometimes)
    ours, theirs = socket.socketpair()
    with ours, theirs, Path(os.devnull).open("rb") as file:
        send(ours, {"a": 1}, [file.fileno()])
        message, files = receive(theirs)
    os.close(files[0])
    assert message == {"a": 1}


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ETOOMANYREFS])
def test_site_without_files_to_give_says_so_and_blames_no_image(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, ct=a_dicom(NOISE, **CT))

    def never(*_: Any, **__: Any) -> int:
        raise OSError(number, "crowded")

    with DecodeSandbox() as sandbox:
        pids = sandbox.pids
        with monkeypatch.context() as patch:
            patch.setattr("fedward_client.dicom.sandbox_wire._CROWDED_S", 0.0)
            owner, name = (SiteFolders, "open") if number == errno.EMFILE else (socket, "send_fds")
            patch.setattr(owner, name, never)
            with pytest.raises(CohortError, match="no more open files"):
                sandbox.decode_frames(tmp_path, b"ct")
        assert sandbox.pids == pids
        assert sandbox.decode_frames(tmp_path, b"ct").values.shape == (1, 64, 48)


def test_processes_are_limited_and_confined(decoders: DecodeSandbox) -> None:
    assert decoders.confined == {"files", "calls"}
    for pid in decoders.pids:
        limit = {
            name: resource.prlimit(pid, getattr(resource, f"RLIMIT_{name}"))
            for name in ("AS", "FSIZE", "NOFILE", "CORE")
        }
        assert limit["AS"][0] == limit["AS"][1] < 1024 * 2**20
        assert limit["FSIZE"] == (512 * 2**20, 512 * 2**20)
        assert limit["NOFILE"] == (4096, 4096)
        assert limit["CORE"] == (0, 0)
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
        status = dict(line.split(":", 1) for line in lines)
        assert status["NoNewPrivs"].strip() == "1"
        assert status["Seccomp"].strip() == "2"


def test_a_file_that_takes_too_much_processor_time_is_refused_and_the_next_decoded(tmp_path: Path) -> None:
    slow, quick = put(tmp_path, slow=slow_file(), quick=a_dicom(NOISE, **CT))

    with DecodeSandbox(cpu_s=0.01) as sandbox:
        before = sandbox.pids
        refused, decoded = sandbox.map([slow, quick], "frames")
        after = sandbox.pids

    assert reason_of(refused) == Reason.OVER_LIMIT
    assert isinstance(decoded, Frames)
    assert before != after


def test_a_file_larger_than_may_be_held_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(300 * 2**20)

    with DecodeSandbox() as sandbox, pytest.raises(UnusableImageError) as caught:
        sandbox.decode_frames(tmp_path, b"sparse")

    assert caught.value.reason in (Reason.TOO_LARGE, Reason.OVER_LIMIT)


def test_a_file_that_kills_its_process_is_refused_alone(tmp_path: Path) -> None:
    """The process is killed from outside while it decodes: as the kernel does when memory runs out."""
    slow, *others = put(tmp_path, slow=slow_file(), b=a_dicom(NOISE, **CT), c=a_dicom(NOISE, **CT))

    with DecodeSandbox(cpu_s=30) as sandbox:
        outcomes = sandbox.map(killed_once_busy(sandbox, [slow, *others]), "frames")
        reasons = [reason_of(each) for each in outcomes]

    assert reasons == [Reason.OVER_LIMIT, None, None]


def killed_once_busy(sandbox: DecodeSandbox, files: Sequence[SiteFile]) -> Iterator[SiteFile]:
    """The files; when the second is asked for, the process is at the first and is killed."""
    (pid,) = sandbox.pids
    start = processor_ticks(pid)
    for number, file in enumerate(files):
        if number == 1:
            while processor_ticks(pid) < start + 3:
                os.sched_yield()
            os.kill(pid, signal.SIGKILL)
        yield file


def processor_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]


def test_a_process_that_dies_idle_costs_no_file(tmp_path: Path) -> None:
    (file,) = put(tmp_path, ct=a_dicom(NOISE, **CT))

    with DecodeSandbox() as sandbox:
        (pid,) = sandbox.pids
        os.kill(pid, signal.SIGKILL)
        while state_of(pid) != "Z":
            os.sched_yield()
        frames = sandbox.decode_frames(file.root, file.name)

    assert frames.values.shape == (1, 64, 48)


def test_a_batch_loses_only_the_file_that_kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = put(tmp_path, **{f"f{number}": a_dicom(NOISE + np.uint16(number), **CT) for number in range(5)})
    nested = struct.pack("<HHLHHL", 0x0040, 0xA730, 0xFFFFFFFF, 0xFFFE, 0xE000, 0) * 300_000
    (tmp_path / "f2").write_bytes(encode(a_dataset(PixelData=None, **CT), "1.2.840.10008.1.2") + nested)

    with DecodeSandbox(cpu_s=0.2) as sandbox:
        outcomes = list(sandbox.map(files, "facts"))

    assert [reason_of(each) for each in outcomes[:2] + outcomes[3:]] == [None] * 4
    assert len(outcomes) == 5


def test_small_images_go_several_at_a_time_and_only_the_one_at_fault_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first attempt: one that takes all its time must not have it again to be found out."""
    started: list[tuple[int, float]] = []
    sizes: list[int] = []
    start, replies = DecoderProcess, outcomes_of

    def counted(*limits: Any) -> DecoderProcess:
        started.append(limits)
        return start(*limits)

    def seen(message: Any, num_files: int, *others: Any) -> list[Outcome]:
        sizes.append(num_files)
        return replies(message, num_files, *others)

    monkeypatch.setattr(module, "DecoderProcess", counted)
    monkeypatch.setattr(module, "outcomes_of", seen)
    good = {f"a{number:02}": a_dicom(NOISE + np.uint16(number), **CT) for number in range(40)}
    *quick, slow = put(tmp_path, **good, slow=slow_file())

    with DecodeSandbox(cpu_s=0.05) as sandbox:
        outcomes = list(sandbox.map([*quick[:32], slow, *quick[32:]], "frames"))

    assert [number for number, each in enumerate(outcomes) if not isinstance(each, Frames)] == [32]
    assert reason_of(outcomes.pop(32)) == Reason.OVER_LIMIT
    for number, outcome in enumerate(outcomes):
        assert isinstance(outcome, Frames)
        assert outcome.values[0, 0, 0] == 2.0 * (int(NOISE[0, 0]) + number) - 1000
    assert len(started) == 2
    assert max(sizes) > 4


def test_the_pace_follows_what_an_image_takes() -> None:
    pace = Pace("frames")
    slice_values = np.empty((512, 512), np.float32)
    sizes = []
    for outcomes, cpu_s in (
        ([slice_values], 0.001),
        ([slice_values] * 4, 0.0001),  # no more fit into one piece of memory
        ([np.empty((8, 8), np.float32)], 0.0001),
        ([slice_values], 0.5),
        ([UnusableImageError(Reason.EMPTY)] * 2, 0.0),
    ):
        pace.note(list(outcomes), cpu_s)
        sizes.append(pace.num_files)

    assert Pace("frames").num_files == 1
    assert sizes == [4, 4, 16, 1, 16]


@pytest.mark.parametrize("retiring", ["true", "false"])
def test_answers_that_come_with_the_end_of_their_process_are_read(
    retiring: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that makes way for a fresh one is gone when the next file is for it; nobody is to blame."""
    files = put(tmp_path, **{f"f{number}": a_dicom(NOISE, **CT) for number in range(2)})
    answer = '{"replies": [{"refused": "multi_frame", "kind": ""}], "retiring": %s, "cpu_s": 1.0}'
    impostor(monkeypatch, tmp_path, answer % retiring, num_answers=1)

    def once_ended(pid: int) -> Iterator[SiteFile]:
        yield files[0]
        while state_of(pid) != "Z":
            os.sched_yield()
        yield files[1]

    with DecodeSandbox() as sandbox:
        outcomes = list(sandbox.map(once_ended(sandbox.pids[0]), "frames"))

    assert [reason_of(each) for each in outcomes] == [Reason.MULTI_FRAME] * 2


def test_two_processes_that_fail_at_the_same_time_are_both_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first one's files are asked for again, the second is found out as well."""
    (file,) = put(tmp_path, ct=a_dicom(NOISE, **CT))
    impostor(monkeypatch, tmp_path, "not json")

    with DecodeSandbox(2) as sandbox:

        def both_answered() -> Iterator[SiteFile]:
            yield from [file] * 32
            while len(sandbox._selector.select()) < 2:
                os.sched_yield()

        outcomes = list(sandbox.map(both_answered(), "facts"))

    assert [reason_of(each) for each in outcomes] == [Reason.OVER_LIMIT] * 32


def test_files_of_a_folder_that_was_replaced_are_found(decoders: DecodeSandbox, tmp_path: Path) -> None:
    data = [a_dicom(NOISE + np.uint16(number), **CT) for number in range(3)]
    (tmp_path / "series").mkdir()
    put(tmp_path / "series", a=data[0])
    files = [SiteFile(tmp_path, b"series/a"), SiteFile(tmp_path, b"series/b")]

    def replaced() -> Iterator[SiteFile]:
        yield files[0]
        (tmp_path / "series").rename(tmp_path / "other")
        (tmp_path / "series").mkdir()
        put(tmp_path / "series", a=data[1], b=data[2])
        yield files[1]

    first = [each.values[0, 0, 0] for each in decoders.map(replaced(), "frames") if isinstance(each, Frames)]
    again = decoders.decode_frames(tmp_path, b"series/a").values[0, 0, 0]

    lowest = 2.0 * int(NOISE[0, 0]) - 1000
    assert first == [lowest, lowest + 4]
    assert again == lowest + 2


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    """No process, no open file, no shared memory: neither after use nor after a process was killed."""
    files = put(tmp_path, slow=slow_file(500), a=a_dicom(NOISE, **CT), b=b"nothing")

    def use() -> tuple[int, ...]:
        with DecodeSandbox(2, cpu_s=30) as sandbox:
            pids = sandbox.pids
            list(sandbox.map(files[1:], "frames"))
            partly = sandbox.map(files * 3, "frames")
            next(partly)
            os.kill(sandbox.pids[0], signal.SIGKILL)
            list(sandbox.map(files[1:], "image"))
            return pids + sandbox.pids

    process_wide.close()  # the one that earlier tests used ends by itself after a while
    use()
    gc.collect()
    before = open_files(), mapped_pixels(), children()
    pids = use()
    gc.collect()

    assert (open_files(), mapped_pixels(), children()) == before
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def open_files() -> list[str]:
    return sorted(str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink())[:-1]


def mapped_pixels() -> int:
    return Path("/proc/self/maps").read_text(encoding="utf-8").count("/memfd:pixels")


def children() -> str:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii")


def test_the_array_outlives_the_sandbox(tmp_path: Path) -> None:
    (file,) = put(tmp_path, ct=a_dicom(NOISE, **CT))
    with DecodeSandbox() as sandbox:
        values = sandbox.decode_frames(file.root, file.name).values

    np.testing.assert_array_equal(values[0], NOISE.astype(np.float32) * 2 - 1000)


def test_processes_that_do_not_start_are_said_so_and_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_files(), children()
    monkeypatch.setattr(sys, "executable", "/bin/false")

    with pytest.raises(CohortError, match="cannot be started"):
        DecodeSandbox(2)

    assert (open_files(), children()) == before


def test_a_program_that_is_not_there_is_an_error_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_files(), children()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")

    with pytest.raises(CohortError, match="decodes images cannot be started"):
        DecodeSandbox(2)

    assert (open_files(), children()) == before


@pytest.mark.parametrize("given", [{"workers": 0}, {"memory_bytes": 2**20}, {"cpu_s": 0}])
def test_impossible_limits_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needed"):
        DecodeSandbox(**given)


def test_a_closed_sandbox_says_so(tmp_path: Path) -> None:
    sandbox = DecodeSandbox()
    sandbox.close()

    with pytest.raises(CohortError, match="cannot be started"):
        sandbox.decode_frames(tmp_path, b"a")


# The wire: what a decoder process that was taken over might say.


def a_shared(values: NDArray[Any]) -> SharedArray:
    shared = SharedArray()
    shared.allocate(values.shape, values.dtype)[...] = values
    return shared


def taking(shared: SharedArray, *, lend: bool = False) -> Take:
    """The site's side of a piece of memory."""
    memories = Memories()
    number = memories.reserve()
    memories.renew(number, shared.file)
    return partial(memories.array, number, lend=lend)


def test_an_array_is_taken_only_when_its_memory_is_sealed_and_fits() -> None:
    shared = a_shared(np.arange(6, dtype=np.float32).reshape(2, 3))
    take = taking(shared)
    assert take([2, 3], "float32")[1, 2] == 5

    for shape, dtype in (
        ([PIECE_BYTES // 8, 3], "float32"),
        ([2, 3], "float64"),
        ([2, 3], "object"),
        ([6], "float32"),
        ([-2, -3], "float32"),
        ([2, 3, 1, 1, 1], "float32"),
        ([2**40, 3], "float32"),
    ):
        with pytest.raises(WireError):
            take(shape, dtype)
    for start in (-64, 8, 64.0, "0", 2**40, PIECE_BYTES):
        with pytest.raises(WireError):
            take([2, 3], "float32", start)
    shared.close()
    memories = Memories()
    with pytest.raises(WireError):  # nothing has come
        memories.array(memories.reserve(), [2, 3], "float32", lend=False)
    for unsealed in (os.memfd_create("pixels", os.MFD_ALLOW_SEALING), os.open("/dev/null", os.O_RDWR)):
        with pytest.raises(WireError):
            memories.renew(memories.reserve(), unsealed)
        os.close(unsealed)


def test_memory_is_used_again_only_when_no_view_of_it_is_left() -> None:
    shared = a_shared(np.zeros((2, 3), np.float32))
    memories = Memories()
    number = memories.reserve()
    memories.renew(number, shared.file)

    lent = memories.array(number, [2, 3], "float32", lend=True)
    memories.settle(number)
    a_part = lent[1:].T[1:]
    del lent
    gc.collect()
    others = {memories.reserve() for _ in range(MEMORIES - 1)}
    for other in others:
        memories.settle(other)
    shared.allocate((2, 3), np.dtype(np.float32))[1, 2] = 7

    assert number not in others
    assert a_part[1, 0] == 7  # it is the decoder's memory
    del a_part
    assert memories.reserve() == number
    shared.close()


def test_when_too_much_is_lent_arrays_are_copied() -> None:
    shared = a_shared(np.zeros((2, 3), np.float32))
    memories = Memories()
    held = []
    for _ in range(2 * MEMORIES):
        number = memories.reserve()
        memories.renew(number, shared.file)
        held.append(memories.array(number, [2, 3], "float32", lend=True))
        memories.settle(number)
    shared.allocate((2, 3), np.dtype(np.float32))[0, 0] = 7

    assert [each[0, 0] for each in held] == [7] * (MEMORIES - DEPTH) + [0] * (MEMORIES + DEPTH)
    shared.close()


def test_arrays_of_one_request_lie_side_by_side_and_are_lent_together() -> None:
    shared = SharedArray()
    starts = []
    for number in range(2):
        shared.allocate((2, 3), np.dtype(np.float32))[...] = -1
        shared.drop()  # a file that was refused leaves nothing
        shared.allocate((2, 3), np.dtype(np.float32))[...] = number
        starts.append(shared.keep())
    with pytest.raises(MemoryError):
        shared.allocate((PIECE_BYTES // 4,), np.dtype(np.float32))
    assert shared.is_full
    memories = Memories()
    number = memories.reserve()
    memories.renew(number, shared.file)

    first, second = (memories.array(number, [2, 3], "float32", start, lend=True) for start in starts)
    memories.settle(number)
    assert (first.max(), second.max()) == (0, 1)
    del first
    gc.collect()
    free = {memories.reserve() for _ in range(MEMORIES - 1)}
    assert number not in free
    del second
    assert memories.reserve() == number
    shared.release()
    assert not shared.is_full
    shared.close()


def test_memory_for_a_large_array_is_not_kept() -> None:
    """And what is kept makes room for it."""
    kept = a_shared(np.zeros((2, 3), np.float32))
    large = SharedArray(kept.close)
    large.allocate((5000, 5000), np.dtype(np.uint8))[...] = 1
    assert kept.file == -1
    take = taking(large, lend=True)
    large.release()
    assert large.file == -1

    values = take([5000, 5000], "uint8")

    assert values.min() == 1
    with pytest.raises(WireError):  # the decoder must say what memory it has instead
        take([5000, 5000], "uint8")


@pytest.mark.parametrize("lend", [False, True])
def test_lent_and_copied_images_are_the_same(decoders: DecodeSandbox, tmp_path: Path, lend: bool) -> None:
    """Of changing size, and held for as long as it pleases the reader."""
    sides = [64, 640, 64, 1800, 640, 64, 1900, 64, 64, 640, 64, 64]
    images = [
        np.random.default_rng(side + number).integers(0, 4096, (side, side), dtype=np.uint16)
        for number, side in enumerate(sides)
    ]
    files = put(tmp_path, **{f"f{number:02}": a_dicom(each, **CT) for number, each in enumerate(images)})

    outcomes = list(decoders.map(files, "frames", lend=lend))

    for image, outcome in zip(images, outcomes, strict=True):
        assert isinstance(outcome, Frames)
        np.testing.assert_array_equal(outcome.values[0], image.astype(np.float32) * 2 - 1000)
        assert outcome.values.flags.writeable


@pytest.mark.data
def test_one_image_after_the_other_takes_no_fresh_pages(tmp_path: Path, shared_data: Path) -> None:
    """Neither for its pixels, nor for the file and what decoders put beside it."""
    files = []
    for path in sorted((shared_data / "dicom-vendors/ct_philips_phantom").glob("*.dcm")):
        packed = dcmread(path)
        packed.compress(RLELossless, generate_instance_uid=False)
        files += put(tmp_path, **{path.stem: encode(packed, RLELossless)})
    mapped = mapped_pixels()

    with DecodeSandbox() as sandbox:
        (pid,) = sandbox.pids
        for _ in sandbox.map(files, "frames", lend=True):
            pass
        before = page_faults(pid)
        for _ in sandbox.map(files, "frames", lend=True):
            pass
        assert sandbox.pids == (pid,)
        assert page_faults(pid) - before < 100 * len(files)
        assert mapped_pixels() - mapped <= MEMORIES


def page_faults(pid: int) -> int:
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    return int(stat.rpartition(")")[2].split()[7])


def a_message() -> dict[str, Any]:
    message = frames_message(decode_frames(a_dicom(NOISE, **CT)))
    rebuilt: dict[str, Any] = json.loads(json.dumps(message))
    return rebuilt


def changed(path: Sequence[str | int], value: Any) -> dict[str, Any]:
    message: Any = a_message()
    place = message
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    found: dict[str, Any] = message
    return found


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["units"], 3),
        (["inverted"], "no"),
        (["spacing"], [1, 2, 3]),
        (["spacing"], "ab"),
        (["windows"], [[1, 2], [3, 4]]),
        (["windows"], 5),
        (["positions"], [[1, 2, 3], [1, 2, 3]]),
        (["positions"], [[1, 2], "AAAAAAAA8D8AAAAAAAAAQA=="]),
        (["positions"], [[1, 3], "AAAAAAAA8D8AAAAAAAAAQA=="]),
        (["positions"], [[1, 3], "no base 64"]),
        (["orientations"], [[1, 2], "AAAAAAAA8D8AAAAAAAAAQA=="]),
        (["stored_range"], []),
        (["stored_range"], None),
        (["stored_range"], [["a", "b"]]),
        (["voi_lut"], [1]),
        (["values"], [[1, 64, 48], "uint8"]),
        (["values"], None),
        (["extra"], 1),
        (["facts"], None),
        (["facts", "num_frames"], 2),
        (["facts", "num_frames"], 2**40),
        (["facts", "num_frames"], 0),
        (["facts", "rescales"], [[1]]),
        (["facts", "rescales"], []),
        (["facts", "windows"], [[["a", 2]]]),
        (["facts", "spacings"], [[1, 1], "AAAAAAAA8D8="]),
        (["facts", "dimension_indices"], "x"),
        (["facts", "frame_types"], 7),
        (["facts", "more"], 7),
    ],
)
def test_frames_that_make_no_sense_are_refused(path: list[str | int], value: Any) -> None:
    shared = a_shared(np.zeros((1, 64, 48), np.float32))

    take = taking(shared)
    assert frames_from(a_message(), take).values.shape == (1, 64, 48)
    with pytest.raises(WireError):
        frames_from(changed(path, value), take)
    shared.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\x05",
        struct.pack("<I", 2**31),
        struct.pack("<I", 5) + b"{",
        struct.pack("<I", 5) + b"{{{{{",
        struct.pack("<I", 1) + b"\xff",
        struct.pack("<I", 200_000) + b"[" * 200_000,
    ],
)
def test_what_is_no_message_is_refused(sent: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            theirs.sendall(sent)
        with pytest.raises(WireError):
            receive(ours)


def test_open_files_that_come_with_no_message_are_closed() -> None:
    ours, theirs = socket.socketpair()
    before = open_files()
    with ours, theirs:
        socket.send_fds(theirs, [struct.pack("<I", 3) + b"abc"], [0, 0])
        with pytest.raises(WireError):
            receive(ours)
        inside = open_files()
    assert len(inside) <= len(before)


def impostor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: str, num_answers: int = 1000) -> None:
    """Let the decoder process be a program that says it is ready and then gives one answer to all."""
    script = tmp_path / "impostor.py"
    script.write_text(
        "import socket, struct, sys, json\n"
        "channel = socket.socket(fileno=int(sys.argv[sys.argv.index('-m') + 2]))\n"
        "def say(text):\n"
        "    channel.sendall(struct.pack('<I', len(text)) + text)\n"
        "say(b'{\"confined\": []}')\n"
        f"for _ in range({num_answers}):\n"
        "    if not channel.recv(100000):\n"
        "        break\n"
        f"    say({answer!r}.encode())\n"
    )
    launcher = tmp_path / "launcher"
    launcher.write_text(f'#!/bin/sh\nexec {os.path.realpath("/proc/self/exe")} {script} "$@"\n')
    launcher.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(launcher))


@pytest.mark.parametrize(
    "answer",
    [
        "not json",
        "[]",
        '{"replies": [], "retiring": false, "cpu_s": 0.1}',
        '{"replies": [{}], "retiring": false, "cpu_s": 0.1}',
        '{"replies": [{"refused": "because", "kind": ""}], "retiring": false, "cpu_s": 0.1}',
        '{"replies": [{"frames": {}}], "retiring": false, "cpu_s": 0.1}',
        '{"replies": [{"image": [[2, 2], "float32"]}], "retiring": false, "cpu_s": 0.1}',
        '{"replies": [7], "retiring": false, "cpu_s": 0.1}',
        '{"replies": [{"refused": "empty", "kind": ""}], "retiring": false, "cpu_s": NaN}',
        '{"replies": [{"refused": "empty", "kind": ""}], "retiring": false, "cpu_s": -1.0}',
        '{"replies": [{"changed": true}, {"changed": true}], "retiring": false, "cpu_s": 0.1}',
    ],
)
def test_an_answer_that_makes_no_sense_costs_the_file(
    answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = put(tmp_path, ct=a_dicom(NOISE, **CT))
    impostor(monkeypatch, tmp_path, answer)

    with DecodeSandbox() as sandbox, pytest.raises(UnusableImageError) as caught:
        sandbox.decode_frames(file.root, file.name)

    assert caught.value.reason == Reason.OVER_LIMIT


def test_a_kind_that_is_no_name_of_the_dictionary_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = put(tmp_path, ct=a_dicom(NOISE, **CT))
    impostor(
        monkeypatch,
        tmp_path,
        '{"replies": [{"refused": "sop_class", "kind": "DOE^JOHN"}], "retiring": false, "cpu_s": 0.1}',
    )

    with DecodeSandbox() as sandbox, pytest.raises(UnusableImageError) as caught:
        sandbox.decode_frames(file.root, file.name)

    assert (caught.value.reason, caught.value.kind) == (Reason.SOP_CLASS, "")


def test_a_silent_process_is_given_up_and_its_image_goes_to_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = put(tmp_path, ct=a_dicom(NOISE, **CT))
    monkeypatch.setattr(module, "_WALL_S", 3.0)
    with DecodeSandbox() as sandbox:
        os.kill(sandbox.pids[0], signal.SIGSTOP)
        assert sandbox.decode_frames(file.root, file.name).values.shape == (1, 64, 48)


def test_an_image_over_which_every_process_is_silent_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Silent(DecoderProcess):
        def await_ready(self, answer_s: float) -> frozenset[str]:
            confined = super().await_ready(answer_s)
            os.kill(self.pid, signal.SIGSTOP)
            return confined

    (file,) = put(tmp_path, ct=a_dicom(NOISE, **CT))
    monkeypatch.setattr(module, "_WALL_S", 0.3)
    monkeypatch.setattr(module, "DecoderProcess", Silent)
    with DecodeSandbox() as sandbox, pytest.raises(UnusableImageError) as caught:
        sandbox.decode_frames(file.root, file.name)

    assert caught.value.reason == Reason.OVER_LIMIT


# The other side, run in a copy of this process so that it is measured as well.


def served(requests: list[tuple[dict[str, Any], list[Path]]], grown: Callable[[], bool]) -> list[Any]:
    """Let `_serve` answer requests in a forked process; return the answers without their pixels."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        code = 5
        try:
            ours.close()
            sandbox_worker._serve(theirs, sandbox_worker.Limits(512 * 2**20, 5.0), grown, bytearray(1))
            code = 4
        except WireError:
            code = 3
        finally:
            os._exit(code)
    theirs.close()
    answers = []
    with ours:
        for request, paths in requests:
            files = [os.open(path, os.O_RDONLY) for path in paths]
            send(ours, request, files)
            close_all(files)
            answer, pixels = receive(ours)
            close_all(pixels)
            answers.append((answer, len(pixels)))
    _, status = os.waitpid(pid, 0)
    answers.append((os.waitstatus_to_exitcode(status), 0))
    return answers


def test_serving_process_answers_each_kind_of_question(tmp_path: Path) -> None:
    put(tmp_path, cr=a_dicom(NOISE), ct=a_dicom(NOISE, **CT), large=b"", huge=a_dicom(NOISE, Rows=20000))
    with (tmp_path / "large").open("r+b") as file:
        file.truncate(257 * 2**20)

    def asked(what: str, *names: str, content: str | None = None) -> tuple[dict[str, Any], list[Path]]:
        request = {"what": what, "contents": [content] * len(names), "memory": 0, "pixels": None}
        return request, [tmp_path / name for name in names]

    answers = served(
        [
            asked("frames", "ct"),
            asked("image", "cr"),
            asked("stored", "ct"),
            asked("frames", "huge"),
            asked("frames", "ct", content="0"),
            asked("facts", "ct", "huge", "large"),
            asked("frames", "large"),
        ],
        lambda: False,
    )

    replies = [answer["replies"] for answer, _ in answers[:-1]]
    assert [num_files for _, num_files in answers] == [1, 0, 0, 0, 0, 0, 0, 0]  # memory, when it is new
    assert replies[0][0]["frames"]["units"] == "HU"
    assert replies[1][0]["image"] == [[64, 48], "float32", 0]
    assert replies[2][0]["image"] == [[1, 64, 48], "uint16", 0]
    assert replies[3][0] == {"refused": "dimensions", "kind": ""}
    assert replies[4][0] == {"changed": True}
    assert [len(reply["facts"]) for reply in replies[5]] == [4, 4, 4]
    assert replies[6][0] == {"refused": "too_large", "kind": ""}
    assert answers[-1] == (3, 0)  # the other side closed the channel


def test_serving_process_answers_for_as_many_images_as_there_is_room_for(tmp_path: Path) -> None:
    put(tmp_path, ct=a_dicom(np.zeros((512, 512), np.uint16), **CT))
    request = {"what": "frames", "contents": [None] * 6, "memory": 0, "pixels": None}

    answers = served([(request, [tmp_path / "ct"] * 6)], lambda: False)

    replies = answers[0][0]["replies"]
    assert [reply["frames"]["values"][2] for reply in replies] == [0, 2**20, 2 * 2**20, 3 * 2**20]


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32"])
def test_pixels_that_are_lent_to_a_decoder_are_the_same_there_and_cannot_be_written_to(dtype: str) -> None:
    pixels = np.arange(2 * 5 * 7 * 3).astype(dtype).reshape(2, 5, 7, 3)[:, ::-1]
    before = open_files()
    file = lend_file(pixels)
    there = borrowed(file, pixels.shape, dtype)
    os.close(file)
    assert np.array_equal(there, pixels)
    assert not there.flags.writeable
    del there
    assert open_files() == before


def test_a_decoder_without_memory_for_what_it_is_lent_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    file = lend_file(NOISE)
    monkeypatch.setattr("mmap.mmap", partial(_raise, OSError(errno.ENOMEM, "no memory")))
    with pytest.raises(MemoryError):
        borrowed(file, NOISE.shape, NOISE.dtype.name)
    os.close(file)


def test_no_memory_for_pixels_to_lend_ends_with_a_remedy_and_leaves_no_file_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = put(tmp_path, ct=a_dicom(NOISE, **CT))
    asked = dataclasses.replace(file, question="{}", pixels=NOISE)
    before = open_files()
    with DecodeSandbox(1) as sandbox:
        monkeypatch.setattr(os, "memfd_create", partial(_raise, OSError(errno.EMFILE, "too many")))
        with pytest.raises(CohortError, match="no more open files"):
            list(sandbox.map([asked], "copy"))
        assert str(tmp_path / "ct") not in open_files()
    assert open_files() == before


def _raise(error: Exception, *_: object, **__: object) -> None:
    raise error


def test_serving_process_that_has_grown_ends_after_its_answer(tmp_path: Path) -> None:
    put(tmp_path, ct=a_dicom(NOISE, **CT))

    answers = served(
        [({"what": "frames", "contents": [None], "memory": 0, "pixels": None}, [tmp_path / "ct"])],
        lambda: True,
    )

    assert answers[0][0]["retiring"] is True
    assert answers[1] == (4, 0)


def test_a_process_that_has_grown_is_replaced_without_blame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fragments of a large image stay: a fresh process takes over, and every file is answered."""
    files = put(tmp_path, **{f"f{number}": a_dicom(NOISE, **CT) for number in range(4)})
    impostor(
        monkeypatch,
        tmp_path,
        '{"replies": [{"refused": "multi_frame", "kind": ""}], "retiring": true, "cpu_s": 0.1}',
    )

    with DecodeSandbox() as sandbox:
        outcomes = list(sandbox.map(files, "frames"))

    assert [reason_of(each) for each in outcomes] == [Reason.MULTI_FRAME] * 4


def test_memory_that_is_not_to_be_had_is_a_memory_error() -> None:
    shared = SharedArray()
    with pytest.raises(MemoryError):
        shared.allocate((2**60,), np.dtype(np.float32))
    shared.close()
