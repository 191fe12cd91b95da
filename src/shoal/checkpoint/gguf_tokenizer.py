"""A checkpoint's tokenizer in GGUF's words: what llama.cpp needs to encode as we do.

llama.cpp reads no rules from the file: it knows splits by name, and `PRE` says which rules of a
tokenizer.json each name stands for. The law: the name is found by the rules, never by the model's, and rules
that no name stands for are refused, since the ids would differ. Byte-level BPE only; the tokens keep their
ids, and rows of the embedding beyond them are unused.

The Modelfile for Ollama is written here too: it repeats what the tokenizer knows of turns and of the end.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.checkpoint.shards import read_json

DIGIT, DIGITS = r"\p{N}", r"\p{N}{1,3}"
BREAKS, CODER_LETTERS, CODER_CJK = r"[\r\n]", r"\s?\p{L}+", "[一-龥\u0800-一가-\ud7ff]+"
V2_LETTERS = r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯ"  # and on for a line: cased letters of all scripts
V2_MARKS = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
V3_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = "GPT-2's own rule"
PRE: dict[
    tuple[str, ...], str
] = {  # rules, as `_rules` gives them, to the name in llama.cpp's llama-vocab.cpp
    (DIGITS, "[一-龥\u3040-\u309f\u30a0-\u30ff]+", V3_WORDS): "deepseek-v3",
    (BREAKS, CODER_LETTERS, r"\s?\p{P}+", CODER_CJK, DIGIT): "deepseek-coder",
    (BREAKS, V2_LETTERS, V2_MARKS, r"\s+$", CODER_CJK, DIGIT): "deepseek-llm",
    (GPT4_WORDS % DIGITS,): "llama-bpe",
    (GPT4_WORDS % DIGIT,): "qwen2",
    (GPT2,): "gpt-2",
}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # token types of llama.cpp


@dataclass(frozen=True)
class GgufTokenizer:
    """What goes into the file. Ids are None where the checkpoint names no such token."""

    pre: str
    tokens: list[str] = field(repr=False)
    types: list[int] = field(repr=False)
    merges: list[str] = field(repr=False)
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    adds_bos: bool
    chat_template: str | None = field(repr=False)


def read_tokenizer(folder: Path, vocab_size: int) -> GgufTokenizer:
    """Of a checkpoint whose embedding has `vocab_size` rows. ValueError where ids would differ."""
    spec, config = read_json(folder / "tokenizer.json"), read_json(folder / "tokenizer_config.json")
    file, model = folder / "tokenizer.json", _table(spec, "model")
    if model.get("type") != "BPE" or model.get("byte_fallback") or model.get("continuing_subword_prefix"):
        raise ValueError(f"{file} is no byte-level BPE, the one kind that is written to GGUF here")
    if spec.get("normalizer") not in (None, {"type": "Sequence", "normalizers": []}):
        raise ValueError(f"{file} has a normalizer; GGUF's byte-level BPE has none, so ids would differ")
    rules = _rules(spec.get("pre_tokenizer"))
    if rules not in PRE:
        raise ValueError(
            f"{file} splits text by rules that llama.cpp has no name for ({' then '.join(rules) or 'none'}); "
            f"its ids would differ. Known are the rules of {', '.join(PRE.values())}"
        )
    ids: dict[str, int] = dict(model["vocab"])
    added: list[dict[str, Any]] = list(spec.get("added_tokens") or ())  # type: ignore[call-overload]
    ids |= {token["content"]: token["id"] for token in added}
    if max(ids.values()) >= vocab_size:
        raise ValueError(
            f"{file} has {max(ids.values()) + 1} tokens, but the model has {vocab_size} rows of embedding"
        )
    tokens, types = [f"[PAD{i}]" for i in range(vocab_size)], [UNUSED] * vocab_size
    for token, i in ids.items():
        tokens[i], types[i] = token, NORMAL
    for token in added:
        control = token["special"] or token["content"].startswith("<｜")
        types[token["id"]] = CONTROL if control else USER_DEFINED
    bos = _named(config, "bos_token")
    adds_bos = config.get("add_bos_token")
    return GgufTokenizer(
        PRE[rules],
        tokens,
        types,
        [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        _id(config, "bos_token", ids),
        _id(config, "eos_token", ids),
        _id(config, "pad_token", ids),
        bos is not None and (_frames(spec, bos) if adds_bos is None else bool(adds_bos)),
        _chat_template(folder, config),
    )


def modelfile(model: str, tokenizer: GgufTokenizer, context: int) -> str:
    """What `ollama create NAME -f Modelfile` reads, beside the model's file."""
    lines = [f"FROM ./{model}", f"PARAMETER num_ctx {min(context, 8192)}"]
    end = None if tokenizer.eos_id is None else tokenizer.tokens[tokenizer.eos_id]
    if end is not None:
        lines.append(f'PARAMETER stop "{end}"')
    if tokenizer.chat_template is None:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    elif "<｜User｜>" in tokenizer.tokens:
        answer = f"<｜Assistant｜>{{{{ .Content }}}}{end or ''}"
        lines.append(
            'TEMPLATE """{{ .System }}{{ range .Messages }}{{ if eq .Role "user" }}<｜User｜>{{ .Content }}'
            f'{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ end }}}}{{{{ end }}}}<｜Assistant｜>"""'
        )
    else:
        lines.append("# no TEMPLATE: Ollama goes by the chat template inside the model's file")
    return "\n".join(lines) + "\n"


def _rules(pre_tokenizer: Any) -> tuple[str, ...]:
    """The splits in order, line breaks spelled out; what is not known comes out as a word no name has."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if isinstance(pre_tokenizer, dict) else []
    rules: list[str] = []
    for number, step in enumerate(steps, start=1):
        kind, pattern = step["type"], step.get("pattern", {})
        plain = step.get("behavior") == "Isolated" and not step.get("invert")
        if kind == "Split" and "Regex" in pattern and plain:
            rule = pattern["Regex"].replace("\r", r"\r").replace("\n", r"\n")
            rules.append(V2_LETTERS if rule.startswith(V2_LETTERS) else rule)
        elif kind == "Digits" and step.get("individual_digits"):
            rules.append(DIGIT)
        elif kind == "ByteLevel" and number == len(steps) and not step.get("add_prefix_space"):
            rules += [GPT2] if step.get("use_regex", True) else []
        else:
            rules.append(kind)
    return tuple(rules)


def _table(spec: dict[str, object], key: str) -> dict[str, Any]:
    value = spec.get(key)
    return value if isinstance(value, dict) else {}


def _named(config: dict[str, object], key: str) -> str | None:
    value = config.get(key)
    token = value.get("content") if isinstance(value, dict) else value
    return token if isinstance(token, str) else None


def _id(config: dict[str, object], key: str, ids: dict[str, int]) -> int | None:
    return ids.get(_named(config, key) or "")


def _frames(spec: dict[str, object], bos: str) -> bool:
    """Whether the post-processor puts BOS before a text."""
    return json.dumps(bos) in json.dumps(spec.get("post_processor"))


def _chat_template(folder: Path, config: dict[str, object]) -> str | None:
    file, said = folder / "chat_template.jinja", config.get("chat_template")
    if file.is_file():
        return file.read_text("utf-8")
    if isinstance(said, list):
        return next((each["template"] for each in said if each["name"] == "default"), None)
    return said if isinstance(said, str) else None
