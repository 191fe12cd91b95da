"""What is asked of a trained model beside its held-out loss: redundancy, specialisation, guesses that stand.

Each function takes the model, the text and the plan of a study and returns numbers for its record.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from experiments.study import Plan, measure, on
from experiments.text import Text
from shoal.analysis.observe import Observation, divergence, observe, specialists
from shoal.config.families import family
from shoal.data.pack import evaluation_batches
from shoal.engine import Engine, EngineSettings, SamplingParams
from shoal.model.layers import RMSNorm
from shoal.model.moe import Gate, MoE
from shoal.model.transformer import Transformer
from shoal.ops.api import Routing

MASKED = (1 / 16, 2 / 16, 3 / 16, 4 / 16)  # of the experts, each token's best
SIZES, TURNS, CALLS = (1, 4, 16, 64, 256), 5, 3  # tokens of a layer's step, and how often it is timed
PROMPTS, PROMPT, ANSWER = 16, 64, 64


class WithoutBest(nn.Module):
    """A gate without groups that may not choose a token's `count` best experts: the next stand in."""

    def __init__(self, gate: Gate, count: int) -> None:
        super().__init__()
        self.gate, self.count = gate, count

    def forward(self, x_TD: Tensor, replay_TK: Tensor | None) -> Routing:
        free = self.gate(x_TD, replay_TK)
        top_k = free.experts_TK.shape[1]
        selection_TE = free.scores_TE
        if self.gate.e_score_correction_bias is not None:
            selection_TE = selection_TE + self.gate.e_score_correction_bias
        ranked_TE = selection_TE.sort(dim=-1, descending=True, stable=True).indices
        return self.gate(x_TD, ranked_TE[:, self.count : self.count + top_k])

    def after(
        self, norm: RMSNorm, x_TD: Tensor, y_TD: Tensor, replay_TK: Tensor | None
    ) -> tuple[Tensor, Tensor, Routing]:
        """As `Gate.after`."""
        total_TD, normal_TD = norm.add(x_TD, y_TD)
        return total_TD, normal_TD, self(normal_TD, replay_TK)


@contextmanager
def without_best(model: Transformer, share: float) -> Iterator[None]:
    """Within the block no token reaches the best `share` of all experts."""
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    gates = [layer.gate for layer in layers]
    try:
        for layer, gate in zip(layers, gates, strict=True):
            layer.gate = WithoutBest(gate, round(share * gate.moe.n_routed_experts))  # type: ignore[assignment]
        yield
    finally:
        for layer, gate in zip(layers, gates, strict=True):
            layer.gate = gate


def at_experts(model: Transformer, text: Text, plan: Plan) -> dict[str, Any]:
    """Held-out loss without each token's best experts, and what the experts do domain by domain."""
    if model.config.moe is None:
        return {}
    return at_masking(model, text, plan) | at_domains(model, text, plan)


def at_masking(model: Transformer, text: Text, plan: Plan) -> dict[str, Any]:
    """Bits per byte of held-out text without each token's best experts, by the share of all that they are."""
    moe = model.config.moe
    assert moe is not None
    sizes = {name: shard.num_bytes for name, shard in text.held_out.items()}
    masked = {}
    for share in MASKED if moe.topk_method in ("greedy", "noaux_tc") and moe.n_group == 1 else ():
        with without_best(model, share):
            bits = {name: measure(model, shard, plan)[0] for name, shard in text.held_out.items()}
        masked[f"{share:.4f}"] = sum(bits[name] * sizes[name] for name in bits) / sum(sizes.values())
    return {"masked": masked}


def at_domains(model: Transformer, text: Text, plan: Plan) -> dict[str, Any]:
    """How far the loads of the domains are apart, each one's own experts, and how few serve it."""
    seen: list[Observation] = []
    for name, shard in text.held_out.items():
        batches = evaluation_batches(shard, plan.tokens_per_batch, plan.seq_len)
        seen.append(observe(model, name, on(model, batches), shard.num_bytes))
    loads_DLE = torch.stack([each.load_LE for each in seen])
    return {
        "divergence": divergence(loads_DLE).mean().item(),  # bits, of at most log2(domains)
        "specialists": {
            each.name: len(found) for each, found in zip(seen, specialists(loads_DLE), strict=True)
        },
        # The fewest experts that take 80% of a domain's choices, and what the two busiest take.
        "experts_for_80": {each.name: each.experts_for(0.8).double().mean().item() for each in seen},
        "share_of_two": {each.name: share_of_best(each.load_LE, 2) for each in seen},
    }


def at_overhead(model: Transformer, text: Text, plan: Plan) -> dict[str, Any]:
    """The gate's share of a mixture layer's time by the number of tokens, in the trained model and in a layer
    of V2-Lite's shape at a quarter of its width, and how few experts serve a domain."""
    layer = next(module for module in model.modules() if isinstance(module, MoE))
    like = model.head_weight()
    lite = replace(family("deepseek-v2-lite").config, hidden_size=512)
    assert lite.moe is not None
    quarter = MoE(lite, replace(lite.moe, moe_intermediate_size=352), device=like.device, dtype=like.dtype)
    draw = torch.Generator(like.device).manual_seed(0)
    for tensor in quarter.parameters():
        tensor.data.normal_(std=0.02, generator=draw)
    skew = at_domains(model, text, plan)
    return {
        "gate_share": {f"{size} tokens": share_of_gate(layer, size) for size in SIZES},
        "gate_share_quarter_of_v2_lite": {
            f"{size} tokens": share_of_gate(quarter.eval(), size) for size in SIZES
        },
        "experts_for_80": skew["experts_for_80"],
        "share_of_two": skew["share_of_two"],
    }


@torch.inference_mode()
def share_of_gate(layer: MoE, tokens: int) -> float:
    """Of the time of the layer; the least of some turns of both."""
    weight = layer.gate.weight
    x_TD = torch.randn(tokens, weight.shape[1], device=weight.device, dtype=weight.dtype)
    least = [math.inf, math.inf]
    for _ in range(TURNS):
        for place, part in enumerate((layer.gate, layer)):
            synchronise(weight.device)
            start = time.perf_counter()
            for _ in range(CALLS):
                part(x_TD, None)
            synchronise(weight.device)
            least[place] = min(least[place], time.perf_counter() - start)
    return least[0] / least[1]


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def share_of_best(load_LE: Tensor, count: int) -> float:
    """Of a layer's choices, what its busiest experts take; mean of layers."""
    best = load_LE.double().topk(count, dim=1).values.sum(1) / load_LE.double().sum(1)
    return best.mean().item()


def at_guesses(model: Transformer, text: Text, plan: Plan) -> dict[str, Any]:
    """Greedy answers to held-out text, plain and with guesses of the prediction module: how many stand, and
    tokens a second of both, warm. In float32 the texts are equal; in bfloat16 a close call may go either
    way."""
    if not model.config.num_nextn_predict_layers:
        return {}
    prompts: list[list[int]] = []
    for shard in text.held_out.values():
        for batch in islice(evaluation_batches(shard, PROMPT * PROMPTS, PROMPT), 1):
            prompts += [part.tolist() for part in batch.ids_T.split(PROMPT)[:PROMPTS]]
    wish = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
    told: dict[str, Any] = {}
    answers = []
    for speculate in (0, 1):
        settings = EngineSettings(cache_bytes=1 << 27, speculate=speculate, prefix_cache=False)
        engine = Engine(model, settings)
        engine.generate(prompts, wish)
        before, start = engine.stats(), time.perf_counter()
        answers.append([done.ids for done in engine.generate(prompts, wish)])
        told[f"tokens_per_second_{speculate}"] = len(prompts) * ANSWER / (time.perf_counter() - start)
    after = engine.stats()
    guessed = [b - a for a, b in zip(before.drafted, after.drafted, strict=True)]
    stood = [b - a for a, b in zip(before.accepted, after.accepted, strict=True)]
    told["speed_of_guessing"] = told["tokens_per_second_1"] / told["tokens_per_second_0"]
    told["acceptance"] = [s / g if g else 0.0 for s, g in zip(stood, guessed, strict=True)]
    told["same_answers"] = sum(a == b for a, b in zip(*answers, strict=True)) / len(prompts)
    return told
