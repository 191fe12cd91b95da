"""A block's feed-forward half for a few rows, as one kernel: x + ffn(norm(x)), dense or a mixture of experts.

Routing is `ops/reference/routing.py` step by step. An expert's weights are read once for all the rows that
chose it, so a step reads the experts that its tokens chose and no others.

Shape letters: T tokens, D hidden, E experts, K experts per token, F expert hidden, I (`inner`) dense hidden.
"""

from __future__ import annotations

import numpy as np

from shoal.ops.cpu.kernels.rows import (
    F32,
    I64,
    add_rows,
    entry,
    exp,
    f32,
    i64,
    kernel,
    norm_rows,
    product,
    softmax,
    swiglu,
    void,
)

MLP = i64(
    *(F32, i64, i64, F32, f32),  # x_TD, norm and its eps
    *(F32, F32, F32, i64),  # gate (I, D), up (I, D), down (D, I), I
    *(F32, F32),  # scratch, out_TD
)
MOE = i64(
    *(F32, i64, i64, F32, f32),  # x_TD, norm and its eps
    *(F32, F32, i64, i64, i64, i64),  # gate (E, D), bias_E, whether there is one, E, K, whether sigmoid
    *(i64, i64, i64, f32),  # n_group, topk_group, whether weights are normalised, their factor
    *(F32, F32, i64),  # gate_up (E, 2 F, D), down (E, D, F), F
    *(F32, F32, F32, i64),  # the shared experts' gate, up, down, and hidden size (0: none)
    *(I64, F32, F32, F32),  # experts_TK, weights_TK, scores_TE, logits_TE
    *(F32, F32),  # scratch, out_TD
)


@kernel(void(F32, i64, i64, i64, F32, F32, F32, i64, F32, i64, F32))
def feed(x, x0, T, D, gate, up, down, inner, scratch, gate0, out):
    """out = down(silu(gate x) up x), with room for 2 T inner elements at gate0."""
    up0 = gate0 + T * inner
    product(x, x0, D, T, gate, 0, inner, D, scratch, gate0, inner)
    product(x, x0, D, T, up, 0, inner, D, scratch, up0, inner)
    swiglu(scratch, gate0, scratch, up0, T * inner)
    product(scratch, gate0, inner, T, down, 0, D, inner, out, 0, D)


@entry(MLP)
def mlp_step(x, T, D, in_norm, in_eps, gate, up, down, inner, scratch, out):
    norm_rows(x, 0, T, in_norm, D, in_eps, scratch, 0)
    feed(scratch, 0, T, D, gate, up, down, inner, scratch, T * D, out)
    add_rows(x, out, T * D)
    return 0


@kernel(i64(F32, i64, i64))
def take_best(values, v0, count):
    """The index of the largest, the smaller of equals, NaN above all; -inf is left in its place."""
    best, best_value = np.int64(0), np.float32(-np.inf)
    for i in range(count):
        value = values[v0 + i]
        if value != value:
            value = np.float32(np.inf)
        if value > best_value:
            best, best_value = np.int64(i), value
    values[v0 + best] = np.float32(-np.inf)
    return best


@kernel(void(F32, i64, i64, i64, i64, i64, i64))
def keep_best_groups(selection, s0, E, n_group, topk_group, biased, groups0):
    """-inf for every expert outside the best groups, with room for 2 n_group elements at groups0."""
    width, kept0 = E // n_group, groups0 + n_group
    for g in range(n_group):
        first = second = np.float32(-np.inf)
        for e in range(width):
            value = selection[s0 + g * width + e]
            if value > first or value != value:
                first, second = value, first
            elif value > second:
                second = value
        selection[groups0 + g] = first + second if biased else first
        selection[kept0 + g] = np.float32(0)
    for _ in range(topk_group):
        selection[kept0 + take_best(selection, groups0, n_group)] = np.float32(1)
    for e in range(E):
        if selection[kept0 + e // width] == np.float32(0):
            selection[s0 + e] = np.float32(-np.inf)


@entry(MOE)
def moe_step(
    x, T, D, in_norm, in_eps, gate, bias, biased, E, K, sigmoid, n_group, topk_group, normalise, factor,
    gate_up, down, F, shared_gate, shared_up, shared_down, shared_width, experts, weights, scores, logits,
    scratch, out,
):  # fmt: skip
    # Scratch: x normalised, selection values and two a group, the shared experts' rows, then an expert's x,
    # gate-up and down rows.
    selection0 = T * D
    groups0 = selection0 + E
    shared0 = groups0 + 2 * n_group
    x0 = shared0 + 2 * T * shared_width
    gate0 = x0 + T * D
    y0 = gate0 + T * 2 * F
    norm_rows(x, 0, T, in_norm, D, in_eps, scratch, 0)
    # 1. Score every expert.
    product(scratch, 0, D, T, gate, 0, E, D, logits, 0, E)
    for i in range(T * E):
        scores[i] = logits[i]
    for t in range(T):
        s0 = t * E
        if sigmoid:
            for e in range(E):
                scores[s0 + e] = np.float32(1) / (np.float32(1) + exp(-scores[s0 + e]))
        else:
            softmax(scores, s0, E)
        # 2. Selection is by score plus bias, 3. within the best groups.
        for e in range(E):
            scratch[selection0 + e] = scores[s0 + e] + bias[e] if biased else scores[s0 + e]
        if n_group > 1:
            keep_best_groups(scratch, selection0, E, n_group, topk_group, biased, groups0)
        # 4. Choose, 5. weigh, 6. normalise, 7. scale.
        total = np.float32(1e-20)
        for k in range(K):
            best = take_best(scratch, selection0, E)
            experts[t * K + k] = best
            weights[t * K + k] = scores[s0 + best]
            total += scores[s0 + best]
        for k in range(K):
            if normalise:
                weights[t * K + k] /= total
            weights[t * K + k] *= factor
    # 8. The shared experts open the sum.
    if shared_width:
        feed(scratch, 0, T, D, shared_gate, shared_up, shared_down, shared_width, scratch, shared0, out)
    else:
        for i in range(T * D):
            out[i] = np.float32(0)
    # 9. Each expert with all of its rows.
    for e in range(E):
        rows = np.int64(0)
        for m in range(T * K):
            if experts[m] == e:
                for i in range(D):
                    scratch[x0 + rows * D + i] = scratch[m // K * D + i]
                rows += 1
        if rows == 0:
            continue
        product(scratch, x0, D, rows, gate_up, e * 2 * F * D, 2 * F, D, scratch, gate0, 2 * F)
        for r in range(rows):
            swiglu(scratch, gate0 + r * 2 * F, scratch, gate0 + r * 2 * F + F, F)
        product(scratch, gate0, 2 * F, rows, down, e * D * F, D, F, scratch, y0, D)
        rows = np.int64(0)
        for m in range(T * K):
            if experts[m] == e:
                for i in range(D):
                    out[m // K * D + i] += weights[m] * scratch[y0 + rows * D + i]
                rows += 1
    add_rows(x, out, T * D)
    return 0
