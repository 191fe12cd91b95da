"""The claims put to the test: one command each.

    python -m experiments text --out runs/text --en 'en/*.jsonl.zst' --zh 'zh/*.jsonl.zst'
    python -m experiments routers segments balance mtp --text runs/text [--device cuda --jobs 8]
    python -m experiments masking overhead domains               # one training serves all three

A study trains its variants with each seed and writes what it found under --out: a record of every run (JSON),
a table (Markdown) and a picture. They are written anew as each run ends, so what was found is there whatever
happens next; with --keep a second call goes on with the trained models of the first.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from experiments import picture, text
from experiments.claims import claims
from experiments.pool import Study, run
from experiments.study import Plan, Result, summarise, to_record

TEXT = "runs/text"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="+", choices=("text", *claims()), metavar="NAME")
    parser.add_argument("--out", type=Path, help="default: runs/text for the text, docs/results for studies")
    making = parser.add_argument_group("text")
    making.add_argument("--en", nargs="+", help="English files")
    making.add_argument("--zh", nargs="+", help="Chinese files")
    making.add_argument("--megabytes", type=float, default=9.0, help="of each domain")
    making.add_argument("--vocab-size", type=int, default=8192)
    training = parser.add_argument_group("studies")
    training.add_argument("--text", default=TEXT, help="what `text` made")
    training.add_argument("--device", default="cpu")
    training.add_argument("--width", type=int, default=256, help="hidden size, and the unit of feed-forward")
    training.add_argument("--seeds", type=int, default=3)
    training.add_argument("--steps", type=int, default=Plan.steps)
    training.add_argument("--tokens-per-batch", type=int, default=Plan.tokens_per_batch)
    training.add_argument("--seq-len", type=int, help="default: the claim's own")
    training.add_argument(
        "--keep",
        action="store_true",
        help="keep trained models beside the text, and take those there",
    )
    training.add_argument("--jobs", type=int, default=2, help="runs side by side")
    arguments = parser.parse_args()
    if arguments.names == ["text"]:
        files = {name: paths for name in ("en", "zh") if (paths := getattr(arguments, name))}
        folder = arguments.out or Path(TEXT)
        made = text.make(folder, files, round(1e6 * arguments.megabytes), arguments.vocab_size)
        for name, shard in made.train.items():
            held_out = made.held_out[name].num_tokens
            print(f"{name}: {shard.num_tokens:,} tokens to train on, {held_out:,} held out")
        return
    if "text" in arguments.names:
        parser.error("text is made by itself, first")
    with TemporaryDirectory() as passing:
        plan = Plan(
            arguments.text,
            arguments.device,
            steps=arguments.steps,
            tokens_per_batch=arguments.tokens_per_batch,
            models=str(Path(arguments.text) / "trained") if arguments.keep else passing,
        )
        studies = []
        for name in arguments.names:
            claim = claims(arguments.width)[name]
            print(f"{name}: {claim.text}\n({claim.source})\n", flush=True)
            studies.append(Study(name, claim, replace(plan, seq_len=arguments.seq_len or claim.seq_len)))
        books = {
            study.name: Book(study, arguments.out or Path("docs/results"), arguments.width, arguments.seeds)
            for study in studies
        }
        failures = run(
            studies, arguments.seeds, arguments.jobs, lambda name, result: books[name].enter(result)
        )
    for book in books.values():
        print(f"\n{book.path.with_suffix('.md').read_text() if book.results else ''}", flush=True)
    if failures:
        sys.exit("\n".join((f"{len(failures)} failed:", *failures)))


class Book:
    """What a study has found so far, as files; the law: they are whole at every moment."""

    def __init__(self, study: Study, folder: Path, width: int, seeds: int) -> None:
        self.study, self.width, self.seeds = study, width, seeds
        self.path = folder / study.name
        self.results: dict[tuple[int, int], Result] = {}  # by place of the variant, and seed
        self.date = f"{datetime.now(UTC):%Y-%m-%d}"
        folder.mkdir(parents=True, exist_ok=True)

    def enter(self, result: Result) -> None:
        claim = self.study.claim
        names = [variant.name for variant in claim.variants]
        self.results[names.index(result.variant), result.seed] = result
        self.write([self.results[place] for place in sorted(self.results)])

    def write(self, results: Sequence[Result]) -> None:
        claim = self.study.claim
        record = {"claim": claim.text, "source": claim.source, "date": self.date}
        record |= {"width": self.width, "seeds": self.seeds} | to_record(self.study.plan, results)
        told = picture.table(self.study.name, record, summarise(results)) + picture.looked_table(results)
        files = {suffix: self.path.with_suffix(suffix) for suffix in (".json", ".md", ".svg")}
        for path in files.values():
            new = path.with_name(f".{path.name}")
            if path.suffix == ".svg":
                picture.dots(results).savefig(new, format="svg")
            else:
                new.write_text(told if path.suffix == ".md" else json.dumps(record, indent=1) + "\n")
            new.replace(path)


if __name__ == "__main__":
    main()
