"""Laws of parity: random models that transformers makes itself give the same logits and gradients here.

Both sides run in float32 and order their sums differently: products of some dozens of terms, each good to
some units of 2^-24, through three layers. That comes to 2e-6 of the largest logit, and to 8e-6 of a
gradient whose terms cancel (a bias of keys, which softmax hardly feels). The limit of 1e-4 is ten times
that; a wrong rotation, scale, epsilon (1e-2 here, to be seen) or expert moves logits by percents and more.

DeepSeekMoE-16B, which transformers does not have, is held against its formulas, written out below.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.modeling_layers import MtpModel

from shoal.config.hf import from_hf
from shoal.model.transformer import Transformer
from tests.model import parts

CLOSE = 1e-4
VOCAB = 61
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Texts of 19 tokens, so that an original context of 8 is passed.
SHORT = {"rope_theta": 10000.0, "original_max_position_embeddings": 8}
LLAMA3 = {"rope_type": "llama3", **SHORT, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", **SHORT, "factor": 4.0, "beta_fast": 4.0, "beta_slow": 1.0}
YARN_V2 = {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}
YARN_V3 = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}
YARN_UNEVEN = {**YARN, "mscale": 1.0, "mscale_all_dim": 0.707}  # the one that scales cosine and sine
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 12,
    "moe_intermediate_size": 14,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
}
V2 = {**BASE, **LATENT, "n_shared_experts": 2, "norm_topk_prob": False}
V3 = {**BASE, **LATENT, "n_shared_experts": 1, "n_group": 4, "topk_group": 2}
V32 = {**V3, "index_n_heads": 12, "index_head_dim": 10}  # so many that no score is 0, where ties would be
LIMITED = {
    "topk_method": "group_limited_greedy",
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 16.0,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", BASE),
    "llama 3.1": ("llama", {**BASE, "rope_parameters": LLAMA3}),
    "llama, wide heads": ("llama", {**BASE, "head_dim": 12}),
    "llama, biases": ("llama", {**BASE, "attention_bias": True, "rope_parameters": LINEAR}),
    "qwen2": ("qwen2", {**BASE, "tie_word_embeddings": True}),
    "qwen2, yarn": ("qwen2", {**BASE, "rope_parameters": YARN}),
    "qwen3_moe": (
        "qwen3_moe",
        {**BASE, **EXPERTS, "head_dim": 12, "moe_intermediate_size": 14, "norm_topk_prob": True},
    ),
    "qwen3_moe, first layer dense": (
        "qwen3_moe",
        {**BASE, **EXPERTS, "head_dim": 8, "moe_intermediate_size": 14, "mlp_only_layers": [0]},
    ),
    "mixtral": ("mixtral", {**BASE, "num_local_experts": 6, "num_experts_per_tok": 2}),
    "olmoe": ("olmoe", {**BASE, **EXPERTS, "pad_token_id": None}),
    "olmoe, normalised": ("olmoe", {**BASE, **EXPERTS, "pad_token_id": None, "norm_topk_prob": True}),
    "v2": ("deepseek_v2", {**V2, **LIMITED, "rope_parameters": YARN_V2}),
    "v2 lite": ("deepseek_v2", {**V2, "q_lora_rank": None, "rope_parameters": YARN_V2}),
    "v2.5": ("deepseek_v2", {**V2, **LIMITED, "topk_group": 3, "rope_parameters": YARN_V3}),
    "v2, no yarn": ("deepseek_v2", {**V2, "attention_bias": True}),
    "v2, uneven yarn": ("deepseek_v2", {**V2, "rope_parameters": YARN_UNEVEN}),
    "v3": ("deepseek_v3", {**V3, "rope_parameters": YARN_V3}),
    "v3, no q_lora": ("deepseek_v3", {**V3, "q_lora_rank": None, "rope_parameters": YARN_V2}),
    "v3, one group": ("deepseek_v3", {**V3, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.446}),
    "v3, every group": ("deepseek_v3", {**V3, "topk_group": 4, "rope_parameters": YARN}),
    "v3, not normalised": ("deepseek_v3", {**V3, "norm_topk_prob": False, "attention_bias": True}),
    "v3.2": ("deepseek_v32", {**V32, "index_topk": 7, "rope_parameters": YARN_V3}),
    "v3.2, one read": ("deepseek_v32", {**V32, "index_topk": 1, "attention_bias": True}),
    "v3.2, all read": ("deepseek_v32", {**V32, "index_topk": 19, "rope_parameters": YARN}),
    "v3, half rotation": ("deepseek_v3", {**V3, "rope_interleave": False, "rope_parameters": YARN_UNEVEN}),
}
cases = pytest.mark.parametrize("case", CASES)
seeds = pytest.mark.parametrize("seed", [0, 1])
TEXTS = [parts.draw_ids(VOCAB, 19, seed) for seed in (0, 1)]


@cache
def _pair(case: str, seed: int) -> tuple[transformers.PreTrainedModel, Transformer]:
    """The oracle, and ours with its weights, name by name."""
    family, settings = CASES[case]
    oracle = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(family, **settings),
        attn_implementation="eager",
        experts_implementation="eager",
        dtype=torch.float32,
    )
    parts.fill(oracle, seed)
    if oracle.config.tie_word_embeddings:
        oracle.tie_weights()
    config = from_hf(oracle.config.to_dict())
    weights = oracle.state_dict()
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    model = Transformer(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    ahead = tuple(
        f"model.layers.{config.num_hidden_layers + k}." for k in range(config.num_nextn_predict_layers)
    )
    assert not unexpected
    assert all(name.startswith(ahead) for name in missing), "transformers keeps prediction modules elsewhere"
    return oracle.eval(), model.eval()


def _assert_close(got: Tensor, wanted: Tensor, what: str = "logits") -> None:
    assert got.shape == wanted.shape
    error, scale = (got - wanted).abs().max(), wanted.abs().max()
    assert error <= CLOSE * scale, f"{what} differ by {error:.1e} of {scale:.1e}"


@cases
@seeds
def test_logits_and_gradients(case: str, seed: int) -> None:
    oracle, model = _pair(case, seed)
    batch = parts.pack(*TEXTS)
    logits_TV = model.logits(model(batch).hidden_TD, batch)
    wanted_TV = oracle(torch.tensor(TEXTS)).logits.flatten(0, 1)
    _assert_close(logits_TV, wanted_TV)

    slope_TV = torch.randn(wanted_TV.shape, generator=torch.Generator().manual_seed(seed))
    ours, theirs = dict(model.named_parameters()), dict(oracle.named_parameters())
    got = torch.autograd.grad(logits_TV, list(ours.values()), slope_TV, allow_unused=True)
    wanted = torch.autograd.grad(wanted_TV, list(theirs.values()), slope_TV, allow_unused=True)
    by_name = dict(zip(ours, got, strict=True))
    for name, gradient in zip(theirs, wanted, strict=True):
        if ".indexer." in name:  # a choice has no gradient, here or there
            assert gradient is None and by_name[name] is None
            continue
        assert gradient is not None
        assert by_name[name] is not None
        _assert_close(by_name[name], gradient, name)


@cases
def test_cached_decoding(case: str) -> None:
    """Prompts of different lengths, then token by token, ours all together in pages, theirs one after the
    other."""
    oracle, model = _pair(case, 0)
    prompts = [7, 2]
    with torch.inference_mode():
        got = parts.through_cache(
            parts.Cache(model.config, 2),
            TEXTS,
            [[length] for length in prompts],
            lambda batch, _: model.logits(model(batch).hidden_TD, batch),
        )
        for text, prompt, logits_TV in zip(TEXTS, prompts, got, strict=True):
            step = oracle(torch.tensor([text[:prompt]]), use_cache=True)
            wanted = [step.logits[0]]
            for token in text[prompt:]:
                step = oracle(torch.tensor([[token]]), past_key_values=step.past_key_values, use_cache=True)
                wanted.append(step.logits[0])
            _assert_close(logits_TV, torch.cat(wanted))


@seeds
@pytest.mark.parametrize("case", ["v3", "v3, no q_lora"])
def test_prediction_modules(case: str, seed: int) -> None:
    """Two in a row, each on the hidden states of the one before."""
    oracle, model = _pair(case, seed)
    ahead = MtpModel(oracle, 2)
    parts.fill(ahead.layers, seed + 10)
    state = {}
    for name, tensor in ahead.layers.state_dict().items():
        depth, rest = name.split(".", 1)
        rest = rest.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
        state[f"model.layers.{model.config.num_hidden_layers + int(depth)}.{rest}"] = tensor
    config = from_hf(oracle.config.to_dict() | {"num_nextn_predict_layers": 2})
    model = Transformer(config)
    model.load_state_dict(oracle.state_dict() | state)

    text, batch = TEXTS[0], parts.pack(TEXTS[0])
    hidden_TD = model(batch).hidden_TD
    theirs = oracle.model(torch.tensor([text])).last_hidden_state
    for depth in range(2):
        next_ids_T = torch.tensor([*text[depth + 1 :], *[0] * (depth + 1)])
        hidden_TD = model.predict_ahead(hidden_TD, next_ids_T, batch, depth).hidden_TD
        positions_1T = batch.positions_T.unsqueeze(0) + depth + 1
        theirs = ahead.forward_layer(depth, theirs, positions_1T, None, input_ids=next_ids_T.unsqueeze(0))
        _assert_close(model.logits(hidden_TD, batch), oracle.lm_head(theirs)[0])


# --------------------------------------------------------------------------------------------------
# DeepSeekMoE-16B (arXiv 2401.06066; model_type deepseek)

MOE_16B: dict[str, Any] = {
    "model_type": "deepseek",
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "moe_intermediate_size": 10,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "attention_bias": False,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


class Literal:
    """The model of MOE_16B for one text, as its paper and its config say, token by token in float64."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}

    def weight(self, name: str) -> Tensor:
        return self.tensors[f"{name}.weight"]

    def norm(self, name: str, x_D: Tensor) -> Tensor:
        return x_D / (x_D.square().sum() / len(x_D) + 1e-2).sqrt() * self.weight(name)

    def turn(self, x_Q: Tensor, position: int) -> Tensor:
        """Pairs are (i, i + Q/2), as in Llama."""
        half = len(x_Q) // 2
        turned = [torch.zeros(())] * len(x_Q)
        for i in range(half):
            angle = position * 10000.0 ** (-2 * i / len(x_Q))
            turned[i] = x_Q[i] * math.cos(angle) - x_Q[i + half] * math.sin(angle)
            turned[i + half] = x_Q[i + half] * math.cos(angle) + x_Q[i] * math.sin(angle)
        return torch.stack(turned)

    def attention(self, name: str, rows: list[Tensor]) -> list[Tensor]:
        q, k, v = ([(self.weight(f"{name}.{x}_proj") @ row).split(6) for row in rows] for x in "qkv")
        q, k = ([[self.turn(head, t) for head in heads] for t, heads in enumerate(x)] for x in (q, k))
        outputs = []
        for t in range(len(rows)):
            heads = []
            for h in range(4):
                scores = [q[t][h] @ k[j][h] / math.sqrt(6) for j in range(t + 1)]
                total = sum(score.exp() for score in scores)
                heads.append(sum(score.exp() / total * v[j][h] for j, score in enumerate(scores)))
            outputs.append(self.weight(f"{name}.o_proj") @ torch.cat(heads))
        return outputs

    def swiglu(self, gate: Tensor, up: Tensor, down: Tensor, x_D: Tensor) -> Tensor:
        gate_F = gate @ x_D
        return down @ (gate_F / (1 + (-gate_F).exp()) * (up @ x_D))

    def dense(self, name: str, x_D: Tensor) -> Tensor:
        gate, up, down = (self.weight(f"{name}.{part}_proj") for part in ("gate", "up", "down"))
        return self.swiglu(gate, up, down, x_D)

    def feed_forward(self, name: str, x_D: Tensor) -> Tensor:
        if f"{name}.gate.weight" not in self.tensors:
            return self.dense(name, x_D)
        powers = (self.weight(f"{name}.gate") @ x_D).exp()
        scores = powers / powers.sum()  # over all 16, not over the chosen
        y_D = self.dense(f"{name}.shared_experts", x_D)  # one SwiGLU of width 2 * 10, weight 1
        for expert in sorted(range(16), key=lambda e: -float(scores[e].detach()))[:6]:
            gate, up = self.tensors[f"{name}.experts.gate_up_proj"][expert].split(10)
            down = self.tensors[f"{name}.experts.down_proj"][expert]
            y_D = y_D + scores[expert] * self.swiglu(gate, up, down, x_D)  # and the six are not normalised
        return y_D

    def logits(self, text: list[int]) -> Tensor:
        rows = [self.weight("model.embed_tokens")[token] for token in text]
        for layer in range(3):
            at = f"model.layers.{layer}"
            seen = self.attention(
                f"{at}.self_attn", [self.norm(f"{at}.input_layernorm", x_D) for x_D in rows]
            )
            rows = [x_D + y_D for x_D, y_D in zip(rows, seen, strict=True)]
            rows = [
                x_D + self.feed_forward(f"{at}.mlp", self.norm(f"{at}.post_attention_layernorm", x_D))
                for x_D in rows
            ]
        return torch.stack([self.weight("lm_head") @ self.norm("model.norm", x_D) for x_D in rows])


@seeds
def test_deepseek_moe_16b(seed: int) -> None:
    model = Transformer(from_hf(MOE_16B)).eval()
    parts.fill(model, seed)
    literal, text = Literal(model.state_dict()), TEXTS[0][:11]
    batch = parts.pack(text)
    logits_TV, wanted_TV = model.logits(model(batch).hidden_TD, batch), literal.logits(text)
    _assert_close(logits_TV.double(), wanted_TV)

    slope_TV = torch.randn(wanted_TV.shape, generator=torch.Generator().manual_seed(seed))
    ours = dict(model.named_parameters())
    got = torch.autograd.grad(logits_TV, list(ours.values()), slope_TV)
    wanted = torch.autograd.grad(wanted_TV, [literal.tensors[name] for name in ours], slope_TV.double())
    for name, ours_grad, literal_grad in zip(ours, got, wanted, strict=True):
        _assert_close(ours_grad.double(), literal_grad, name)

    with torch.inference_mode():
        cache = parts.Cache(model.config, 1)
        (cached_TV,) = parts.through_cache(
            cache, [text], [[7]], lambda batch, _: model.logits(model(batch).hidden_TD, batch)
        )
    _assert_close(cached_TV.double(), wanted_TV)
