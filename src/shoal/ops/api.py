"""The one door to the maths: a typed function for each op, whose docstring is the contract.

Every op is said twice behind this door: as a plain PyTorch reference, which is the specification and runs
anywhere, and, where it pays, as a Triton kernel. `dispatch` picks one from the device and the sizes; callers
never know which. Both are differentiable where the contract says so. An op refuses what it does not take; it
never guesses.

Shape letters: T tokens, S sequences, D hidden, H query heads, G key-value heads, Q query/key head dim, V
value head dim, C latent rank, R rope dim, E experts, K experts per token (of sparse attention: positions), F
expert hidden, P pages, B pages of a sequence, N positions of a sequence, J index heads, I index head dim.

A paged cache of uint8 is in FP8: in place of C + R numbers a slot has C bytes of e4m3, a float32 scale for
each 128 of them and R bfloat16; in place of a head's Q, Q bytes and the scales. It stands for the numbers
that these make, rounded to the dtype of the queries. Dense attention takes it, sparse attention does not.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from shoal.ops.dispatch import Rehearsal as Rehearsal
from shoal.ops.dispatch import call, fuse
from shoal.ops.dispatch import rehearsing as rehearsing
from shoal.ops.invariance import is_batch_invariant as is_batch_invariant
from shoal.ops.invariance import with_gradient_of as with_gradient_of


class Routing(NamedTuple):
    """What the router decided for each token."""

    experts_TK: Tensor  # int64, best first; -1 where the choice was dropped
    weights_TK: Tensor  # float32, differentiable: what each chosen expert's output is multiplied by
    scores_TE: Tensor  # float32, differentiable: the score of every expert, before bias and selection
    logits_TE: Tensor | None = (
        None  # float32, differentiable: what the scores were made of, where a gate kept it
    )


class OpenSum(NamedTuple):
    """What a mixture has yet to add up: whoever reads it does so in passing."""

    rows_MD: Tensor  # of each choice; of a dropped one whatever lay there
    experts_TK: Tensor
    weights_TK: Tensor
    dense_STD: Tensor  # what all tokens get, in S parts


class CrossEntropy(NamedTuple):
    """The loss of a step, and the loss of each token."""

    total: Tensor  # float32 scalar, differentiable: sum over tokens of weight * nll
    nll_T: Tensor  # float32, not differentiable: negative log-probability of each target, in nats


class Moments(NamedTuple):
    """AdamW's averages of a parameter, as they are kept: float32, bfloat16, or 8 bits in blocks of 256.

    8 bits are int8 (signed, 127 equal steps) for the first and uint8 (a logarithm, 12 steps an octave) for
    the second, each with a float32 scale a block.
    """

    first: Tensor  # the weight's shape
    second: Tensor
    first_scale: Tensor | None = None  # (numel / 256, rounded up)
    second_scale: Tensor | None = None


class Sampled(NamedTuple):
    """A token for each row, and its log-probability as the model has it."""

    tokens_S: Tensor  # int64
    logprobs_S: Tensor  # float32, of the unpenalised logits at temperature 1


class Blocking(NamedTuple):
    """How native sparse attention cuts a text into blocks, in tokens but for the last three, in blocks."""

    compress_block: int
    compress_stride: int
    select_block: int
    top_k: int
    first: int  # always selected
    local: int  # always selected, a token's own block among them


class LatentWeights(NamedTuple):
    """What MLA holds (model/mla.py), for `latent_step`."""

    q_a_LD: Tensor | None  # None: queries come from x by q_b alone
    q_a_bias_L: Tensor | None
    q_norm_L: Tensor | None
    q_b: Tensor  # (H (N + R), L or D)
    kv_a: Tensor  # (C + R, D)
    kv_a_bias: Tensor | None
    kv_norm_C: Tensor
    kv_b: Tensor  # (H (N + V), C)
    o: Tensor  # (D, H V)
    o_bias_D: Tensor | None


class GroupedWeights(NamedTuple):
    """What GQA holds (model/gqa.py), for `grouped_step`."""

    q: Tensor  # (H Q, D)
    k: Tensor  # (G Q, D)
    v: Tensor
    q_bias: Tensor | None
    k_bias: Tensor | None
    v_bias: Tensor | None
    o: Tensor  # (D, H Q)
    o_bias_D: Tensor | None
    q_norm: Tensor | None  # over a head (Q) or over all (H Q)
    k_norm: Tensor | None


class ExpertWeights(NamedTuple):
    """What MoE holds (model/moe.py), for `moe_step`."""

    gate_ED: Tensor
    bias_E: Tensor | None
    gate_up_E2FD: Tensor
    down_EDF: Tensor
    shared: tuple[Tensor, Tensor, Tensor] | None  # gate, up and down of the shared experts


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Normalised in float32, cast to x's dtype, then multiplied by the weight: the cast points of Llama and
    DeepSeek. Any leading shape, empty included. Differentiable in x and weight.
    """
    return call("rms_norm", x, weight_D, eps)


def add_rms_norm(x: Tensor, y: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum x + y in their dtype, and `rms_norm` of it: the residual stream, and what the next layer reads.

    x and y are alike in shape and dtype. Differentiable in x, y and weight, through both results.
    """
    return call("add_rms_norm", x, y, weight_D, eps)


def add_sum_rms_norm(x_TD: Tensor, y: OpenSum, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` of x and `close(y)`, with the casts of both. No gradient."""
    return call("add_sum_rms_norm", x_TD, *y, weight_D, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise, in the inputs' dtype. Differentiable in both."""
    return call("swiglu", gate, up)


def linears(
    x_TD: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...]
) -> tuple[Tensor, ...]:
    """x W^T, plus the bias if there is one, for each of some weights (N_i, D) that read the same rows.

    In x's dtype, any leading shape of x. Differentiable in all.
    """
    return call("linears", x_TD, weights, biases)


def rope(x_THQ: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, *, interleaved: bool) -> Tensor:
    """Rotate each pair of the last R elements of x by the angle whose cosine and sine are given in float32,
    one a pair; elements before them are left.

    `interleaved` pairs (0,1), (2,3) ...; otherwise (i, i + R/2). The layout of x is kept, computed in float32
    and cast back. The same angles serve every head. Differentiable in x (the rotation by the opposite angle).
    """
    return call("rope", x_THQ, cos_TR2, sin_TR2, interleaved)


def gate_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """x W^T in float32 whatever the inputs' dtype: the router's logits (T, E).

    Narrow inputs count as the float32 numbers they are; products and sums are float32's, never TF32's.
    Differentiable in both.
    """
    return call("gate_logits", x_TD, weight_ED)


def route(
    logits_TE: Tensor,
    top_k: int,
    *,
    scoring_func: Literal["softmax", "sigmoid"],
    bias_E: Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    norm_topk_prob: bool = False,
    routed_scaling_factor: float = 1.0,
    replay_TK: Tensor | None = None,
) -> Routing:
    """Score every expert and choose `top_k` of them for each token (DeepSeek-V2 eq. 20-22, V3 eq. 12-16).

    Scores are a softmax over all experts or a sigmoid of each, in float32 (logits must be float32). Selection
    is by score + `bias_E`, restricted to the `topk_group` best of `n_group` contiguous groups: a group's
    value is its largest score, or with a bias the sum of its two largest biased scores. Ties go to the
    smaller index. Weights are the unbiased scores of the chosen, divided by their sum plus 1e-20 if
    `norm_topk_prob`, times the scaling factor.

    `replay_TK` (int, -1 for dropped) replaces the selection and nothing else: weights are still computed,
    with gradient, from the scores (normalised over the choices that were kept). Gradients flow to the logits
    through weights and scores; none to the bias.
    """
    if logits_TE.dtype != torch.float32:
        raise ValueError(
            f"route: logits are {logits_TE.dtype}; the gate runs in float32, cast before the matmul"
        )
    if not 0 < top_k <= logits_TE.shape[1]:
        raise ValueError(
            f"route: top_k is {top_k}; it must be between 1 and the {logits_TE.shape[1]} experts"
        )
    return Routing(
        *call(
            "route",
            logits_TE,
            top_k,
            scoring_func,
            bias_E,
            n_group,
            topk_group,
            norm_topk_prob,
            routed_scaling_factor,
            replay_TK,
        )
    )


def gate(
    x_TD: Tensor,
    weight_ED: Tensor,
    top_k: int,
    *,
    scoring_func: Literal["softmax", "sigmoid"],
    bias_E: Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    norm_topk_prob: bool = False,
    routed_scaling_factor: float = 1.0,
    replay_TK: Tensor | None = None,
) -> Routing:
    """`route` of `gate_logits`, which the result holds too."""
    if not 0 < top_k <= weight_ED.shape[0]:
        raise ValueError(f"gate: top_k is {top_k}; it must be between 1 and the {weight_ED.shape[0]} experts")
    return Routing(
        *call(
            "gate",
            x_TD,
            weight_ED,
            top_k,
            scoring_func,
            bias_E,
            n_group,
            topk_group,
            norm_topk_prob,
            routed_scaling_factor,
            replay_TK,
        )
    )


def add_norm_gate(
    x_TD: Tensor,
    y_TD: Tensor,
    norm_D: Tensor,
    eps: float,
    weight_ED: Tensor,
    top_k: int,
    *,
    scoring_func: Literal["softmax", "sigmoid"],
    bias_E: Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    norm_topk_prob: bool = False,
    routed_scaling_factor: float = 1.0,
    replay_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor, Routing]:
    """`add_rms_norm`, and `gate` of its norm: what stands between a layer's attention and its experts."""
    rule = scoring_func, bias_E, n_group, topk_group, norm_topk_prob, routed_scaling_factor, replay_TK
    total_TD, normal_TD, *made = call(
        "add_norm_gate", x_TD, y_TD, norm_D, eps, weight_ED, top_k, *rule
    )  # fmt: skip
    return total_TD, normal_TD, Routing(*made)


def limit_capacity(experts_TK: Tensor, n_experts: int, capacity: int) -> Tensor:
    """`experts_TK` with -1 where an expert already had `capacity` tokens (Switch, GShard).

    Places are given first to every token's first choice, in token order, then to every second choice, and so
    on.
    """
    return call("limit_capacity", experts_TK, n_experts, capacity)


def grouped_mlp(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
) -> Tensor:
    """y_t = sum over k of weights[t,k] * down_e(silu(gate_e(x_t)) * up_e(x_t)), with e = experts[t,k].

    Rows 0..F of `gate_up_E2FD[e]` are the gate, F..2F the up projection. A choice of -1 contributes nothing;
    an expert may have no rows, and T may be 0. The sum over k is taken in float32 and cast once to x's dtype.
    Differentiable in x, weights and both matrices; SwiGLU is recomputed in the backward pass, not stored.
    """
    return call("grouped_mlp", x_TD, experts_TK, weights_TK, gate_up_E2FD, down_EDF)


def mixture(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    gate_GD: Tensor,
    up_GD: Tensor,
    down_DG: Tensor,
) -> Tensor:
    """`grouped_mlp`, plus down(silu(gate x) * up x) of the shared experts: a dense MLP that all tokens take.

    Both are cast to x's dtype before they are added. On a GPU x was there before the launch that wrote the
    choice, as it is where a gate chooses by it. Differentiable as `grouped_mlp`, and in the shared matrices.
    """
    return call("mixture", x_TD, experts_TK, weights_TK, gate_up_E2FD, down_EDF, gate_GD, up_GD, down_DG)


def open_mixture(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    gate_GD: Tensor,
    up_GD: Tensor,
    down_DG: Tensor,
) -> Tensor | OpenSum:
    """`mixture`, or where no gradient is asked for what it would add up last: `add_sum_rms_norm` does so in
    passing, and `close` alone.
    """
    made = call("open_mixture", x_TD, experts_TK, weights_TK, gate_up_E2FD, down_EDF, gate_GD, up_GD, down_DG)
    return made if isinstance(made, Tensor) else OpenSum(*made)


def close(y: OpenSum) -> Tensor:
    """The rows (T, D) of an open mixture: sums over k of weights[t,k] * rows[t K + k], and over s of
    dense[s,t], each in float32 and cast, then added."""
    return call("close", *y)


def sum_choices(rows_MD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The last step of `grouped_mlp`: y_t = sum over k of weights[t,k] * rows[t K + k].

    In float32, cast once. Rows of dropped choices (-1) are zeros. No gradient.
    """
    return call("sum_choices", rows_MD, experts_TK, weights_TK)


def attention(
    q_THQ: Tensor,
    k_TGQ: Tensor,
    v_TGV: Tensor,
    cu_seqlens_S1: Tensor,
    max_seqlen: int,
    scale: float,
    cu_keys_S1: Tensor | None = None,
    max_keys: int = 0,
) -> Tensor:
    """Causal attention within each sequence of a pack: o_THV.

    Query head h reads key-value head h * G / H. Softmax in float32. V may differ from Q (MLA: 128 and 192).
    Differentiable in q, k and v. With `cu_keys_S1` keys and values have boundaries of their own, at most
    `max_keys` a sequence: its n queries are the last of N tokens, and query i sees the first N - n + i + 1.
    """
    own = () if cu_keys_S1 is None else (cu_keys_S1, max_keys)
    return call("attention", q_THQ, k_TGQ, v_TGV, cu_seqlens_S1, max_seqlen, scale, *own)


def window_attention(
    q_THQ: Tensor,
    k_TGQ: Tensor,
    v_TGV: Tensor,
    cu_seqlens_S1: Tensor,
    max_seqlen: int,
    scale: float,
    window: int,
) -> Tensor:
    """`attention` in which a token sees the last `window` positions, its own among them."""
    if window < 1:
        raise ValueError(f"window_attention: window is {window}; a token sees at least itself, use 1 or more")
    return call("window_attention", q_THQ, k_TGQ, v_TGV, cu_seqlens_S1, max_seqlen, scale, window)


def attention_part(
    q_nHQ: Tensor, k_NGQ: Tensor, v_NGV: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention of one sequence's n queries over N keys: o_nHV, and lse_nH in float32.

    lse is the logarithm of the sum of exp(scale q k) over the keys that a query sees: all of them, or if
    `causal` the first N - n + i + 1 for query i. What no key is seen by is 0, with an lse of -inf.
    `merge_attention` joins the parts of disjoint keys. No gradient.
    """
    return call("attention_part", q_nHQ, k_NGQ, v_NGV, scale, causal)


def merge_attention(
    a_nHV: Tensor, lse_a_nH: Tensor, b_nHV: Tensor, lse_b_nH: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, from that over each: o_nHV and lse_nH, float32 or wider.

    o = (e^lse_a a + e^lse_b b) / (e^lse_a + e^lse_b). No gradient.
    """
    return call("merge_attention", a_nHV, lse_a_nH, b_nHV, lse_b_nH)


def write_cache(pages: Tensor, slots_T: Tensor, rows: Tensor) -> None:
    """Keep row t of `rows` (T, ...) at slot `slots_T[t]` of `pages` (P, page_size, ...), in place. No
    gradient.
    """
    call("write_cache", pages, slots_T, rows)


def write_latent_cache(
    q_THR: Tensor,
    kv_TL: Tensor,
    weight_C: Tensor,
    eps: float,
    cos_TR2: Tensor,
    sin_TR2: Tensor,
    pages: Tensor,
    slots_T: Tensor,
    *,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """What MLA does to a token before it attends to a cache: rotated queries (T, H, R), and rows (T, C + R).

    The queries are turned where they lie, so that those of which they are a part are whole. A row is
    `rms_norm` of the first C elements of `kv_TL` and `rope` of the last R; it is kept at its slot of `pages`
    (P, page_size, C + R) and returned, as the cache has it. Cast points are those of the two ops. No
    gradient.
    """
    return call(
        "write_latent_cache", q_THR, kv_TL, weight_C, eps, cos_TR2, sin_TR2, pages, slots_T, interleaved
    )


def latent_queries(
    q_THQ: Tensor,
    kv_TL: Tensor,
    norm_C: Tensor,
    eps: float,
    cos_TR2: Tensor,
    sin_TR2: Tensor,
    kv_b: Tensor,
    pages: Tensor,
    slots_T: Tensor,
    *,
    interleaved: bool,
) -> Tensor:
    """Queries (T, H, C + R) that `latent_attention` takes; the tokens' rows are written to the cache.

    Of each query (N + R elements) the first N are multiplied by the head's W_UK, and the last R rotated.
    `kv_b` (H (N + V), C) holds W_UK and W_UV of each head, one after the other. Rows and pages as in
    `write_latent_cache`. No gradient.
    """
    return call(
        "latent_queries",
        q_THQ,
        kv_TL,
        norm_C,
        eps,
        cos_TR2,
        sin_TR2,
        kv_b,
        pages,
        slots_T,
        interleaved,
    )


def keys_and_values(kv_THX: Tensor, shared_TR: Tensor, value_dim: int) -> tuple[Tensor, Tensor]:
    """Of each head's [key | value], and what all keys share behind their own: keys (T, H, N + R) and values
    (T, H, V), a view. Differentiable in both.
    """
    return call("keys_and_values", kv_THX, shared_TR, value_dim)


def latent_values(o_THC: Tensor, kv_b: Tensor, value_dim: int) -> Tensor:
    """W_UV of each head times what `latent_attention` made of latents: (T, H, V). `kv_b` as in
    `latent_queries`. No gradient.
    """
    return call("latent_values", o_THC, kv_b, value_dim)


def write_kv_cache(
    q_THQ: Tensor,
    k_TGQ: Tensor,
    v_TGQ: Tensor,
    cos_TR2: Tensor,
    sin_TR2: Tensor,
    pages: Tensor,
    slots_T: Tensor,
    *,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries, rotated keys and values; keys and values are kept at their slots of `pages` (P,
    page_size, 2, G, Q), and returned as the cache has them. No gradient.
    """
    return call("write_kv_cache", q_THQ, k_TGQ, v_TGQ, cos_TR2, sin_TR2, pages, slots_T, interleaved)


def read_cache(
    pages: Tensor, table_B: Tensor, first: int, last: int, numbers: int, dtype: torch.dtype
) -> Tensor:
    """Positions `first` to `last` of the sequence with the pages `table_B`, in order: (last - first, ...).

    Of a cache in FP8 in `dtype`, the first `numbers` of a row being those in e4m3.
    """
    return call("read_cache", pages, table_B, first, last, numbers, dtype)


def paged_attention(
    q_THQ: Tensor,
    pages: Tensor,
    block_table_SB: Tensor,
    context_lens_S: Tensor,
    max_context_len: int,
    cu_seqlens_S1: Tensor,
    max_seqlen: int,
    scale: float,
) -> Tensor:
    """Attention of new tokens over a paged cache of keys and values, `pages` (P, page_size, 2, G, Q): o_THQ.

    The n new tokens of sequence s are the last n of its `context_lens_S[s]` positions and are already in the
    cache; each sees the positions up to its own. `max_context_len` and `max_seqlen` may be upper bounds, and
    a sequence without positions (an empty place of a CUDA graph) gets zeros. What lies past a context may be
    anything, NaN included, and touches no result. Softmax in float32. No gradient.
    """
    return call(
        "paged_attention",
        q_THQ,
        pages,
        block_table_SB,
        context_lens_S,
        max_context_len,
        cu_seqlens_S1,
        max_seqlen,
        scale,
    )


def latent_attention(
    q_THL: Tensor,
    pages: Tensor,
    block_table_SB: Tensor,
    context_lens_S: Tensor,
    max_context_len: int,
    cu_seqlens_S1: Tensor,
    max_seqlen: int,
    latent_rank: int,
    scale: float,
    values: tuple[Tensor, int] | None = None,
) -> Tensor:
    """Absorbed MLA over a paged latent cache, `pages` (P, page_size, C + R): o_THC, with C = `latent_rank`.
    With `values`, (kv_b, V), what `latent_values` makes of that: (T, H, V).

    One key head of C + R elements serves every query head, and its first C elements are the value. Queries
    are already multiplied by W_UK (first C) and rotated (last R). Positions and masking as in
    `paged_attention`.
    """
    return call(
        "latent_attention",
        q_THL,
        pages,
        block_table_SB,
        context_lens_S,
        max_context_len,
        cu_seqlens_S1,
        max_seqlen,
        latent_rank,
        scale,
        values,
    )


def index_scores(
    q_TJI: Tensor, weights_TJ: Tensor, k_TI: Tensor, cu_seqlens_S1: Tensor, max_seqlen: int
) -> Tensor:
    """The lightning indexer (DeepSeek-V3.2, arXiv 2512.02556, eq. 1): scores (T, N), with N = `max_seqlen`.

    scores[t, n] = sum over j of weights[t,j] * relu(q[t,j] . k[n]), n counted from the start of t's sequence;
    -inf where n comes after t. In float32 whatever the inputs' dtypes. Differentiable in q, weights and k.
    """
    return call("index_scores", q_TJI, weights_TJ, k_TI, cu_seqlens_S1, max_seqlen)


def paged_index_scores(
    q_TJI: Tensor,
    weights_TJ: Tensor,
    pages: Tensor,
    block_table_SB: Tensor,
    context_lens_S: Tensor,
    max_context_len: int,
    cu_seqlens_S1: Tensor,
    max_seqlen: int,
) -> Tensor:
    """`index_scores` of new tokens over a paged cache of index keys, `pages` (P, page_size, I): (T, N), with
    N = `max_context_len`.

    `pages` may be a view into wider rows. Positions and masking as in `paged_attention`. No gradient.
    """
    return call(
        "paged_index_scores",
        q_TJI,
        weights_TJ,
        pages,
        block_table_SB,
        context_lens_S,
        max_context_len,
        cu_seqlens_S1,
        max_seqlen,
    )


def select_top(scores_TN: Tensor, top_k: int) -> Tensor:
    """The columns of the `top_k` largest scores of each row, in ascending order: (T, K) int64, K = min(top_k,
    N).

    Ties go to the smaller column, so what is chosen does not depend on N. A score of -inf is never chosen,
    NaN counts as one; where fewer remain, -1 fills the end. No gradient.
    """
    if top_k < 1:
        raise ValueError(f"select_top: top_k is {top_k}; a token reads at least one position, use 1 or more")
    return call("select_top", scores_TN, min(top_k, scores_TN.shape[1]))


def name_rows(
    places_TK: Tensor, cu_seqlens_S1: Tensor, block_table_SB: Tensor | None, page_size: int
) -> Tensor:
    """Positions of each token's sequence (of `select_top`) as rows of the pack, or with a block table as
    slots of the cache: (T, K) int64. -1 stays -1. No gradient.
    """
    return call("name_rows", places_TK, cu_seqlens_S1, block_table_SB, page_size)


def sparse_latent_attention(
    q_THL: Tensor, rows_XL: Tensor, indices_TK: Tensor, latent_rank: int, scale: float
) -> Tensor:
    """Absorbed MLA of each token over the rows it names: o_THC, with C = `latent_rank`.

    Rows and queries as in `latent_attention`; `rows_XL` are those of a pack, or of all slots of a cache, in
    FP8 too, and may be a view into wider ones. `indices_TK` (int64) names rows, -1 none; a token names at
    least one, and none twice. Rows that a token does not name may be NaN and touch nothing of its result.
    Softmax in float32. Differentiable in q and rows.
    """
    return call("sparse_latent_attention", q_THL, rows_XL, indices_TK, latent_rank, scale)


def attention_mass(
    q_THQ: Tensor,
    k_TGQ: Tensor,
    cu_seqlens_S1: Tensor,
    max_seqlen: int,
    scale: float,
    places_TK: Tensor | None = None,
) -> Tensor:
    """How causal attention spreads, averaged over heads: (T, N) float32, N = `max_seqlen`, rows sum to 1.

    mass[t, n] is the mean over heads of softmax_n(scale * q . k), 0 where n comes after t. With `places_TK`
    (of `select_top`) the softmax is over those positions, and the rest is 0. Heads as in `attention`. No
    gradient.
    """
    return call("attention_mass", q_THQ, k_TGQ, cu_seqlens_S1, max_seqlen, scale, places_TK)


def compressed_attention(
    q_THQ: Tensor,
    k_MGQ: Tensor,
    v_MGV: Tensor,
    cu_seqlens_S1: Tensor,
    cu_entries_S1: Tensor,
    max_seqlen: int,
    block: int,
    stride: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of a pack's tokens over entries that each stand for `block` tokens: o_THV, lse_TH (float32).

    Entry j of a sequence stands for its tokens from j * `stride` on, and is seen from the last of them on.
    The entries of all sequences lie end to end, by `cu_entries_S1`; what follows them is read by nobody, and
    gets a gradient of 0. Who sees none gets 0, with an lse of -inf. Heads as in `attention`. Differentiable
    in q, k and v through o (arXiv 2502.11089, eq. 7).
    """
    where = cu_seqlens_S1, cu_entries_S1, max_seqlen
    o_THV, lse_TH = call("compressed_attention", q_THQ, k_MGQ, v_MGV, *where, block, stride, scale)
    return o_THV, lse_TH


def select_blocks(
    q_THQ: Tensor,
    k_MGQ: Tensor,
    lse_TH: Tensor,
    cu_seqlens_S1: Tensor,
    cu_entries_S1: Tensor,
    max_seqlen: int,
    blocking: Blocking,
    scale: float,
) -> Tensor:
    """The blocks that each token reads, the same for the heads of a group: (T, G, K) int64, ascending.

    A block's value is the probability that compressed attention gives the entries that overlap it, summed
    over heads (arXiv 2502.11089, eq. 8 to 11); the first and the local ones come before all. K is `top_k`, or
    the blocks of `max_seqlen` if fewer; ties go to the smaller block, and where fewer can be seen -1 fills
    the end. Inputs as in, and lse from, `compressed_attention`. No gradient.
    """
    where = cu_seqlens_S1, cu_entries_S1, max_seqlen
    return call("select_blocks", q_THQ, k_MGQ, lse_TH, *where, tuple(blocking), scale)


def block_attention(
    q_THQ: Tensor,
    k_TGQ: Tensor,
    v_TGV: Tensor,
    blocks_TGK: Tensor,
    cu_seqlens_S1: Tensor,
    max_seqlen: int,
    block: int,
    scale: float,
) -> Tensor:
    """Causal attention of each token over the blocks of its sequence that it names, by group: o_THV.

    Block j is positions j * `block` on. -1 names none, and none is named twice; who sees nothing gets 0.
    Heads as in `attention`. Differentiable in q, k and v.
    """
    return call("block_attention", q_THQ, k_TGQ, v_TGV, blocks_TGK, cu_seqlens_S1, max_seqlen, block, scale)


def paged_runs_attention(
    q_THQ: Tensor,
    pages: Tensor,
    starts_TGK: Tensor,
    length: int,
    stride: int,
    block_table_SB: Tensor,
    context_lens_S: Tensor,
    cu_seqlens_S1: Tensor,
    max_seqlen: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of new tokens over runs of positions in a paged cache: o_THV and lse_TH (float32).

    A row of `pages` (P, page_size, G, Q + V) is a key, then a value; it may be a view into wider rows. A
    group reads, for a token, `length` positions from each of its `starts_TGK` on, every `stride`-th; those
    below 0 or after the token are left out. Nothing read is 0, with an lse of -inf. Positions, contexts and
    NaN as in `paged_attention`. No gradient.
    """
    where = block_table_SB, context_lens_S, cu_seqlens_S1, max_seqlen
    o_THV, lse_TH = call("paged_runs_attention", q_THQ, pages, starts_TGK, length, stride, *where, scale)
    return o_THV, lse_TH


def paged_select_blocks(
    q_THQ: Tensor,
    pages: Tensor,
    lse_TH: Tensor,
    block_table_SB: Tensor,
    context_lens_S: Tensor,
    max_context_len: int,
    cu_seqlens_S1: Tensor,
    max_seqlen: int,
    blocking: Blocking,
    scale: float,
) -> Tensor:
    """`select_blocks` of new tokens over a paged cache, K by `max_context_len`.

    The row of the token that completes an entry's block begins with the entry's key: `pages` (P, page_size,
    G, Q or more). lse is of `paged_runs_attention` over the entries. No gradient.
    """
    where = block_table_SB, context_lens_S, max_context_len, cu_seqlens_S1, max_seqlen
    return call("paged_select_blocks", q_THQ, pages, lse_TH, *where, tuple(blocking), scale)


# ----------------------------------------------------------------------------------------------------
# Half a block as one kernel, for a few rows, where calls cost more than arithmetic. These have no
# reference here: what they equal is the modules that they stand for, and where no kernel takes a call they
# return None.


def latent_step(
    x_TD: Tensor,
    norm_D: Tensor,
    norm_eps: float,
    weights: LatentWeights,
    latent_eps: float,
    head_dims: tuple[int, int, int, int],
    cos_TR2: Tensor,
    sin_TR2: Tensor,
    pages: Tensor,
    slots_T: Tensor,
    block_table_SB: Tensor,
    context_lens_S: Tensor,
    max_context_len: int,
    cu_seqlens_S1: Tensor,
    scale: float,
    *,
    interleaved: bool,
) -> Tensor | None:
    """x + MLA(norm(x)) in its absorbed form, the new rows of the cache written: (T, D), or None.

    `head_dims` is (H, N, R, V). The cache as in `latent_attention`. No gradient.
    """
    return fuse(
        "latent_step",
        x_TD,
        norm_D,
        norm_eps,
        weights,
        latent_eps,
        head_dims,
        cos_TR2,
        sin_TR2,
        pages,
        slots_T,
        block_table_SB,
        context_lens_S,
        max_context_len,
        cu_seqlens_S1,
        scale,
        interleaved,
    )


def grouped_step(
    x_TD: Tensor,
    norm_D: Tensor,
    norm_eps: float,
    weights: GroupedWeights,
    cos_TQ2: Tensor,
    sin_TQ2: Tensor,
    pages: Tensor,
    slots_T: Tensor,
    block_table_SB: Tensor,
    context_lens_S: Tensor,
    max_context_len: int,
    cu_seqlens_S1: Tensor,
    scale: float,
    *,
    interleaved: bool,
) -> Tensor | None:
    """x + GQA(norm(x)), the new rows of the cache written: (T, D), or None. q's and k's norms share the eps.

    The cache as in `paged_attention`, which tells the heads. No gradient.
    """
    return fuse(
        "grouped_step",
        x_TD,
        norm_D,
        norm_eps,
        weights,
        cos_TQ2,
        sin_TQ2,
        pages,
        slots_T,
        block_table_SB,
        context_lens_S,
        max_context_len,
        cu_seqlens_S1,
        scale,
        interleaved,
    )


def mlp_step(
    x_TD: Tensor, norm_D: Tensor, norm_eps: float, gate_ID: Tensor, up_ID: Tensor, down_DI: Tensor
) -> Tensor | None:
    """x + down(silu(gate(norm(x))) * up(norm(x))): (T, D), or None. No gradient."""
    return fuse("mlp_step", x_TD, norm_D, norm_eps, gate_ID, up_ID, down_DI)


def moe_step(
    x_TD: Tensor,
    norm_D: Tensor,
    norm_eps: float,
    weights: ExpertWeights,
    top_k: int,
    *,
    scoring_func: Literal["softmax", "sigmoid"],
    n_group: int = 1,
    topk_group: int = 1,
    norm_topk_prob: bool = False,
    routed_scaling_factor: float = 1.0,
) -> tuple[Tensor, Routing] | None:
    """x + MoE(norm(x)), routed as in `route`, and the routing: (T, D), or None. No gradient."""
    done = fuse(
        "moe_step",
        x_TD,
        norm_D,
        norm_eps,
        weights,
        top_k,
        scoring_func,
        n_group,
        topk_group,
        norm_topk_prob,
        routed_scaling_factor,
    )
    return None if done is None else (done[0], Routing(*done[1:]))


def norm_step(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor | None:
    """`rms_norm`, or None. No gradient."""
    return fuse("norm_step", x_TD, weight_D, eps)


def head_step(x_TD: Tensor, weight_VD: Tensor) -> Tensor | None:
    """x W^T: (T, V), or None. No gradient."""
    return fuse("head_step", x_TD, weight_VD)


def greedy_step(logits_SV: Tensor, scores_SV: Tensor) -> Sampled | None:
    """`sample` at temperature 0 for every row, to rounding, or None."""
    done = fuse("greedy_step", logits_SV, scores_SV)
    return None if done is None else Sampled(*done)


def record(
    slots_T: Tensor,
    ids_T: Tensor,
    choices_LTK: Tensor,
    ids_X: Tensor,
    experts_XLK: Tensor,
    tokens_LE: Tensor,
    touched_L: Tensor,
    num_slots: int,
) -> None:
    """Leave a token's id and its experts in every layer at its slot of the cache, and count; in place.

    Slots, ids and choices are int64, a choice -1 where it was dropped; `ids_X` is int32, `experts_XLK` int16.
    `tokens_LE` (int64) counts what each expert was given, `touched_L` (int64) how many distinct experts a
    step gave anything; a slot from `num_slots` on is padding's, and is not counted. No gradient.
    """
    call("record", slots_T, ids_T, choices_LTK, ids_X, experts_XLK, tokens_LE, touched_L, num_slots)


def record_step(
    slots_T: Tensor,
    ids_T: Tensor,
    choices_LTK: Tensor,
    ids_X: Tensor,
    experts_XLK: Tensor,
    tokens_LE: Tensor,
    touched_L: Tensor,
    num_slots: int,
) -> bool:
    """`record`, if it was done. IndexError for a slot or an expert outside of the tables."""
    arguments = slots_T, ids_T, choices_LTK, ids_X, experts_XLK, tokens_LE, touched_L, num_slots
    return fuse("record_step", *arguments) is not None


def linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, weights_T: Tensor
) -> CrossEntropy:
    """Output head and cross-entropy in one, without ever holding the T x V logits.

    Logits and softmax in float32 (the product in the inputs' dtype). Differentiable in hidden and weight
    through `total` only. Targets outside [0, V) are refused where checking costs nothing (on a CPU); T may be
    0.
    """
    return CrossEntropy(*call("linear_cross_entropy", hidden_TD, weight_VD, targets_T, weights_T))


def adamw(
    weight: Tensor,
    grad: Tensor,
    moments: Moments,
    master: Tensor | None,
    factor: Tensor | None,
    step: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    key: int,
) -> None:
    """One AdamW update (arXiv 1711.05101), in place, of a weight of any shape. No gradient.

    All is computed in float32. The weight follows a float32 `master`, or is its own: a bfloat16 one is then
    rounded at random, by odds that keep the mean, and so are narrow moments. What is stored narrow is exact
    in the update of the step that made it. The gradient counts `factor` times (float32 scalar, on the
    device); a factor that is not finite calls the update off. `step` is the number of this update, from 1, a
    float32 scalar on the device. Random bits are a function of `key`, `step` and the element alone.
    """
    call("adamw", weight, grad, moments, master, factor, step, lr, betas, eps, weight_decay, key)


def narrow_load(values: Tensor, scale: Tensor | None) -> Tensor:
    """Float32 of what `narrow_store` kept."""
    return call("narrow_load", values, scale)


def narrow_store(values: Tensor, scale: Tensor | None, x: Tensor, key: int, step: Tensor) -> None:
    """Keep float32 x in `values` (float32, bfloat16, int8 or uint8, as in Moments), rounded at random.

    The mean is kept: E[narrow_load] = x, of int8 to 1/512 of a step, of uint8 to 0.1%; uint8 values below
    2^-21 of their block's largest are kept as that. Bits as in `adamw`.
    """
    call("narrow_store", values, scale, x, key, step)


def sample(
    logits_SV: Tensor,
    temperature_S: Tensor,
    top_k_S: Tensor,
    top_p_S: Tensor,
    min_p_S: Tensor,
    uniforms_S: Tensor,
    *,
    scores_SV: Tensor | None = None,
) -> Sampled:
    """Draw each row from softmax(scores / temperature), restricted, at the number u in [0, 1) it is given.

    Kept are the `top_k` most probable (0: all), of them the fewest whose probabilities reach `top_p` of
    theirs, of these the ones at least `min_p` times as probable as the best; equals of the last one kept are
    kept too. Drawn is the first token, by id, whose cumulative probability exceeds u times the total; a token
    of probability 0 never. Temperature 0 takes the best, the lowest id among equals.

    `scores_SV` (float32, from `penalise`) is what is drawn from; without it the logits are. Log-probabilities
    are the logits' own. Temperature and min_p are float32, top_p and u float64, top_k int32. A row depends on
    itself alone; NaN or +inf in it shows as a log-probability that is not finite. No gradient.
    """
    for name, row, dtype in (
        ("temperature", temperature_S, torch.float32),
        ("top_k", top_k_S, torch.int32),
        ("top_p", top_p_S, torch.float64),
        ("min_p", min_p_S, torch.float32),
        ("uniforms", uniforms_S, torch.float64),
    ):
        if row.dtype != dtype or row.shape != logits_SV.shape[:1]:
            raise ValueError(
                f"sample: {name} is {tuple(row.shape)} {row.dtype}; "
                f"give one {dtype} for each of the {logits_SV.shape[0]} rows"
            )
    return Sampled(
        *call("sample", logits_SV, temperature_S, top_k_S, top_p_S, min_p_S, uniforms_S, scores_SV)
    )


def penalise(
    logits_SV: Tensor,
    ids_SN: Tensor,
    lengths_S: Tensor,
    num_prompt_S: Tensor,
    repetition_S: Tensor,
    frequency_S: Tensor,
    presence_S: Tensor,
) -> Tensor:
    """Scores (S, V) in float32: the logits, less for what a row has said before.

    Row s has the first `lengths_S[s]` of `ids_SN[s]` behind it, the first `num_prompt_S[s]` of them its
    prompt, the rest its text; what lies past the length may be anything. In order: the logit of a token that
    stands in either is divided by `repetition` if positive, multiplied if not; `frequency` times its count in
    the text is subtracted, and `presence` if that is not 0. Ids and lengths are int32 or int64, factors
    float32. No gradient.
    """
    return call("penalise", logits_SV, ids_SN, lengths_S, num_prompt_S, repetition_S, frequency_S, presence_S)
