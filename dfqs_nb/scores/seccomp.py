"""The system calls that a sandboxed process may not make, as a filter that ``bwrap --seccomp`` installs.

The filter is a program of classic BPF (``seccomp(2)``): it looks at the number and the first argument of each
call, and lets everything through that is not listed here.
"""

from __future__ import annotations

import platform
import struct
from errno import EAFNOSUPPORT, ENOSYS, EPERM

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL, FAIL = 0x7FFF0000, 0x80000000, 0x00050000
NUMBER, ARCHITECTURE, ARGUMENT = 0, 4, 16  # offsets in `struct seccomp_data`
NEW_NAMESPACES = 0x7E020000  # CLONE_NEWNS, CGROUP, UTS, IPC, USER, PID and NET
FAMILIES = (1, 2, 10, 16)  # of sockets: UNIX, INET, INET6, NETLINK; not VSOCK, ALG, PACKET and the rest

# What is refused, for each reason: a call with Linux's numbers for x86_64 and aarch64 (from 424 on they are
# the same everywhere).
REFUSED = {
    "the caller's keyring": "add_key 248 217, request_key 249 218, keyctl 250 219",
    "namespaces": "unshare 272 97, setns 308 268",
    "mounts": "mount 165 40, umount2 166 39, pivot_root 155 41, open_tree 428 428, move_mount 429 429, "
    "fsopen 430 430, mount_setattr 442 442",
    "other processes' memory and files": "ptrace 101 117, process_vm_readv 310 270, "
    "process_vm_writev 311 271, kcmp 312 272, pidfd_getfd 438 438",
    "memory that outlives its process, and that no limit on processes counts": "shmget 29 194, "
    "semget 64 190, msgget 68 186, memfd_create 319 279, memfd_secret 447 447",
    "large parts of the kernel that no program under test needs": "io_uring_setup 425 425, "
    "io_uring_enter 426 426, io_uring_register 427 427, bpf 321 280, perf_event_open 298 241, "
    "userfaultfd 323 282, open_by_handle_at 304 265",
}
CALLS: dict[str, tuple[int, int]] = {
    name: (int(x86), int(arm))
    for calls in REFUSED.values()
    for name, x86, arm in (call.split() for call in calls.split(","))
}
CLONE, CLONE3, SOCKET = (56, 220), (435, 435), (41, 198)
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def program() -> bytes:
    """The filter for this machine; empty where its numbers are not known here."""
    if (machine := platform.machine()) not in MACHINES:
        return b""
    column, architecture = MACHINES[machine]

    def when(number: int, *then: bytes) -> list[bytes]:
        return [_step(EQUAL, number, 0, len(then)), *then]

    steps = [_step(LOAD, ARCHITECTURE), _step(EQUAL, architecture, 1, 0), _step(RETURN, KILL)]
    steps += [_step(LOAD, NUMBER), _step(AT_LEAST, 1 << 30, 0, 1), _step(RETURN, KILL)]  # x32's numbers
    for numbers in CALLS.values():
        steps += when(numbers[column], _step(RETURN, FAIL | EPERM))
    # clone3 hides its flags behind a pointer; libraries fall back to clone where there is none
    steps += when(CLONE3[column], _step(RETURN, FAIL | ENOSYS))
    new = [_step(LOAD, ARGUMENT), _step(ANY_BIT, NEW_NAMESPACES, 0, 1), _step(RETURN, FAIL | EPERM)]
    steps += when(CLONE[column], *new, _step(RETURN, ALLOW))
    known = [_step(EQUAL, family, len(FAMILIES) - i, 0) for i, family in enumerate(FAMILIES)]
    steps += when(SOCKET[column], _step(LOAD, ARGUMENT), *known, _step(RETURN, FAIL | EAFNOSUPPORT))
    return b"".join([*steps, _step(RETURN, ALLOW)])


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)
