"""The claims that are put to the test, each as the variants that it compares.

The hidden size U is also one unit of feed-forward. Every mixture holds 16 U a layer and a token passes
through 2 U of it, as in the comparison of DeepSeekMoE (arXiv 2401.06066, section 4.2, whose single-expert
rows had one unit; here all rows have equal active parameters). Attention, depth and text are the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from experiments import look
from experiments.study import Extra, Variant, nothing_more
from shoal.config.model import (
    GQAConfig,
    IndexerConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    NSAConfig,
    RopeConfig,
)
from shoal.config.run import BalanceConfig

LAYERS, HEAD = 6, 64
SPARSE = (
    0.3  # of the steps, the last of a run, are those of sparse attention where it is put on a dense model
)
NONE = BalanceConfig(bias_update_speed=0.0, sequence_loss=0.0)
AUXILIARY = replace(
    NONE, sequence_loss=0.01
)  # V2's expert-level loss, with the factor of DeepSeekMoE's tests


@dataclass(frozen=True)
class Claim:
    """A claim, who made it, and what is compared."""

    text: str
    source: str
    variants: tuple[Variant, ...]
    extra: Extra = nothing_more
    timed: bool = False  # what `extra` finds is time: it wants the device to itself
    seq_len: int = 512


def dense(unit: int, units: float) -> ModelConfig:
    heads = unit // HEAD
    return ModelConfig(
        model_type="llama",
        vocab_size=8192,  # the tokenizer's decides
        hidden_size=unit,
        intermediate_size=round(units * unit),
        num_hidden_layers=LAYERS,
        attention=GQAConfig(num_attention_heads=heads, num_key_value_heads=heads, head_dim=HEAD),
        rope=RopeConfig(),
        max_position_embeddings=2048,
    )


def mixture(unit: int, experts: int, top_k: int, units: float, **fields: object) -> ModelConfig:
    """`top_k` of `experts` experts of `units` each in every layer."""
    moe = MoEConfig(experts, top_k, round(units * unit), **fields)  # type: ignore[arg-type]
    return replace(dense(unit, 2), model_type="deepseek", moe=moe)


def segmented(unit: int, m: int, shared: int, **fields: object) -> ModelConfig:
    """16 experts cut into m each, 2 m of them for a token, `shared` of these always the same."""
    return mixture(unit, 16 * m - shared, 2 * m - shared, 1 / m, n_shared_experts=shared, **fields)


def sparse_attention(unit: int) -> tuple[Variant, ...]:
    """Grouped queries and NSA; MLA and DSA. A token of a 1,024 reads a fifth of it by NSA, 128 by DSA."""
    heads = unit // HEAD
    full = dense(unit, 2)
    mla = MLAConfig(2 * heads, unit // 2, 32, 16, 32, q_lora_rank=unit // 2)
    nsa = NSAConfig(2 * heads, heads, 48, 32, 16, 8, 16, 6, sliding_window=64)
    gqa = GQAConfig(num_attention_heads=2 * heads, num_key_value_heads=heads, head_dim=HEAD)
    latent = replace(full, model_type="deepseek_v3", attention=mla)
    indexed = replace(mla, indexer=IndexerConfig(4, 32, 128))
    return (
        Variant("full, grouped queries", replace(full, attention=gqa), NONE),
        Variant("NSA", replace(full, model_type="nsa", attention=nsa), NONE),
        Variant("full, MLA", latent, NONE, sparse_share=SPARSE),
        Variant(
            "DSA", replace(latent, model_type="deepseek_v32", attention=indexed), NONE, sparse_share=SPARSE
        ),
    )


def claims(unit: int = 256) -> dict[str, Claim]:
    """All of them, in models `unit` wide, a multiple of 64."""
    if unit % HEAD:
        raise ValueError(f"the width is {unit}; it must be a multiple of the head's {HEAD}")
    rule = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}
    loss_free = segmented(unit, 4, 1, **rule)
    halves = segmented(unit, 2, 1, **rule)  # 128 wide at 256: the least that the FP8 kernels take
    moved = replace(NONE, bias_update_speed=0.005)
    gshard = Variant(
        "GShard",
        mixture(unit, 16, 2, 1, norm_topk_prob=True, capacity_factor=2.0),
        replace(NONE, gshard_loss=0.01),
    )
    deepseek = Variant("DeepSeekMoE", segmented(unit, 4, 1), AUXILIARY)
    return {
        "routers": Claim(
            "dense < hash < Switch < GShard < DeepSeekMoE at equal active parameters; a dense model of all "
            "parameters is the bound. Masking the best experts costs DeepSeekMoE more than GShard",
            "DeepSeekMoE, arXiv 2401.06066, table 1, figures 4 and 5",
            (
                Variant("dense", dense(unit, 2), NONE),
                Variant("hash", mixture(unit, 8, 1, 2, topk_method="hash", norm_topk_prob=True), NONE),
                Variant(
                    "Switch", mixture(unit, 8, 1, 2, capacity_factor=1.25), replace(NONE, switch_loss=0.01)
                ),
                Variant(
                    "Mixtral", mixture(unit, 16, 2, 1, norm_topk_prob=True), replace(NONE, switch_loss=0.01)
                ),
                Variant(
                    "noisy top-2",
                    mixture(unit, 16, 2, 1, norm_topk_prob=True, noisy_gate=True),
                    replace(NONE, switch_loss=0.01),
                ),
                gshard,
                Variant(
                    "GShard, random second",
                    mixture(unit, 16, 2, 1, norm_topk_prob=True, capacity_factor=2.0, random_second=True),
                    replace(NONE, gshard_loss=0.01),
                ),
                Variant(
                    "expert choice, looks ahead", mixture(unit, 16, 2, 1, topk_method="expert_choice"), NONE
                ),
                deepseek,
                Variant(
                    "segments",
                    mixture(unit, 64, 8, 1 / 4, topk_method="segments", n_group=16, topk_group=4),
                    NONE,
                ),
                Variant("dense, all parameters", dense(unit, 16), NONE),
            ),
            look.at_experts,
        ),
        "segments": Claim(
            "finer experts are better (m = 1, 2, 4, 8), and an isolated shared expert helps",
            "DeepSeekMoE, arXiv 2401.06066, figure 3",
            (
                *(Variant(f"m = {m}, shared 0", segmented(unit, m, 0), AUXILIARY) for m in (1, 2, 4, 8)),
                *(
                    Variant(f"m = 4, shared {shared}", segmented(unit, 4, shared), AUXILIARY)
                    for shared in (1, 2)
                ),
            ),
        ),
        "balance": Claim(
            "a bias moved by the load balances experts at no cost in perplexity; an auxiliary loss has one",
            "loss-free balancing, arXiv 2408.15664, table 2",
            (
                Variant("none", loss_free, NONE),
                Variant("auxiliary loss", loss_free, AUXILIARY),
                Variant("loss-free", loss_free, moved),
                Variant("quantile", loss_free, replace(NONE, bias_update_speed=0.005, bias_rule="quantile")),
            ),
        ),
        "masking": Claim(
            "experts of DeepSeekMoE are less redundant: without each token's best it loses more than GShard",
            "DeepSeekMoE, arXiv 2401.06066, figure 4",
            (gshard, deepseek),
            look.at_masking,
        ),
        "overhead": Claim(
            "routing is 10 to 15% of a mixture layer on small batches; on a narrow domain 80% of the tokens "
            "go to two experts",
            "articles",
            (gshard, deepseek),
            look.at_overhead,
            timed=True,
        ),
        "domains": Claim(
            "experts specialise by domain: English, Chinese, code; finer ones more",
            "DeepSeekMoE, arXiv 2401.06066, section 1; ESFT, arXiv 2407.01906, figure 3",
            (gshard, deepseek),
            look.at_domains,
        ),
        "fp8": Claim(
            "products in FP8 cost less than 0.25% of the loss",
            "DeepSeek-V3, arXiv 2412.19437, section 3.3 and appendix B.1",
            (
                Variant("wide", halves, moved),
                Variant("FP8", halves, moved, precision="fp8"),
            ),
        ),
        "sparse": Claim(
            "sparse attention costs no loss: NSA against full attention from the first step, DSA put on a "
            "trained MLA against the same MLA trained on",
            "NSA, arXiv 2502.11089, table 1; DeepSeek-V3.2, arXiv 2512.02556, section 2.2",
            sparse_attention(unit),
            seq_len=1024,
        ),
        "mtp": Claim(
            "predicting a second token improves the main loss, and 85 to 90% of its guesses stand",
            "DeepSeek-V3, arXiv 2412.19437, table 4 and section 5.4.3",
            (
                Variant("without", loss_free, moved),
                Variant(
                    "with",
                    replace(loss_free, model_type="deepseek_v3", num_nextn_predict_layers=1),
                    moved,
                    mtp_loss_weight=0.3,
                ),
            ),
            look.at_guesses,
            timed=True,
        ),
    }
