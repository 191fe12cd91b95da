"""`shoal serve` on one GPU: what HTTP takes from the engine, and how long a start takes.

    python -m benchmarks.server [--model deepseek-v2-lite] [--streams 128] [--folder DIR] [--only start]

A checkpoint of random weights is written once, as local safetensors. The server is started on it by its
command, first with every cache of kernels, plans and the driver empty, then again with what the first start
left, each until /ready answers 200; the marks in its log say where the time went. The second server is then
loaded by a process of its own (streams.py), and the same requests go through the same engine without a server
(`offline`), in a process of its own too.

Seconds of CPU are those of each process by /proc, so they hold on a machine that others use, where the ratio
of two clocks does not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import string
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.streams import Load, Told

MAIN = "import sys; sys.argv[0] = 'shoal'; from shoal.cli import main; main()"
CACHES = ("SHOAL_CACHE", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME", "CUDA_CACHE_PATH")
WANTED_RATIO, WANTED_SECONDS = 0.95, {"empty caches": 60.0, "warm": 20.0}
MARKS = (  # what the log says when a phase begins
    ("interpreter, imports", ""),
    ("weights", "opening"),
    ("engine", r"loading (\d+)/\1$"),
    ("kernels", "compiling kernels"),
    ("trying", "trying kernels"),
    ("graphs", "recording graphs"),
    ("first answer", "answering once"),
)
TICK = os.sysconf("SC_CLK_TCK")


def make_checkpoint(model: str, folder: Path, device: str) -> None:
    """Random weights in a family's shape, and a tokenizer with a spelling for every id."""
    import torch

    from shoal.checkpoint import hf
    from shoal.config.families import family, tiny
    from shoal.model.transformer import Transformer

    name = model.removeprefix("tiny-")
    config = family(name).config if name == model else tiny(name)
    config = replace(config, num_nextn_predict_layers=0, bos_token_id=0, eos_token_id=1)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    made = Transformer(config, device="meta", dtype=dtype)
    made.allocate(device)
    made.init_weights(torch.Generator(device).manual_seed(0))
    with tempfile.TemporaryDirectory() as beside:
        make_tokenizer(config.vocab_size, Path(beside))
        hf.save(made, folder, tokenizer_files=sorted(Path(beside).iterdir()))


def make_tokenizer(size: int, folder: Path) -> None:
    """Bytes, and made-up words of two letters and more: as many tokens and merges as a published one has."""
    from shoal.data.text import Tokenizer
    from shoal.data.tokenizer import SMALLEST, train_tokenizer

    made = train_tokenizer(["a"], SMALLEST)
    definition = json.loads(made.definition)
    vocabulary, merges = definition["model"]["vocab"], definition["model"]["merges"]
    for length in range(2, 5):
        for letters in product(string.ascii_lowercase, repeat=length):
            if len(vocabulary) == size:
                break
            word = "".join(letters)
            merges.append([word[:-1], word[-1]])
            vocabulary[word] = len(vocabulary)
    text = json.dumps(definition, ensure_ascii=False)
    Tokenizer(text, made.bos_token, made.eos_token, made.pad_token, made.chat_template, True).save(folder)


class Server:
    """`shoal serve`, started and heard; `lines` are what it said, and when after its start."""

    def __init__(self, folder: Path, caches: Path, options: list[str]) -> None:
        command = [sys.executable, "-c", MAIN, "serve", str(folder), "--port", "0", *options]
        homes = {name: str(caches / name.lower()) for name in CACHES}
        self.start = time.perf_counter()
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, **homes}
        )
        self.lines: list[tuple[float, str]] = []
        threading.Thread(target=self._hear, daemon=True).start()
        self.url = ""
        while not self._is_ready():
            if self.process.poll() is not None:
                said = "\n".join(line for _, line in self.lines[-20:])
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{said}")
            time.sleep(0.02)
        self.seconds = time.perf_counter() - self.start

    def _hear(self) -> None:
        for line in self.process.stderr or ():
            self.lines.append((time.perf_counter() - self.start, line.rstrip()))

    def _is_ready(self) -> bool:
        if not self.url:
            said = [match[1] for _, line in self.lines if (match := re.search(r"(http://\S+)$", line))]
            self.url = said[0] if said else ""
        if not self.url:
            return False
        try:
            with urllib.request.urlopen(f"{self.url}/ready") as answer:
                return answer.status == 200
        except (urllib.error.HTTPError, urllib.error.URLError):
            return False

    def phases(self) -> dict[str, float]:
        """Seconds between the marks of the log."""
        begun = {MARKS[0][0]: 0.0}
        for name, pattern in MARKS[1:]:
            at = [when for when, line in self.lines if re.search(pattern, line)]
            if at:
                begun[name] = at[-1]
        ends = [*list(begun.values())[1:], self.seconds]
        return {name: end - start for (name, start), end in zip(begun.items(), ends, strict=True)}

    def cpu(self) -> tuple[float, float]:
        """Seconds so far of the process that speaks HTTP, and of the engine's."""
        (forks,) = (
            child
            for child in children(self.process.pid)
            if b"forkserver" in Path(f"/proc/{child}/cmdline").read_bytes()
        )
        (engine,) = children(forks)
        return cpu_seconds(self.process.pid), cpu_seconds(engine)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()


def children(pid: int) -> list[int]:
    """Of all threads of a process."""
    lists = (task / "children" for task in Path(f"/proc/{pid}/task").iterdir())
    return [int(child) for found in lists if found.exists() for child in found.read_text().split()]


def cpu_seconds(pid: int | str) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


@contextlib.contextmanager
def serving(folder: Path, caches: Path, options: list[str]) -> Iterator[Server]:
    server = Server(folder, caches, options)
    try:
        yield server
    finally:
        server.stop()


@dataclass(frozen=True)
class Row:
    what: str
    tokens_per_second: float
    seconds: float
    first_ms: float | None
    engine_us: float  # of CPU, a token
    http_us: float | None


def load_server(server: Server, load: Load) -> Row:
    command = [sys.executable, "-m", "benchmarks.streams", server.url]
    command += [word for name, value in asdict(load).items() for word in (f"--{name}", str(value))]
    before = server.cpu()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    http, engine = (1e6 * (after - earlier) for after, earlier in zip(server.cpu(), before, strict=True))
    told = Told(**json.loads(done.stdout))
    if told.generated != load.streams * load.tokens:
        raise RuntimeError(f"{told.generated} tokens came, of {load.streams * load.tokens}")
    row = Row("server", told.rate, told.seconds, told.first_ms, engine / told.generated, None)
    return replace(row, http_us=http / told.generated)


def run_offline(folder: Path, loads: list[Load], settings: dict[str, Any], device: str) -> list[Row]:
    """The same requests through an engine of the same settings, and nothing else."""
    from shoal.cli.serve import Opening
    from shoal.engine import Engine, EngineSettings, SamplingParams

    engine = Opening(folder, EngineSettings(**settings), device)(lambda what, done, total: None)
    assert isinstance(engine, Engine)
    engine.warm_up()
    rows = []
    for load in loads:
        params = SamplingParams(temperature=0, max_tokens=load.tokens, ignore_eos=True)
        cpu, start, generated = time.process_time(), time.perf_counter(), 0
        for ids in load.prompts():
            engine.add(ids, params)
        while engine.busy:
            generated += sum(event.token is not None for event in engine.step())
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        rows.append(Row("offline", generated / seconds, seconds, None, 1e6 * cpu / generated, None))
    return rows


def table(rows: list[Row]) -> str:
    lines = ["| | tokens/s | s | first token ms | engine, CPU us a token | HTTP, CPU us a token |"]
    lines.append("|---" * 6 + "|")
    for row in rows:
        first = "" if row.first_ms is None else f"{row.first_ms:.0f}"
        http = "" if row.http_us is None else f"{row.http_us:.1f}"
        cells = f"{row.tokens_per_second:,.0f} | {row.seconds:.2f} | {first} | {row.engine_us:.1f} | {http}"
        lines.append(f"| {row.what} | {cells} |")
    return "\n".join(lines)


def starts_table(starts: dict[str, tuple[float, dict[str, float]]]) -> str:
    names = [name for name, _ in MARKS if any(name in phases for _, phases in starts.values())]
    lines = ["| start | s to /ready | wanted | " + " | ".join(names) + " |"]
    lines.append("|---" * (3 + len(names)) + "|")
    for what, (seconds, phases) in starts.items():
        cells = " | ".join(f"{phases[name]:.1f}" if name in phases else "" for name in names)
        lines.append(f"| {what} | {seconds:.1f} | {WANTED_SECONDS[what]:.0f} | {cells} |")
    return "\n".join(lines)


def best(rows: list[Row]) -> Row:
    return max(rows, key=lambda row: row.tokens_per_second)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.server", description=__doc__)
    parser.add_argument("--model", default="deepseek-v2-lite", help="a family; tiny-FAMILY is its tiny twin")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is, or is to be kept")
    parser.add_argument("--only", choices=["start", "overhead"], help="one half; overhead starts once, warm")
    parser.add_argument("--streams", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=2, help="of the load, of which the best counts")
    parser.add_argument("--max-batch-tokens", type=int, default=8192)
    parser.add_argument("--cache-gib", type=float, help="of both engines; default: what the device leaves")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--write", action="store_true", help="the checkpoint into --folder, and no more")
    parser.add_argument("--offline", metavar="JSON", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="Markdown file to append to, with a .jsonl beside it")
    given = parser.parse_args()
    if given.write:
        if given.folder is None:
            raise SystemExit("--write needs --folder")
        make_checkpoint(given.model, given.folder, given.device)
        return
    if given.offline:
        told = json.loads(given.offline)
        loads = [Load(**load) for load in told["loads"]]
        rows = run_offline(given.folder, loads, told["settings"], given.device)
        print(json.dumps([asdict(row) for row in rows]))
        return
    with tempfile.TemporaryDirectory() as scratch:
        measure(given, Path(scratch))


def measure(given: argparse.Namespace, scratch: Path) -> None:
    begun = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - begun:6.1f} s] {text}", flush=True)

    folder = given.folder or scratch / "model"
    if not (folder / "config.json").exists():
        # Not in here: who has used the device keeps some of its memory.
        command = [sys.executable, "-m", "benchmarks.server", "--write", "--folder", str(folder)]
        command += ["--model", given.model, "--device", given.device]
        subprocess.run(command, check=True)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    say(f"{given.model}: {size / 2**30:.1f} GiB of safetensors")
    settings: dict[str, Any] = {"max_sequences": given.streams, "max_batch_tokens": given.max_batch_tokens}
    options = ["--max-sequences", str(given.streams), "--max-batch-tokens", str(given.max_batch_tokens)]
    options += ["--device", given.device, "--log-level", "warning"]
    if given.cache_gib:
        settings["cache_bytes"] = int(given.cache_gib * 2**30)
        options += ["--cache-gib", str(given.cache_gib)]
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    shape = Load(given.streams, given.prompt, given.tokens, vocabulary)
    loads = [replace(shape, tokens=min(16, given.tokens), seed=1000)]
    loads += [replace(shape, seed=seed) for seed in range(given.rounds)]
    starts: dict[str, tuple[float, dict[str, float]]] = {}
    rows: list[Row] = []
    if given.only != "overhead":
        with serving(folder, scratch, options) as server:
            starts["empty caches"] = server.seconds, server.phases()
        say(starts_table(starts).splitlines()[-1])
    with serving(folder, scratch, options) as server:
        starts["warm"] = server.seconds, server.phases()
        say(starts_table(starts).splitlines()[-1])
        if given.only != "start":
            rows.append(best([load_server(server, load) for load in loads][1:]))
            say(table(rows).splitlines()[-1])
    if rows:
        told = json.dumps({"settings": settings, "loads": [asdict(load) for load in loads]})
        command = [sys.executable, "-m", "benchmarks.server", "--folder", str(folder), "--offline", told]
        command += ["--device", given.device]
        caches = {name: str(scratch / name.lower()) for name in CACHES}
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **caches}
        )
        rows.append(best([Row(**row) for row in json.loads(done.stdout)][1:]))
    tell(given, starts, rows)


def tell(given: argparse.Namespace, starts: dict[str, Any], rows: list[Row]) -> None:
    import torch

    device = torch.cuda.get_device_name() if given.device == "cuda" else "CPU"
    text = f"{given.model}, {device}, torch {torch.__version__}\n"
    if given.only != "overhead":
        text += f"\n{starts_table(starts)}\n"
    if rows:
        ratio = rows[0].tokens_per_second / rows[1].tokens_per_second
        text += f"\n{table(rows)}\n\nThrough the server {ratio:.1%} of offline ({WANTED_RATIO:.0%} wanted).\n"
    print(f"\n{text}")
    if given.out:
        title, _, tables = text.partition("\n")
        found = {"starts": starts, "rows": [asdict(row) for row in rows]}
        report.append(given.out, "server", device, title, tables.strip("\n"), [found])


if __name__ == "__main__":
    main()
