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
    meet,
    norm_rows,
    product,
    project,
    share,
    softmax,
    swiglu,
    void,
)

MLP = i64(
    *(F32, i64, i64, F32, f32),  # x_TD, norm and its eps
    *(F32, F32, F32, i64),  # gate (I, D), up (I, D), down (D, I), I
    *(F32, F32, i64, i64),  # scratch, out_TD, part, parts
)
MOE = i64(
    *(F32, i64, i64, F32, f32),  # x_TD, norm and its eps
    *(F32, F32, i64, i64, i64, i64),  # gate (E, D), bias_E, whether there is one, E, K, whether sigmoid
    *(i64, i64, i64, f32),  # n_group, topk_group, whether weights are normalised, their factor
    *(F32, F32, i64),  # gate_up (E, 2 F, D), down (E, D, F), F
    *(F32, F32, F32, i64),  # the shared experts' gate, up, down, and hidden size (0: none)
    *(I64, F32, F32, F32),  # experts_TK, weights_TK, scores_TE, logits_TE
    *(F32, F32, i64, i64),  # scratch, out_TD, part, parts
)


@entry(MLP)
def mlp_step(x, T, D, in_norm, in_eps, gate, up, down, inner, scratch, out, part, parts):
    # Scratch: gate and up rows; then of each part x normalised.
    up0 = T * inner
    x0 = 2 * T * inner + part * T * D
    norm_rows(x, 0, T, in_norm, D, in_eps, scratch, x0)
    project(scratch, x0, D, T, gate, inner, D, scratch, 0, inner, part, parts)
    project(scratch, x0, D, T, up, inner, D, scratch, up0, inner, part, parts)
    first, end = share(inner, part, parts), share(inner, part + 1, parts)
    for t in range(T):
        swiglu(scratch, t * inner + first, scratch, up0 + t * inner + first, end - first)
    meet()
    project(scratch, 0, inner, T, down, D, inner, out, 0, D, part, parts)
    add_rows(x, out, T, D, part, parts)
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


@kernel(void(F32, i64, i64, i64, F32, i64, F32, i64, F32, i64, i64, F32, i64, i64, F32, i64))
def feed(x, x0, rows, D, gate, g0, up, u0, down, d0, inner, scratch, gate0, up0, y, y0):
    """y = down(silu(gate x) up x), with room for `rows` times `inner` elements at gate0 and at up0."""
    product(x, x0, D, rows, gate, g0, inner, D, scratch, gate0, inner)
    product(x, x0, D, rows, up, u0, inner, D, scratch, up0, inner)
    swiglu(scratch, gate0, scratch, up0, rows * inner)
    product(scratch, gate0, inner, rows, down, d0, D, inner, y, y0, D)


@entry(MOE)
def moe_step(
    x, T, D, in_norm, in_eps, gate, bias, biased, E, K, sigmoid, n_group, topk_group, normalise, factor,
    gate_up, down, F, shared_gate, shared_up, shared_down, shared_width, experts, weights, scores, logits,
    scratch, out, part, parts,
):  # fmt: skip
    # Scratch: x normalised and the experts' rows of y; then of each part selection values and two a group, an
    # expert's x and y, and gate and up rows of whatever is wider.
    wide = max(F, shared_width)
    y0 = T * D
    selection0 = y0 + T * K * D + part * (E + 2 * n_group + 2 * T * (D + wide))
    groups0 = selection0 + E
    x0 = groups0 + 2 * n_group
    out0 = x0 + T * D
    gate0 = out0 + T * D
    up0 = gate0 + T * wide
    # 1. Score every expert: the part's share of tokens.
    first, end = share(T, part, parts), share(T, part + 1, parts)
    norm_rows(x, first * D, end - first, in_norm, D, in_eps, scratch, first * D)
    product(scratch, first * D, D, end - first, gate, 0, E, D, logits, first * E, E)
    for i in range(first * E, end * E):
        scores[i] = logits[i]
    for t in range(first, end):
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
    meet()
    # 8. The shared experts and each expert with all of its rows, in turn to the parts.
    turn = np.int64(0)
    if shared_width:
        if part == 0:
            feed(
                scratch, 0, T, D, shared_gate, 0, shared_up, 0, shared_down, 0, shared_width,
                scratch, gate0, up0, out, 0,
            )  # fmt: skip
        turn = 1 % parts
    elif part == 0:
        for i in range(T * D):
            out[i] = np.float32(0)
    for e in range(E):
        rows = np.int64(0)
        for m in range(T * K):
            if experts[m] == e:
                if turn == part:
                    for i in range(D):
                        scratch[x0 + rows * D + i] = scratch[m // K * D + i]
                rows += 1
        if rows == 0:
            continue
        if turn == part:
            w0 = e * 2 * F * D
            feed(
                scratch, x0, rows, D, gate_up, w0, gate_up, w0 + F * D, down, e * D * F, F,
                scratch, gate0, up0, scratch, out0,
            )  # fmt: skip
            rows = np.int64(0)
            for m in range(T * K):
                if experts[m] == e:
                    for i in range(D):
                        scratch[y0 + m * D + i] = scratch[out0 + rows * D + i]
                    rows += 1
        turn = (turn + 1) % parts
    meet()
    # 9. Their sum, onto x.
    for t in range(T):
        for k in range(K):
            m = t * K + k
            for i in range(share(D, part, parts), share(D, part + 1, parts)):
                out[t * D + i] += weights[m] * scratch[y0 + m * D + i]
    add_rows(x, out, T, D, part, parts)
    return 0
