"""Laws of the sandbox: whatever a program does, `run` returns and nothing of it is left.

Programs that end by themselves have CALM limits, because other work may hold the machine."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from pathlib import Path

import pytest

from shoal.stages import sandbox
from shoal.stages.sandbox import Limits, Verdict

pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="the sandbox stands on Linux")
CALM = Limits(seconds=60.0, cpu_seconds=20)
SHORT = Limits(seconds=1.0, cpu_seconds=1)


def run(source: str, limits: Limits = CALM) -> Verdict:
    return sandbox.run(source, limits=limits)


def alive(word: str) -> bool:
    """Whether any process has this word on its command line."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if word.encode() in (folder / "cmdline").read_bytes():
                return True
        except (FileNotFoundError, ProcessLookupError):
            continue
    return False


def test_a_program_runs_with_its_input_and_exit_code() -> None:
    assert sandbox.run("print(input())", stdin="读 this", limits=CALM).output == "读 this\n"
    assert run("raise SystemExit(3)").outcome == "failed"
    broken = run("1 / 0")
    assert broken.outcome == "failed"
    assert "ZeroDivisionError" in broken.errors


def test_time_is_up_whether_it_works_or_waits() -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(100)"
    for source in ("while True: pass", "import time; time.sleep(100)", deaf):
        assert run(source, SHORT).outcome == "timeout"


def test_memory_files_and_output_are_bounded() -> None:
    assert "MemoryError" in run("bytearray(10**9)").errors
    assert "File too large" in run("open('big', 'wb').write(bytes(1 << 26))").errors
    shouted = run("print('y' * 10**7)")
    assert shouted.outcome == "ok"
    assert len(shouted.output) == CALM.output_bytes


def test_a_fork_bomb_and_a_daemon_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert run(bomb, SHORT).outcome in ("killed", "timeout")
    word = f"word-{os.getpid()}-{time.monotonic_ns()}"
    daemon = (
        "import os, subprocess, sys\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        f"    subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', {word!r}])\n"
        "    os._exit(0)\n"
        "os.wait()\n"
    )
    assert run(daemon).outcome == "ok"
    assert not alive(word)
    run("open('left', 'w')")
    assert not list(tmp_path.iterdir())


def test_what_is_said_to_be_held_is_held(tmp_path: Path) -> None:
    held = run("pass").held
    if "network" in held:
        tried = "import socket\nsocket.create_connection(('127.0.0.1', 9), 1)"
        assert "unreachable" in run(tried).errors  # without a network there is not even loopback
    if "files" in held:
        assert "PermissionError" in run(f"open({str(tmp_path / 'evil')!r}, 'w')").errors
        assert not (tmp_path / "evil").exists()
    if "processes" in held:
        assert run(f"import os\nos.kill({os.getpid()}, 0)").outcome == "failed"  # we cannot be named there
    assert (
        run("import os; print(sorted(os.environ))").output.count("'") == 6
    )  # HOME, LANG, PATH: none of ours


def test_tests_are_passed_by_passing_them_only() -> None:
    tests = "assert double(2) == 4"
    for source, outcome in (
        ("def double(x): return 2 * x", "ok"),
        ("def double(x): return x", "failed"),
        ("import sys; sys.exit(0)", "failed"),
        ("import os; os._exit(0)", "failed"),
        ("def double(x):", "failed"),
    ):
        assert sandbox.run_tests(source, tests, limits=CALM).outcome == outcome


def test_it_runs_from_threads() -> None:
    outcomes: list[str] = []
    threads = [threading.Thread(target=lambda: outcomes.append(run("print(1)").outcome)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == ["ok"] * 3


def test_a_limit_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"seconds is 0; it must be above 0"):
        Limits(seconds=0)
