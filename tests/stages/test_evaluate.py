"""Laws of `shoal eval`: each number is that of lm-eval's own `hf` model; code runs in a jail.

Both sides read float32 weights, in different orders of addition. Over the 4 layers and some hundred tokens of
these models a log-probability moves by some 1e-6 of logits that reach 30; a sum over 20 tokens stays below
1e-3. What is greedy, chosen or written can differ only where two logits lie that close.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shoal.checkpoint import hf
from shoal.config.families import tiny
from shoal.config.run import DataConfig, RunConfig, TrainConfig
from shoal.data.text import Tokenizer
from shoal.data.tokenizer import train_tokenizer
from shoal.engine import EngineSettings, SamplingParams
from shoal.model.transformer import Transformer
from shoal.stages import pretrain
from shoal.stages.llm import open_engine
from tests.evaluation_sets import write_sets

pytest.importorskip("lm_eval", reason="needs shoal[eval]")

from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from shoal.stages import exam
from shoal.stages.evaluate import EngineLM, run

SHARED = Path(__file__).parents[3] / "shared" / "data" / "eval"
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
CONTEXT = 1024


def quiet(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module", params=["deepseek-v3", "mixtral-8x7b"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Float32, with weights large enough that its predictions are not flat."""
    out = tmp_path_factory.mktemp("checkpoint")
    tokenizer = train_tokenizer(["Question: how many eggs? Answer: 12 eggs\n" * 9], 290)
    tokenizer = replace(tokenizer, chat_template=TEMPLATE)
    tokenizer.save(out / "tokenizer")
    config = replace(
        tiny(request.param),
        vocab_size=tokenizer.vocab_size,
        num_nextn_predict_layers=0,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    hf.save(model, out / "model", tokenizer_files=list((out / "tokenizer").iterdir()))
    return out / "model"


@pytest.fixture(scope="module")
def ours(folder: Path) -> EngineLM:
    engine = open_engine(folder, EngineSettings(num_pages=64, max_batch_tokens=128, max_sequences=8))
    return EngineLM(engine, Tokenizer.load(folder), chat=False, progress=quiet)


@pytest.fixture(scope="module")
def theirs(folder: Path, ours: EngineLM) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    made: Any = HFLM  # its types are its parent's
    return made(
        pretrained=model.eval(),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        batch_size=4,
        max_length=ours.max_length,
        device="cpu",
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published layouts, with questions of ours."""
    return write_sets(tmp_path_factory.mktemp("data"))


def ask(*arguments: Any) -> Instance:
    return Instance("loglikelihood", {}, arguments, 0)


def test_log_likelihoods_are_theirs(ours: EngineLM, theirs: Any) -> None:
    """With and without a context, one that ends in blanks, and one that is longer than the model's."""
    before = ours.cut
    asked = [
        ask("Question: how", " many eggs"),
        ask("Question: ", "12"),
        ask("", "Answer: eggs"),
        ask("how many eggs " * 300, "12 eggs"),
        *(ask("Question: how many? Answer:", f" {n}") for n in range(9)),
    ]
    for mine, other in zip(ours.loglikelihood(asked), theirs.loglikelihood(asked), strict=True):
        assert mine[0] == pytest.approx(other[0], abs=1e-3)
        assert mine[1] == other[1]
    assert ours.cut == before + 1


def test_what_is_greedy_is_greedy(ours: EngineLM, theirs: Any) -> None:
    """What the engine wrote by its best tokens, and the same with another end."""
    asked = ours.tok_encode("Question: how")
    said = list(ours.engine.generate([asked], SamplingParams(0.0, max_tokens=4))[0].ids)
    other = [*said[:-1], (said[-1] + 1) % ours.text.vocab_size]
    pairs: list[Any] = [(None, asked, said), (None, asked, other)]
    assert [greedy for _, greedy in ours._loglikelihood_tokens(pairs)] == [True, False]
    assert [greedy for _, greedy in theirs._loglikelihood_tokens(pairs)] == [True, False]


def test_whole_texts_are_theirs(ours: EngineLM, theirs: Any) -> None:
    """Texts of one window and of several: each token is told once, with the context they give it."""
    asked = [ask("eggs"), ask("how many eggs? " * 300), ask("蛋" * 500)]
    mine, other = ours.loglikelihood_rolling(asked), theirs.loglikelihood_rolling(asked)
    assert mine == pytest.approx(other, rel=1e-5)


def test_answers_are_theirs(ours: EngineLM, theirs: Any) -> None:
    """Greedy, to a stop string, to the end of their tokens, after a question that has to be cut."""
    free = {"until": ["no such thing"], "do_sample": False, "max_gen_toks": 24}
    asked = [ask(text, free) for text in ("Question: how many", "eggs", "Answer: 12 " * 250)]
    said = ours.generate_until(asked)
    assert said == theirs.generate_until(asked)
    stops = [text[5:7] for text in said]
    cut = [ask(each.args[0], {**free, "until": [stop]}) for each, stop in zip(asked, stops, strict=True)]
    assert ours.generate_until(cut) == theirs.generate_until(cut)


def test_scores_are_theirs(ours: EngineLM, theirs: Any, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tasks, sample by sample: what is asked, each log-likelihood, each answer, each score. Answers
    stop at 24 tokens: no random weights end one, and a longer one says nothing more."""
    monkeypatch.setitem(exam.EXAMS, "gsm8k", replace(exam.EXAMS["gsm8k"], most=24))
    names = ["gsm8k", "mmlu_stem"]
    scores, mine = run(ours, exam.prepare(names, data), limit=3)
    told: Any = evaluate(theirs, dict(exam.prepare(names, data)), limit=3)
    for score in scores:
        assert score.value == told["results"][score.task][f"{score.metric},none"]
        assert score.samples == 3
    for left, right in zip(mine["mmlu_stem"], told["samples"]["mmlu_stem"], strict=True):
        assert left["arguments"] == right["arguments"]
        for a, b in zip(left["filtered_resps"], right["filtered_resps"], strict=True):
            assert float(a[0]) == pytest.approx(float(b[0]), abs=1e-3)
    for left, right in zip(mine["gsm8k"], told["samples"]["gsm8k"], strict=True):
        assert left["arguments"] == right["arguments"]
        assert left["filtered_resps"] == right["filtered_resps"]


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_every_task_scores_a_trained_checkpoint_as_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published files, two questions each, of a model that has learned a little: 40 steps."""
    text = SHARED.parent / "pretrain" / "tiny-mixed.jsonl.zst"
    config = RunConfig(
        replace(tiny("deepseek-v3"), vocab_size=1024, max_position_embeddings=2048),
        TrainConfig(steps=40, evaluate_every=0, checkpoint_every=0),
        DataConfig(train=(str(text),), tokens_per_batch=1024, seq_len=256),
    )
    pretrain.run(config, tmp_path / "run")
    folder = tmp_path / "run" / "export"
    engine = open_engine(folder, EngineSettings(num_pages=128, max_batch_tokens=256, max_sequences=8))
    mine = EngineLM(engine, Tokenizer.load(folder), chat=False, progress=quiet)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer, made = AutoTokenizer.from_pretrained(folder), cast(Any, HFLM)
    length = mine.max_length
    other = made(pretrained=model.eval(), tokenizer=tokenizer, batch_size=4, max_length=length, device="cpu")
    for name, each in exam.EXAMS.items():
        monkeypatch.setitem(exam.EXAMS, name, replace(each, most=24))
    names = list(exam.EXAMS)
    scores, asked = run(mine, exam.prepare(names, SHARED), limit=2)
    told: Any = evaluate(other, dict(exam.prepare(names, SHARED)), limit=2)
    assert {score.task for score in scores} == set(names)
    for score in scores:
        assert score.value == told["results"][score.task][f"{score.metric},none"], score.task
    for name in names:
        for left, right in zip(asked[name], told["samples"][name], strict=True):
            assert left["arguments"] == right["arguments"]
            for a, b in zip(left["filtered_resps"], right["filtered_resps"], strict=True):
                if exam.EXAMS[name].kind == "choice":
                    assert float(a[0]) == pytest.approx(float(b[0]), abs=1e-3), name
                else:
                    assert a == b, name


def test_a_chat_is_asked_by_its_template(ours: EngineLM, folder: Path) -> None:
    chat = EngineLM(ours.engine, Tokenizer.load(folder), chat=True, progress=quiet)
    messages = [{"role": "user", "content": "how many?"}]
    text = chat.apply_chat_template(messages)
    assert chat.tok_encode(text) == chat.text.chat(messages)
    plain = replace(Tokenizer.load(folder), chat_template=None)
    with pytest.raises(ValueError, match="no chat template: it is a base model"):
        EngineLM(ours.engine, plain, chat=True, progress=quiet)


def test_code_is_right_where_its_tests_pass(data: Path) -> None:
    doc = exam.read_docs(data / "humaneval/HumanEval.jsonl.gz", exam.EXAMS["humaneval"])[1]
    judge = exam.build("humaneval", exam.EXAMS["humaneval"], data, chat=False).config.process_results
    assert callable(judge)
    whole = "def add1(a, b):\n    return a + b + 1\n"
    for answer, right in (
        (doc["answer"], 1.0),
        ("    return a + b\n", 0.0),
        (f"Here it is:\n```python\n{whole}```\n", 1.0),
        (f"```\n{doc['answer']}", 1.0),
        ("    raise SystemExit(0)\n", 0.0),  # leaves before its tests
        ("    while True: pass\n", 0.0),
    ):
        assert judge(doc, [answer]) == {"pass@1": right}


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
@pytest.mark.parametrize("name", list(exam.EXAMS))
def test_every_task_reads_its_published_file(name: str) -> None:
    task = exam.build(name, exam.EXAMS[name], SHARED, chat=False)
    docs: list[Any] = list(task.eval_docs)
    assert len(docs) > 100
    for doc in docs[:50]:
        assert doc["answer"]
        assert exam.EXAMS[name].kind != "choice" or doc["answer"] in doc["options"]
