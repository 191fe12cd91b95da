"""The inside of the sandbox: a script that shuts itself in, then runs a program it was given.

It is started by sandbox.py as a process of its own, `python -I -S jail.py LIMITS`, and imports the standard
library alone: what it runs is untrusted, so nothing of ours or of the user's is there to be found. It makes
new namespaces (no network, its own process numbers) and forbids writing outside its folder (Landlock), where
the kernel allows; it says on its report which of these hold. The law: when it ends, nothing that it started
lives. The supervisor is the one that waits; it kills by process group, by namespace, and whatever was left
to it as orphans.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import sys
import time

CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWIPC = 0x10000000, 0x20000000, 0x40000000, 0x08000000
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT, LANDLOCK_PATH = 444, 445, 446, 1  # x86-64 and arm64 alike
# Landlock's first version: write a file, remove a folder or file, make one of seven kinds.
LANDLOCK_WRITES = (1 << 1) | sum(1 << bit for bit in range(4, 13))
POLL_SECONDS = 0.005


def main() -> None:
    limits = json.loads(sys.argv[1])
    report = os.fdopen(limits["report"], "w")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans become ours, not init's
    held = []
    if _isolate(libc):
        held += ["network", "processes"]
    child = os.fork()
    if child == 0:
        report.close()
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        _run(libc, limits)
    # Asked of the supervisor, not of the child, whose words are not to be trusted.
    if libc.syscall(LANDLOCK_CREATE, None, 0, 1) > 0:
        held.append("files")
    status, seconds = _wait(child, limits["seconds"], limits["processes"])
    _kill_all(child)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    json.dump(
        {
            "status": status,
            "seconds": seconds,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "held": held,
        },
        report,
    )
    report.close()


def _isolate(libc: ctypes.CDLL) -> bool:
    """New namespaces for what is forked from here. False where the kernel, or its host, forbids them."""
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC) != 0:
        return False
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:  # noqa: PTH123 (no pathlib in here: it is slow to import)
            file.write(text)
    return True


def _run(libc: ctypes.CDLL, limits: dict) -> None:
    """The child: limits, then the program. Never returns."""
    os.setsid()
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _forbid_writes(libc, limits["folder"])
    resource.setrlimit(
        resource.RLIMIT_CPU, (limits["cpu_seconds"], limits["cpu_seconds"] + 1)
    )  # told, killed
    for what, limit in (
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_NPROC, limits["processes"]),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (limit, limit))
    command = [sys.executable, "-I", "-S", *limits["arguments"]]
    os.execve(command[0], command, {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": limits["folder"]})


def _forbid_writes(libc: ctypes.CDLL, folder: str) -> None:
    """From here on files are made and changed under `folder` alone. Nothing where there is no Landlock."""
    rules = struct.pack("Q", LANDLOCK_WRITES)
    ruleset = libc.syscall(LANDLOCK_CREATE, rules, len(rules), 0)
    if ruleset < 0:
        return
    for path in (folder, "/dev/null"):
        writes = LANDLOCK_WRITES if path == folder else 1 << 1
        beneath = struct.pack("=Qi", writes, os.open(path, os.O_PATH))
        libc.syscall(LANDLOCK_ADD, ruleset, LANDLOCK_PATH, beneath, 0)
    libc.syscall(LANDLOCK_RESTRICT, ruleset, 0)
    os.closerange(3, 256)


def _wait(child: int, seconds: float, processes: int) -> tuple[str, float]:
    """How the child ended, and after how long: "exit N", "signal N", "timeout" or "processes".

    Root is exempt from RLIMIT_NPROC, and often the one who trains; so processes are counted here too.
    """
    start = time.monotonic()
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        passed = time.monotonic() - start
        if pid:
            code = os.waitstatus_to_exitcode(status)
            return (f"exit {code}" if code >= 0 else f"signal {-code}"), passed
        if passed > seconds:
            return "timeout", passed
        if _count(child, processes) > processes:
            return "processes", passed
        time.sleep(POLL_SECONDS)


def _count(child: int, enough: int) -> int:
    """The child and what descends from it, counted until there are too many."""
    found, waiting = 1, [child]
    while waiting and found <= enough:
        below = children(waiting.pop())
        found += len(below)
        waiting += below
    return found


def children(pid: int) -> list[int]:
    """Living children and finished ones that nobody waited for, where the kernel tells (Linux)."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:  # noqa: PTH123
            return [int(child) for child in file.read().split()]
    except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
        return []


def _kill_all(child: int) -> None:
    """The child's group, then our children until there are none: orphans of what is killed become ours."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    while True:
        for pid in children(os.getpid()):
            os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


if __name__ == "__main__":
    main()
