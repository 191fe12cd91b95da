"""The claims put to the test: one command each.

    python -m experiments text --out runs/text --en 'en/*.jsonl.zst' --zh 'zh/*.jsonl.zst'
    python -m experiments routers segments balance mtp --text runs/text [--device cuda --jobs 8]
    python -m experiments masking overhead domains --keep        # one training serves all three
    python -m experiments fp8 | sparse --seq-len 1024 | ...

A study trains its variants with each seed and writes what it found under --out: a record of every run (JSON),
a table (Markdown) and a picture.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path

from experiments import picture, text
from experiments.claims import claims
from experiments.study import Plan, run, summarise, to_record

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
    training.add_argument("--seq-len", type=int, default=Plan.seq_len)
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
    plan = Plan(
        arguments.text,
        arguments.device,
        steps=arguments.steps,
        tokens_per_batch=arguments.tokens_per_batch,
        seq_len=arguments.seq_len,
        keep=arguments.keep,
    )
    for name in arguments.names:
        claim = claims(arguments.width)[name]
        print(f"\n{name}: {claim.text}\n({claim.source})\n", flush=True)
        results = run(claim.variants, range(arguments.seeds), plan, arguments.jobs, claim.extra)
        record = {"claim": claim.text, "source": claim.source, "date": f"{datetime.now(UTC):%Y-%m-%d}"}
        record |= {"width": arguments.width} | to_record(plan, results)
        told = picture.table(name, record, summarise(results)) + picture.looked_table(results)
        folder = arguments.out or Path("docs/results")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        (folder / f"{name}.md").write_text(told)
        picture.dots(results).savefig(folder / f"{name}.svg")
        print(f"\n{told}", flush=True)


if __name__ == "__main__":
    main()
