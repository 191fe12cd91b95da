"""The tasks of `shoal eval`: published evaluation sets as files of this machine, asked the field's way.

A task is a row: which file has its questions, how one is asked, and what makes an answer right. `build` makes
lm-eval's ConfigurableTask of it (the extra `eval`), so that counting, few-shot examples and standard errors
are lm-eval's own. The law: a score depends on the file, the row and the model alone; nothing is downloaded.
What a model wrote as code runs in the sandbox (sandbox.py), never in this process.
"""

from __future__ import annotations

import difflib
import gzip
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
from lm_eval.api.task import ConfigurableTask

from shoal.stages import sandbox
from shoal.stages.rewards import number

Doc = dict[str, Any]
Kind = Literal["choice", "number", "code"]

LETTERS = "ABCDE"
ENGLISH = "Question: {}\nAnswer:"
CHINESE = "问题：{}\n答案："  # noqa: RUF001
_FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Exam:
    """`read` turns a record of the file into {question, answer} and, by kind, options or tests."""

    file: str  # under the data folder
    kind: Kind
    read: Callable[[Doc], Doc]
    where: str  # who publishes the file
    stops: tuple[str, ...] = ()
    shots: int = 0  # worked examples before the question, the first of `shots_file`
    shots_file: str = ""
    most: int = 512  # tokens of an answer


def _gsm8k(record: Doc) -> Doc:
    worked = re.sub(r"<<.*?>>", "", record["answer"])
    return {
        "question": f"Question: {record['question']}\nAnswer:",
        "worked": worked,
        "answer": worked.rpartition("####")[2].strip().replace(",", ""),
    }


def _svamp(record: Doc) -> Doc:
    body = record["Body"].rstrip()
    ends = "" if body.endswith((".", "?", "!")) else "."
    return _asked(f"{body}{ends} {record['Question']}", record["Answer"])


def _asked(question: str, answer: object, form: str = ENGLISH) -> Doc:
    return {"question": form.format(question), "answer": str(answer), "worked": str(answer)}


def _cmath(record: Doc) -> Doc:
    return _asked(record["question"], record["golden"], CHINESE)


def _mgsm_zh(record: Doc) -> Doc:
    return _asked(record["messages"][0]["content"], record["answer"], CHINESE)


MMLU = "The following are multiple choice questions (with answers) about {}."


def _mmlu(record: Doc) -> Doc:
    options = [f"{letter}. {text}" for letter, text in zip(LETTERS, record["options"], strict=False)]
    topic = record["topic"].replace("_", " ")
    asked = "\n".join([record["question"].strip(), *options])
    return {
        "question": f"{MMLU.format(topic)}\n\n{asked}\nAnswer:",
        "options": list(LETTERS[: len(options)]),
        "answer": record["answer"],
        "worked": record["answer"],
    }


def _agieval(record: Doc, form: str) -> Doc:
    """Its options begin with (A), (B), ...; some have a passage."""
    asked = "\n".join([f"{record['passage'] or ''}{record['question'].strip()}", *record["options"]])
    letters = [option[1] for option in record["options"]]
    return {
        "question": form.format(asked),
        "options": letters,
        "answer": record["label"],
        "worked": record["label"],
    }


def _humaneval(record: Doc) -> Doc:
    return {
        "question": record["prompt"],
        "answer": record["canonical_solution"],
        "worked": record["canonical_solution"],
        "tests": f"{record['test']}\ncheck({record['entry_point']})",
        "name": record["entry_point"],
    }


def _mbpp(record: Doc) -> Doc:
    tests = "\n".join(record["test_list"])
    code = record["code"].replace("\r\n", "\n")
    setup = record.get("test_setup_code") or ""
    return {
        "question": f'"""\n{record["text"]}\n{tests}\n"""\n',
        "answer": code,
        "worked": code,
        "tests": f"{setup}\n{tests}",
        "name": "",
    }


CODE_STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\n```")
MATH_STOPS = ("\n\n", "Question:", "问题：")  # noqa: RUF001

# Who publishes the files.
OPENAI, DEEPSEEK = "github.com/openai", "github.com/deepseek-ai"
MATH, CODER = f"{DEEPSEEK}/DeepSeek-Math", f"{DEEPSEEK}/DeepSeek-Coder"
GSM8K, HUMANEVAL, AGIEVAL = (
    f"{OPENAI}/grade-school-math",
    f"{OPENAI}/human-eval",
    "github.com/ruixiangcui/AGIEval",
)
GAOKAO = ("biology", "chemistry", "geography", "history", "mathqa")  # of physics, some have two answers

EXAMS: dict[str, Exam] = {
    "gsm8k": Exam("gsm8k/test.jsonl", "number", _gsm8k, GSM8K, MATH_STOPS, 5, "gsm8k/train.jsonl.gz"),
    "svamp": Exam("svamp/test.jsonl", "number", _svamp, CODER, MATH_STOPS),
    "cmath": Exam("cmath/test.jsonl", "number", _cmath, MATH, MATH_STOPS),
    "mgsm_zh": Exam("mgsm_zh/test.jsonl", "number", _mgsm_zh, MATH, MATH_STOPS),
    "mmlu_stem": Exam("mmlu/mmlu_stem_test.jsonl", "choice", _mmlu, MATH),
    "humaneval": Exam("humaneval/HumanEval.jsonl.gz", "code", _humaneval, HUMANEVAL, CODE_STOPS),
    "mbpp": Exam("mbpp/mbpp.jsonl", "code", _mbpp, CODER, ('\n"""', "\nassert", "\n```")),
    "agieval_aqua_rat": Exam("agieval/aqua-rat.jsonl", "choice", partial(_agieval, form=ENGLISH), AGIEVAL),
    **{
        f"agieval_gaokao_{name}": Exam(
            f"agieval/gaokao-{name}.jsonl", "choice", partial(_agieval, form=CHINESE), AGIEVAL
        )
        for name in GAOKAO
    },
}


def find_exams(names: Sequence[str]) -> dict[str, Exam]:
    """Those of these names. ValueError names the nearest of one that is not there."""
    wanted = [name.strip() for name in names if name.strip()]
    if not wanted:
        raise ValueError(f"no task is named; there are {', '.join(EXAMS)}")
    for name in wanted:
        if name not in EXAMS:
            near = difflib.get_close_matches(name, EXAMS, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"there is no task {name!r}; the nearest is {near!r}, all are {', '.join(EXAMS)}"
            )
    return {name: EXAMS[name] for name in wanted}


def prepare(names: Sequence[str], data: Path, *, chat: bool = False) -> dict[str, ConfigurableTask]:
    """lm-eval's tasks of these names over the files of a folder. ValueError says what is missing."""
    exams = find_exams(names)
    if not data.is_dir():
        wanted = "; ".join(f"{each.file} from {each.where}" for each in exams.values())
        raise ValueError(f"there is no folder {data} (--data); it has the files of the tasks: {wanted}")
    return {name: build(name, each, data, chat=chat) for name, each in exams.items()}


def build(name: str, exam: Exam, data: Path, *, chat: bool) -> ConfigurableTask:
    """lm-eval's task over the file. In a chat an answer ends by itself, and code comes in a block."""
    documents = {"test": read_docs(data / exam.file, exam)}
    config: dict[str, Any] = {"test_split": "test"}
    if exam.shots:
        documents["shots"] = read_docs(data / exam.shots_file, exam)
        config |= {"fewshot_split": "shots", "fewshot_config": {"sampler": "first_n"}}
    if exam.kind == "choice":
        config |= {"output_type": "multiple_choice", "doc_to_choice": _options}
        config |= {"metric_list": [_metric("acc")]}
    else:
        metric, judge = ("pass@1", _passes) if exam.kind == "code" else ("exact_match", _equals)
        config |= {
            "output_type": "generate_until",
            "process_results": judge,
            "metric_list": [_metric(metric)],
        }
        stops = [] if chat else list(exam.stops)
        config["generation_kwargs"] = {"until": stops, "do_sample": False, "max_gen_toks": exam.most}
    config |= {
        "task": name,
        "custom_dataset": lambda: documents,
        "doc_to_text": _question,
        "doc_to_target": _gold if exam.kind == "choice" else _worked,
        "target_delimiter": "" if exam.kind == "code" else " ",
        "num_fewshot": exam.shots,
    }
    return ConfigurableTask(config=config)


def read_docs(file: Path, exam: Exam) -> datasets.Dataset:
    if not file.is_file():
        raise ValueError(f"{file} is missing; it is published at {exam.where}, or give its folder as --data")
    text = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    try:
        records = [json.loads(line) for line in text.splitlines() if line.strip()]
        return datasets.Dataset.from_list([exam.read(record) for record in records])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not the published file: {error!r}; fetch it from {exam.where}") from None


def _metric(name: str) -> Mapping[str, Any]:
    return {"metric": name, "aggregation": "mean", "higher_is_better": True}


def _question(doc: Doc) -> str:
    return doc["question"]


def _worked(doc: Doc) -> str:
    return doc["worked"]


def _options(doc: Doc) -> list[str]:
    return doc["options"]


def _gold(doc: Doc) -> int:
    return doc["options"].index(doc["answer"])


def _equals(doc: Doc, answers: Sequence[str]) -> dict[str, float]:
    return {"exact_match": number(answers[0], doc)}


def _passes(doc: Doc, answers: Sequence[str]) -> dict[str, float]:
    return {"pass@1": float(sandbox.run_tests(_program(doc, answers[0]), doc["tests"]).outcome == "ok")}


def _program(doc: Doc, answer: str) -> str:
    """The answer goes on from the question, or is a block that stands by itself."""
    blocks = _FENCED.findall(answer)
    code = blocks[-1] if blocks else answer
    alone = bool(blocks) and (not doc["name"] or f"def {doc['name']}(" in code)
    return code if alone else doc["question"] + code
