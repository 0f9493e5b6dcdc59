"""A process that shuts itself in, for good: what runs in it afterwards can compute, and read the standard library.

Linux only, and without any privilege: a seccomp filter lets through a short list of system calls, Landlock opens only
the folders of the standard library, to read, and hard limits hold processor time, memory and files. A process that is
root becomes nobody first. There is no way back, whatever the code does: the kernel keeps all three, and machine code
that goes around Python meets them as well.

Nothing here imports more than the standard library, since it runs with nothing else.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
import sysconfig
from collections.abc import Sequence

NOBODY = 65534

_X86_64 = (
    "read 0 write 1 close 3 stat 4 fstat 5 lstat 6 poll 7 lseek 8 mmap 9 mprotect 10 munmap 11 brk 12 rt_sigaction 13 "
    "rt_sigprocmask 14 rt_sigreturn 15 pread64 17 readv 19 writev 20 access 21 select 23 sched_yield 24 mremap 25 "
    "madvise 28 dup 32 dup2 33 nanosleep 35 getitimer 36 getpid 39 exit 60 uname 63 getdents 78 getcwd 79 readlink 89 "
    "gettimeofday 96 getrlimit 97 getrusage 98 sysinfo 99 times 100 getuid 102 getgid 104 geteuid 107 getegid 108 "
    "getppid 110 sigaltstack 131 arch_prctl 158 gettid 186 time 201 futex 202 sched_getaffinity 204 getdents64 217 "
    "set_tid_address 218 clock_gettime 228 clock_getres 229 clock_nanosleep 230 exit_group 231 newfstatat 262 "
    "readlinkat 267 faccessat 269 pselect6 270 ppoll 271 set_robust_list 273 dup3 292 getrandom 318 statx 332 rseq 334 "
    "faccessat2 439"
)
_AARCH64 = (
    "getcwd 17 dup 23 dup3 24 faccessat 48 close 57 getdents64 61 lseek 62 read 63 write 64 readv 65 writev 66 "
    "pread64 67 pselect6 72 ppoll 73 readlinkat 78 newfstatat 79 fstat 80 exit 93 exit_group 94 set_tid_address 96 "
    "futex 98 set_robust_list 99 nanosleep 101 getitimer 102 clock_gettime 113 clock_getres 114 clock_nanosleep 115 "
    "sched_getaffinity 123 sched_yield 124 sigaltstack 132 rt_sigaction 134 rt_sigprocmask 135 rt_sigreturn 139 "
    "times 153 uname 160 getrlimit 163 getrusage 165 gettimeofday 169 getpid 172 getppid 173 getuid 174 geteuid 175 "
    "getgid 176 getegid 177 gettid 178 sysinfo 179 brk 214 munmap 215 mremap 216 mmap 222 mprotect 226 madvise 233 "
    "getrandom 278 statx 291 rseq 293 faccessat2 439"
)
# machine -> (the kernel's number of the architecture, calls let through, calls that open with the place of their
# flags, number of fcntl)
_MACHINES = {
    "x86_64": (0xC000003E, _X86_64, {2: 1, 257: 2}, 72),
    "aarch64": (0xC00000B7, _AARCH64, {56: 2}, 25),
}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_HARMLESS_FCNTL = (1, 2, 3, 1030)  # F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC; F_SETOWN would send signals to others

_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050001, 0x80000000  # refused: EPERM, so that Python says so and goes on
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16

_PR_SET_PDEATHSIG, _PR_SET_KEEPCAPS, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 8, 22, 38
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_READ_FILE, _READ_FOLDER = 1 << 2, 1 << 3
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # of Landlock by its version; 16 since version 5


class CannotShutIn(Exception):
    """This system lacks what a process is shut in with; the message says what."""


def limit(seconds: int, memory: int) -> None:
    """Hard limits: processor time in seconds, address space in bytes, no file that grows, no core dump."""
    import resource

    wanted = {"CPU": seconds, "AS": memory, "FSIZE": 0, "CORE": 0, "NOFILE": 64}
    for name, value in wanted.items():
        what = getattr(resource, f"RLIMIT_{name}", None)
        if what is None:
            continue
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(what, (value, value))
        except (ValueError, OSError):  # a Mac refuses a limit of the address space
            if sys.platform == "linux":
                raise


def end_with_parent() -> None:
    """Have the kernel end this process with the one that started it, where it is Linux's."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(*map(ctypes.c_long, (_PR_SET_PDEATHSIG, 9, 0, 0, 0)))


def shut_in(seconds: int, memory: int, readable: Sequence[str] = ()) -> None:
    """From here on this process computes, reads the standard library and its open pipes, and nothing else; or what
    lies in the folders ``readable`` besides.

    Raises:
        CannotShutIn: not Linux on x86-64 or ARM64, no seccomp, no Landlock (kernel 5.13), or it has other threads,
            which none of this would hold.
    """
    if sys.platform != "linux" or platform.machine() not in _MACHINES or sys.byteorder != "little":
        raise CannotShutIn(f"it takes Linux on x86-64 or ARM64, and this is {sys.platform} on {platform.machine()}")
    if len(os.listdir("/proc/self/task")) > 1:
        raise CannotShutIn("it has other threads")
    libc = ctypes.CDLL(None, use_errno=True)
    os.chdir("/")
    limit(seconds, memory)
    if os.geteuid() == 0:
        _become_nobody(libc)
    _call(libc.prctl, "no_new_privs", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call(libc.prctl, "a signal when the parent dies", _PR_SET_PDEATHSIG, 9, 0, 0, 0)
    _only_the_library(libc, readable)
    _filter_calls(libc)


def _call(function: object, what: str, *arguments: object) -> int:
    given = function(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))  # type: ignore[operator]
    if given < 0:
        raise CannotShutIn(f"{what}: {os.strerror(ctypes.get_errno())}")
    return given


def _become_nobody(libc: ctypes.CDLL) -> None:
    """Only the right to look into any folder is kept, since root's Python often lies where nobody may not look;
    Landlock then says which folders."""
    _call(libc.prctl, "keeping a capability", _PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    look = 1 << 2  # CAP_DAC_READ_SEARCH
    header, wanted = struct.pack("=Ii", 0x20080522, 0), struct.pack("=6I", look, look, 0, 0, 0, 0)
    _call(libc.capset, "dropping capabilities", header, wanted)


def library() -> list[str]:
    """Folders and files that Python needs to import the standard library; those that exist, links resolved."""
    paths = sysconfig.get_paths()
    wanted = [paths["stdlib"], paths["platstdlib"], os.path.join(sys.base_prefix, "lib")]
    wanted += ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache", "/usr/share/zoneinfo"]
    return sorted({os.path.realpath(p) for p in wanted if os.path.exists(p)})


def _only_the_library(libc: ctypes.CDLL, more: Sequence[str]) -> None:
    version = _call(libc.syscall, "Landlock is not there", _CREATE_RULESET, None, 0, 1)
    handled = (1 << _FILE_RIGHTS.get(version, 16)) - 1
    rules = _call(libc.syscall, "Landlock", _CREATE_RULESET, struct.pack("=Q", handled), 8, 0)
    for path in [*library(), *map(os.path.realpath, more)]:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        allowed = _READ_FILE | _READ_FOLDER if os.path.isdir(path) else _READ_FILE
        _call(libc.syscall, f"Landlock on {path}", _ADD_RULE, rules, 1, struct.pack("=Qi", allowed, place), 0)
        os.close(place)
    _call(libc.syscall, "Landlock", _RESTRICT_SELF, rules, 0)
    os.close(rules)


def _filter_calls(libc: ctypes.CDLL) -> None:
    architecture, allowed, opening, fcntl = _MACHINES[platform.machine()]
    steps = [(_LOAD, 0, 0, _ARCHITECTURE_AT), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL)]
    steps.append((_LOAD, 0, 0, _NUMBER_AT))
    for number in map(int, allowed.split()[1::2]):
        steps += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    for number, place in opening.items():
        steps += [(_EQUAL, 0, 4, number), (_LOAD, 0, 0, _ARGUMENTS_AT + 8 * place)]
        steps += [(_ANY_BIT, 0, 1, _WRITING), (_RETURN, 0, 0, _REFUSE), (_RETURN, 0, 0, _ALLOW)]
    steps += [(_EQUAL, 0, 1 + 2 * len(_HARMLESS_FCNTL), fcntl), (_LOAD, 0, 0, _ARGUMENTS_AT + 8)]
    for command in _HARMLESS_FCNTL:
        steps += [(_EQUAL, 0, 1, command), (_RETURN, 0, 0, _ALLOW)]
    steps.append((_RETURN, 0, 0, _REFUSE))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *s) for s in steps))
    program = struct.pack("@HP", len(steps), ctypes.addressof(code))
    _call(libc.prctl, "seccomp", _PR_SET_SECCOMP, 2, program, 0, 0)
