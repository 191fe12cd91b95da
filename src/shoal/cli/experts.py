"""`shoal experts`: score them, cut them out, put them in, prune, merge, duplicate, and place them on GPUs.

A verb is a function here. Each that writes a model takes `--text` and then says what it cost: bits per byte
of that text before and after. What a pack is and where it fits is checkpoint/pack.py's, what the verbs do to
a model analysis/experts.py's, placement analysis/placement.py's. Results go to standard output.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli.device import Device, find_device

if TYPE_CHECKING:
    from torch import Tensor

    from shoal.cli.texts import Text
    from shoal.model.transformer import Transformer

experts_app = typer.Typer(help="Take experts apart: score, extract, graft, prune, merge, duplicate, place.")


class By(StrEnum):
    gate = "gate"
    token = "token"


class Mix(StrEnum):
    average = "average"
    score = "score"


Checkpoint = Annotated[Path, typer.Argument(help="A checkpoint folder.")]
Out = Annotated[Path, typer.Argument(help="The folder to write.")]
Texts = Annotated[
    list[str] | None, typer.Option("--text", help="Text to measure on: FILES or NAME=FILES. Repeatable.")
]
Limit = Annotated[int, typer.Option(help="Tokens of each text to read.")]
Scores = Annotated[Path | None, typer.Option(help="What `experts score --out` wrote, or a file of ESFT's.")]
ScoreBy = Annotated[By, typer.Option(help="Score by gate values or by share of the choices.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON (docs/json.md).")]
Overwrite = Annotated[bool, typer.Option(help="Replace what the folder holds, if it is of the same kind.")]


@experts_app.command()
def score(
    path: Checkpoint,
    text: Texts = None,
    out: Annotated[Path | None, typer.Option(help="Write the scores to this file.")] = None,
    share: Annotated[float, typer.Option(help="Show the fewest experts that reach this share.")] = 0.2,
    by: ScoreBy = By.token,
    limit: Limit = 32768,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """What part of a text each expert has, in each layer: by gate values and by choices, as ESFT scores."""
    from shoal.analysis.experts import routed
    from shoal.data.atomic import write_atomically
    from shoal.model.esft import choose_experts

    opened = _open(path, device, text, limit, need_text=True)
    names = [str(layer) for layer in routed(opened.model.config)]
    tables = {kind.value: _score(opened.model, opened.texts, kind) for kind in By}
    result: dict[str, Any] = {
        f"{kind}_scores": {
            name: {str(expert): value for expert, value in enumerate(row)}
            for name, row in zip(names, table_LE.tolist(), strict=True)
        }
        for kind, table_LE in tables.items()
    }
    chosen = [each.tolist() for each in choose_experts(tables[by.value], share)]
    result["experts"] = dict(zip(names, chosen, strict=True))
    if out is not None:
        with write_atomically(out) as file:
            file.write(json.dumps(result).encode())
    if as_json:
        print(json.dumps(result))
        return
    for name, each in result["experts"].items():
        print(
            f"block {name}: {len(each)} experts have {share:.0%} by {by.value}: {', '.join(map(str, each))}"
        )


@experts_app.command()
def extract(
    path: Checkpoint,
    out: Out,
    experts: Annotated[
        str | None, typer.Option(help='Which, by block: "1:12,40;2:35". "all" takes every one.')
    ] = None,
    scores: Scores = None,
    share: Annotated[float, typer.Option(help="With --scores: the fewest that reach this share.")] = 0.2,
    by: ScoreBy = By.token,
    text: Texts = None,
    limit: Limit = 32768,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Cut experts out as a pack: safetensors, and a manifest with the hash of their base."""
    from shoal.analysis.experts import routed
    from shoal.checkpoint import pack
    from shoal.model.esft import choose_experts

    if (experts is None) == (scores is None):
        raise ValueError('say which experts: --experts "1:12,40;2:35" or --scores FILE')
    opened = _open(path, device, text, limit)
    blocks = routed(opened.model.config)
    if scores is not None:
        table_LE = _read_scores(scores, blocks, by)
        chosen = {
            block: each.tolist() for block, each in zip(blocks, choose_experts(table_LE, share), strict=True)
        }
    elif experts == "all":
        moe = opened.model.config.moe
        chosen = {block: list(range(moe.n_routed_experts if moe else 0)) for block in blocks}
    else:
        chosen = _parse(experts or "")
    made = pack.extract(opened.model, chosen, out, overwrite=overwrite)
    count = sum(map(len, made.experts.values()))
    size = sum(tensor.nbytes for tensor in made.tensors.values())
    now = opened.measure(opened.model)
    result = {
        "out": str(out),
        "base": made.base,
        "experts": count,
        "bytes": size,
        "before": now,
        "after": now,
    }
    _tell(result, f"{count} experts, {size / 1e6:,.1f} MB, of base {made.base}", as_json)


@experts_app.command()
def graft(
    path: Checkpoint,
    pack_folder: Annotated[Path, typer.Argument(metavar="PACK", help="What `experts extract` wrote.")],
    out: Out,
    text: Texts = None,
    limit: Limit = 32768,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Put the experts of a pack into another checkpoint of the same base."""
    from shoal.checkpoint import pack

    opened = _open(path, device, text, limit)
    held = pack.read_pack(pack_folder)
    before = opened.measure(opened.model)
    model = pack.graft(opened.model, held)
    count = sum(map(len, held.experts.values()))
    _finish(opened, model, out, overwrite, before, f"{count} experts grafted", as_json)


@experts_app.command()
def prune(
    path: Checkpoint,
    out: Out,
    keep: Annotated[int, typer.Option(help="Experts that each layer keeps.")],
    scores: Scores = None,
    by: ScoreBy = By.gate,
    text: Texts = None,
    limit: Limit = 32768,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Keep the best experts of each layer, by a score file or by --text, and their rows of the router."""
    from shoal.analysis.experts import choose_best, routed
    from shoal.analysis.experts import prune as cut

    opened = _open(path, device, text, limit, mtp=False, need_text=scores is None)
    config = opened.model.config
    if config.moe is None:
        raise ValueError(f"{path} has no routed experts to prune")
    table_LE = (
        _score(opened.model, opened.texts, by) if scores is None else _read_scores(scores, routed(config), by)
    )
    kept_LN = choose_best(table_LE, keep, config.moe)
    before = opened.measure(opened.model)
    model = cut(opened.model, kept_LN)
    told = (
        f"{keep} of {config.moe.n_routed_experts} experts a layer kept; prediction modules, if any, left out"
    )
    _finish(opened, model, out, overwrite, before, told, as_json)


@experts_app.command()
def merge(
    first: Checkpoint,
    second: Annotated[Path, typer.Argument(help="Another fine-tune of the same base.")],
    out: Out,
    by: Annotated[
        Mix, typer.Option(help="The mean of both, or each by how much --text uses it.")
    ] = Mix.average,
    text: Texts = None,
    limit: Limit = 32768,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Merge the experts of two fine-tunes of one base."""
    from shoal.analysis.experts import merge as mix
    from shoal.analysis.experts import shares
    from shoal.checkpoint.pack import base_hash

    opened = _open(first, device, text, limit, need_text=by is Mix.score)
    other = _open(second, device, None, limit)
    ours, theirs = base_hash(opened.model), base_hash(other.model)
    if ours != theirs:
        raise ValueError(
            f"{first} is of base {ours} and {second} of base {theirs}; experts of different bases read "
            "different things, so they are not merged"
        )
    share_LE = None
    if by is Mix.score:
        share_LE = shares(*(_score(model, opened.texts, By.gate) for model in (opened.model, other.model)))
    before = opened.measure(opened.model)
    model = mix(opened.model, other.model, share_LE)
    _finish(opened, model, out, overwrite, before, f"merged by {by.value}", as_json)


@experts_app.command()
def duplicate(
    path: Checkpoint,
    out: Out,
    times: Annotated[int, typer.Option(help="Copies of each expert, itself included.")] = 2,
    text: Texts = None,
    limit: Limit = 32768,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """A larger model that computes the same: each expert so many times, as many times the choices."""
    from shoal.analysis.experts import duplicate as copy

    opened = _open(path, device, text, limit)
    before = opened.measure(opened.model)
    model = copy(opened.model, times)
    assert model.config.moe is not None
    told = f"{model.config.moe.n_routed_experts} experts, {model.config.moe.num_experts_per_tok} a token"
    _finish(opened, model, out, overwrite, before, told, as_json)


@experts_app.command()
def place(
    load: Annotated[Path, typer.Argument(help="Scores (`experts score`, ESFT) or the JSON of `inspect`.")],
    gpus: Annotated[int, typer.Option(help="GPUs that share a layer's experts.")] = 8,
    slots: Annotated[
        int | None, typer.Option(help="Experts held in all, copies included. Default: one each.")
    ] = None,
    groups: Annotated[int, typer.Option(help="Groups of the router, kept on one node each.")] = 1,
    nodes: Annotated[int, typer.Option(help="Nodes that the GPUs are in.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write the placement to this file, as JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    """Which GPU holds which experts, busy ones in copies (EPLB), and how near the balance is to its bound."""
    from shoal.analysis.placement import place as find
    from shoal.data.atomic import write_atomically

    layers = {}
    for name, load_E in _read_load(load).items():
        found = find(load_E, gpus, slots, groups=groups, nodes=nodes)
        layers[name] = {
            "gpus": found.slots_GS,
            "copies": found.copies_E,
            "load": found.load_G,
            "bound": found.bound,
            "balance": found.balance,
            "over_bound": found.over_bound,
        }
    policy = "hierarchical" if nodes > 1 and groups % nodes == 0 else "global"
    result = {"gpus": gpus, "slots": slots, "policy": policy, "layers": layers}
    if out is not None:
        with write_atomically(out) as file:
            file.write(json.dumps(result).encode())
    if as_json:
        print(json.dumps(result))
        return
    print("block  mean/largest load of a GPU  largest load over the bound")
    for name, told in layers.items():
        print(f"{name:>5}  {told['balance']:>27.3f}  {told['over_bound']:>27.4f}")


# What several verbs share


@dataclass(frozen=True, eq=False)
class _Opened:
    folder: Path
    model: Transformer
    texts: list[Text]

    def measure(self, model: Transformer) -> dict[str, float] | None:
        """Bits per byte of each text; None without one."""
        from shoal.analysis.experts import bits_per_byte

        if not self.texts:
            return None
        device = model.model.embed_tokens.weight.device
        return {text.name: bits_per_byte(model, text.on(device), text.num_bytes) for text in self.texts}


def _open(
    path: Path,
    device: str,
    text: list[str] | None,
    limit: int,
    *,
    mtp: bool = True,
    need_text: bool = False,
) -> _Opened:
    from shoal.checkpoint import hf
    from shoal.cli.texts import read_texts
    from shoal.cli.view import loading
    from shoal.data.text import Tokenizer

    if need_text and not text:
        raise ValueError("this is measured on a text: give --text FILES")
    folder = hf.find_folder(path)
    with loading("loading") as progress:
        model = hf.load(folder, device=find_device(device), mtp=mtp, progress=progress).eval()
    if not text:
        return _Opened(folder, model, [])
    seq_len = min(2048, model.config.max_position_embeddings)
    return _Opened(folder, model, read_texts(text, Tokenizer.load(folder), limit=limit, seq_len=seq_len))


def _score(model: Transformer, texts: Sequence[Text], by: By) -> Tensor:
    from shoal.model.esft import score_experts

    device = model.model.embed_tokens.weight.device
    batches = (batch for text in texts for batch in text.on(device))
    return score_experts(model, batches, by.value).cpu()


def _finish(
    opened: _Opened,
    model: Transformer,
    out: Path,
    overwrite: bool,
    before: dict[str, float] | None,
    told: str,
    as_json: bool,
) -> None:
    from shoal.checkpoint import hf

    files = [opened.folder / name for name in hf.COMPANIONS if (opened.folder / name).exists()]
    hf.save(model, out, tokenizer_files=files, overwrite=overwrite)
    result = {"out": str(out), "before": before, "after": opened.measure(model)}
    _tell(result, f"{told}; written to {out}", as_json)


def _tell(result: dict[str, Any], told: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    print(told)
    for name, before in (result["before"] or {}).items():
        after = result["after"][name]
        print(f"{name}: {before:.4f} bits per byte before, {after:.4f} after ({after - before:+.4f})")


def _parse(experts: str) -> dict[int, list[int]]:
    """ "1:12,40;2:35" as {1: [12, 40], 2: [35]}."""
    try:
        blocks = [each.split(":") for each in experts.split(";")]
        return {int(block): [int(expert) for expert in each.split(",")] for block, each in blocks}
    except ValueError:
        raise ValueError(f'--experts is {experts!r}; give blocks and experts as in "1:12,40;2:35"') from None


def _read_scores(path: Path, blocks: Sequence[int], by: By) -> Tensor:
    import torch

    told = _read_json(path).get(f"{by.value}_scores")
    if not isinstance(told, dict):
        raise ValueError(f"{path} has no {by.value}_scores; make it with `experts score --out`")
    if sorted(map(int, told)) != sorted(blocks):
        raise ValueError(
            f"{path} scores blocks {', '.join(sorted(told, key=int))}; the model routes in {blocks}"
        )
    rows = [told[str(block)] for block in blocks]
    return torch.tensor([[row[str(e)] for e in range(len(row))] for row in rows], dtype=torch.float64)


def _read_load(path: Path) -> dict[str, list[float]]:
    told = _read_json(path)
    if isinstance(told.get("load"), dict):
        return told["load"]
    if not isinstance(told.get("token_scores"), dict):
        raise ValueError(f"{path} has neither `token_scores` nor `load`; give a score file or inspect's JSON")
    return {
        name: [row[str(expert)] for expert in range(len(row))] for name, row in told["token_scores"].items()
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}; it must hold one JSON object")
    return value
