"""`shoal inspect`: what the experts of a checkpoint do with texts, as one HTML page and as JSON.

Texts are named (`--text en=a.txt --text code='*.py'`), a domain each, so that it can be seen which experts
are whose. What is measured is analysis/observe.py's, the page analysis/report.py's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.device import Checkpoint, Device, Download, find_device


def inspect(
    path: Checkpoint,
    text: Annotated[
        list[str], typer.Option("--text", help="A domain: NAME=FILES, or FILES alone. Repeatable.")
    ],
    out: Annotated[Path, typer.Option(help="The page to write; the JSON goes beside it.")] = Path(
        "experts.html"
    ),
    limit: Annotated[int, typer.Option(help="Tokens of each domain to read.")] = 32768,
    sample: Annotated[int, typer.Option(help="Tokens of each domain to show one by one.")] = 128,
    device: Device = "auto",
    download: Download = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON too (docs/json.md).")] = False,
) -> None:
    """Look inside the experts: load, balance, who goes together, whose is what, token by token."""
    from shoal.analysis import observe, report
    from shoal.analysis.experts import routed
    from shoal.checkpoint import hf
    from shoal.cli.texts import read_texts
    from shoal.cli.view import loading, say
    from shoal.data.atomic import write_atomically
    from shoal.data.text import Tokenizer

    if sample < 1:
        raise ValueError(f"--sample is {sample}; show 1 token or more")
    folder = hf.find_folder(path, download=download)
    tokenizer = Tokenizer.load(folder)
    with loading("loading") as progress:
        model = hf.load(folder, device=find_device(device), mtp=False, progress=progress).eval()
    if model.config.moe is None:
        raise ValueError(f"{path} routes nothing, so there is nothing to inspect; name a model with experts")
    texts = read_texts(text, tokenizer, limit=limit, seq_len=min(2048, model.config.max_position_embeddings))
    seen, where = [], model.model.embed_tokens.weight.device
    for each in texts:
        say(f"reading {each.name}: {each.num_tokens:,} tokens")
        seen.append(observe.observe(model, each.name, each.on(where), each.num_bytes, sample=sample))
    found = report.Inspection(
        model=folder.name if folder.name != "export" else f"{folder.parent.name}/{folder.name}",
        blocks=routed(model.config),
        top_k=model.config.moe.num_experts_per_tok,
        seen=tuple(seen),
        pieces=tuple(tuple(tokenizer.decode([t]) for t in one.sample.ids_N.tolist()) for one in seen),
        similar_LEE=observe.similarity(model),
    )
    told = report.to_json(found)
    with write_atomically(out) as file:
        file.write(report.to_html(found).encode())
    with write_atomically(out.with_suffix(".json")) as file:
        file.write(json.dumps(told).encode())
    if as_json:
        print(json.dumps(told))
    say(f"written to {out} and {out.with_suffix('.json')}; watching took {found.watching:.1%} of the run")
