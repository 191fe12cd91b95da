"""The data verbs: raw text cleaned, told apart from its copies, turned into tokens and packed.

Each verb reads files and writes a folder or a file; a bar shows bytes, MB/s and time left. The law: records
that cannot be read are told at the end, never in the middle of hours, and words go to standard error, since
standard output is for the JSON that was asked for. Rooms are imported inside the commands.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from shoal.data.jobs import Job
    from shoal.data.read import Document, Reading

app = typer.Typer(help="Prepare text: clean, deduplicate, tokenize, pack.", no_args_is_help=True)

Files = Annotated[
    list[str], typer.Argument(help="Files or globs: .txt .md .py .jsonl(.gz, .zst) .parquet .arrow.")
]
Out = Annotated[Path, typer.Option(help="The folder to write: documents-*.jsonl.zst and report.json.")]
Workers = Annotated[int, typer.Option(help="Processes. The result does not depend on it.")]
Cluster = Annotated[
    Path | None, typer.Option(help="Run on a cluster, as this TOML says (docs/how-to/data-on-a-cluster.md).")
]
CORES = os.cpu_count() or 1


@app.command()
def clean(
    files: Files,
    out: Out,
    languages: Annotated[str, typer.Option(help="What to keep, of en, zh, code, other.")] = "en,zh,code",
    min_units: Annotated[int, typer.Option(help="Words, or Chinese characters, of a document.")] = 50,
    workers: Workers = CORES,
    cluster: Cluster = None,
) -> None:
    """Drop documents that are no text worth reading: language, length, symbols, repetition, boilerplate."""
    from shoal.data import steps
    from shoal.data.clean import CleanRules

    rules = CleanRules(languages=tuple(languages.split(",")), min_units=min_units)
    _do(steps.clean(files, out, rules), files, "cleaning", workers, cluster)


@app.command()
def dedup(
    files: Files,
    out: Out,
    by: Annotated[str, typer.Option(help="document or paragraph.")] = "document",
    threshold: Annotated[float, typer.Option(help="Jaccard similarity from which two are copies.")] = 0.8,
    workers: Workers = CORES,
    cluster: Cluster = None,
) -> None:
    """Keep the first of every cluster of exact and near copies (MinHash), by document or by paragraph."""
    from dataclasses import replace

    from shoal.data import steps
    from shoal.data.minhash import DOCUMENTS, PARAGRAPHS

    if by not in ("document", "paragraph"):
        raise ValueError(f"--by is {by!r}; it is document or paragraph")
    level = "document" if by == "document" else "paragraph"
    settings = replace(DOCUMENTS if level == "document" else PARAGRAPHS, threshold=threshold)
    job = steps.dedup(files, out, level=level, settings=settings)
    _do(job, files, "finding copies", workers, cluster, times=2)


@app.command()
def decontaminate(
    files: Files,
    against: Annotated[
        list[str], typer.Option(help="Evaluation files or globs (.jsonl, .json). Repeatable.")
    ],
    out: Out,
    run: Annotated[int, typer.Option(help="Words, or Chinese characters, in a row that are one hit.")] = 13,
    min_hits: Annotated[int, typer.Option(help="Hits from which a document is dropped.")] = 1,
    workers: Workers = CORES,
    cluster: Cluster = None,
) -> None:
    """Drop documents that share a run of 13 words (in Chinese, characters) with an evaluation set."""
    from shoal.data import steps

    job = steps.decontaminate(files, against, out, run=run, min_hits=min_hits)
    _do(job, files, "looking for evaluation text", workers, cluster)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="The folders that the steps wrote, in their order.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """One page with pictures of what each step kept and dropped."""
    from shoal.cli.view import say
    from shoal.data.atomic import write_atomically
    from shoal.data.parts import load_report
    from shoal.data.report import page

    with write_atomically(out) as file:
        file.write(page([load_report(folder) for folder in folders]).encode())
    say(f"written to {out}")


@app.command()
def recall(
    out: Annotated[Path, typer.Argument(help="The .jsonl to write.")],
    form: Annotated[str, typer.Option(help="strings, facts or words.")] = "facts",
    documents: Annotated[int, typer.Option(help="How many.")] = 4000,
    shortest: Annotated[int, typer.Option(help="Words of a document, at least.")] = 100,
    longest: Annotated[int, typer.Option(help="Words of a document, at most.")] = 160,
    text: Annotated[
        list[str] | None, typer.Option(help="Files whose words facts hide among. Repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
) -> None:
    """Write text in which things come again, for a small model to learn looking back (recipes/extend)."""
    from shoal.data.atomic import write_atomically
    from shoal.data.read import read_documents
    from shoal.data.recall import WORDS, find_words, recall_documents

    if form not in ("strings", "facts", "words"):
        raise ValueError(f"--form is {form!r}; it is strings, facts or words")
    words = WORDS
    if text:
        words = [word for document in read_documents(text) for word in find_words(document.text)]
    with write_atomically(out) as file:
        for document in recall_documents(documents, (shortest, longest), seed, form, words):
            file.write(json.dumps({"text": document.text}).encode() + b"\n")


@app.command()
def tokenizer(
    files: Files,
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens, special ones included.")] = 32768,
) -> None:
    """Train a byte-level BPE tokenizer with DeepSeek's pre-tokenizer and special tokens."""
    from shoal.cli.view import console, say
    from shoal.data.read import Reading, read_documents
    from shoal.data.tokenizer import train_tokenizer

    got = Reading()
    with reading_bar(files, "reading") as progress:
        documents = _watch(read_documents(files, got), got, progress)
        texts = (document.text for document in documents)
        trained = train_tokenizer(texts, vocab_size, show_progress=console.is_terminal)
    trained.save(out)
    _tell_bad(got)
    say(f"{trained.vocab_size} tokens, written to {out}")


@app.command()
def pack(
    files: Files,
    tokenizer: Annotated[Path, typer.Option(help="A tokenizer's folder.")],
    out: Annotated[Path, typer.Option(help="The shard to write.")],
    fim_rate: Annotated[
        float, typer.Option(help="Share of documents turned fill-in-the-middle; V3: 0.1.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Decides which documents, and where they are cut.")] = 0,
) -> None:
    """Tokenize documents into one memory-mapped shard."""
    from shoal.cli.view import say
    from shoal.data.fim import FIM
    from shoal.data.read import Reading, read_documents
    from shoal.data.shard import Shard, tokenize_documents, write_shard
    from shoal.data.text import Tokenizer

    known = Tokenizer.load(tokenizer)
    got = Reading()
    with reading_bar(files, "packing") as progress:
        documents = _watch(read_documents(files, got), got, progress)
        write_shard(out, tokenize_documents(known, documents, FIM(fim_rate, seed)), known.vocab_size)
    shard = Shard.open(out)
    _tell_bad(got)
    rate = shard.num_bytes / shard.num_tokens
    say(f"{shard.num_documents} documents, {shard.num_tokens:,} tokens, {rate:.2f} bytes a token: {out}")


@app.command()
def fertility(
    files: Files,
    tokenizer: Annotated[
        list[Path], typer.Option(help="A tokenizer's folder, or a tokenizer.json. Repeat to compare.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tokens per character of each tokenizer, by language (en, zh, code)."""
    from rich.table import Table

    from shoal.cli.view import console
    from shoal.data.fertility import measure
    from shoal.data.read import Reading, read_documents

    got = Reading()
    with reading_bar(files, "counting") as progress:
        rows = measure(_watch(read_documents(files, got), got, progress), tokenizer)
    _tell_bad(got)
    if as_json:
        print(json.dumps([row.table() for row in rows], ensure_ascii=False))
        return
    table = Table(
        "tokenizer", "vocabulary", "language", "characters", "tokens per character", "bytes per token"
    )
    for row in rows:
        table.add_row(
            row.name, f"{row.vocab_size:,}", row.language, f"{row.characters:,}",
            f"{row.tokens_per_character:.3f}", f"{row.bytes_per_token:.2f}",
        )  # fmt: skip
    console.print(table)


# What they share


@contextmanager
def reading_bar(patterns: Sequence[str], what: str, times: int = 1) -> Iterator[Callable[[Reading], None]]:
    """A bar of the files' bytes, read `times` times over; lines now and then where there is no terminal."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from shoal.cli.view import LOG_EVERY_SECONDS, console, say
    from shoal.data.read import find_files

    total = times * sum(file.stat().st_size for file in find_files(patterns))
    start = printed = time.monotonic()
    last, before = 0, 0
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(
        TextColumn(what), *columns, console=console, transient=True, disable=not console.is_terminal
    )
    task = bar.add_task(what, total=total)

    def show(reading: Reading) -> None:
        nonlocal last, before, printed
        if reading.num_bytes < last:  # another round
            before += last
        last = reading.num_bytes
        done, now = before + last, time.monotonic()
        bar.update(task, completed=done)
        if not console.is_terminal and now - printed > LOG_EVERY_SECONDS:
            printed, rate = now, done / (now - start)
            left = (total - done) / rate if rate else 0.0
            amount = f"{done / 1e6:.0f} of {total / 1e6:.0f} MB"
            say(f"  {what}: {amount}, {rate / 1e6:.1f} MB/s, {left:.0f} s left")

    with bar:
        yield show


def _watch(
    documents: Iterator[Document], reading: Reading, progress: Callable[[Reading], None]
) -> Iterator[Document]:
    for document in documents:
        yield document
        progress(reading)


def _do(
    job: Job, files: Sequence[str], what: str, workers: int, cluster: Path | None, times: int = 1
) -> None:
    """A step, here or on a cluster, and in words what came of it."""
    from shoal.cli.view import say
    from shoal.data.jobs import run_here
    from shoal.data.parts import load_report

    if cluster is None:
        with reading_bar(files, what, times) as progress:
            run_here(job, workers=workers, progress=progress)
    else:
        from shoal.data.cluster import Cluster, submit

        submitted = submit(job, Cluster.load(cluster))
        if submitted:
            say(f"{submitted}; it is done when {job.out / 'report.json'} is there")
            return
    report = load_report(job.out)
    share = report.bytes_out / report.bytes_in
    kept = f"kept {report.documents_out:,} of {report.documents_in:,} documents, {share:.1%} of the text"
    say(f"{kept}: {job.out / job.results[0]}")
    for reason, (documents, size) in report.reasons.items():
        say(f"  {reason}: {documents:,} documents, {size / 1e6:.2f} MB")
    if report.bad_records:
        say(f"{report.bad_records:,} records could not be read, first: {report.quotes[0]}")


def _tell_bad(reading: Reading) -> None:
    from shoal.cli.view import say

    if reading.bad:
        say(f"{reading.bad:,} records could not be read and were skipped, first: {reading.quotes[0]}")
