"""A study: variants of one small model, each trained by the Trainer on the same text with several seeds.

A variant is a model and how it is balanced; all else is the study's. The law: a run is a function of its
variant and seed, the seeds are the same for all variants, and what is compared is measured on the same
held-out text. Which runs there are, and when, is for pool.py.
"""

from __future__ import annotations

import hashlib
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from experiments.text import Text, load
from shoal.batch import Batch
from shoal.config import cost
from shoal.config.model import MLAConfig, ModelConfig
from shoal.config.run import BalanceConfig, OptimConfig, TrainConfig
from shoal.data.pack import evaluation_batches
from shoal.data.shard import Shard
from shoal.model.moe import max_violation
from shoal.model.transformer import Transformer
from shoal.ops import api as ops
from shoal.train.fp8 import multiply_in_fp8
from shoal.train.indexer import LearnIndexers, indexers
from shoal.train.loss import NextToken
from shoal.train.trainer import Trainer


@dataclass(frozen=True)
class Variant:
    name: str
    model: ModelConfig
    balance: BalanceConfig
    mtp_loss_weight: float = 0.0
    dtype: str = "bfloat16"
    precision: str = "dtype"  # or fp8: of the products
    sparse_share: float = 0.0  # the last of the steps, begun anew; by an indexer if the model has one


@dataclass(frozen=True)
class Plan:
    """What all runs of a study share."""

    text: str  # a folder of text.py
    device: str = "cpu"
    steps: int = 400
    tokens_per_batch: int = 8192
    seq_len: int = 512
    lr: float = 2e-3
    threads: int = 1
    models: str = ""  # a folder where trained models are put, and found by whoever asks for the same


@dataclass(frozen=True)
class Result:
    """One run. `flops` are those of training, by config/cost.py."""

    variant: str
    seed: int
    bits_per_byte: float  # of all held-out text
    domains: dict[str, float]
    max_violation: float  # of the held-out text's routing, mean of layers; 0 where nothing routes
    active: int
    total: int
    flops: float
    seconds: float  # of training, with the others of the study beside it
    extra: dict[str, Any]


Extra = Callable[[Transformer, Text, Plan], dict[str, Any]]


@dataclass(frozen=True)
class Question:
    """What a study asks of a trained model beside its loss; the variant by the study's name for it."""

    study: str
    variant: Variant
    extra: Extra


def nothing_more(model: Transformer, text: Text, plan: Plan) -> dict[str, Any]:
    return {}


def trained(variant: Variant, seed: int, plan: Plan, text: Text) -> tuple[Transformer, float]:
    """The model after its last step, and the seconds that took; put down and found again if the plan says."""
    if not plan.models:
        return train(variant, seed, plan, text)
    device = torch.device(plan.device)
    path = Path(plan.models) / f"{identity(variant, seed, plan)}.safetensors"
    if path.exists():
        model = _empty(variant, plan, text)
        state = load_file(path, device=str(device))
        model.load_state_dict(state)
        with safe_open(path, "pt") as file:
            return model.eval(), float(file.metadata()["seconds"])
    model, seconds = train(variant, seed, plan, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, path.with_suffix(f".{os.getpid()}"), {"seconds": str(seconds)})
    path.with_suffix(f".{os.getpid()}").rename(path)
    return model, seconds


def identity(variant: Variant, seed: int, plan: Plan) -> str:
    """Of a run: what it is a function of, on one text."""
    what = replace(variant, name=""), seed, replace(plan, text="", threads=1, models="")
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def _empty(variant: Variant, plan: Plan, text: Text) -> Transformer:
    device = torch.device(plan.device)
    # A CPU computes in float32: it has no fast bfloat16.
    dtype = torch.float32 if device.type == "cpu" else getattr(torch, variant.dtype)
    config = replace(variant.model, vocab_size=text.tokenizer.vocab_size)
    model = Transformer(config, device="meta", dtype=dtype)
    model.allocate(device)
    return multiply_in_fp8(model) if variant.precision == "fp8" else model


def train(variant: Variant, seed: int, plan: Plan, text: Text) -> tuple[Transformer, float]:
    model, batches = _empty(variant, plan, text), text.batches(plan.tokens_per_batch, plan.seq_len, seed)
    generator = torch.Generator(model.head_weight().device).manual_seed(seed)
    model.init_weights(generator)
    start = time.perf_counter()
    last = max(1, round(variant.sparse_share * plan.steps)) if variant.sparse_share else 0

    def go_on(model: Transformer, first: int, steps: int, **how: Any) -> None:
        settings = TrainConfig(
            steps=steps,
            mtp_loss_weight=variant.mtp_loss_weight,
            optim=OptimConfig(lr=plan.lr, warmup_steps=max(1, steps // 20), schedule="linear"),
            balance=variant.balance,
        )
        folder = Path(plan.text)
        trainer = Trainer(
            model, lambda at: batches.batch(first + at), settings, folder, generator=generator, **how
        )
        model.train()
        for _ in range(steps):
            trainer.train_step()

    if not isinstance(variant.model.attention, MLAConfig) or variant.model.attention.indexer is None:
        go_on(model, 0, plan.steps - last)
        if last:
            go_on(model, plan.steps - last, last)
        return model.eval(), time.perf_counter() - start
    # A model with an indexer was one without, which is then taught what attention reads: more steps than
    # others have, on text that comes again.
    attention = replace(variant.model.attention, indexer=None)
    plain = _empty(
        replace(variant, model=replace(variant.model, model_type="deepseek_v3", attention=attention)),
        plan,
        text,
    )
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    go_on(plain, 0, plan.steps - last)
    model.load_state_dict(plain.state_dict(), strict=False)
    warm = max(1, last // 3)
    go_on(model, plan.steps - last, warm, objective=LearnIndexers(), trainable=indexers(model))
    objective = LearnIndexers(NextToken(0, mtp_weight=0.0))
    go_on(model, plan.steps - last, last, objective=objective)
    return model.eval(), time.perf_counter() - start


@torch.inference_mode()
def measure(model: Transformer, shard: Shard, plan: Plan) -> tuple[float, torch.Tensor | None]:
    """Bits per byte of held-out text, and each expert's tokens (L, E)."""
    nats, load_LE = 0.0, None
    for batch in on(model, evaluation_batches(shard, plan.tokens_per_batch, plan.seq_len)):
        output = model(batch)
        assert batch.targets_T is not None
        assert batch.weights_T is not None
        weight_VD = model.head_weight()
        loss = ops.linear_cross_entropy(output.hidden_TD, weight_VD, batch.targets_T, batch.weights_T)
        nats += loss.total.item()
        if output.routing:
            assert model.config.moe is not None
            experts = model.config.moe.n_routed_experts
            chosen = [layer.experts_TK.flatten() for layer in output.routing]
            counts = torch.stack([torch.bincount(each[each >= 0], minlength=experts) for each in chosen])
            load_LE = counts if load_LE is None else load_LE + counts
    return nats / math.log(2) / shard.num_bytes, load_LE


def on(model: Transformer, batches: Iterator[Batch]) -> Iterator[Batch]:
    """Batches where the model is."""
    device = model.head_weight().device
    for batch in batches:
        yield batch.to(device)


def run_one(questions: Sequence[Question], seed: int, plan: Plan) -> list[Result]:
    """One training, and what each question about it finds; the questions' variants differ in name alone."""
    torch.set_num_threads(plan.threads)
    text, variant = load(Path(plan.text)), questions[0].variant
    model, seconds = trained(variant, seed, plan, text)
    found = {name: measure(model, shard, plan) for name, shard in text.held_out.items()}
    sizes = {name: shard.num_bytes for name, shard in text.held_out.items()}
    bits = sum(value * sizes[name] for name, (value, _) in found.items()) / sum(sizes.values())
    loads = [load_LE for _, load_LE in found.values() if load_LE is not None]
    violation = max_violation(torch.stack(loads).sum(0)).mean().item() if loads else 0.0
    params = cost.params(model.config, mtp=False)
    tokens = plan.steps * plan.tokens_per_batch
    flops = tokens * cost.flops_per_token(model.config, plan.seq_len // 2, mtp=variant.mtp_loss_weight > 0)
    domains = {name: value for name, (value, _) in found.items()}
    return [
        Result(
            *(each.variant.name, seed, bits, domains, violation),
            *(params.active, params.total, flops, seconds, each.extra(model, text, plan)),
        )
        for each in questions
    ]


def look_again(question: Question, seed: int, plan: Plan) -> dict[str, Any]:
    """What a question finds in a model that is there already."""
    torch.set_num_threads(plan.threads)
    text = load(Path(plan.text))
    model, _ = trained(question.variant, seed, plan, text)
    return question.extra(model, text, plan)


@dataclass(frozen=True)
class Row:
    """A variant over its seeds."""

    variant: str
    seeds: int
    bits_per_byte: float
    deviation: float
    max_violation: float
    active: int
    total: int
    flops: float
    seconds: float


def summarise(results: Sequence[Result]) -> list[Row]:
    rows = []
    for name in dict.fromkeys(each.variant for each in results):
        of = [each for each in results if each.variant == name]
        bits = [each.bits_per_byte for each in of]
        rows.append(
            Row(
                name,
                len(of),
                statistics.mean(bits),
                statistics.stdev(bits) if len(bits) > 1 else math.nan,
                statistics.mean(each.max_violation for each in of),
                of[0].active,
                of[0].total,
                of[0].flops,
                statistics.mean(each.seconds for each in of),
            )
        )
    return rows


def to_record(plan: Plan, results: Sequence[Result]) -> dict[str, Any]:
    where = torch.cuda.get_device_name() if plan.device.startswith("cuda") else f"{os.cpu_count()} CPU cores"
    told = {key: value for key, value in asdict(plan).items() if key not in ("text", "models")}
    return {"hardware": where, "plan": told, "results": [asdict(each) for each in results]}
