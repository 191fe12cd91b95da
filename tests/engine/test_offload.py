"""Laws of offloaded experts: the output is that of the same ops over all experts, bit for bit; what is copied
is what was not there; the ledger and the counts tell it.

On a CPU the slots are memory like any other: here everything but the speed of the copies is real. "The same
ops" are asked for (`dispatch.using`), as a CPU's half-block kernels choose experts themselves and stand back.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.checkpoint import hf
from shoal.engine import Completion, Engine, EngineSettings, SamplingParams
from shoal.model.moe import MoE
from shoal.model.offloaded import Slots, host_bytes, offload, offloaded
from shoal.model.quantised import Scheme, quantise
from shoal.model.transformer import Transformer
from shoal.ops import dispatch
from shoal.stages.llm import open_engines
from shoal.stages.spread import Degrees
from tests.engine.conftest import build

GIB = 2**30


def an_expert(model: Transformer) -> int:
    """Bytes of one, in all layers."""
    assert model.config.moe is not None
    layers = [block.mlp for block in model.model.layers if isinstance(block.mlp, MoE)]
    return (
        sum(t.nbytes for mlp in layers for t in mlp.experts.parameters()) // model.config.moe.n_routed_experts
    )


def keep(model: Transformer, slots: int) -> Transformer:
    """A copy with so many experts of each layer on the device."""
    assert model.config.moe is not None
    gib = (model.config.moe.n_routed_experts - slots) * an_expert(model) / GIB
    return offload(deepcopy(model), gib)


def serve(model: Transformer, **settings: Any) -> tuple[Engine, list[Completion]]:
    """Prompts that name all experts in a step, and decodes that name few."""
    prompts = [list(range(5, 60)), list(range(5, 40)), [9], list(range(100, 130))]
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, routing=True)
    engine = Engine(model, EngineSettings(**{"max_sequences": 4, **settings}))
    return engine, engine.generate(prompts, params)


def told(answers: list[Completion]) -> list[Any]:
    return [(each.ids, each.logprobs, each.routing.tolist()) for each in answers if each.routing is not None]


@pytest.mark.parametrize("scheme", [None, "fp8", "int4"])
@pytest.mark.parametrize(
    ("family", "settings", "invariant"),
    [
        ("deepseek-v3", {"max_batch_tokens": 40}, False),
        ("deepseek-v3", {"speculate": 2}, True),
        ("qwen3-30b-a3b", {"max_batch_tokens": 8, "buckets": (1, 4)}, False),
    ],
)
def test_the_output_is_the_same_bit_for_bit(
    family: str, settings: dict[str, Any], invariant: bool, scheme: Scheme | None
) -> None:
    model = build(family)
    model = model if scheme is None else quantise(deepcopy(model), scheme)
    assert model.config.moe is not None
    few = keep(model, model.config.moe.num_experts_per_tok + 1)
    with dispatch.batch_invariant() if invariant else dispatch.using("reference"):
        _, wanted = serve(model, **settings)
        engine, got = serve(few, **settings)
    assert told(got) == told(wanted)
    stats = engine.stats()
    assert stats.expert_cache_queries is not None and stats.expert_cache_hits is not None
    assert 0 < stats.expert_cache_hits < stats.expert_cache_queries


def test_narrow_sums_too() -> None:
    """bfloat16 weights: rows are rounded before they are weighed, in rounds as without."""
    model = Transformer(build("deepseek-v3").config, dtype=torch.bfloat16).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    with dispatch.using("reference"):
        assert told(serve(keep(model, 4))[1]) == told(serve(model)[1])


def test_by_other_ops_it_is_the_same_to_rounding() -> None:
    """Without being asked for, a CPU takes its own kernels where no expert is offloaded."""
    model = build("deepseek-v3")
    for ours, theirs in zip(serve(keep(model, 5))[1], serve(model)[1], strict=True):
        assert ours.ids == theirs.ids
        torch.testing.assert_close(
            torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs), rtol=0, atol=1e-4
        )


@given(st.integers(1, 6), st.lists(st.sets(st.integers(0, 9), max_size=10), max_size=30))
def test_slots_hold_what_was_brought(count: int, steps: list[set[int]]) -> None:
    """After each round every expert of it is in a slot of its own; copies are of those that were not."""
    slots, held = Slots(count, 10), dict[int, int]()  # slot -> expert
    misses = 0
    for named in steps:
        rounds = slots.rounds(sorted(named))
        assert sorted(expert for each in rounds for expert in each) == sorted(named)
        for wanted in rounds:
            copies = slots.bring(wanted)
            misses += len(copies)
            for expert, slot in copies:
                assert expert in wanted and expert not in held.values() and 0 <= slot < count
                held[slot] = expert
            assert {expert: slot for slot, expert in held.items()} == slots.slot_of
            assert set(wanted) <= slots.slot_of.keys()
    assert (slots.queries, slots.hits) == (sum(map(len, steps)), sum(map(len, steps)) - misses)


def test_the_least_used_of_late_makes_room() -> None:
    slots = Slots(3, 8)
    for named in ([0], [0], [1], [2], [0, 1]):
        for wanted in slots.rounds(named):
            slots.bring(wanted)
    for wanted in slots.rounds([3]):
        slots.bring(wanted)
    assert slots.slot_of.keys() == {0, 1, 3}
    for _ in range(300):  # what was used often is forgotten in the end
        for wanted in slots.rounds([1, 3]):
            slots.bring(wanted)
    for wanted in slots.rounds([4]):
        slots.bring(wanted)
    assert 0 not in slots.slot_of


def test_ledger_and_counts() -> None:
    model = build("deepseek-v3")
    few = keep(model, 5)
    plain, _ = serve(model)
    engine, _ = serve(few)
    assert model.config.moe is not None
    saved = (model.config.moe.n_routed_experts - 5) * an_expert(model)
    assert plain.ledger.weights - engine.ledger.weights == saved
    assert engine.ledger.host == host_bytes(few) == model.config.moe.n_routed_experts * an_expert(model)
    assert "host memory" in str(engine.ledger) and "host memory" not in str(plain.ledger)
    assert engine.ledger.activations > plain.ledger.activations  # rows of a step in rounds
    assert plain.stats().expert_cache_queries is plain.stats().expert_cache_hits is None
    layers = list(offloaded(few))
    assert engine.stats().expert_cache_queries == sum(each.slots.queries for each in layers)


@pytest.mark.parametrize("scheme", [None, "fp8", "int4"])
def test_a_checkpoint_loads_into_host_memory(tmp_path: Path, scheme: Scheme | None) -> None:
    model = build("deepseek-v3")
    hf.save(model, tmp_path / "it")
    whole = hf.load(tmp_path / "it", quant=scheme).eval()
    gib = 6.5 * an_expert(whole) / GIB
    loaded = hf.load(tmp_path / "it", quant=scheme, offload=gib).eval()
    assert all(each.slots.count == 9 for each in offloaded(loaded))
    with dispatch.using("reference"):
        assert told(serve(loaded)[1]) == told(serve(whole)[1])


def test_what_cannot_be_is_refused() -> None:
    model = build("deepseek-v3")
    assert model.config.moe is not None
    most = (model.config.moe.n_routed_experts - model.config.moe.num_experts_per_tok) * an_expert(model) / GIB
    for gib in (0, -1, 1.01 * most, 1e9, float("nan")):
        with pytest.raises(ValueError, match=rf"offload is .* at most {most:.4g}"):
            offload(deepcopy(model), gib)
    assert all(each.slots.count == 3 for each in offloaded(offload(deepcopy(model), most)))
    with pytest.raises(ValueError, match="over 2 processes, but experts are offloaded on one alone"):
        open_engines(Path(), EngineSettings(), Degrees(tensor_parallel=2), device="cpu", offload=1)
    with pytest.raises(ValueError, match="routes nothing"):
        offload(deepcopy(build("r1-distill-qwen-1.5b")), 1)
    with pytest.raises(ValueError, match="offloaded already"):
        offload(keep(model, 5), most)
