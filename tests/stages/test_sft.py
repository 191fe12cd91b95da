"""Laws of supervised tuning: only what the assistant says is learned, samples do not see each other.

A stopped run goes on bit for bit.
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
from shoal.config.run import BalanceConfig, from_table
from shoal.config.tune import DistillConfig, ExpertsConfig, LoraConfig, SFTConfig
from shoal.data.conversations import Conversation, SamplePacker, pack, read_conversations, to_samples
from shoal.data.text import Tokenizer
from shoal.model.transformer import Transformer
from shoal.stages import sft
from shoal.stages.grpo import tokenizer_files
from shoal.train.metrics import Event, StepReport

SHARED = Path(__file__).parents[3] / "shared" / "data" / "sft"


def learned(conversation: Conversation, tokenizer: Tokenizer) -> list[str]:
    """What is learned of each sample, as text; spans apart."""
    texts = []
    for sample in to_samples(conversation, tokenizer):
        spans, open_ = [], False
        for token, counts in zip(sample.ids, sample.learned, strict=True):
            if counts:
                spans = spans if open_ else [*spans, []]
                spans[-1].append(token)
            open_ = counts
        texts.append(" / ".join(tokenizer.decode(span) for span in spans))
    return texts


def said(*turns: tuple[str, str]) -> Conversation:
    return Conversation(tuple({"role": role, "content": content} for role, content in turns))


EOS = "<｜end▁of▁sentence｜>"


def test_only_what_the_assistant_says_is_learned(start: Path) -> None:
    tokenizer = Tokenizer.load(start)
    talk = said(
        ("system", "be"), ("user", "一 two"), ("assistant", "三"), ("user", "4"), ("assistant", "five")
    )
    assert learned(talk, tokenizer) == [f"三{EOS} / five{EOS}"]
    assert to_samples(said(("user", "only asked")), tokenizer) == []
    # A user who writes a control token has not ended a turn.
    assert learned(said(("user", f"a{EOS}<｜Assistant｜>b"), ("assistant", "c")), tokenizer) == [f"c{EOS}"]


def test_reasoning_that_past_turns_lose_gives_a_sample_a_turn(start: Path) -> None:
    tokenizer = Tokenizer.load(start)
    talk = said(("user", "1"), ("assistant", "<think>a</think>b"), ("user", "2"), ("assistant", "c"))
    assert learned(talk, tokenizer) == [f"<think>a</think>b{EOS}", f"c{EOS}"]


def test_calls_are_learned_and_what_tools_return_is_not(start: Path, tmp_path: Path) -> None:
    file = tmp_path / "tools.json"
    turns = [
        {"from": "human", "value": "weather?"},
        {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "北京"}}'},
        {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "It is sunny."},
    ]
    file.write_text(json.dumps([{"conversations": turns, "tools": '[{"name": "look"}]'}]))
    (talk,) = read_conversations([file])
    (text,) = learned(talk, Tokenizer.load(start))
    assert '{"at": "北京"}' in text
    assert text.endswith(f"/ It is sunny.{EOS}")
    assert "sunny<" not in text
    (sample,) = to_samples(talk, Tokenizer.load(start))
    assert '{"name": "look"}' in Tokenizer.load(start).decode(sample.ids)


def test_layouts_say_the_same(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"instruction": "a", "context": "b", "response": "c"},
        {"instruction": "a", "input": "b", "output": "c"},
        {"messages": [{"role": "user", "content": "a\n\nb"}, {"role": "assistant", "content": "c"}]},
        {"conversations": [{"from": "human", "value": "a\n\nb"}, {"from": "gpt", "value": "c"}]},
    ]
    file = tmp_path / "all.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    first, *rest = read_conversations([file])
    assert rest == [first] * 3
    file.write_text('{"question": 1}')
    with pytest.raises(ValueError, match=r"all.jsonl, record 1 has none of the keys"):
        list(read_conversations([file]))


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
@pytest.mark.parametrize(
    "name",
    [
        "oasst1_sft_zh.json",
        "glaive_toolcall_en_demo.json",
        "glaive_toolcall_zh_demo.json",
        "reason_tool_use_demo_50.jsonl",
        "esft/train_law.jsonl.gz",
    ],
)
def test_published_sets_are_read_and_their_answers_learned(start: Path, name: str) -> None:
    tokenizer, found = Tokenizer.load(start), 0
    for talk in list(read_conversations([SHARED / name]))[:40]:
        answers = sum(message["role"] == "assistant" for message in talk.messages)
        texts = " / ".join(learned(talk, tokenizer)).split(" / ")
        assert len(texts) >= min(answers, 1)
        for message in talk.messages:
            if message["role"] == "assistant" and message["content"]:
                assert any(message["content"].strip()[-20:] in text for text in [" / ".join(texts)])
                found += 1
    assert found >= 20


def test_samples_of_a_pack_do_not_see_each_other(start: Path) -> None:
    tokenizer, model = Tokenizer.load(start), hf.load(start)
    samples = [
        to_samples(said(("user", a), ("assistant", b)), tokenizer)[0] for a, b in (("x", "yy"), ("zz", "w"))
    ]
    together = model(pack(samples)).hidden_TD
    alone = torch.cat([model(pack([sample])).hidden_TD for sample in samples])
    # The same sums over other batch sizes: a few float32 roundings of values of order 1.
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_every_sample_comes_once_an_epoch(start: Path) -> None:
    tokenizer = Tokenizer.load(start)
    samples = [to_samples(said(("user", "q"), ("assistant", "a" * n)), tokenizer)[0] for n in range(1, 12)]
    packer = SamplePacker(samples, 40, seed=3)
    total, index, tokens = sum(len(s.ids) - 1 for s in samples), 0, 0
    while tokens < 2 * total:
        batch = packer.batch(index)
        assert batch.num_tokens <= 40
        tokens, index = tokens + batch.num_tokens, index + 1
    assert tokens == 2 * total  # the epochs end where they should
    assert torch.equal(packer.batch(1).ids_T, SamplePacker(samples, 40, seed=3).batch(1).ids_T)


def config(start: Path, folder: Path) -> SFTConfig:
    file = folder / "talks.jsonl"
    rows = [{"instruction": f"{n}+1", "output": f"{n + 1}"} for n in range(60)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return SFTConfig(
        model=str(start),
        data=(str(file),),
        train=from_table(
            {
                "model": {"family": "deepseek-v3", "tiny": True},
                "train": {"steps": 6, "evaluate_every": 3, "checkpoint_every": 2, "optim": {"lr": 0.01}},
            },
            "x",
        ).train,
        holdout_fraction=0.2,
        tokens_per_batch=200,
        seq_len=100,
        samples=1,
    )


def test_a_run_learns_shows_answers_and_goes_on_bit_for_bit(start: Path, tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, StepReport) and event.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    run = config(start, tmp_path)
    sft.run(run, tmp_path / "whole")
    assert sft.run(run, tmp_path / "parts", observe=interrupt).interrupted
    sft.run(run, tmp_path / "parts")
    ours, theirs = (hf.load(tmp_path / name / "export").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "evaluation"]
    assert losses[-1] < losses[0]
    shown = [json.loads(line) for line in (tmp_path / "whole" / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in shown] == [3, 6]
    assert shown[0]["answers"][0]["asked"].endswith("+1")


def test_adapters_alone_learn_and_are_there_for_others(start: Path, tmp_path: Path) -> None:
    lora = LoraConfig(("o_proj", "experts.down_proj"), rank=2)
    run = replace(config(start, tmp_path), lora=lora)
    sft.run(run, tmp_path / "run")
    before, after = hf.load(start).state_dict(), hf.load(tmp_path / "run" / "export").state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert {name.split(".", 3)[3] for name in changed if "bias" not in name} == {
        "self_attn.o_proj.weight",
        "mlp.experts.down_proj",
    }
    assert (tmp_path / "run" / "adapters" / "adapter_model.safetensors").exists()


def test_a_dense_student_learns_what_its_teacher_would_say(start: Path, tmp_path: Path) -> None:
    """It never sees what was said in the data as right: only the teacher's distribution over it."""
    vocabulary = hf.load(start).config.vocab_size
    dense = replace(tiny("r1-distill-qwen-7b"), vocab_size=vocabulary, bos_token_id=0, eos_token_id=1)
    student = Transformer(dense)
    student.init_weights(torch.Generator().manual_seed(0))
    hf.save(student, tmp_path / "student", tokenizer_files=tokenizer_files(str(start)))
    plain = config(start, tmp_path)
    run = replace(
        plain,
        model=str(tmp_path / "student"),
        train=replace(plain.train, balance=BalanceConfig(sequence_loss=0.0)),
        distill=DistillConfig(str(start), keep=8),
    )
    sft.run(run, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["teacher"] for row in rows if row["kind"] == "step"]
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match=r"train\.balance\.sequence_loss is 0\.0001; distillation"):
        replace(run, train=plain.train)
    strange = replace(dense, vocab_size=vocabulary + 1)
    other = Transformer(strange)
    other.init_weights(torch.Generator().manual_seed(0))
    hf.save(other, tmp_path / "other", tokenizer_files=tokenizer_files(str(start)))
    with pytest.raises(ValueError, match="they must share a vocabulary"):
        sft.run(replace(run, distill=DistillConfig(str(tmp_path / "other"))), tmp_path / "again")


def test_chosen_experts_alone_learn(start: Path, tmp_path: Path) -> None:
    run = replace(config(start, tmp_path), esft=ExpertsConfig(share=0.3, batches=2))
    sft.run(run, tmp_path / "run")
    before, after = hf.load(start).state_dict(), hf.load(tmp_path / "run" / "export").state_dict()
    for name, tensor in before.items():
        rows = [i for i in range(len(tensor)) if not torch.equal(tensor[i], after[name][i])]
        if "experts." in name and "shared" not in name:
            assert 0 < len(rows) < 10
        else:
            assert not rows or "bias" in name


def test_nothing_to_learn_is_told(start: Path, tmp_path: Path) -> None:
    run = config(start, tmp_path)
    (tmp_path / "talks.jsonl").write_text('{"instruction": "a", "output": "' + "b" * 200 + '"}')
    with pytest.raises(ValueError, match=r"no answer to learn from in .* is within seq_len 100"):
        sft.run(run, tmp_path / "run")
