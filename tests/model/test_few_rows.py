"""Laws of a step of few rows: by the CPU's kernels it is what the modules compute, or it is left to them.

Both sides get the same weights and the same hostile cache (tests/model/parts.py): NaN wherever nothing was
written, page 0 nobody's.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.batch import Batch
from shoal.config.families import tiny
from shoal.config.model import MLAConfig, ModelConfig
from shoal.model.few_rows import few_rows
from shoal.model.layers import Linear
from shoal.model.transformer import Output, Transformer
from shoal.ops import dispatch
from shoal.ops.api import Routing
from shoal.ops.cpu import limits
from shoal.stages.quickstart import MODEL
from tests.model.parts import Cache, Ids, draw_ids, fill

FAMILIES = [
    "deepseek-v3",  # latent with q_lora, sigmoid, groups, bias, shared experts
    "deepseek-v2-lite",  # latent without q_lora, softmax, YaRN
    "deepseek-v2",  # groups by their best
    "qwen3-30b-a3b",  # grouped, normed by head
    "olmoe-1b-7b",  # grouped, normed over all heads
    "r1-distill-qwen-1.5b",  # biases, dense
    "mixtral-8x7b",
    "llama-3-8b",
]
# Both sides are float32 sums of up to 128 products in different order: each is off by 128 * 2^-24 = 8e-6 of
# the sum of magnitudes at worst, a few 1e-7 as a rule, and some thirty follow one another in a model of up to
# four layers. Values are of order 1 after the last norm.
TOLERANCE = 5e-5


def odd(config: ModelConfig) -> ModelConfig:
    """Dimensions that fill no vector, and biases."""
    attention = MLAConfig(
        num_attention_heads=3,
        q_lora_rank=13,
        kv_lora_rank=19,
        qk_nope_head_dim=7,
        qk_rope_head_dim=6,
        v_head_dim=5,
        attention_bias=True,
    )
    assert config.moe is not None
    moe = replace(config.moe, moe_intermediate_size=11)
    return replace(config, hidden_size=37, intermediate_size=29, attention=attention, moe=moe)


CONFIGS = {name: tiny(name) for name in FAMILIES} | {"odd": odd(tiny("deepseek-v3")), "quickstart": MODEL}


def by_kernels(model: Transformer, batch: Batch) -> tuple[Tensor, tuple[Routing, ...]] | None:
    decoder = model.model
    return few_rows(model, decoder.embed_tokens(batch.ids_T), decoder.rotary(batch.positions_T), batch)


def build(config: ModelConfig) -> Transformer:
    model = Transformer(config)
    fill(model)
    model.model.rotary.reset()
    return model.eval()


def step(model: Transformer, rows: dict[int, int], side: dispatch.Side) -> tuple[Output, Cache]:
    """Prompts of several lengths by the modules, then a step with so many new tokens of each sequence."""
    cache = Cache(model.config, sequences=len(rows))
    ids = [draw_ids(model.config.vocab_size, 40, seed=s) for s in rows]
    prompts: dict[int, Ids] = {s: ids[s][: 3 + 2 * s] for s in rows}
    with torch.inference_mode():
        with dispatch.using("reference"):
            model(cache.feed(prompts))
        batch = cache.feed({s: ids[s][len(prompts[s]) :][:count] for s, count in rows.items()})
        with dispatch.using(side):
            if side == "auto":
                assert by_kernels(model, batch) is not None
            return model(batch), cache


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rows", [(1,), (1, 1), (1,) * 5, (1,) * 8, (2, 1, 4)])
def test_by_kernels_or_by_modules(name: str, rows: tuple[int, ...]) -> None:
    model = build(CONFIGS[name])
    counts = dict(enumerate(rows))
    ours, our_cache = step(model, counts, "auto")
    theirs, their_cache = step(model, counts, "reference")
    torch.testing.assert_close(ours.hidden_TD, theirs.hidden_TD, rtol=0, atol=TOLERANCE)
    assert len(ours.routing) == len(theirs.routing)
    for our, their in zip(ours.routing, theirs.routing, strict=True):
        assert torch.equal(our.experts_TK, their.experts_TK)
        torch.testing.assert_close(our.weights_TK, their.weights_TK, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(our.scores_TE, their.scores_TE, rtol=0, atol=TOLERANCE)
        assert our.logits_TE is not None
        assert their.logits_TE is not None
        torch.testing.assert_close(our.logits_TE, their.logits_TE, rtol=0, atol=TOLERANCE)
    for our, their in zip(our_cache.pages, their_cache.pages, strict=True):
        # The rows of the step are in, in the same places, and every other place is as it was.
        torch.testing.assert_close(our, their, rtol=0, atol=TOLERANCE, equal_nan=True)


@pytest.mark.parametrize("name", ["odd", "deepseek-v2-lite", "qwen3-30b-a3b", "olmoe-1b-7b", "llama-3-8b"])
@pytest.mark.parametrize("rows", [(1,), (2, 1, 4)])
def test_any_number_of_threads_gives_the_same_bits(
    name: str, rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three share what one does alone; at one row some have no share at all."""
    model = build(CONFIGS[name])
    monkeypatch.setattr(limits, "WEIGHTS_OF_PART", 1)
    monkeypatch.setattr(limits, "ROWS_OF_TEAM", 1)
    outcomes = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert limits.count_parts(1, 10) == threads
        output, cache = step(model, dict(enumerate(rows)), "auto")
        with torch.inference_mode():
            logits_TV = dispatch.fuse("head_step", output.hidden_TD, model.head_weight())
        chosen = [part for routing in output.routing for part in routing[:4]]
        outcomes.append([output.hidden_TD, logits_TV, *chosen, *map(Tensor.nan_to_num, cache.pages)])
    assert all(torch.equal(one, several) for one, several in zip(*outcomes, strict=True))


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_the_head(rows: int) -> None:
    """Sums of 37 products in another order: off by 37 * 2^-24 of magnitudes of some 30 at worst."""
    generator = torch.Generator().manual_seed(0)
    x_TD, weight_VD = torch.randn(rows, 37, generator=generator), torch.randn(257, 37, generator=generator)
    with torch.inference_mode():
        ours = dispatch.fuse("head_step", x_TD, weight_VD)
        torch.testing.assert_close(ours, x_TD @ weight_VD.T, rtol=0, atol=37 * 2.0**-24 * 64)


def test_a_broken_weight_shows() -> None:
    model = build(tiny("deepseek-v3"))
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.gate.weight")[0] = math.nan
    output, _ = step(model, {0: 1}, "auto")
    assert not output.hidden_TD.isfinite().all()


@pytest.mark.parametrize("size", [60.0, 1e4])
def test_large_values_saturate_and_do_not_overflow(size: float) -> None:
    """silu, sigmoid and softmax beyond where e^x leaves float32."""
    x_TD, norm_D = torch.tensor([[1.0, -1.0]]), torch.full((2,), size)
    weights = torch.eye(2), torch.ones(2, 2), torch.eye(2)
    with torch.inference_mode():
        ours = dispatch.fuse("mlp_step", x_TD, norm_D, 0.0, *weights)
        normal = F.rms_norm(x_TD, (2,), norm_D, 0.0)
        up = normal @ weights[1].T
        assert torch.equal(ours, x_TD + F.silu(normal) * up)


def refusals(change: str) -> Tensor | None:
    model = Transformer(tiny("deepseek-v3"), dtype=torch.bfloat16 if change == "dtype" else torch.float32)
    fill(model)
    model.eval()
    if change == "product":
        linear = model.get_submodule("model.layers.0.self_attn.o_proj")
        assert isinstance(linear, Linear)
        linear.product = lambda x, w, b: F.linear(x, w, b)
    cache = Cache(model.config, 1, dtype=torch.bfloat16 if change == "dtype" else torch.float32)
    batch = cache.feed({0: draw_ids(512, 17 if change == "rows" else 2)})
    if change == "replay":
        batch = replace(batch, routing=torch.zeros(2, 8, 8, dtype=torch.int64))
    if change == "training":
        batch = replace(batch, kv=None)
    if change == "mode":
        model.train()
    with torch.enable_grad() if change == "gradients" else torch.inference_mode():
        done = by_kernels(model, batch)
    return None if done is None else done[0]


@pytest.mark.parametrize("change", ["dtype", "product", "rows", "replay", "training", "mode", "gradients"])
def test_what_the_kernels_do_not_take_is_left_to_the_modules(change: str) -> None:
    assert refusals("nothing") is not None
    assert refusals(change) is None


def test_capacity_is_left_to_the_modules() -> None:
    model = build(tiny("deepseek-v3"))
    assert model.config.moe is not None
    moe = replace(model.config.moe, eval_capacity_factor=2.0)
    for gate in model.gates():
        gate.moe = moe
    cache = Cache(model.config, 1)
    with torch.inference_mode():
        assert by_kernels(model, cache.feed({0: [1, 2]})) is None


def test_the_door_says_why() -> None:
    x_TD, weights = torch.ones(1, 2), (torch.ones(2), 1e-6, torch.eye(2), torch.eye(2), torch.eye(2))
    assert "inference_mode" in dispatch.explain_fused("mlp_step", x_TD, *weights)
    with torch.inference_mode():
        assert dispatch.explain_fused("mlp_step", x_TD, *weights) == "mlp_step: cpu"
        with dispatch.batch_invariant():
            assert "batch-invariant" in dispatch.explain_fused("mlp_step", x_TD, *weights)
            assert dispatch.fuse("mlp_step", x_TD, *weights) is None
        assert "17 rows" in dispatch.explain_fused("mlp_step", torch.ones(17, 2), *weights)
        assert "float64" in dispatch.explain_fused("mlp_step", x_TD.double(), *weights)
        with dispatch.using("reference"):
            assert "reference" in dispatch.explain_fused("mlp_step", x_TD, *weights)


def test_a_slot_outside_of_the_cache_is_an_error() -> None:
    model = build(tiny("deepseek-v3"))
    batch = Cache(model.config, 1).feed({0: [1, 2]})
    assert batch.kv is not None
    wrong = replace(batch, kv=replace(batch.kv, slots_T=torch.tensor([0, 1 << 40])))
    with torch.inference_mode(), pytest.raises(IndexError, match="slot"):
        model(wrong)
