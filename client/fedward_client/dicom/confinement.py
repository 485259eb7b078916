"""Take from a decoder process what a decoder does not need, for good (hop 2).

After `confine` the process can read the program's own files and what was handed to it, and write
nothing; it has no network, starts no program and touches no other process, not by a signal, a limit or
a priority either. Landlock and seccomp need no privilege and work inside containers and under systemd's
RestrictNamespaces, where a network namespace of its own is not to be had. What only a superuser may do
goes too, or it could raise its own limits, which are `sandbox_worker.py`'s.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Iterable
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)

_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 4, 22, 38
_SECCOMP_MODE_FILTER = 2
_CAPABILITY_VERSION = 0x20080522
_CAP_DAC_READ_SEARCH = 2

_LANDLOCK_CREATE, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT = 444, 445, 446
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_FS_RIGHTS_OF_ABI = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # number of rights, lowest bits first
_NET_RIGHTS = 0b11  # TCP bind and connect, from ABI 4
_SCOPES = 0b11  # abstract sockets and signals, from ABI 6

# What an image has no use for. A system call that is not listed stays. By their last lines no mode, owner
# or time of a file is changed, which Landlock leaves to whoever owns it.
_DENIED: dict[str, dict[str, int]] = {
    "x86_64": {
        "socket": 41,
        "connect": 42,
        "bind": 49,
        "listen": 50,
        "accept": 43,
        "accept4": 288,
        "socketpair": 53,
        "execve": 59,
        "execveat": 322,
        "fork": 57,
        "vfork": 58,
        "kill": 62,
        "tkill": 200,
        "ptrace": 101,
        "process_vm_readv": 310,
        "process_vm_writev": 311,
        "pidfd_open": 434,
        "pidfd_send_signal": 424,
        "pidfd_getfd": 438,
        "io_uring_setup": 425,
        "bpf": 321,
        "userfaultfd": 323,
        "perf_event_open": 298,
        "open_by_handle_at": 304,
        "keyctl": 250,
        "add_key": 248,
        "request_key": 249,
        "mount": 165,
        "unshare": 272,
        "setns": 308,
        "rt_sigqueueinfo": 129,
        "rt_tgsigqueueinfo": 297,
        "setpriority": 141,
        "ioprio_set": 251,
        "sched_setparam": 142,
        "sched_setscheduler": 144,
        "sched_setaffinity": 203,
        "sched_setattr": 314,
        "kcmp": 312,
        "migrate_pages": 256,
        "move_pages": 279,
        "process_madvise": 440,
        "process_mrelease": 448,
        "memfd_secret": 447,
        "shmget": 29,
        "shmat": 30,
        "shmctl": 31,
        "semget": 64,
        "semop": 65,
        "semctl": 66,
        "semtimedop": 220,
        "msgget": 68,
        "msgsnd": 69,
        "msgrcv": 70,
        "msgctl": 71,
        "mq_open": 240,
        "mq_unlink": 241,
        "inotify_init": 253,
        "inotify_init1": 294,
        "fanotify_init": 300,
        "chmod": 90,
        "fchmod": 91,
        "fchmodat": 268,
        "fchmodat2": 452,
        "chown": 92,
        "fchown": 93,
        "lchown": 94,
        "fchownat": 260,
        "truncate": 76,
        "utime": 132,
        "utimes": 235,
        "futimesat": 261,
        "utimensat": 280,
        "setxattr": 188,
        "lsetxattr": 189,
        "fsetxattr": 190,
        "removexattr": 197,
        "lremovexattr": 198,
        "fremovexattr": 199,
        "setxattrat": 463,
        "removexattrat": 466,
        "file_setattr": 469,
    },
    "aarch64": {
        "socket": 198,
        "connect": 203,
        "bind": 200,
        "listen": 201,
        "accept": 202,
        "accept4": 242,
        "socketpair": 199,
        "execve": 221,
        "execveat": 281,
        "kill": 129,
        "tkill": 130,
        "ptrace": 117,
        "process_vm_readv": 270,
        "process_vm_writev": 271,
        "pidfd_open": 434,
        "pidfd_send_signal": 424,
        "pidfd_getfd": 438,
        "io_uring_setup": 425,
        "bpf": 280,
        "userfaultfd": 282,
        "perf_event_open": 241,
        "open_by_handle_at": 265,
        "keyctl": 219,
        "add_key": 217,
        "request_key": 218,
        "mount": 40,
        "unshare": 97,
        "setns": 268,
        "rt_sigqueueinfo": 138,
        "rt_tgsigqueueinfo": 240,
        "setpriority": 140,
        "ioprio_set": 30,
        "sched_setparam": 118,
        "sched_setscheduler": 119,
        "sched_setaffinity": 122,
        "sched_setattr": 274,
        "kcmp": 272,
        "migrate_pages": 238,
        "move_pages": 239,
        "process_madvise": 440,
        "process_mrelease": 448,
        "memfd_secret": 447,
        "shmget": 194,
        "shmat": 196,
        "shmctl": 195,
        "semget": 190,
        "semop": 193,
        "semctl": 191,
        "semtimedop": 192,
        "msgget": 186,
        "msgsnd": 189,
        "msgrcv": 188,
        "msgctl": 187,
        "mq_open": 180,
        "mq_unlink": 181,
        "inotify_init1": 26,
        "fanotify_init": 262,
        "fchmod": 52,
        "fchmodat": 53,
        "fchmodat2": 452,
        "fchown": 55,
        "fchownat": 54,
        "truncate": 45,
        "utimensat": 88,
        "setxattr": 5,
        "lsetxattr": 6,
        "fsetxattr": 7,
        "removexattr": 14,
        "lremovexattr": 15,
        "fremovexattr": 16,
        "setxattrat": 463,
        "removexattrat": 466,
        "file_setattr": 469,
    },
}
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT = 0x40000000  # the other numbering of system calls on x86_64

# Calls that the process needs for itself: which argument (from 0) has to be one of which values. Its own
# number is filled in when the filter is made.
_SELF = -1
_OWN_ONLY: dict[str, dict[int, tuple[int, tuple[int, ...]]]] = {
    "x86_64": {234: (0, (_SELF,)), 302: (0, (0, _SELF))},  # tgkill, prlimit64
    "aarch64": {131: (0, (_SELF,)), 261: (0, (0, _SELF))},
}
# And which argument may have none of which values: a file that signals another process, or types for it.
_SETOWN, _SETSIG, _SETOWN_EX = 8, 10, 15
_FIOSETOWN, _SIOCSPGRP, _TIOCSTI = 0x8901, 0x8902, 0x5412
_NOT_WITH: dict[str, dict[int, tuple[int, tuple[int, ...]]]] = {
    "x86_64": {72: (1, (_SETOWN, _SETSIG, _SETOWN_EX)), 16: (1, (_FIOSETOWN, _SIOCSPGRP, _TIOCSTI))},
    "aarch64": {25: (1, (_SETOWN, _SETSIG, _SETOWN_EX)), 29: (1, (_FIOSETOWN, _SIOCSPGRP, _TIOCSTI))},
}  # fcntl, ioctl

_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3 = 435
_CLONE_THREAD = 0x10000

_LOAD, _IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _REFUSE, _UNKNOWN_CALL = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38  # EPERM, ENOSYS
_NUMBER_OFFSET, _ARCH_OFFSET, _FIRST_ARGUMENT_OFFSET = 0, 4, 16


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def confine(readable: Iterable[Path]) -> frozenset[str]:
    """Confine this process and all its threads to come; call it while there is one thread.

    Args:
        readable: folders whose files may still be opened, for reading.

    Returns:
        what could be had: "files" (Landlock), "calls" (seccomp: network, programs, other processes).
    """
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)  # no core dump, no debugger: pixels are in here
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return frozenset()
    _drop_capabilities()
    done = {"files": _restrict_files(readable), "calls": _restrict_calls()}
    return frozenset(name for name, works in done.items() if works)


def _drop_capabilities() -> None:
    """Be nobody's superuser; without privilege there is nothing to drop.

    Reading on without regard to modes stays: the program may be another user's, and the ruleset decides.
    """
    header = struct.pack("<Ii", _CAPABILITY_VERSION, 0)
    for kept in (1 << _CAP_DAC_READ_SEARCH, 0):
        # effective, permitted and inheritable: the lower 32, then the upper
        if _libc.capset(header, struct.pack("<6I", kept, kept, 0, 0, 0, 0)) == 0:
            return


def _restrict_files(readable: Iterable[Path]) -> bool:
    abi = _libc.syscall(_LANDLOCK_CREATE, None, 0, 1)
    if abi < 1:
        return False
    rights = (1 << _FS_RIGHTS_OF_ABI[min(abi, 5)]) - 1
    attributes = struct.pack("<QQQ", rights, _NET_RIGHTS if abi >= 4 else 0, _SCOPES if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = _libc.syscall(_LANDLOCK_CREATE, attributes, size, 0)
    if ruleset < 0:
        return False
    try:
        for folder in readable:
            _permit(ruleset, folder)
        return bool(_libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0) == 0)
    finally:
        os.close(ruleset)


def _permit(ruleset: int, path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # not on this machine
        return
    try:
        rights = _READ_FILE | _READ_DIR if path.is_dir() else _READ_FILE
        _libc.syscall(_LANDLOCK_ADD_RULE, ruleset, 1, struct.pack("<Qi", rights, descriptor), 0)
    finally:
        os.close(descriptor)


def _restrict_calls() -> bool:
    machine = platform.machine()
    if machine not in _DENIED:
        return False
    program = filter_program(machine)
    loaded = _Program(len(program) // 8, program)
    return bool(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(loaded), 0, 0) == 0)


def filter_program(machine: str) -> bytes:
    """Assemble the filter: refuse the listed calls, new processes, and every call by another numbering.

    Source: linux/filter.h, linux/seccomp.h.
    """
    numbers = sorted(_DENIED[machine].values())
    special = _argument_lines(machine)
    refuse = 9 + len(numbers) + len(special)  # place of this line; jumps count from the line behind them
    lines = [
        (_LOAD, 0, 0, _ARCH_OFFSET),
        (_IF_EQUAL, 0, refuse - 2, _AUDIT_ARCH[machine]),
        (_LOAD, 0, 0, _NUMBER_OFFSET),
        (_IF_AT_LEAST, refuse - 4, 0, _X32_BIT),
        *((_IF_EQUAL, refuse - place - 1, 0, number) for place, number in enumerate(numbers, start=4)),
        *special,
        # A thread is made by the same call as a process. What the newer call is to make lies in memory,
        # where a filter cannot look; told that it does not exist, the C library takes the older one.
        (_IF_EQUAL, 5, 0, _CLONE3),
        (_IF_EQUAL, 0, 2, _CLONE[machine]),
        (_LOAD, 0, 0, _FIRST_ARGUMENT_OFFSET),
        (_IF_ANY_BIT, 0, 1, _CLONE_THREAD),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
        (_RETURN, 0, 0, _UNKNOWN_CALL),
    ]
    return b"".join(struct.pack("<HBBI", *line) for line in lines)


def _argument_lines(machine: str) -> list[tuple[int, int, int, int]]:
    """Lines for the calls that depend on one argument, of which 32 bits are what the kernel looks at."""
    lines: list[tuple[int, int, int, int]] = []
    for calls, listed, other in ((_OWN_ONLY, _ALLOW, _REFUSE), (_NOT_WITH, _REFUSE, _ALLOW)):
        for number, (argument, values) in calls[machine].items():
            lines += [
                (_IF_EQUAL, 0, len(values) + 3, number),
                (_LOAD, 0, 0, _FIRST_ARGUMENT_OFFSET + 8 * argument),
                *(
                    (_IF_EQUAL, len(values) - place, 0, os.getpid() if value == _SELF else value)
                    for place, value in enumerate(values)
                ),
                (_RETURN, 0, 0, other),
                (_RETURN, 0, 0, listed),
            ]
    return lines
