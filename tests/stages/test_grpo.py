"""Laws of reasoning RL: it learns what is rewarded, and a stopped run goes on bit for bit.

Engine and trainer agree on what was sampled; what goes wrong in a rollout is counted.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.checkpoint import hf
from shoal.config.families import tiny
from shoal.config.tune import GRPOConfig, grpo_from_table
from shoal.data.text import Tokenizer
from shoal.engine import Completion
from shoal.model.transformer import Transformer
from shoal.ops import dispatch
from shoal.stages import grpo, rollout, round_batches
from shoal.stages.claim import claim
from shoal.stages.judge import Judge
from shoal.stages.rollout import Episode, Question, Rollout
from shoal.train.metrics import Event, StepReport
from tests.train import parts

LETTERS = "tests.stages.misbehaving:letters"


def config(start: Path, folder: Path, **changes: Any) -> GRPOConfig:
    folder.mkdir(exist_ok=True)
    problems = folder / "problems.jsonl"
    problems.write_text("".join(json.dumps({"prompt": f"{n}?", "n": n}) + "\n" for n in range(8)))
    table = {
        "model": str(start),
        "problems": [str(problems)],
        "held_out": [str(problems)],
        "rewards": [LETTERS],
        "train": {"steps": 4, "evaluate_every": 4, "optim": {"lr": 0.01}, "accumulation": 2},
        "rollout": {"questions": 4, "group": 4, "max_tokens": 6, "cache_bytes": 1 << 20},
    }
    return grpo_from_table({**table, **changes}, "a recipe")


def lines(file: Path) -> list[dict[str, Any]]:
    """A record without its timing."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "timing"} for row in rows]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return hf.load(folder).state_dict()


def test_it_learns_what_is_rewarded(start: Path, tmp_path: Path) -> None:
    """The letters are a twentieth of the vocabulary: from that share of an answer to most of it."""
    settings = {"steps": 12, "accumulation": 1, "evaluate_every": 6, "optim": {"lr": 0.02}}
    rollouts = {"questions": 8, "group": 8, "max_tokens": 6}
    run = config(start, tmp_path, train=settings, rollout=rollouts, policy={"kl_weight": 0.0}, correct_at=0.8)
    assert not grpo.run(run, tmp_path / "run").interrupted
    told = lines(tmp_path / "run" / "rollouts.jsonl")
    assert [row["step"] for row in told] == list(range(12))
    assert told[0]["reward"] < 0.2 < 0.6 < told[-1]["reward"]
    judged = lines(tmp_path / "run" / "evaluations.jsonl")
    assert [row["step"] for row in judged] == [0, 6, 12]
    assert judged[0]["high"] < judged[-1]["low"]
    assert all(0 <= row["pass_1"] <= row["pass_k"] <= 1 for row in judged)
    assert hf.load(tmp_path / "run" / "export").config == hf.load(start).config


@pytest.mark.parametrize("stop_after", [2, 3])  # between rounds, and within one
def test_a_stopped_run_goes_on_bit_for_bit(start: Path, tmp_path: Path, stop_after: int) -> None:
    changes = {
        "steps_per_round": 2,
        "refresh_every": 2,
        "policy": {"variant": "v3.2", "kl_weight": 0.1},
        "train": {"steps": 6, "evaluate_every": 2, "optim": {"lr": 0.01}, "accumulation": 2},
    }
    run = config(start, tmp_path, **changes)

    def interrupt(event: Event) -> None:
        if isinstance(event, StepReport) and event.step == stop_after:
            os.kill(os.getpid(), signal.SIGINT)

    grpo.run(run, tmp_path / "whole")
    assert grpo.run(run, tmp_path / "parts", observe=interrupt).interrupted
    grpo.run(run, tmp_path / "parts")
    ours, theirs = (weights(tmp_path / name / "export") for name in ("whole", "parts"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    for record in ("metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl"):
        assert lines(tmp_path / "whole" / record) == lines(tmp_path / "parts" / record)
    kl = [row["kl"] for row in lines(tmp_path / "whole" / "metrics.jsonl")]
    assert kl[0] == kl[2] == kl[4] == 0  # the reference is the policy at the start of each round
    assert min(kl[1::2]) > 0


def test_engine_and_trainer_agree_on_what_was_sampled(start: Path, tmp_path: Path) -> None:
    """Absorbed attention over a cache, and packed attention without: float32 roundings apart."""
    run = config(start, tmp_path)
    model, tokenizer = hf.load(start), Tokenizer.load(start)
    questions = grpo.read_questions(run.problems, tokenizer)
    with Judge(run.weights()) as judge:
        sampler = Rollout(model, tokenizer, judge, run)
        groups = sampler.sample(questions, 0)
        again = sampler.sample(questions, 0)
        other = sampler.sample(questions, 1)
    ids = [[e.completion.ids for e in group] for group in groups]
    assert ids == [[e.completion.ids for e in group] for group in again]  # a function of weights and seed
    assert ids != [[e.completion.ids for e in group] for group in other]
    assert model.training  # left as it was
    answers = [answer for group in groups for answer in group]
    dealt = round_batches.deal(answers, run, torch.Generator())
    assert sorted(i for parts in dealt for part in parts for i in part) == list(range(len(answers)))
    (batches,) = round_batches.batches_of(answers, dealt, run, torch.device("cpu"))
    for batch in batches:
        gap = rollout.measure_gap(model, batch)
        # Some 1e3 roundings of 6e-8 on the way to a logit of order 1, random in sign: 2e-6.
        assert gap.mean < 5e-6
        assert gap.most < 1e-4
        assert batch.routing is not None
        assert gap.replayed == 0  # every choice of the engine is the trainer's
        assert gap.routing < 0.01  # left to itself, the trainer differs where two scores are as good as equal
        assert float(batch.weights_T.sum()) == pytest.approx(0.5, rel=0.3)  # type: ignore[union-attr]
    total = sum(float(batch.weights_T.sum()) for batch in batches)  # type: ignore[union-attr]
    assert total == pytest.approx(1)


def episode(prompt: tuple[int, ...], answer: tuple[int, ...]) -> Episode:
    logprobs = tuple(-float(token) / 100 for token in answer)
    tops = tuple(((token, -0.1), (7, -3.0)) for token in answer)
    completion = Completion(answer, logprobs, tops, "stop")
    with Judge({LETTERS: 1.0}) as judge:
        (score,) = judge.score([""], [{}])
    return Episode(Question(prompt, {}), completion, "", score, 0.0)


def test_rows_of_a_batch_are_the_tokens_that_were_sampled(start: Path, tmp_path: Path) -> None:
    settings = config(start, tmp_path).rollout
    kept = replace(settings, keep_sampling=True, top_k=2, top_p=0.9)
    answers = [episode((10, 11), (20, 21, 1)), episode((12,), (1,))]
    batch = round_batches.to_batch(answers, [0.25, 0.5], kept, torch.device("cpu"))
    assert batch.ids_T.tolist() == [10, 11, 20, 21, 12]
    assert batch.targets_T is not None
    assert batch.targets_T.tolist() == [11, 20, 21, 1, 1]
    assert batch.weights_T is not None
    assert batch.weights_T.tolist() == [0, 0.25, 0.25, 0.25, 0.5]
    weighed = round_batches.give_advantages(batch, [0.5, -1.0])
    assert batch.advantages_T is None
    assert weighed.advantages_T is not None
    assert weighed.advantages_T.tolist() == [0, 0.5, 0.5, 0.5, -1.0]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 0]
    assert batch.cu_seqlens_S1.tolist() == [0, 4, 5]
    assert batch.kept_TK is not None
    assert [[token for token in row if token >= 0] for row in batch.kept_TK.tolist()] == [
        [11],
        [20],
        [21],
        [1],
        [1],
    ]  # 0.95 of the mass is above top_p alone
    model = hf.load(start)
    looked = rollout.look_back(model, batch, 1.0, None)
    assert looked.old_T is not None
    assert looked.old_T.abs().max() == 0  # a single token that could be drawn has probability 1


def test_recorded_experts_are_replayed(start: Path, tmp_path: Path) -> None:
    """A record of the trainer's own choices changes nothing; another record is what the tokens then use."""
    settings, model = config(start, tmp_path).rollout, hf.load(start)
    batch = round_batches.to_batch([episode((10, 11), (20, 21, 1))], [0.25], settings, torch.device("cpu"))
    own = torch.stack([layer.experts_TK for layer in model(batch).routing], 1)
    same = rollout.measure_gap(model, replace(batch, routing=own))
    assert same.routing == same.replayed == 0
    other = rollout.measure_gap(model, replace(batch, routing=(own + 1) % 16))
    assert other.routing > 0.5
    assert other.replayed == 0
    assert other.mean != same.mean


def test_what_happens_in_a_rollout_is_counted(start: Path, tmp_path: Path) -> None:
    bad = "tests.stages.misbehaving:misbehave"
    run = config(start, tmp_path, rewards=[LETTERS, f"0.5 {bad}"])
    with Judge(run.weights()) as judge:
        sampler = Rollout(hf.load(start), Tokenizer.load(start), judge, run)
        groups = sampler.sample(grpo.read_questions(run.problems, sampler.tokenizer)[:2], 0)
        told = rollout.count(groups)
        assert told["overlong"] + told["empty"] <= told["answers"] == 8
        assert told["longest"] == 6
        assert told[f"reward/{bad}"] == 1
        one = groups[0][0]
        ends = [((7,), "stop"), ((7,), "length"), ((7, 8), "stop")]  # nothing but the end; cut; a word
        ended = [
            replace(one, completion=replace(one.completion, ids=ids, finish=finish)) for ids, finish in ends
        ]
        assert [(episode.empty, episode.overlong) for episode in ended] == [
            (True, False), (False, True), (False, False),
        ]  # fmt: skip
        told = rollout.count([ended])
        assert (told["empty"], told["overlong"], told["equal_groups"]) == (1, 1, 1)
        score = judge.score(["nan"], [{}])[0]
        assert rollout.count([[replace(groups[0][0], score=score)]])["fault/not a number"] == 1
    assert rollout.is_flat([replace(groups[0][0], reward=0.1 + 0.2), replace(groups[0][0], reward=0.3)])


def test_on_policy_distillation_comes_near_the_teacher(start: Path, tmp_path: Path) -> None:
    """Reverse KL, measured where the student goes, falls to two thirds, noise included."""
    teacher = parts.model(hf.load(start).config, seed=7)
    hf.save(teacher, tmp_path / "teacher", tokenizer_files=grpo.tokenizer_files(str(start)))
    settings = {"steps": 40, "accumulation": 1, "evaluate_every": 0, "optim": {"lr": 0.01}}
    run = config(
        start,
        tmp_path,
        teacher=str(tmp_path / "teacher"),
        train=settings,
        policy={"variant": "dapo"},
        rollout={"questions": 8, "group": 8, "max_tokens": 6},
    )
    grpo.run(run, tmp_path / "run")
    kl = [row["kl"] for row in lines(tmp_path / "run" / "metrics.jsonl")]
    assert sum(kl[-5:]) < 0.67 * sum(kl[:5])
    with pytest.raises(ValueError, match=r"with a teacher, policy\.kl_weight \(0\.04\)"):
        replace(run, policy=replace(run.policy, kl_weight=0.04))


def test_dynamic_sampling_replaces_flat_groups(start: Path, tmp_path: Path) -> None:
    """Half the questions reward every answer alike: with more samplings they are left out of the round."""
    some = "tests.stages.misbehaving:letters_if_even"
    for extra, flat in ((0, 1), (8, 0)):
        rollouts = {"questions": 4, "group": 4, "max_tokens": 6, "extra_rounds": extra}
        run = config(start, tmp_path, rewards=[some], rollout=rollouts, policy={"variant": "dapo"})
        run = replace(run, train=replace(run.train, steps=1))
        grpo.run(run, tmp_path / f"run-{extra}")
        (told,) = lines(tmp_path / f"run-{extra}" / "rollouts.jsonl")
        assert (told["equal_groups"] > 0) == flat


def test_in_batch_invariant_mode_the_gap_is_zero_at_every_step(start: Path, tmp_path: Path) -> None:
    rollouts = {"questions": 4, "group": 4, "max_tokens": 6, "batch_invariant": True}
    settings = {"steps": 3, "accumulation": 2, "evaluate_every": 0, "optim": {"lr": 0.01}}
    grpo.run(config(start, tmp_path, train=settings, rollout=rollouts), tmp_path / "run")
    told = lines(tmp_path / "run" / "rollouts.jsonl")
    assert [row["gap"] for row in told] == [{"mean": 0, "most": 0, "routing": 0, "replayed": 0}] * 3
    assert not dispatch.is_batch_invariant()  # left as it was


def test_sparse_attention_has_no_batch_invariant_form(start: Path, tmp_path: Path) -> None:
    for family in ("nsa-27b", "deepseek-v3.2"):
        model = Transformer(tiny(family))
        model.init_weights(torch.Generator().manual_seed(0))
        files = [start / name for name in ("tokenizer.json", "tokenizer_config.json")]
        hf.save(model, tmp_path / family, tokenizer_files=files)
        run = config(tmp_path / family, tmp_path, rollout={"batch_invariant": True})
        with pytest.raises(ValueError, match="has no batch-invariant form; leave it out"):
            grpo.run(run, tmp_path / "run" / family)


def test_mistakes_are_told(start: Path, tmp_path: Path) -> None:
    run = config(start, tmp_path)
    claim(tmp_path / "run", run)
    claim(tmp_path / "run", replace(run, train=replace(run.train, steps=8)))  # further: the same run
    with pytest.raises(ValueError, match=r"holds another run: its rollout\.group is 4, here 2; choose"):
        claim(tmp_path / "run", replace(run, rollout=replace(run.rollout, group=2)))
    with pytest.raises(ValueError, match=r"which steps_per_round 3 times train\.accumulation 2 does"):
        config(start, tmp_path, steps_per_round=3)
    with pytest.raises(ValueError, match=r"rollout has no key 'heat'; the nearest is"):
        config(start, tmp_path, rollout={"heat": 1})
    problems = tmp_path / "bad.jsonl"
    problems.write_text('{"question": 1}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl, record 1 has neither 'prompt' nor 'messages'"):
        grpo.read_questions([str(problems)], Tokenizer.load(start))
    problems.write_text('{"messages": [{"role": "user", "content": "1"}]}\n')
    plain = replace(Tokenizer.load(start), chat_template="{{ messages[0].content }}")
    with pytest.raises(ValueError, match="no generation prompt"):
        grpo.read_questions([str(problems)], plain)


def test_wilson_holds_what_it_promises() -> None:
    low, high = grpo.wilson(0.5, 100)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # Wilson 1927, as tabled
    assert grpo.wilson(0.0, 10)[0] == 0
    assert grpo.wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
