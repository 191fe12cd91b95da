"""Training a tokenizer of our own: byte-level BPE with DeepSeek-V3's rules and its control tokens.

Splitting comes first, and bounds what a token can be: one to three digits; a run of Chinese or kana; a word
with the one character before it; punctuation with the line breaks after it; white space. The law: every text
can be encoded, and decodes to itself. BOS, EOS and PAD are 0, 1 and 2. Finding the merges is left to the
`tokenizers` library, using the result to text.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

from shoal.data.chat import DEEPSEEK
from shoal.data.text import Tokenizer

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
TURNS = ("<｜User｜>", "<｜Assistant｜>")
CONTROL_TOKENS = (
    *(BOS, EOS, PAD, *TURNS),
    *("<think>", "</think>"),
    *("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    *("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"),
    *("<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"),
    *("<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
)
SMALLEST = len(CONTROL_TOKENS) + 256

# The three splits of DeepSeek-V3's tokenizer.json, one after the other.
DIGITS = r"\p{N}{1,3}"
CHINESE_AND_KANA = "[一-龥\u3040-\u309f\u30a0-\u30ff]+"
WORDS = "|".join(
    (
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+",
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
        r" ?[\p{P}\p{S}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, show_progress: bool = False) -> Tokenizer:
    """A tokenizer of exactly `vocab_size` tokens; the same for the same texts, in any order."""
    if vocab_size < SMALLEST:
        raise ValueError(
            f"vocab_size is {vocab_size}, less than 256 bytes and {len(CONTROL_TOKENS)} control tokens; "
            f"ask for at least {SMALLEST}"
        )
    bpe = tokenizers.Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(rule), "isolated") for rule in (DIGITS, CHINESE_AND_KANA, WORDS)]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    bpe.train_from_iterator(texts, trainer)
    if (reached := bpe.get_vocab_size()) < vocab_size:
        raise ValueError(
            f"vocab_size is {vocab_size}, but this text has no more than {reached} tokens to learn; "
            f"give more text, or ask for at most {reached}"
        )
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return Tokenizer(_mark_special(bpe.to_str()), BOS, EOS, PAD, DEEPSEEK, adds_bos=True)


def _mark_special(definition: str) -> str:
    """Special means never shown. Reasoning and tool calls are part of an answer, so their tokens are not."""
    spec = json.loads(definition)
    for token in spec["added_tokens"]:
        token["special"] = token["content"] in (BOS, EOS, PAD, *TURNS)
    return json.dumps(spec, ensure_ascii=False)
