"""The engine on a GPU: graphs, overlap and speculation against the CPU, nothing compiled once it is warm, and
the ledger against what PyTorch measures.

Float32 and small models, so that the two sides differ by the order of sums alone.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from shoal.config.families import tiny
from shoal.engine import Completion, Engine, EngineSettings, SamplingParams
from shoal.engine.pieces import why_not
from shoal.model.offloaded import offload, offloaded
from shoal.model.transformer import Transformer
from shoal.ops import dispatch
from tests.engine.conftest import build
from tests.engine.test_speculation import ALWAYS_RIGHT, SOMETIMES, clairvoyant

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
SETTINGS = EngineSettings(page_size=16, num_pages=128, max_batch_tokens=64, max_sequences=8)


def on_gpu(host: Transformer) -> Transformer:
    device = Transformer(host.config, device="cuda")
    device.load_state_dict(host.state_dict())
    return device.eval()


def wishes(*, routing: bool) -> list[SamplingParams]:
    greedy = SamplingParams(temperature=0, max_tokens=24, routing=routing)
    return [
        greedy,
        replace(greedy, max_tokens=7, logprobs=3),
        replace(greedy, temperature=1.0, seed=3),
        replace(greedy, temperature=0.8, seed=4, top_p=0.9),
        replace(greedy, temperature=1.0, seed=5, top_k=9, min_p=0.05),
        replace(greedy, frequency_penalty=3.0, repetition_penalty=2.0, logit_bias=((7, 3.0),)),
        replace(greedy, prompt_logprobs=2),
        replace(greedy, min_tokens=4, stop_token_ids=tuple(range(40))),
    ]


def assert_same(found: list[Completion], expected: list[Completion]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.ids, ours.finish) == (theirs.ids, theirs.finish)
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-3)
        if theirs.prompt_logprobs is not None:
            assert ours.prompt_logprobs == pytest.approx(theirs.prompt_logprobs, abs=1e-3)
        if theirs.routing is not None:
            assert ours.routing is not None
            assert torch.equal(ours.routing, theirs.routing)


def test_counts_that_nobody_waits_for_are_those_of_the_call_before() -> None:
    engine = Engine(on_gpu(build("deepseek-v3")), SETTINGS)
    wish = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    told = []
    for _ in range(3):
        engine.generate([[1, 2, 3]], wish)
        counts = engine.stats(wait=False).expert_tokens
        assert counts is not None
        told.append(counts)
    whole = engine.stats().expert_tokens
    assert whole is not None
    assert torch.equal(told[0], told[1])  # nobody asked before the first: that one waited
    assert 3 * told[1].sum() == whole.sum()
    assert 3 * told[2].sum() == 2 * whole.sum()


@pytest.mark.parametrize(
    "family",
    ["deepseek-v3", "deepseek-v3.2", "deepseek-v2-lite", "nsa-27b", "qwen3-30b-a3b", "r1-distill-qwen-1.5b"],
)
def test_graphs_and_overlap_say_what_the_cpu_says(family: str, prompts: list[list[int]]) -> None:
    host = build(family)
    params = wishes(routing=host.config.moe is not None)
    expected = Engine(host, SETTINGS).generate(prompts, params)
    device = on_gpu(host)
    several = [] if why_not(device) else [replace(SETTINGS, lengths=(8, 24, 64), buckets=())]
    for settings in (
        SETTINGS,  # graphs, pieces and overlap are the default here
        replace(SETTINGS, buckets=(), lengths=(), overlap=False),
        replace(SETTINGS, decode_steps=8),
        *several,
        replace(SETTINGS, page_size=4, num_pages=24, max_batch_tokens=40),  # with preemption
    ):
        engine = Engine(device, settings)
        for _ in range(2):  # the second time from the prefix cache
            assert_same(engine.generate(prompts, params), expected)
        assert engine.pool.num_free == settings.num_pages


@pytest.mark.parametrize(
    ("family", "overlap"), [("deepseek-v3", True), ("qwen3-30b-a3b", True), ("deepseek-v3", False)]
)
def test_bursts_in_graphs_give_the_same_bits(family: str, overlap: bool, prompts: list[list[int]]) -> None:
    """By fixed sums, however many steps are launched in a row; again with few pages."""
    device, params = on_gpu(build(family)), wishes(routing=True)
    with dispatch.batch_invariant():
        expected = Engine(device, replace(SETTINGS, overlap=overlap)).generate(prompts, params)
        for settings in (SETTINGS, replace(SETTINGS, page_size=4, num_pages=24, max_batch_tokens=40)):
            engine = Engine(device, replace(settings, overlap=overlap, decode_steps=8))
            found = engine.generate(prompts, params)
            assert_same(found, expected)
            assert [each.logprobs for each in found] == [each.logprobs for each in expected]
            assert engine.pool.num_free == settings.num_pages


def test_narrow_index_keys_are_served_alike_in_graphs(prompts: list[list[int]]) -> None:
    """Eagerly and replayed; the CPU's may choose otherwise near a tie, by the order of its sums."""
    device, greedy = on_gpu(build("deepseek-v3.2")), SamplingParams(temperature=0, max_tokens=24)
    narrow = replace(SETTINGS, index_keys="fp8")
    told = [
        Engine(device, settings).generate(prompts, greedy)
        for settings in (narrow, replace(narrow, buckets=(), overlap=False))
    ]
    assert [done.ids for done in told[0]] == [done.ids for done in told[1]]


@pytest.mark.parametrize("family", ["deepseek-v3", "qwen3-30b-a3b"])
def test_a_narrow_cache_is_served_alike_in_graphs(family: str, prompts: list[list[int]]) -> None:
    """In graphs and without, by fixed sums: the same bits."""
    device, params = on_gpu(build(family)), wishes(routing=True)
    settings = replace(SETTINGS, cache_dtype="fp8")
    with dispatch.batch_invariant():
        eager = Engine(device, replace(settings, buckets=(), overlap=False)).generate(prompts, params)
        graphs = Engine(device, settings).generate(prompts, params)
        pieces = Engine(device, replace(settings, max_batch_tokens=24)).generate(prompts, params)
    for found in (graphs, pieces):
        assert [(each.ids, each.logprobs) for each in found] == [(each.ids, each.logprobs) for each in eager]


@pytest.mark.parametrize("family", ["deepseek-v3", "qwen3-30b-a3b"])
def test_offloaded_experts_give_the_same_bits(family: str, prompts: list[list[int]]) -> None:
    """From pinned memory over the bus, prompts in rounds."""
    params, settings = wishes(routing=True), replace(SETTINGS, buckets=(), lengths=(), overlap=False)
    expected = Engine(on_gpu(build(family)), settings).generate(prompts, params)
    device = on_gpu(build(family))
    stacks = [each for name, each in device.named_parameters() if ".mlp.experts." in name]
    assert device.config.moe is not None
    an_expert = sum(stack.nbytes for stack in stacks) / device.config.moe.n_routed_experts
    offload(device, (device.config.moe.n_routed_experts - 4) * an_expert / 2**30)
    found = Engine(device, SETTINGS).generate(prompts, params)
    assert [(each.ids, each.logprobs) for each in found] == [(each.ids, each.logprobs) for each in expected]
    assert all(stack.is_pinned() for each in offloaded(device) for stack in each.parameters(recurse=False))


@pytest.mark.parametrize("share", [ALWAYS_RIGHT, SOMETIMES])
def test_speculation_says_what_the_cpu_says_without(share: float, prompts: list[list[int]]) -> None:
    host = clairvoyant(share)
    params = [replace(wish, logprobs=0) for wish in wishes(routing=True)]
    expected = Engine(host, SETTINGS).generate(prompts, params)
    engine = Engine(on_gpu(host), replace(SETTINGS, speculate=2))
    engine.warm_up()
    assert_same(engine.generate(prompts, params), expected)
    assert sum(engine.stats().accepted) > 0


def test_nothing_is_compiled_once_it_is_warm() -> None:
    from triton import knobs

    model = Transformer(tiny("deepseek-v3"), device="cuda", dtype=torch.bfloat16)
    model.init_weights(torch.Generator("cuda").manual_seed(0))
    settings = replace(SETTINGS, num_pages=512, max_batch_tokens=256, decode_steps=4)
    engine = Engine(model.eval(), settings)
    engine.warm_up()
    compiled: list[str] = []

    def watch(*, repr: str, **_: Any) -> None:
        compiled.append(repr)

    knobs.runtime.jit_cache_hook = watch
    try:
        draw = random.Random(0)
        for _ in range(60):
            ids = [draw.randrange(512) for _ in range(draw.randint(1, 120))]
            engine.add(ids, replace(draw.choice(wishes(routing=True)), max_tokens=draw.randint(8, 20)))
            engine.step()
        while engine.busy:
            engine.step()
    finally:
        knobs.runtime.jit_cache_hook = None
    assert not [name.partition("[")[0] for name in compiled]


def test_the_ledger_is_what_is_measured() -> None:
    """A model of some GiB: weights, cache, graphs and the largest step, within 3% of PyTorch's peak. What
    graphs alone may use of their pool is not allocated in PyTorch's count."""
    config = replace(tiny("deepseek-v2-lite"), vocab_size=102_400, hidden_size=2048, intermediate_size=10_944)
    torch._C._cuda_clearCublasWorkspaces()  # of the tests before
    torch.cuda.empty_cache()
    start = torch.cuda.memory_allocated()
    model = Transformer(config, device="cuda", dtype=torch.bfloat16)
    model.init_weights(torch.Generator("cuda").manual_seed(0))
    settings = EngineSettings(cache_bytes=1 << 31, max_batch_tokens=2048, max_sequences=32)
    engine = Engine(model.eval(), settings)
    engine.warm_up()
    torch.cuda.reset_peak_memory_stats()
    prompts = [[1 + at] * 120 for at in range(32)]
    engine.generate(prompts, SamplingParams(max_tokens=16, top_p=0.9, ignore_eos=True))
    idle = sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if tuple(segment["segment_pool_id"]) != (0, 0)
    )
    measured = torch.cuda.max_memory_allocated() - start + idle
    assert engine.ledger.total == pytest.approx(measured, rel=0.03), f"{engine.ledger}\nmeasured {measured}"
