"""A block's attention half for a few new tokens over the paged cache: x + W_o attention(norm(x)), one kernel.

`latent_step` is MLA absorbed (`model/mla.py`), `grouped_step` is GQA (`model/gqa.py`). The cache rows of all
new tokens are written first, so a token finds itself among what it may see; then each token of each sequence
goes over its own positions, page by page. A return other than 0 says which index was outside of its table
(`ops/cpu/attention.py` has the words), for here nothing can be raised.

Shape letters as in the modules; L is the query's latent rank (0: none), B pages of a sequence.
"""

from __future__ import annotations

import numpy as np

from shoal.ops.cpu.kernels.rows import (
    F32,
    I32,
    I64,
    add_bias,
    add_rows,
    boolean,
    entry,
    f32,
    i64,
    kernel,
    meet,
    norm_rows,
    product,
    project,
    rotate,
    share,
    softmax,
    void,
)

BAD_SLOT, BAD_CONTEXT, BAD_PAGE = 1, 2, 3

LATENT = i64(
    *(F32, i64, i64, F32, f32),  # x_TD, norm and its eps
    *(F32, F32, F32, F32),  # q_a (L, D), its bias, norm, q_b (H (N + R), L or D)
    *(F32, F32, F32, F32),  # kv_a (C + R, D), its bias, norm, kv_b (H (N + V), C)
    *(F32, F32, i64, f32),  # o (D, H V), its bias; whether there are biases; eps of the latent norms
    *(F32, F32, i64),  # cos_TR2, sin_TR2, whether interleaved
    *(F32, i64, i64, I64),  # pages, how many, their size, slots_T
    *(I32, I32, I32, i64, i64, i64),  # block_table_SB, context_lens_S, cu_seqlens_S1, S, B, longest context
    *(i64, i64, i64, i64, i64, i64),  # L, H, N, R, V, C
    *(f32, F32, F32, i64, i64),  # scale, scratch, out_TD, part, parts
)
GROUPED = i64(
    *(F32, i64, i64, F32, f32),  # x_TD, norm and its eps
    *(F32, F32, F32, F32, F32, F32, i64),  # q, k, v and their biases; whether there are biases
    *(F32, F32, i64),  # o and its bias, whether there is one
    *(F32, F32, i64, f32),  # norms of q and k; 0 none, 1 over a head, 2 over all; their eps
    *(F32, F32, i64),  # cos_TQ2, sin_TQ2, whether interleaved
    *(F32, i64, i64, I64),  # pages, how many, their size, slots_T
    *(I32, I32, I32, i64, i64, i64),  # block_table_SB, context_lens_S, cu_seqlens_S1, S, B, longest context
    *(i64, i64, i64),  # H, G, Q
    *(f32, F32, F32, i64, i64),  # scale, scratch, out_TD, part, parts
)


@kernel(void(F32, i64, i64, i64, F32, i64, i64, i64, I32, i64, i64, i64, i64, F32, i64))
def weigh(
    scores, s0, s_stride, heads, pages, first, page_stride, width, table, t0, page_size, row, seen, o, o0
):
    """o[h] = sum over positions p of scores[h, p] times `width` elements of p's row, from element `first`."""
    for i in range(heads * width):
        o[o0 + i] = np.float32(0)
    at, p = np.int64(0), np.int64(0)
    while p < seen:
        if p % page_size == 0:
            at = np.int64(table[t0 + p // page_size]) * page_stride + first
        if p % page_size + 4 <= page_size and p + 4 <= seen:  # o is read and written once for four rows
            ab, ac, ad = at + row, at + 2 * row, at + 3 * row
            for h in range(heads):
                s, to = s0 + h * s_stride + p, o0 + h * width
                va, vb, vc, vd = scores[s], scores[s + 1], scores[s + 2], scores[s + 3]
                for c in range(width):
                    o[to + c] += (va * pages[at + c] + vb * pages[ab + c]) + (
                        vc * pages[ac + c] + vd * pages[ad + c]
                    )
            at += 4 * row
            p += 4
        else:
            for h in range(heads):
                v = scores[s0 + h * s_stride + p]
                for c in range(width):
                    o[o0 + h * width + c] += v * pages[at + c]
            at += row
            p += 1


@kernel(void(F32, i64, i64, i64, F32, i64, i64, i64, I32, i64, i64, i64, i64, F32, i64, i64))
def score(
    q,
    q0,
    q_stride,
    heads,
    pages,
    first,
    page_stride,
    width,
    table,
    t0,
    page_size,
    row,
    seen,
    scores,
    s0,
    s_stride,
):
    """scores[h, p] = q[h] . `width` elements of p's row, from element `first`."""
    at = np.int64(0)
    for p in range(seen):
        if p % page_size == 0:
            at = np.int64(table[t0 + p // page_size]) * page_stride + first
        product(q, q0, q_stride, heads, pages, at, 1, width, scores, s0 + p, s_stride)
        at += row


@kernel(boolean(I32, i64, i64, i64))
def are_pages(table, t0, count, num_pages):
    good = True
    for i in range(count):
        good = good and 0 <= table[t0 + i] < num_pages
    return good


@kernel(i64(I64, i64, i64, i64, I32, I32, I32, i64, i64, i64))
def fault(slots, T, num_pages, page_size, table, contexts, boundaries, S, B, longest):
    """Which index is outside of its table; 0 if none."""
    for t in range(T):
        if slots[t] < 0 or slots[t] >= num_pages * page_size:
            return BAD_SLOT
    for s in range(S):
        first, end = np.int64(boundaries[s]), np.int64(boundaries[s + 1])
        if first < 0 or end > T or contexts[s] > longest or contexts[s] > B * page_size:
            return BAD_CONTEXT
        if end > first and contexts[s] < end - first:
            return BAD_CONTEXT
        if not are_pages(table, s * B, (contexts[s] + page_size - 1) // page_size, num_pages):
            return BAD_PAGE
    return 0


@entry(LATENT)
def latent_step(
    x, T, D, in_norm, in_eps, q_a, q_a_bias, q_norm, q_b, kv_a, kv_a_bias, kv_norm, kv_b, o, o_bias,
    biased, eps, cos, sin, interleaved, pages, num_pages, page_size, slots, table, contexts, boundaries, S, B,
    longest, L, H, N, R, V, C, scale, scratch, out, part, parts,
):  # fmt: skip
    wrong = fault(slots, T, num_pages, page_size, table, contexts, boundaries, S, B, longest)
    if wrong:  # every part sees it: none waits for another
        return wrong
    Q, row, pairs = N + R, C + R, R // 2
    # Scratch: q, the cache's rows, the query's latents, o; of one token q~, its scores and its weighted
    # latents; then of each part x normalised, or the query's latents.
    kv0 = T * H * Q
    latent0 = kv0 + T * row
    o0 = latent0 + T * L
    absorbed0 = o0 + T * H * V
    scores0 = absorbed0 + H * row
    seen0 = scores0 + H * longest
    x0 = seen0 + H * C + part * T * max(D, L)
    # 1. The part's heads of the queries, and its tokens' rows of the cache.
    h0, h1 = share(H, part, parts), share(H, part + 1, parts)
    norm_rows(x, 0, T, in_norm, D, in_eps, scratch, x0)
    project(scratch, x0, D, T, kv_a, row, D, scratch, kv0, row, part, parts)
    if biased:
        add_bias(kv_a_bias, scratch, kv0, T, row, part, parts)
    if L:
        project(scratch, x0, D, T, q_a, L, D, scratch, latent0, L, part, parts)
        if biased:
            add_bias(q_a_bias, scratch, latent0, T, L, part, parts)
    meet()
    inputs = D
    if L:
        norm_rows(scratch, latent0, T, q_norm, L, eps, scratch, x0)
        inputs = L
    product(scratch, x0, inputs, T, q_b, h0 * Q * inputs, (h1 - h0) * Q, inputs, scratch, h0 * Q, H * Q)
    for t in range(share(T, part, parts), share(T, part + 1, parts)):
        at = kv0 + t * row
        norm_rows(scratch, at, 1, kv_norm, C, eps, scratch, at)
        rotate(scratch, at + C, pairs, cos, sin, t * pairs, interleaved)
        for i in range(row):
            pages[slots[t] * row + i] = scratch[at + i]
    meet()
    for s in range(S):
        first, end = np.int64(boundaries[s]), np.int64(boundaries[s + 1])
        for t in range(first, end):
            seen = np.int64(contexts[s]) - (end - 1 - t)
            # 2. Into the latent space: q~ = W_uk^T q_nope, beside the rotated part, both scaled.
            for h in range(h0, h1):
                q, to, w = (t * H + h) * Q, absorbed0 + h * row, h * (N + V) * C
                for c in range(C):
                    scratch[to + c] = np.float32(0)
                for n in range(N):
                    v = scratch[q + n] * scale
                    for c in range(C):
                        scratch[to + c] += v * kv_b[w + n * C + c]
                rotate(scratch, q + N, pairs, cos, sin, t * pairs, interleaved)
                for i in range(R):
                    scratch[to + C + i] = scratch[q + N + i] * scale
            # 3. Scores, 4. softmax, 5. the sum of latents, 6. out of the latent space.
            score(
                scratch, absorbed0 + h0 * row, row, h1 - h0, pages, 0, page_size * row, row, table, s * B,
                page_size, row, seen, scratch, scores0 + h0 * longest, longest,
            )  # fmt: skip
            for h in range(h0, h1):
                softmax(scratch, scores0 + h * longest, seen)
            weigh(
                scratch, scores0 + h0 * longest, longest, h1 - h0, pages, 0, page_size * row, C, table, s * B,
                page_size, row, seen, scratch, seen0 + h0 * C,
            )  # fmt: skip
            for h in range(h0, h1):
                to, w = o0 + (t * H + h) * V, (h * (N + V) + N) * C
                product(scratch, seen0 + h * C, C, 1, kv_b, w, V, C, scratch, to, V)
    meet()
    # 7. Out, onto x.
    project(scratch, o0, H * V, T, o, D, H * V, out, 0, D, part, parts)
    if biased:
        add_bias(o_bias, out, 0, T, D, part, parts)
    add_rows(x, out, T, D, part, parts)
    return 0


@entry(GROUPED)
def grouped_step(
    x, T, D, in_norm, in_eps, q_w, k_w, v_w, q_bias, k_bias, v_bias, biased, o, o_bias, o_biased, q_norm,
    k_norm, normed, eps, cos, sin, interleaved, pages, num_pages, page_size, slots, table, contexts,
    boundaries, S, B, longest, H, G, Q, scale, scratch, out, part, parts,
):  # fmt: skip
    wrong = fault(slots, T, num_pages, page_size, table, contexts, boundaries, S, B, longest)
    if wrong:  # every part sees it: none waits for another
        return wrong
    row, pairs, shared = 2 * G * Q, Q // 2, H // G
    # Scratch: q, k, v, o, and the scores of one token; then of each part x normalised.
    k0 = T * H * Q
    v0 = k0 + T * G * Q
    o0 = v0 + T * G * Q
    scores0 = o0 + T * H * Q
    x0 = scores0 + H * longest + part * T * D
    # 1. Queries, keys, values, by columns.
    norm_rows(x, 0, T, in_norm, D, in_eps, scratch, x0)
    project(scratch, x0, D, T, q_w, H * Q, D, scratch, 0, H * Q, part, parts)
    project(scratch, x0, D, T, k_w, G * Q, D, scratch, k0, G * Q, part, parts)
    project(scratch, x0, D, T, v_w, G * Q, D, scratch, v0, G * Q, part, parts)
    if biased:
        add_bias(q_bias, scratch, 0, T, H * Q, part, parts)
        add_bias(k_bias, scratch, k0, T, G * Q, part, parts)
        add_bias(v_bias, scratch, v0, T, G * Q, part, parts)
    meet()
    # 2. The new rows of the cache, by tokens.
    for t in range(share(T, part, parts), share(T, part + 1, parts)):
        q, k = t * H * Q, k0 + t * G * Q
        if normed == 1:
            norm_rows(scratch, q, H, q_norm, Q, eps, scratch, q)
            norm_rows(scratch, k, G, k_norm, Q, eps, scratch, k)
        elif normed == 2:
            norm_rows(scratch, q, 1, q_norm, H * Q, eps, scratch, q)
            norm_rows(scratch, k, 1, k_norm, G * Q, eps, scratch, k)
        for h in range(H):
            rotate(scratch, q + h * Q, pairs, cos, sin, t * pairs, interleaved)
        for g in range(G):
            rotate(scratch, k + g * Q, pairs, cos, sin, t * pairs, interleaved)
        for i in range(G * Q):
            pages[slots[t] * row + i] = scratch[k + i]
            pages[slots[t] * row + G * Q + i] = scratch[v0 + t * G * Q + i]
        for i in range(H * Q):
            scratch[q + i] *= scale
    meet()
    for s in range(S):
        first, end = np.int64(boundaries[s]), np.int64(boundaries[s + 1])
        for t in range(first, end):
            seen = np.int64(contexts[s]) - (end - 1 - t)
            # 3. Scores, 4. softmax, 5. the sum of values: the query heads of a key head together.
            for g in range(share(G, part, parts), share(G, part + 1, parts)):
                q, scores = (t * H + g * shared) * Q, scores0 + g * shared * longest
                score(
                    scratch, q, Q, shared, pages, g * Q, page_size * row, Q, table, s * B, page_size, row,
                    seen, scratch, scores, longest,
                )  # fmt: skip
                for h in range(shared):
                    softmax(scratch, scores + h * longest, seen)
                weigh(
                    scratch, scores, longest, shared, pages, (G + g) * Q, page_size * row, Q, table, s * B,
                    page_size, row, seen, scratch, o0 + (t * H + g * shared) * Q,
                )  # fmt: skip
    meet()
    # 6. Out, onto x.
    project(scratch, o0, H * Q, T, o, D, H * Q, out, 0, D, part, parts)
    if o_biased:
        add_bias(o_bias, out, 0, T, D, part, parts)
    add_rows(x, out, T, D, part, parts)
    return 0
