"""What a decode child may not do, enforced by the kernel: talk, write, or become another program.

Demuxers are chosen and `io_open` is refused before that, but decoders other than PyAV open a
video by their own probing. A seccomp filter (Linux, x86-64 and arm64) makes sockets, new
programs, and files opened for writing fail with EACCES, whatever a library tries.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _MODE_FILTER = 38, 22, 2
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06  # BPF: ld word, jeq, jset, ret
_NUMBER_AT, _ARCH_AT, _ARGUMENTS_AT = 0, 4, 16  # struct seccomp_data
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | 13, 0x80000000  # EACCES
_X32 = 0x40000000  # the same calls under other numbers
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# Architecture, then numbers of system calls: forbidden whole, and those that open a file by
# (number, place of the flags among the arguments).
_ARCHITECTURES: dict[str, tuple[int, tuple[int, ...], tuple[tuple[int, int], ...]]] = {
    # socket connect execve execveat ptrace creat openat2 rename renameat renameat2 link linkat
    # symlink symlinkat unlink unlinkat rmdir truncate mkdir mkdirat mknod mknodat
    "x86_64": (
        0xC000003E,
        (41, 42, 59, 322, 101, 85, 437, 82, 264, 316, 86, 265, 88, 266, 87, 263, 84, 76, 83, 258,
         133, 259),
        ((2, 1), (257, 2)),
    ),
    # socket connect execve execveat ptrace openat2 renameat renameat2 linkat symlinkat unlinkat
    # truncate mkdirat mknodat
    "aarch64": (
        0xC00000B7,
        (198, 203, 221, 281, 117, 437, 38, 276, 37, 36, 35, 45, 34, 33),
        ((56, 2),),
    ),
}  # fmt: skip


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def confine() -> bool:
    """Forbid this process, for good, sockets, new programs and changes to files.

    Returns:
        Whether the kernel does; it cannot on other systems than Linux.
    """
    known = _ARCHITECTURES.get(platform.machine())
    if sys.platform != "linux" or known is None:
        return False
    code = _program(*known)
    buffer = ctypes.create_string_buffer(code)
    program = _Program(len(code) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return bool(libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program), 0, 0) == 0)


def _program(
    architecture: int, forbidden: tuple[int, ...], opening: tuple[tuple[int, int], ...]
) -> bytes:
    """The filter as BPF: eight bytes an instruction (code, jump if true, if false, value)."""

    def step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("=HBBI", code, yes, no, value)

    lines = [
        step(_LOAD, _ARCH_AT),
        step(_EQUAL, architecture, yes=1),
        step(_RETURN, _KILL),
        step(_LOAD, _NUMBER_AT),
        step(_ANY_BIT, _X32, no=1),
        step(_RETURN, _REFUSE),
    ]
    for number in forbidden:
        lines += [step(_EQUAL, number, no=1), step(_RETURN, _REFUSE)]
    for number, place in opening:
        lines += [
            step(_EQUAL, number, no=4),
            step(_LOAD, _ARGUMENTS_AT + 8 * place),
            step(_ANY_BIT, _WRITES, no=1),
            step(_RETURN, _REFUSE),
            step(_RETURN, _ALLOW),
        ]
    return b"".join([*lines, step(_RETURN, _ALLOW)])
