"""Who should run the data steps on many machines: the same job by each engine at hand, on this one.

`python -m benchmarks.cluster FILES... --size MB [--workers 2] [--rounds 3] [--kill SECONDS]`, with the extra
`cluster` and `ray[data]` installed. Cleaning, then copies by document, of a corpus in twice as many files as
workers (benchmarks/data.py makes it). Each way is a process of its own, started anew, in turns, Ray's node
one for all; seconds are of the whole and, of them, those until the process had its engine; memory is the
proportional share (PSS) of all its processes, a node's too, at its highest. `--kill` ends one worker that
long after, by SIGKILL, and says what came of it.

    here              stages and workers of shoal.data.jobs
    datatrove local   the same tasks, by its executor of processes
    datatrove Ray     the same tasks, by its executor on Ray
    Ray Data          the steps said in its own words (`by_ray_data`); its files are not the local ones
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.data import make_corpus
from shoal.data import steps
from shoal.data.clean import CleanRules, judge
from shoal.data.cluster import Cluster, submit
from shoal.data.dedup import join
from shoal.data.jobs import Job, quiet, run_here
from shoal.data.minhash import DOCUMENTS, sign
from shoal.data.parts import DOCUMENTS_FILES, REPORT_FILE
from shoal.data.read import Document, read_documents

CLEAN, SINGLE = "clean", "single"


def jobs(files: list[str], out: Path, run: Callable[[Job], object]) -> None:
    """Both steps; a part is a file."""
    run(steps.clean(files, out / CLEAN, CleanRules(), part_bytes=1))
    run(steps.dedup([out / CLEAN / DOCUMENTS_FILES], out / SINGLE, level="document", part_bytes=1))


def here(files: list[str], out: Path, workers: int) -> None:
    up()
    jobs(files, out, lambda job: run_here(job, workers=workers, progress=quiet))


def datatrove_local(files: list[str], out: Path, workers: int) -> None:
    up()
    jobs(files, out, lambda job: submit(job, Cluster("local", {"workers": workers})))


def datatrove_ray(files: list[str], out: Path, workers: int) -> None:
    join_ray()
    jobs(files, out, lambda job: submit(job, Cluster("ray", {"workers": workers})))


# Ray Data's own way: begins here, and what it needs of ours is the judgement of a text.


def by_ray_data(files: list[str], out: Path, workers: int) -> None:
    join_ray()
    import ray.data  # pyright: ignore[reportMissingImports]

    def read(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for number, document in enumerate(read_documents([row["file"]])):
            yield {"id": row["number"] << 32 | number, "text": document.text}

    def keep(batch: dict[str, Any]) -> dict[str, Any]:
        documents = [Document(text, "") for text in batch["text"]]
        kept = np.array([verdict.keep for verdict in judge(documents, CleanRules())], bool)
        return {name: column[kept] for name, column in batch.items()}

    def signed(batch: dict[str, Any]) -> dict[str, Any]:
        signs = sign(list(batch["text"]), DOCUMENTS)
        keys = np.concatenate([signs.keys_XB, signs.exact_X[:, None]], axis=1)
        return {"id": batch["id"], "keys": keys.view(np.int64), "minima": signs.minima_XK.view(np.int32)}

    def by_band(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for band, key in enumerate(row["keys"]):
            yield {"band": band, "key": key, "id": row["id"]}

    def pairs(group: dict[str, Any]) -> dict[str, Any]:
        order = np.lexsort((group["id"], group["key"]))
        ids, keys = group["id"][order], group["key"][order]
        again = np.concatenate([[False], keys[1:] == keys[:-1]])
        heads = ids[np.maximum.accumulate(np.where(again, 0, np.arange(ids.size)))]
        exact = np.full(2 * int(again.sum()), group["band"][0] == DOCUMENTS.bands)
        one = np.concatenate([heads[again], np.roll(ids, 1)[again]])
        return {"one": one, "other": np.concatenate([ids[again], ids[again]]), "exact": exact}

    named = [{"file": file, "number": number} for number, file in enumerate(files)]
    kept = ray.data.from_items(named, override_num_blocks=len(named)).flat_map(read).map_batches(keep)
    kept.write_json(str(out / CLEAN))
    again = ray.data.read_json(str(out / CLEAN))
    marks = again.map_batches(signed).materialize()
    found = marks.flat_map(by_band).groupby("band").map_groups(pairs, batch_format="numpy").to_pandas()
    table = marks.to_pandas()
    minima = {text: np.asarray(row) for text, row in zip(table["id"], table["minima"], strict=True)}
    near = [
        exact or float(np.mean(minima[one] == minima[other], dtype=np.float32)) >= DOCUMENTS.threshold
        for one, other, exact in found[["one", "other", "exact"]].itertuples(index=False)
    ]
    copies = join(found.loc[near, ["one", "other"]].to_numpy(np.int64).T)[0]
    again.map_batches(lambda batch: {
        name: column[~np.isin(batch["id"], copies)] for name, column in batch.items()
    }).write_json(str(out / SINGLE))  # fmt: skip


# and ends here.

WAYS = {
    "here": here,
    "datatrove local": datatrove_local,
    "datatrove Ray": datatrove_ray,
    "Ray Data": by_ray_data,
}


def join_ray() -> None:
    import ray  # pyright: ignore[reportMissingImports]

    ray.init(logging_level="warning")
    up()


@contextmanager
def node_of_ray(workers: int, tries: int = 8) -> Iterator[int]:
    """A head node's process, which RAY_ADDRESS then names.

    Ray gives its agents 15 s to choose ports, so they are given here, and a node 30 s to start: on a busy
    machine that may be too little, and then it is tried again.
    """
    names = ("port", "runtime-env-agent-port", "dashboard-agent-grpc-port", "dashboard-agent-listen-port")
    ray = str(Path(sys.executable).parent / "ray")
    command = [ray, "start", "--head", "--block", "--disable-usage-stats", "--include-dashboard=false"]
    for attempt in range(tries):
        first, began = random.randrange(20_000, 30_000), time.perf_counter()
        ports = [f"--{name}={first + n}" for n, name in enumerate((*names, "metrics-export-port"))]
        node = subprocess.Popen(
            [*command, f"--num-cpus={workers}", *ports], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            assert node.stdout is not None
            started = any(b"Ray runtime started" in line for line in node.stdout)
            if started:
                print(f"Ray's node: {time.perf_counter() - began:.0f} s, try {attempt + 1}", flush=True)
                os.environ["RAY_ADDRESS"] = f"127.0.0.1:{first}"
                yield node.pid
                return
        finally:
            for process in family(node.pid):
                process.kill()
            node.wait()
    raise RuntimeError(f"Ray's node did not come up in {tries} tries")


def up() -> None:
    print("up", flush=True)


def digest(folder: Path) -> str:
    """Of the texts that are left, whatever their files and order."""
    found = sorted(set(folder.glob("*.json")) - {folder / REPORT_FILE})  # Ray Data names lines of JSON so
    lines = (json.loads(line)["text"] for file in found for line in file.open(encoding="utf-8"))
    told = lines if found else (each.text for each in read_documents([folder / DOCUMENTS_FILES]))
    texts = (hashlib.blake2b(text.encode()).digest() for text in told)
    return hashlib.blake2b(b"".join(sorted(texts))).hexdigest()[:12]


def family(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def share(processes: list[psutil.Process]) -> int:
    total = 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def kill_a_worker(processes: list[psutil.Process]) -> str:
    """Of those that are no daemon of Ray's, the one that has computed most."""
    busy: dict[psutil.Process, float] = {}
    for process in processes:
        try:
            words = " ".join(process.cmdline())
            if ("ray" in words and "ray::" not in words) or "Agent" in words or "tracker" in words:
                continue
            busy[process] = sum(process.cpu_times()[:2])
        except psutil.NoSuchProcess:
            continue
    if not busy:
        return "there was no worker to kill"
    one = max(busy, key=lambda process: busy[process])
    told = " ".join(one.cmdline())[:60]
    os.kill(one.pid, signal.SIGKILL)
    return f"killed {told!r}"


def run(
    way: str,
    files: list[str],
    out: Path,
    workers: int,
    kill: float | None,
    limit: float,
    node: int | None,
) -> str | dict[str, Any]:
    """One way from start to end: what it took, or how it ended."""
    command = [sys.executable, "-m", "benchmarks.cluster", *files, "--way", way, "--out", str(out)]
    began, log = time.perf_counter(), out.with_suffix(".log")
    with log.open("w") as errors:
        child = subprocess.Popen(
            [*command, "--workers", str(workers)], stdout=subprocess.PIPE, stderr=errors, text=True
        )
    assert child.stdout is not None
    child.stdout.readline()
    ready, peak, told = time.perf_counter(), 0, ""
    while child.poll() is None and time.perf_counter() - ready < limit:
        ours = [*family(child.pid), *(family(node) if node is not None and "Ray" in way else ())]
        peak = max(peak, share(ours))
        if kill is not None and not told and time.perf_counter() - ready > kill:
            told = kill_a_worker(ours[1:])
        time.sleep(0.2)
    ended = time.perf_counter()
    hung = child.poll() is None
    for process in family(child.pid):
        process.kill()
    child.wait()
    if hung or child.returncode:
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        how = f"hung for {limit:.0f} s" if hung else f"ended with {child.returncode}: {' '.join(last)[:160]}"
        return f"{told}; {how}" if told else how
    return {
        "seconds": ended - began, "until up": ready - began, "MiB": peak / 2**20,
        "texts": digest(out / SINGLE), "killed": told,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster", description=__doc__)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--size", type=float, default=20, help="MB of text")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kill", type=float, help="seconds after which a worker is killed, in a round more")
    parser.add_argument("--limit", type=float, default=240, help="seconds after which a way is given up")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        WAYS[options.way](options.files, options.out, options.workers)
        return
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder, count = Path(name), 2 * options.workers
        corpus = []
        for number in range(count):
            corpus.append(str(folder / f"part-{number}.jsonl.zst"))
            some = options.files[number % len(options.files)]
            make_corpus([some], Path(corpus[-1]), int(options.size * 1e6 / count))
        told: dict[str, list[dict[str, Any]]] = {way: [] for way in options.ways}
        needs = any("Ray" in way for way in options.ways)
        node = stack.enter_context(node_of_ray(options.workers)) if needs else None
        for number in range(options.rounds + (options.kill is not None)):
            kill = options.kill if number == options.rounds else None
            for way in options.ways:
                out = folder / "out"
                shutil.rmtree(out, ignore_errors=True)
                found = run(way, corpus, out, options.workers, kill, options.limit, node)
                print(json.dumps({"way": way, "round": number, "found": found}), flush=True)
                if isinstance(found, dict) and kill is None:
                    told[way].append(found)
                if kill is not None and isinstance(found, str):  # asked again, as the user would
                    found = run(way, corpus, out, options.workers, None, options.limit, node)
                    print(json.dumps({"way": way, "round": "again", "found": found}), flush=True)
    print("| | seconds | until it was up | peak, MiB | texts |\n|---|---|---|---|---|")
    for way, rounds in told.items():
        if rounds:
            seconds, ready, peak = (
                statistics.median(each[what] for each in rounds) for what in ("seconds", "until up", "MiB")
            )
            texts = {each["texts"] for each in rounds}
            print(f"| {way} | {seconds:.1f} | {ready:.1f} | {peak:.0f} | {', '.join(sorted(texts))} |")


if __name__ == "__main__":
    main()
