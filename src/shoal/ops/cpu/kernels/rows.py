"""What the CPU kernels are made of: products, norms, SwiGLU and rotation of a few rows, in numba's Python.

Imported to be compiled, never to run. Memory is raw, as in C: a pointer and the index of the first element.
So nothing is allocated, counted or able to raise, and the object file needs nothing but libc's memset and
memcpy. Sums may be reordered and products fused (`FASTMATH`), which is what lets LLVM use whole vectors; NaN
and infinity keep their meaning.

Most entries are for one thread or several. Each calls with its `part` of `parts`, takes its share of heads,
experts or columns, and meets the others where it needs what they made. Shares never overlap, and a number is
computed alike whoever computes it.

The argument for `product`: with one to eight rows it is bound by the weights' way from the caches or from
memory, so they are read in order, and once for four rows of x.
"""

from __future__ import annotations

import math

import llvmlite.binding as llvm
import numpy as np
from numba import cfunc, njit, types

FASTMATH = {"reassoc", "contract", "nsz", "arcp"}

f32, i64, boolean, void = types.float32, types.int64, types.boolean, types.void
F32, I64 = types.CPointer(f32), types.CPointer(i64)
I16, I32 = types.CPointer(types.int16), types.CPointer(types.int32)


def kernel(signature):
    """Compile for these types alone: numba would make one more of each for a constant among the arguments."""
    return njit(signature, fastmath=FASTMATH, error_model="numpy", boundscheck=False)


def entry(signature):
    """A kernel that is called from outside, by C's rules."""
    return cfunc(signature, fastmath=FASTMATH, error_model="numpy", boundscheck=False)


# Each part waits for all the others; alone it returns at once. Compiling wants an address, and calls nothing.
llvm.add_symbol("GOMP_barrier", 1)
meet = types.ExternalFunction("GOMP_barrier", void())


@kernel(i64(i64, i64, i64))
def share(count, part, parts):
    """Where the share of a part begins; it ends where the next one's does."""
    return count * part // parts


@kernel(void(F32, i64, i64, i64, F32, i64, i64, i64, F32, i64, i64))
def product(x, x0, x_stride, rows, w, w0, outputs, inputs, y, y0, y_stride):
    """y[r, i] = sum over j of w[i, j] x[r, j]."""
    r = np.int64(0)
    while r + 4 <= rows:
        xa = x0 + r * x_stride
        xb, xc, xd = xa + x_stride, xa + 2 * x_stride, xa + 3 * x_stride
        ya = y0 + r * y_stride
        for i in range(outputs):
            a = b = c = d = np.float32(0)
            at = w0 + i * inputs
            for j in range(inputs):
                v = w[at + j]
                a += v * x[xa + j]
                b += v * x[xb + j]
                c += v * x[xc + j]
                d += v * x[xd + j]
            y[ya + i] = a
            y[ya + y_stride + i] = b
            y[ya + 2 * y_stride + i] = c
            y[ya + 3 * y_stride + i] = d
        r += 4
    while r + 2 <= rows:
        xa = x0 + r * x_stride
        xb = xa + x_stride
        ya = y0 + r * y_stride
        for i in range(outputs):
            a = b = np.float32(0)
            at = w0 + i * inputs
            for j in range(inputs):
                v = w[at + j]
                a += v * x[xa + j]
                b += v * x[xb + j]
            y[ya + i] = a
            y[ya + y_stride + i] = b
        r += 2
    if r < rows:
        xa = x0 + r * x_stride
        ya = y0 + r * y_stride
        for i in range(outputs):
            a = np.float32(0)
            at = w0 + i * inputs
            for j in range(inputs):
                a += w[at + j] * x[xa + j]
            y[ya + i] = a


@kernel(void(F32, i64, i64, i64, F32, i64, i64, F32, i64, i64, i64, i64))
def project(x, x0, x_stride, rows, w, outputs, inputs, y, y0, y_stride, part, parts):
    """The part's share of the columns of y = x w^T."""
    first, end = share(outputs, part, parts), share(outputs, part + 1, parts)
    product(x, x0, x_stride, rows, w, first * inputs, end - first, inputs, y, y0 + first, y_stride)


@kernel(void(F32, F32, i64, i64, i64, i64, i64))
def add_bias(bias, y, y0, rows, outputs, part, parts):
    """To the part's share of columns."""
    for r in range(rows):
        for i in range(share(outputs, part, parts), share(outputs, part + 1, parts)):
            y[y0 + r * outputs + i] += bias[i]


@kernel(void(F32, F32, i64, i64, i64, i64))
def add_rows(x, y, rows, dim, part, parts):
    """y += x, the residual, in the part's share of columns."""
    for r in range(rows):
        for i in range(share(dim, part, parts), share(dim, part + 1, parts)):
            y[r * dim + i] += x[r * dim + i]


@kernel(void(F32, i64, F32, i64, f32, F32, i64))
def norm(x, x0, weight, dim, eps, y, y0):
    """RMSNorm of one row; y may be x."""
    total = np.float32(0)
    for i in range(dim):
        total += x[x0 + i] * x[x0 + i]
    scale = np.float32(1) / np.float32(math.sqrt(total / np.float32(dim) + eps))
    for i in range(dim):
        y[y0 + i] = x[x0 + i] * scale * weight[i]


@kernel(void(F32, i64, i64, F32, i64, f32, F32, i64))
def norm_rows(x, x0, rows, weight, dim, eps, y, y0):
    for r in range(rows):
        norm(x, x0 + r * dim, weight, dim, eps, y, y0 + r * dim)


@kernel(f32(f32))
def exp(x):
    """e^x within 2 units in the last place, in steps that vectorise.

    x = n ln 2 + r, a polynomial of r (the coefficients of Cephes' expf), and n into the exponent. x is held
    to [-87, 88], where e^x is a normal number: 1e-38 stands for all that is smaller. NaN stays NaN.
    """
    if x < np.float32(-87):
        x = np.float32(-87)
    if x > np.float32(88):
        x = np.float32(88)
    turns = x * np.float32(1.44269504)
    n = np.int32(turns + np.float32(0.5) if turns >= np.float32(0) else turns - np.float32(0.5))
    r = x - np.float32(n) * np.float32(0.693359375) + np.float32(n) * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1)
    return p * np.int32((n + np.int32(127)) << np.int32(23)).view(np.float32)


@kernel(void(F32, i64, i64))
def softmax(x, x0, count):
    """In place."""
    top = x[x0]
    for i in range(1, count):
        top = max(top, x[x0 + i])
    total = np.float32(0)
    for i in range(count):
        e = exp(x[x0 + i] - top)
        x[x0 + i] = e
        total += e
    scale = np.float32(1) / total
    for i in range(count):
        x[x0 + i] *= scale


@kernel(void(F32, i64, F32, i64, i64))
def swiglu(gate, g0, up, u0, dim):
    """silu(gate) * up in the place of the gate."""
    for i in range(dim):
        g = gate[g0 + i]
        gate[g0 + i] = g / (np.float32(1) + exp(-g)) * up[u0 + i]


@kernel(void(F32, i64, i64, F32, F32, i64, i64))
def rotate(x, x0, pairs, cos, sin, angle0, interleaved):
    """Rotate one head in place: pairs (0, 1), (2, 3) ... if interleaved, else (i, i + pairs)."""
    near = 2 if interleaved else 1
    far = 1 if interleaved else pairs
    for i in range(pairs):
        at = x0 + near * i
        a, b = x[at], x[at + far]
        c, s = cos[angle0 + i], sin[angle0 + i]
        x[at] = a * c - b * s
        x[at + far] = b * c + a * s


@entry(i64(F32, i64, i64, F32, f32, F32))
def norm_step(x, T, D, weight, eps, out):
    norm_rows(x, 0, T, weight, D, eps, out, 0)
    return 0


@kernel(f32(F32, i64, i64))
def largest(x, x0, count):
    """Four at once, since a maximum waits for the one before; NaN is passed over."""
    a = b = c = d = np.float32(-np.inf)
    i = np.int64(0)
    while i + 4 <= count:
        a, b = max(a, x[x0 + i]), max(b, x[x0 + i + 1])
        c, d = max(c, x[x0 + i + 2]), max(d, x[x0 + i + 3])
        i += 4
    while i < count:
        a = max(a, x[x0 + i])
        i += 1
    return max(max(a, b), max(c, d))


@entry(i64(F32, F32, i64, i64, I64, F32))
def greedy_step(logits, scores, S, V, tokens, logprobs):
    for s in range(S):
        v0 = s * V
        top, best = largest(scores, v0, V), np.int64(0)
        while best < V - 1 and scores[v0 + best] != top:
            best += 1
        top, total = largest(logits, v0, V), np.float32(0)
        for i in range(V):
            total += exp(logits[v0 + i] - top)
        tokens[s] = best
        logprobs[s] = logits[v0 + best] - top - np.float32(math.log(total))
    return 0


@entry(i64(I64, I64, I64, I32, I16, I64, I64, i64, i64, i64, i64, i64, i64, I64))
def record_step(
    slots, ids, choices, ids_at, experts_at, tokens, touched, T, L, K, E, room, num_slots, counts
):
    for t in range(T):
        if slots[t] < 0 or slots[t] >= room:
            return 1
        ids_at[slots[t]] = np.int32(ids[t])
    for layer in range(L):
        for e in range(E):
            counts[e] = 0
        for t in range(T):
            for k in range(K):
                choice = choices[(layer * T + t) * K + k]
                if choice >= E:
                    return 2
                experts_at[(slots[t] * L + layer) * K + k] = np.int16(choice)
                if choice >= 0 and slots[t] < num_slots:
                    counts[choice] += 1
        for e in range(E):
            tokens[layer * E + e] += counts[e]
            touched[layer] += np.int64(counts[e] > 0)
    return 0


@entry(i64(F32, i64, i64, F32, i64, F32, i64, i64))
def head_step(x, T, D, weight, V, out, part, parts):
    project(x, 0, D, T, weight, V, D, out, 0, V, part, parts)
    return 0
