"""The law of a spread engine's life: it is one. It answers as one process does, and if a part dies, it dies.

Slow: each process reads torch anew.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import PATIENCE, Server, Start
from tests.server.test_faults import LONG, read

pytestmark = pytest.mark.slow

ASK: Any = {"model": "tiny", "prompt": "def add", "temperature": 0, "max_tokens": 12, "ignore_eos": True}
SCRIPT = """
import sys
from shoal import LLM, SamplingParams
from shoal.engine import EngineSettings

llm = LLM(sys.argv[1], tensor_parallel=2, settings=EngineSettings(cache_bytes=1 << 24))
(done,) = llm.generate(["def add"], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
print(*done.completion.ids)
"""


def parts(server: Server) -> list[int]:
    """The processes that the engine's own has started."""
    engine = server.engine_pid()
    tasks = Path(f"/proc/{engine}/task").iterdir()
    pids = [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
    return [pid for pid in pids if b"parallel.ranks" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def say(server: Server) -> list[int]:
    answer = server.ask("POST", "/v1/completions", json={**ASK, "return_token_ids": True}).json()
    return answer["choices"][0]["token_ids"]


@pytest.mark.parametrize(
    "spread",
    [["--tensor-parallel-size", "2"], ["--data-parallel-size", "2", "--enable-expert-parallel"]],
    ids=["cut", "experts"],
)
def test_a_part_that_is_killed_is_the_death_of_the_engine_which_is_started_again(
    server: Server, launch: Start, spread: list[str]
) -> None:
    many = launch(*spread, "--max-sequences", "2")
    expected = say(server)
    assert say(many) == expected
    with httpx.stream(
        "POST", f"{many.url}/v1/completions", json={**LONG, "stream": True}, timeout=PATIENCE
    ) as stream:
        chunks = read(stream)
        next(chunks)
        (part,) = parts(many)
        os.kill(part, signal.SIGKILL)
        assert list(chunks)[-1]["error"]["code"] == "engine_died"
    many.wait_until(lambda: many.ask("GET", "/ready").status_code == 200)
    assert say(many) == expected and many.metric("engine_restarts_total") == 1
    (part,) = parts(many)
    assert many.stop() == 0
    many.wait_until(lambda: not Path(f"/proc/{part}").exists())


@pytest.mark.parametrize("start", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]])
def test_a_script_starts_its_own_or_is_started_by_torchrun(
    server: Server, checkpoint: Path, tmp_path: Path, start: list[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, *start, str(script), str(checkpoint)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=2 * PATIENCE,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [str(token) for token in say(server)]
