"""What a decoder process can still do once it is confined: tried out in processes of their own."""

from __future__ import annotations

import json
import os
import platform
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from fedward_client.dicom import confinement

TRIED = {
    "socket.socket()": 1,
    "socket.socket(socket.AF_UNIX)": 1,
    "socket.socketpair()": 1,
    "socket.create_connection(('127.0.0.1', 9))": 1,
    "os.fork()": 1,
    "subprocess.run(['/bin/true'])": 1,
    "os.execv('/bin/true', ['true'])": 1,
    "os.kill(os.getppid(), 0)": 1,
    "open('/etc/passwd')": 13,
    "os.listdir('/etc')": 13,
    "open('/proc/self/environ')": 13,
    "open('new', 'w')": 13,
    "os.mkdir('new')": 13,
    "os.unlink('there')": 13,
    "open('there', 'a')": 13,
    "open('there').close()": "done",
    "open(os.__file__).close()": "done",
    "threading.Thread(target=int).start()": "done",
    "os.close(os.memfd_create('pixels'))": "done",
}
"""Statement -> EPERM (1, seccomp), EACCES (13, Landlock), or done."""

CONFINED = """
import json, os, socket, subprocess, sys, threading
from pathlib import Path
from fedward_client.dicom.confinement import confine
os.chdir(sys.argv[1])
assert confine([Path(sys.prefix), Path(sys.base_prefix), Path.cwd(), Path("/nowhere")]) == {"files", "calls"}
found = {}
for statement in json.loads(sys.argv[2]):
    try:
        exec(statement)
    except OSError as error:
        found[statement] = error.errno
    else:
        found[statement] = "done"
print(json.dumps(found))
"""


def test_confined_process_reads_its_program_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "there").touch()

    done = subprocess.run(
        [sys.executable, "-c", CONFINED, str(tmp_path), json.dumps(list(TRIED))],
        # coverage would want to write down what it saw
        env={name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == TRIED


def test_filter_is_complete_and_every_jump_ends_at_a_verdict() -> None:
    """Walk the program for each call: what it answers is what the table says."""
    for machine, denied in confinement._DENIED.items():
        program = confinement.filter_program(machine)
        arch = confinement._AUDIT_ARCH[machine]
        assert all(verdict(program, arch, number) == confinement._REFUSE for number in denied.values())
        assert verdict(program, arch, confinement._CLONE[machine], 0x11) == confinement._REFUSE
        assert verdict(program, arch, confinement._CLONE[machine], 0x3D0F00) == confinement._ALLOW
        assert verdict(program, arch, confinement._CLONE3) == confinement._UNKNOWN_CALL
        assert verdict(program, arch, 0) == confinement._ALLOW
        assert verdict(program, arch + 1, 0) == confinement._REFUSE
        assert verdict(program, arch, confinement._X32_BIT | 41) == confinement._REFUSE
        for number, (argument, values) in confinement._OWN_ONLY[machine].items():
            own = [os.getpid() if value == confinement._SELF else value for value in values]
            assert {with_argument(program, arch, number, argument, value) for value in own} == {ALLOW}
            assert with_argument(program, arch, number, argument, os.getppid()) == confinement._REFUSE
        for number, (argument, values) in confinement._NOT_WITH[machine].items():
            refused = {with_argument(program, arch, number, argument, value) for value in values}
            assert refused == {confinement._REFUSE}
            assert with_argument(program, arch, number, argument, 1) == ALLOW


ALLOW = confinement._ALLOW


def with_argument(program: bytes, arch: int, number: int, argument: int, value: int) -> int:
    return verdict(program, arch, number, *[0] * argument, value)


def verdict(program: bytes, arch: int, number: int, *arguments: int) -> int:
    """What a filter answers; a small interpreter of the four instructions that it uses."""
    lines = [struct.unpack_from("<HBBI", program, start) for start in range(0, len(program), 8)]
    given = {0: number, 4: arch, 16: 0} | {16 + 8 * place: each for place, each in enumerate(arguments)}
    loaded = place = 0
    while True:
        code, if_true, if_false, operand = lines[place]
        if code == confinement._RETURN:
            return int(operand)
        if code == confinement._LOAD:
            loaded = given[operand]
            place += 1
            continue
        holds = {
            confinement._IF_EQUAL: loaded == operand,
            confinement._IF_AT_LEAST: loaded >= operand,
            confinement._IF_ANY_BIT: bool(loaded & operand),
        }[code]
        place += 1 + (if_true if holds else if_false)


def test_a_machine_without_a_table_is_confined_in_files_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")

    assert confinement._restrict_calls() is False
