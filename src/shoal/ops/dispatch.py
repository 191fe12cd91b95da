"""Which implementation of an op runs: one table, one override, one `explain()`.

The reference serves every device; a Triton kernel is chosen on CUDA where one exists and takes the call.
Half a block of few rows on a CPU has kernels of its own and no reference (`fuse`): the modules are that.
`using` forces one side for a block of code (tests compare the two with it), and the environment variable
SHOAL_OPS does so for a whole process. Only this file names `ops.reference`, `ops.triton` or `ops.cpu`.

Batch-invariant mode (`batch_invariant`, or SHOAL_BATCH_INVARIANT=1) asks of every op that a row's result
be the same, bit for bit, whatever else is in the batch. Most kernels are so by nature; one that is not says
how it would be; those of few rows on a CPU are not, and stand back for the references' invariant forms. On a
GPU the references have no such form: what a kernel refuses is then refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import Any, Literal, Protocol, get_args

from torch import Tensor

from shoal.ops.invariance import batch_invariant as batch_invariant
from shoal.ops.invariance import is_batch_invariant as is_batch_invariant
from shoal.ops.reference import (
    adamw,
    attention,
    blocks,
    experts,
    invariant,
    layers,
    loss,
    narrow,
    quantised,
    records,
    routing,
    sampling,
    sparse,
)
from shoal.ops.reference import cache as cached

Side = Literal["auto", "reference", "triton"]


class Rehearsal(Protocol):
    """Of kernels that are to be compiled; `compiled` tells at its end how many were, not found on disk."""

    compiled: int

    def attempt(self) -> AbstractContextManager[None]: ...


REFERENCE: dict[str, Callable[..., Any]] = {
    "rms_norm": layers.rms_norm,
    "add_rms_norm": layers.add_rms_norm,
    "swiglu": layers.swiglu,
    "linears": layers.linears,
    "rope": layers.rope,
    "gate_logits": routing.gate_logits,
    "route": routing.route,
    "gate": routing.gate,
    "add_norm_gate": routing.add_norm_gate,
    "limit_capacity": routing.limit_capacity,
    "grouped_mlp": experts.grouped_mlp,
    "mixture": experts.mixture,
    "open_mixture": experts.mixture,
    "close": experts.close,
    "add_sum_rms_norm": experts.add_sum_rms_norm,
    "sum_choices": experts.sum_rows,
    "attention": attention.attention,
    "attention_part": attention.attention_part,
    "merge_attention": attention.merge_attention,
    "write_cache": attention.write_cache,
    "write_latent_cache": cached.write_latent_cache,
    "write_kv_cache": cached.write_kv_cache,
    "latent_queries": cached.latent_queries,
    "latent_values": cached.latent_values,
    "keys_and_values": cached.keys_and_values,
    "read_cache": attention.read_cache,
    "paged_attention": attention.paged_attention,
    "latent_attention": attention.latent_attention,
    "index_scores": sparse.index_scores,
    "paged_index_scores": sparse.paged_index_scores,
    "select_top": sparse.select_top,
    "name_rows": sparse.name_rows,
    "narrow_index": sparse.narrow_index,
    "write_index_keys": sparse.write_index_keys,
    "narrow_index_scores": sparse.narrow_index_scores,
    "sparse_latent_attention": sparse.sparse_latent_attention,
    "attention_mass": sparse.attention_mass,
    "window_attention": attention.window_attention,
    "compressed_attention": blocks.compressed_attention,
    "select_blocks": blocks.select_blocks,
    "block_attention": blocks.block_attention,
    "paged_runs_attention": blocks.paged_runs_attention,
    "paged_select_blocks": blocks.paged_select_blocks,
    "linear_cross_entropy": loss.linear_cross_entropy,
    "adamw": adamw.adamw,
    "narrow_load": narrow.narrow_load,
    "narrow_store": narrow.narrow_store,
    "sample": sampling.sample,
    "penalise": sampling.penalise,
    "record": records.record,
    "quantise_rows": quantised.quantise_rows,
    "quantise_blocks": quantised.quantise_blocks,
    "quantise_groups": quantised.quantise_groups,
    "dequantise": quantised.dequantise,
    "quantised_linears": quantised.quantised_linears,
    "quantised_mlp": quantised.quantised_mlp,
    "quantised_sum": experts.sum_rows,
    "fp8_pair": quantised.fp8_pair,
    "fp8_linears": quantised.fp8_linears,
    "fp8_grouped_mlp": quantised.fp8_grouped_mlp,
}

INVARIANT: dict[str, Callable[..., Any]] = {  # on a CPU; a reference that is not here is so by nature
    "rms_norm": invariant.rms_norm,
    "add_rms_norm": invariant.add_rms_norm,
    "swiglu": invariant.swiglu,
    "linears": invariant.linears,
    "rope": invariant.rope,
    "gate_logits": invariant.gate_logits,
    "route": invariant.route,
    "gate": invariant.gate,
    "add_norm_gate": invariant.add_norm_gate,
    "grouped_mlp": invariant.grouped_mlp,
    "mixture": invariant.mixture,
    "open_mixture": invariant.mixture,
    "sum_choices": invariant.sum_choices,
    "write_latent_cache": invariant.write_latent_cache,
    "write_kv_cache": invariant.write_kv_cache,
    "latent_queries": invariant.latent_queries,
    "latent_values": invariant.latent_values,
    "paged_attention": invariant.paged_attention,
    "latent_attention": invariant.latent_attention,
    "linear_cross_entropy": invariant.linear_cross_entropy,
    "sample": invariant.sample,
}


@dataclass(frozen=True)
class Kernel:
    """A Triton implementation, and why it would not take a call (None: it takes it)."""

    run: Callable[..., Any]
    refusal: Callable[..., str | None]
    invariant: Callable[..., Any] | None = None  # in batch-invariant mode; None: `run` is so by nature
    choose: Callable[..., tuple[str, str]] | None = None  # which of several, and why; None: there is one


@cache
def kernels() -> dict[str, Kernel]:
    """The Triton side. Imported when first needed: Triton is on Linux only, and takes a second to import."""
    from shoal.ops.triton import (
        adamw,
        block_attention,
        cache_attention,
        expanded,
        experts,
        fp8,
        fp8_linear,
        gate,
        index,
        index_scores,
        latent,
        linears,
        loss,
        narrow_rows,
        norms,
        permutation,
        quantise,
        quantised,
        records,
        rotary,
        routing,
        runs,
        sampling,
        select,
        sparse,
        swiglu,
    )
    from shoal.ops.triton import attention as packed_attention
    from shoal.ops.triton import blocks as chosen
    from shoal.ops.triton import cache as cached

    return {
        "rms_norm": Kernel(norms.rms_norm, norms.rms_norm_refusal),
        "add_rms_norm": Kernel(norms.add_rms_norm, norms.add_rms_norm_refusal),
        "swiglu": Kernel(swiglu.swiglu, swiglu.swiglu_refusal),
        "linears": Kernel(
            linears.linears,
            linears.linears_refusal,
            linears.fixed_linears,
            linears.choose,
        ),
        "rope": Kernel(rotary.rope, rotary.rope_refusal),
        "gate_logits": Kernel(gate.gate_logits, gate.gate_logits_refusal),
        "attention": Kernel(
            packed_attention.attention,
            packed_attention.attention_refusal,
            partial(packed_attention.attention, invariant=True),
            packed_attention.choose,
        ),
        "attention_part": Kernel(packed_attention.attention_part, packed_attention.attention_refusal),
        "merge_attention": Kernel(packed_attention.merge_attention, lambda *_: None),
        "paged_attention": Kernel(
            cache_attention.paged_attention,
            cache_attention.paged_attention_refusal,
            partial(cache_attention.paged_attention, invariant=True),
        ),
        "latent_attention": Kernel(
            cache_attention.latent_attention,
            cache_attention.latent_attention_refusal,
            partial(cache_attention.latent_attention, invariant=True),
            choose=cache_attention.choose_latent,
        ),
        "route": Kernel(routing.route, routing.route_refusal, partial(routing.route, invariant=True)),
        "gate": Kernel(routing.gate, routing.gate_refusal, partial(routing.gate, invariant=True)),
        "add_norm_gate": Kernel(
            routing.add_norm_gate,
            routing.add_norm_gate_refusal,
            partial(routing.add_norm_gate, invariant=True),
        ),
        "limit_capacity": Kernel(routing.limit_capacity, lambda *_: None),
        "adamw": Kernel(adamw.adamw, adamw.adamw_refusal),
        "grouped_mlp": Kernel(experts.grouped_mlp, experts.grouped_mlp_refusal),
        "mixture": Kernel(experts.mixture, experts.mixture_refusal, experts.fixed_mixture),
        "open_mixture": Kernel(experts.open_mixture, experts.mixture_refusal, experts.fixed_mixture),
        "close": Kernel(permutation.close, lambda *_: None),
        "add_sum_rms_norm": Kernel(norms.add_sum_rms_norm, norms.add_sum_rms_norm_refusal),
        "sum_choices": Kernel(permutation.sum_choices, lambda *_: None),
        "write_cache": Kernel(cached.write_cache, cached.write_cache_refusal),
        "write_latent_cache": Kernel(cached.write_latent_cache, cached.write_latent_cache_refusal),
        "write_kv_cache": Kernel(cached.write_kv_cache, cached.write_kv_cache_refusal),
        "latent_queries": Kernel(
            latent.latent_queries,
            latent.latent_queries_refusal,
            partial(latent.latent_queries, invariant=True),
        ),
        "latent_values": Kernel(
            latent.latent_values,
            latent.latent_values_refusal,
            partial(latent.latent_values, invariant=True),
        ),
        "keys_and_values": Kernel(expanded.keys_and_values, expanded.keys_and_values_refusal),
        "read_cache": Kernel(narrow_rows.read_cache, narrow_rows.read_cache_refusal),
        "index_scores": Kernel(index_scores.index_scores, index_scores.index_scores_refusal),
        "paged_index_scores": Kernel(
            index_scores.paged_index_scores, index_scores.paged_index_scores_refusal
        ),
        "narrow_index": Kernel(index.narrow_index, index.narrow_index_refusal),
        "write_index_keys": Kernel(index.write_index_keys, index.write_index_keys_refusal),
        "narrow_index_scores": Kernel(
            index_scores.narrow_index_scores, index_scores.narrow_index_scores_refusal
        ),
        "select_top": Kernel(select.select_top, select.select_top_refusal),
        "name_rows": Kernel(select.name_rows, select.name_rows_refusal),
        "sparse_latent_attention": Kernel(
            sparse.sparse_latent_attention,
            sparse.sparse_latent_attention_refusal,
            partial(sparse.sparse_latent_attention, parts=1),
        ),
        "window_attention": Kernel(packed_attention.window_attention, packed_attention.attention_refusal),
        "compressed_attention": Kernel(
            packed_attention.compressed_attention, packed_attention.attention_refusal
        ),
        "select_blocks": Kernel(chosen.select_blocks, chosen.select_blocks_refusal),
        "block_attention": Kernel(block_attention.block_attention, block_attention.block_attention_refusal),
        "paged_runs_attention": Kernel(
            runs.paged_runs_attention,
            runs.paged_runs_attention_refusal,
            partial(runs.paged_runs_attention, parts=1),
        ),
        "paged_select_blocks": Kernel(
            chosen.paged_select_blocks,
            chosen.paged_select_blocks_refusal,
            partial(chosen.paged_select_blocks, invariant=True),
        ),
        "linear_cross_entropy": Kernel(
            loss.linear_cross_entropy, loss.linear_cross_entropy_refusal, loss.fixed_linear_cross_entropy
        ),
        "sample": Kernel(sampling.sample, sampling.sample_refusal, sampling.fixed_sample),
        "penalise": Kernel(sampling.penalise, sampling.penalise_refusal),
        "record": Kernel(records.record, records.record_refusal),
        "quantise_rows": Kernel(quantise.quantise_rows, quantise.quantise_refusal),
        "quantise_blocks": Kernel(quantise.quantise_blocks, quantise.quantise_refusal),
        "dequantise": Kernel(quantised.dequantise, lambda values, *_: quantise.lacks_e4m3(values)),
        "quantised_linears": Kernel(
            quantised.quantised_linears,
            quantised.linears_refusal,
            partial(quantised.quantised_linears, invariant=True),
        ),
        "quantised_mlp": Kernel(
            quantised.quantised_mlp,
            quantised.quantised_refusal,
            partial(quantised.quantised_mlp, invariant=True),
        ),
        "quantised_sum": Kernel(permutation.sum_choices, lambda *_: None),
        "fp8_pair": Kernel(quantise.quantise_both, quantise.quantise_refusal),
        "fp8_linears": Kernel(
            fp8_linear.linears,
            fp8_linear.linears_refusal,
            partial(fp8_linear.linears, invariant=True),
            fp8_linear.choose,
        ),
        "fp8_grouped_mlp": Kernel(fp8.grouped_mlp, fp8.grouped_mlp_refusal),
    }


def _checked(side: str, where: str) -> Side:
    for known in get_args(Side):
        if side == known:
            return known
    raise ValueError(f"{where} is {side!r}; set it to auto, reference or triton")


_default_side = _checked(os.environ.get("SHOAL_OPS", "auto"), "SHOAL_OPS")
_side: ContextVar[Side] = ContextVar("side", default=_default_side)


@contextmanager
def using(side: Side) -> Iterator[None]:
    """Take every op from one side within the block."""
    token = _side.set(_checked(side, "side"))
    try:
        yield
    finally:
        _side.reset(token)


def rehearsing() -> AbstractContextManager[Rehearsal]:
    """On CUDA: a block in which no kernel is launched that is not compiled yet; at its end those that it met
    are, several at once. What reads what they would have computed goes into a context `attempt()`, in which
    nothing runs at all; one that fails harms no other, but nothing may be copied to or from the host there.
    """
    from shoal.ops.triton import ahead

    return ahead.rehearsing()


def call(op: str, x: Tensor, *arguments: Any) -> Any:
    """Run `op` on the side that serves this call; `x`, its first tensor, says on which device."""
    side = _side.get()
    if side == "triton" or (side == "auto" and x.is_cuda):
        kernel = kernels().get(op)
        reason = "it has no Triton kernel" if kernel is None else kernel.refusal(x, *arguments)
        if kernel is not None and reason is None:
            run = kernel.invariant if is_batch_invariant() and kernel.invariant is not None else kernel.run
            return run(x, *arguments)
        if side == "triton":
            raise ValueError(f"{op}: {reason}; use the side auto or reference")
        if is_batch_invariant() and op in INVARIANT:
            raise ValueError(
                f"{op}: {reason}, and batch-invariant mode has no other form on a GPU; leave the mode off"
            )
    if x.is_cpu and is_batch_invariant() and op in INVARIANT:
        return INVARIANT[op](x, *arguments)
    return REFERENCE[op](x, *arguments)


@cache
def steps() -> dict[str, Kernel]:
    """Half a block in one kernel, on a CPU. No references: the modules that they stand for are that."""
    from shoal.ops.cpu import attention as cpu_attention
    from shoal.ops.cpu import experts, rows

    return {
        "latent_step": Kernel(cpu_attention.latent_step, cpu_attention.latent_refusal),
        "grouped_step": Kernel(cpu_attention.grouped_step, cpu_attention.grouped_refusal),
        "mlp_step": Kernel(experts.mlp_step, experts.mlp_refusal),
        "moe_step": Kernel(experts.moe_step, experts.moe_refusal),
        "norm_step": Kernel(rows.norm_step, rows.norm_refusal),
        "head_step": Kernel(rows.head_step, rows.head_refusal),
        "greedy_step": Kernel(rows.greedy_step, rows.greedy_refusal),
        "record_step": Kernel(rows.record_step, rows.record_refusal),
    }


def fuse(op: str, x: Tensor, *arguments: Any) -> Any:
    """Run `op` as one kernel, or None where there is none that takes the call: the caller spells it out."""
    if not x.is_cpu or _side.get() != "auto" or is_batch_invariant():
        return None
    kernel = steps()[op]
    return kernel.run(x, *arguments) if kernel.refusal(x, *arguments) is None else None


def explain_fused(op: str, x: Tensor, *arguments: Any) -> str:
    """Whether `fuse` would run `op`, and why."""
    if not x.is_cpu:
        reason = f"the tensors are on {x.device}"
    elif _side.get() != "auto":
        reason = f"the side {_side.get()} is asked for"
    elif is_batch_invariant():
        reason = "a row's sums depend on how many rows there are, and batch-invariant mode is on"
    else:
        reason = steps()[op].refusal(x, *arguments)
    return f"{op}: cpu" if reason is None else f"{op}: spelled out, since {reason}"


def explain(op: str, x: Tensor, *arguments: Any) -> str:
    """Which side would serve this call, and why."""
    side = _side.get()
    form = ", in batch-invariant form" if x.is_cpu and is_batch_invariant() and op in INVARIANT else ""
    if side == "reference":
        return f"{op}: reference, as asked for{form}"
    if side == "auto" and not x.is_cuda:
        return f"{op}: reference, since the tensors are on {x.device}{form}"
    kernel = kernels().get(op)
    reason = "there is no Triton kernel" if kernel is None else kernel.refusal(x, *arguments)
    if kernel is not None and reason is None:
        fixed = is_batch_invariant() and kernel.invariant is not None
        if kernel.choose is not None:
            name, why = kernel.choose(x, *arguments, invariant=fixed)
            return f"{op}: triton/{name} ({why})"
        return f"{op}: triton" + (", in batch-invariant form" if fixed else "")
    refused = side == "triton" or (is_batch_invariant() and op in INVARIANT)
    return f"{op}: {'refused' if refused else 'reference'}, since {reason}"


def expert_tuning() -> ModuleType:
    """What tunes and measures `grouped_mlp` on the GPU at hand, for the command line."""
    from shoal.ops.triton import expert_tuning

    return expert_tuning
