"""What is refused before anything starts, with the value, what works, and how to say it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from shoal.config.families import tiny
from shoal.config.run import DataConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from shoal.parallel.mesh import open_mesh
from shoal.parallel.pipeline import split
from tests.train import parts

FOUR = ParallelConfig(data=2, expert=2)


def run(parallel: ParallelConfig = FOUR, **changes: Any) -> RunConfig:
    train = replace(TrainConfig(steps=2, accumulation=4), **changes)
    return RunConfig(parts.config(), train, DataConfig(seq_len=32, tokens_per_batch=64), parallel=parallel)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulation": 6}, r"train\.accumulation is 6 .* make it a multiple of 4"),
        (
            {"parallel": ParallelConfig(pipeline=2), "accumulation": 1},
            r"accumulation is 1 .* too few to fill the 2 stages .* at least 2",
        ),
        (
            {"parallel": ParallelConfig(2, 1, 2, "dualpipev"), "accumulation": 4},
            r"accumulation is 4 .* too few to fill the 4 stages .* at least 8",
        ),
        (
            {"parallel": ParallelConfig(pipeline=2, schedule="dualpipev")},
            r"the model has 3 layers, fewer than the 4 stages of parallel\.schedule 'dualpipev'",
        ),
        ({"optim": OptimConfig(moments="int8")}, r"moments is 'int8'.*straddle.*'float32' or 'bfloat16'"),
    ],
)
def test_what_does_not_work_on_several_is_refused_with_what_does(
    changes: dict[str, Any], message: str
) -> None:
    run()
    with pytest.raises(ValueError, match=message):
        run(**changes)


def test_sequences_are_shared_where_that_can_be_done() -> None:
    shared = ParallelConfig(context=4)
    assert run(shared, accumulation=1).parallel.readers == 1
    with pytest.raises(
        ValueError, match=r"cuts a sequence into 64 pieces, but data\.seq_len is 32; raise it"
    ):
        run(ParallelConfig(context=32))
    train, data = TrainConfig(steps=2), DataConfig(seq_len=32, tokens_per_batch=64)
    moe = parts.config().moe
    assert moe is not None
    plain = replace(moe, n_group=1, topk_group=1, scoring_func="softmax", norm_topk_prob=False)
    for other, message in (
        (
            replace(plain, topk_method="expert_choice"),
            r"topk_method is 'expert_choice'.* or set parallel\.context to 1",
        ),
        (replace(moe, eval_capacity_factor=1.0), r"experts have a capacity.* or parallel\.context to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            RunConfig(replace(parts.config(), moe=other), train, data, parallel=shared)


@pytest.mark.parametrize(
    ("family", "what"), [("deepseek-v3.2", "has an indexer"), ("nsa-27b", "is native sparse")]
)
def test_attention_that_chooses_what_it_reads_wants_whole_sequences(family: str, what: str) -> None:
    settings = tiny(family), TrainConfig(steps=2, accumulation=4), DataConfig(seq_len=32, tokens_per_batch=64)
    RunConfig(*settings, parallel=FOUR)
    with pytest.raises(
        ValueError, match=rf"attention {what}: what a token reads .* set parallel\.context to 1"
    ):
        RunConfig(*settings, parallel=ParallelConfig(context=2))


def test_experts_must_come_out_even() -> None:
    with pytest.raises(ValueError, match=r"parallel\.expert is 3, but the model has 16 experts"):
        run(ParallelConfig(1, 3), accumulation=3)
    with pytest.raises(ValueError, match="expert is 0; it must be at least 1"):
        ParallelConfig(1, 0)
    with pytest.raises(ValueError, match="context is 2 and pipeline 2, which do not work together yet"):
        ParallelConfig(context=2, pipeline=2)
    with pytest.raises(ValueError, match="schedule is 'dualpipev', but pipeline is 1"):
        ParallelConfig(schedule="dualpipev")


def test_stages_are_even_and_each_has_a_block() -> None:
    """A prediction module counts as a block of the last stage."""
    cases = {(61, 1, 16): [4] * 14 + [3, 2], (5, 1, 4): [2, 1, 1, 1], (4, 2, 4): [1] * 4, (3, 0, 1): [3]}
    for (blocks, ahead, stages), sizes in cases.items():
        config = parts.config(num_hidden_layers=blocks, num_nextn_predict_layers=ahead)
        ranges = split(config, stages)
        assert [len(layers) for layers in ranges] == sizes
        assert [layer for layers in ranges for layer in layers] == list(range(blocks))
    with pytest.raises(ValueError, match="4 stages are more than the model's 3 layers"):
        split(parts.config(), 4)


@pytest.mark.parametrize(("started", "fix"), [("1", "--nproc-per-node 4"), ("8", r"--set parallel\.data=4")])
def test_the_degrees_are_those_that_were_started(
    started: str, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", started)
    with (
        pytest.raises(
            ValueError, match=rf"{started} process.* started, but .*data 2 x expert 2.* is 4; .*{fix}"
        ),
        open_mesh(ParallelConfig(2, 2), "cpu"),
    ):
        pass
