"""Flash attention over a pack of sequences of any lengths, forward and backward.

    o_i = sum_j p_ij v_j,  p_ij = exp(scale q_i k_j - l_i),  l_i = log sum_j exp(scale q_i k_j)      forward
    dv_j = sum_i p_ij do_i,  ds_ij = p_ij (do_i v_j - d_i),  d_i = do_i o_i                          keys
    dk_j = scale sum_i ds_ij q_i,  dq_i = scale sum_j ds_ij k_j                                      queries

Layout: rows of q, k and v are (token, head) as they come; a program takes one block of one sequence and one
head and walks the other side, masking only the blocks on the diagonal or at the end. Keys are two products
wide where their dim is no power of two: 192 = 128 + 64. Keys may be longer than queries: query i of n then
sees the first N - n + i + 1 of N if CAUSAL, else all of them (a piece of a cached context). In a WINDOW it
sees the last so many of these; with a STRIDE keys stand for blocks of tokens, and are seen when these are.
The backward pass is two kernels, one for each side, so every sum runs in one order and nothing is added
atomically.

Bound: the matrix rate. `attention` says which calls go to cuDNN and which come here.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(
    ptr,
    row,
    kept,
    head,
    first: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
):
    """WIDTH elements from `first` of these rows of one head, (rows, BLOCK), zeros elsewhere."""
    column = tl.arange(0, BLOCK)
    mask = kept[:, None]
    if WIDTH != BLOCK:
        mask = mask & (column < WIDTH)[None, :]
    at = row.to(tl.int64)[:, None] * (HEADS * DIM) + (head * DIM + first) + column[None, :]
    return tl.load(ptr + at, mask=mask, other=0.0)


@triton.jit
def _store(
    ptr,
    row,
    kept,
    head,
    value,
    first: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    at = row.to(tl.int64)[:, None] * (HEADS * DIM) + (head * DIM + first) + column[None, :]
    tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=kept[:, None] & (column < WIDTH)[None, :])


@triton.jit
def _span(cu_ptr, s):
    first = tl.load(cu_ptr + s)
    return first, tl.load(cu_ptr + s + 1) - first


@triton.jit
def _entries(i, ahead, STRIDE: tl.constexpr, LAG: tl.constexpr):
    """How many keys query i sees, `ahead` of them before the first query's own; compressed ones come every
    STRIDE tokens, the first after STRIDE + LAG."""
    if STRIDE == 1:
        seen = tl.maximum(i + 1 + ahead, 0)
    else:
        seen = tl.maximum(i + 1 - LAG, 0) // STRIDE
    return seen


@triton.jit
def _first(j, ahead, STRIDE: tl.constexpr, LAG: tl.constexpr):
    """The first query that sees key j."""
    if STRIDE == 1:
        first = tl.maximum(j - ahead, 0)
    else:
        first = j * STRIDE + STRIDE - 1 + LAG
    return first


@triton.jit
def _forward_blocks(
    q,
    q_rest,
    o,
    total,
    top,
    k_ptr,
    v_ptr,
    k_first,
    n_keys,
    seen,
    group,
    begin,
    end,
    scale,
    G: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    V: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    BV: tl.constexpr,
    BN: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    WINDOW: tl.constexpr,
):
    for start in range(begin, end, BN):
        j = start + tl.arange(0, BN)
        kept = j < n_keys
        k = _load(k_ptr, k_first + j, kept, group, 0, D1, B1, G, D1 + D2)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        if D2:
            k_rest = _load(k_ptr, k_first + j, kept, group, D1, D2, B2, G, D1 + D2)
            scores = tl.dot(q_rest, k_rest.T, scores, input_precision=PRECISION)
        if MASK:
            sees = j[None, :] < seen[:, None]
            if WINDOW:
                sees = sees & (j[None, :] >= seen[:, None] - WINDOW)
            scores = tl.where(sees, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1) * scale)
        ground = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(scores * scale - ground[:, None])
        fade = tl.exp2(top - ground)
        total = total * fade + tl.sum(p, 1)
        v = _load(v_ptr, k_first + j, kept, group, 0, V, BV, G, V)
        o = tl.dot(p.to(v.dtype), v, o * fade[:, None], input_precision=PRECISION)
        top = higher
    return o, total, top


@triton.jit
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    cu_q_ptr,
    cu_k_ptr,
    scale,  # times log2(e)
    H: tl.constexpr,
    G: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    V: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    BV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    WINDOW: tl.constexpr = 0,
    STRIDE: tl.constexpr = 1,
    LAG: tl.constexpr = 0,
):
    """o (T, H, V) and, in nats, lse (T, H); the longest rows of a sequence come first."""
    head, s = tl.program_id(1), tl.program_id(2)
    q_first, n = _span(cu_q_ptr, s)
    k_first, n_keys = _span(cu_k_ptr, s)
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    if block * BM < n:
        group = head // (H // G)
        i = block * BM + tl.arange(0, BM)
        kept = i < n
        q = _load(q_ptr, q_first + i, kept, head, 0, D1, B1, H, D1 + D2)
        if D2:
            q_rest = _load(q_ptr, q_first + i, kept, head, D1, D2, B2, H, D1 + D2)
        else:
            q_rest = q
        begin = 0
        if STRIDE > 1:
            seen = _entries(i, 0, STRIDE, LAG)
            end = tl.minimum(n_keys, _entries((block + 1) * BM - 1, 0, STRIDE, LAG))
            whole = _entries(block * BM, 0, STRIDE, LAG) // BN * BN
        elif CAUSAL:
            seen = n_keys - n + 1 + i
            end = tl.minimum(n_keys, n_keys - n + (block + 1) * BM)
            whole = tl.maximum(n_keys - n + 1 + block * BM, 0) // BN * BN
            if WINDOW:  # of a pack: as many keys as queries
                begin = tl.maximum(block * BM + 1 - WINDOW, 0) // BN * BN
                whole = begin
        else:
            seen = tl.zeros((BM,), tl.int32) + n_keys
            end = n_keys
            whole = n_keys // BN * BN
        whole = tl.minimum(whole, end // BN * BN)
        o = tl.zeros((BM, BV), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        top = tl.full((BM,), float("-inf"), tl.float32)
        o, total, top = _forward_blocks(
            q, q_rest, o, total, top, k_ptr, v_ptr, k_first, n_keys, seen, group, begin, whole, scale,
            G, D1, D2, V, B1, B2, BV, BN, False, PRECISION, WINDOW,
        )  # fmt: skip
        o, total, top = _forward_blocks(
            q, q_rest, o, total, top, k_ptr, v_ptr, k_first, n_keys, seen, group, whole, end, scale,
            G, D1, D2, V, B1, B2, BV, BN, True, PRECISION, WINDOW,
        )  # fmt: skip
        total = tl.where(total > 0, total, 1.0)  # no key: 0 / 1, and -inf from top
        _store(o_ptr, q_first + i, kept, head, o / total[:, None], 0, V, BV, H, V)
        lse = (top + tl.log2(total)) * 0.6931471805599453
        tl.store(lse_ptr + (q_first + i).to(tl.int64) * H + head, lse, mask=kept)


@triton.jit
def delta_kernel(o_ptr, do_ptr, delta_ptr, rows, V: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr):
    """d = <do, o> of each (token, head)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BV)
    mask = (row < rows)[:, None] & (column < V)[None, :]
    at = row[:, None] * V + column[None, :]
    o = tl.load(o_ptr + at, mask=mask, other=0.0).to(tl.float32)
    do = tl.load(do_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(delta_ptr + row, tl.sum(o * do, 1), mask=row < rows)


@triton.jit
def keys_backward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    cu_ptr,
    cu_k_ptr,
    scale,  # times log2(e)
    H: tl.constexpr,
    G: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    V: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    BV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
    WINDOW: tl.constexpr = 0,
    STRIDE: tl.constexpr = 1,
    LAG: tl.constexpr = 0,
):
    """dk and dv of BN keys of one key head, over the queries that see them, head after head of its group."""
    group, s = tl.program_id(1), tl.program_id(2)
    first, n = _span(cu_ptr, s)
    k_first, n_keys = _span(cu_k_ptr, s)
    block = tl.program_id(0)
    if block * BN < n_keys:
        j = block * BN + tl.arange(0, BN)
        kept = j < n_keys
        k = _load(k_ptr, k_first + j, kept, group, 0, D1, B1, G, D1 + D2)
        v = _load(v_ptr, k_first + j, kept, group, 0, V, BV, G, V)
        dk = tl.zeros((BN, B1), tl.float32)
        dk_rest = tl.zeros((BN, B2), tl.float32)
        dv = tl.zeros((BN, BV), tl.float32)
        if D2:
            k_rest = _load(k_ptr, k_first + j, kept, group, D1, D2, B2, G, D1 + D2)
        else:
            k_rest = k
        last = n
        if WINDOW:
            last = tl.minimum(n, (block + 1) * BN - 1 + WINDOW)
        ahead = n_keys - n
        begin = tl.minimum(_first(block * BN, ahead, STRIDE, LAG), n) // BM * BM
        for r in range(H // G):
            head = group * (H // G) + r
            for start in range(begin, last, BM):
                i = start + tl.arange(0, BM)
                there = i < n
                q = _load(q_ptr, first + i, there, head, 0, D1, B1, H, D1 + D2)
                do = _load(do_ptr, first + i, there, head, 0, V, BV, H, V)
                at = (first + i).to(tl.int64) * H + head
                lse = tl.load(lse_ptr + at, mask=there, other=0.0) * 1.4426950408889634
                delta = tl.load(delta_ptr + at, mask=there, other=0.0)
                scores = tl.dot(k, q.T, input_precision=PRECISION)
                if D2:
                    q_rest = _load(q_ptr, first + i, there, head, D1, D2, B2, H, D1 + D2)
                    scores = tl.dot(k_rest, q_rest.T, scores, input_precision=PRECISION)
                p = tl.exp2(scores * scale - lse[None, :])
                seen = _entries(i, ahead, STRIDE, LAG)
                sees = (j[:, None] < seen[None, :]) & there[None, :]
                if WINDOW:
                    sees = sees & (j[:, None] >= seen[None, :] - WINDOW)
                p = tl.where(sees, p, 0.0)
                dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
                dp = tl.dot(v, do.T, input_precision=PRECISION)
                ds = (p * (dp - delta[None, :])).to(q.dtype)
                dk = tl.dot(ds, q, dk, input_precision=PRECISION)
                if D2:
                    dk_rest = tl.dot(ds, q_rest, dk_rest, input_precision=PRECISION)
        nat = scale * 0.6931471805599453
        _store(dk_ptr, k_first + j, kept, group, dk * nat, 0, D1, B1, G, D1 + D2)
        if D2:
            _store(dk_ptr, k_first + j, kept, group, dk_rest * nat, D1, D2, B2, G, D1 + D2)
        _store(dv_ptr, k_first + j, kept, group, dv, 0, V, BV, G, V)


@triton.jit
def _query_blocks(
    dq,
    dq_rest,
    q,
    q_rest,
    do,
    lse,
    delta,
    k_ptr,
    v_ptr,
    first,
    n,
    seen,
    group,
    begin,
    end,
    scale,
    G: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    V: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    BV: tl.constexpr,
    BN: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    WINDOW: tl.constexpr,
):
    for start in range(begin, end, BN):
        j = start + tl.arange(0, BN)
        kept = j < n
        k = _load(k_ptr, first + j, kept, group, 0, D1, B1, G, D1 + D2)
        v = _load(v_ptr, first + j, kept, group, 0, V, BV, G, V)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        if D2:
            k_rest = _load(k_ptr, first + j, kept, group, D1, D2, B2, G, D1 + D2)
            scores = tl.dot(q_rest, k_rest.T, scores, input_precision=PRECISION)
        p = tl.exp2(scores * scale - lse[:, None])
        if MASK:
            sees = (j[None, :] < seen[:, None]) & kept[None, :]
            if WINDOW:
                sees = sees & (j[None, :] >= seen[:, None] - WINDOW)
            p = tl.where(sees, p, 0.0)
        dp = tl.dot(do, v.T, input_precision=PRECISION)
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        if D2:
            dq_rest = tl.dot(ds, k_rest, dq_rest, input_precision=PRECISION)
    return dq, dq_rest


@triton.jit
def queries_backward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    cu_ptr,
    cu_k_ptr,
    scale,  # times log2(e)
    H: tl.constexpr,
    G: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    V: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    BV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
    WINDOW: tl.constexpr = 0,
    STRIDE: tl.constexpr = 1,
    LAG: tl.constexpr = 0,
):
    """dq of BM queries of one head, over the keys they see."""
    head, s = tl.program_id(1), tl.program_id(2)
    first, n = _span(cu_ptr, s)
    k_first, n_keys = _span(cu_k_ptr, s)
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    if block * BM < n:
        group = head // (H // G)
        i = block * BM + tl.arange(0, BM)
        kept = i < n
        q = _load(q_ptr, first + i, kept, head, 0, D1, B1, H, D1 + D2)
        if D2:
            q_rest = _load(q_ptr, first + i, kept, head, D1, D2, B2, H, D1 + D2)
        else:
            q_rest = q
        do = _load(do_ptr, first + i, kept, head, 0, V, BV, H, V)
        at = (first + i).to(tl.int64) * H + head
        lse = tl.load(lse_ptr + at, mask=kept, other=0.0) * 1.4426950408889634
        delta = tl.load(delta_ptr + at, mask=kept, other=0.0)
        dq = tl.zeros((BM, B1), tl.float32)
        dq_rest = tl.zeros((BM, B2), tl.float32)
        ahead = n_keys - n
        seen = _entries(i, ahead, STRIDE, LAG)
        begin = 0
        whole = _entries(block * BM, ahead, STRIDE, LAG) // BN * BN
        end = tl.minimum(n_keys, _entries((block + 1) * BM - 1, ahead, STRIDE, LAG))
        if WINDOW:
            begin = tl.maximum(block * BM + 1 - WINDOW, 0) // BN * BN
            whole = begin
        dq, dq_rest = _query_blocks(
            dq, dq_rest, q, q_rest, do, lse, delta, k_ptr, v_ptr, k_first, n_keys, seen, group,
            begin, whole, scale,
            G, D1, D2, V, B1, B2, BV, BN, False, PRECISION, WINDOW,
        )  # fmt: skip
        dq, dq_rest = _query_blocks(
            dq, dq_rest, q, q_rest, do, lse, delta, k_ptr, v_ptr, k_first, n_keys, seen, group,
            whole, end, scale,
            G, D1, D2, V, B1, B2, BV, BN, True, PRECISION, WINDOW,
        )  # fmt: skip
        nat = scale * 0.6931471805599453
        _store(dq_ptr, first + i, kept, head, dq * nat, 0, D1, B1, H, D1 + D2)
        if D2:
            _store(dq_ptr, first + i, kept, head, dq_rest * nat, D1, D2, B2, H, D1 + D2)
