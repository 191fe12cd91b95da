"""Laws of a tokenizer we train: its size is exact, its control tokens and splits are DeepSeek's, and the same
text gives the same tokenizer.

The pieces expected of the splits follow from the three rules by hand; no tokenizer was asked.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shoal.data.read import Document
from shoal.data.text import Tokenizer
from shoal.data.tokenizer import CONTROL_TOKENS, SMALLEST, train_tokenizer


def test_the_size_is_exact_and_control_tokens_come_first(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 1000
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    ids = [tokenizer.encode(token, parse_special=True) for token in CONTROL_TOKENS]
    assert ids == [[n] for n in range(len(CONTROL_TOKENS))]


def test_every_control_token_of_the_published_templates_is_there(shared_data: Path) -> None:
    folder = shared_data / "deepseek" / "chat_templates"
    templates = [folder / "trl-deepseekv3.jinja", *folder.glob("*R1-Distill*"), *folder.glob("*V3.1*")]
    found = {token for path in templates for token in re.findall(r"<｜[^｜]+｜>|</?think>", path.read_text())}
    assert len(found) == 14
    assert found <= set(CONTROL_TOKENS)


def test_texts_in_another_order_give_the_same_tokenizer(
    tokenizer: Tokenizer, modules: list[Document]
) -> None:
    assert train_tokenizer((module.text for module in reversed(modules)), 1000) == tokenizer


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("1234567 x12", ["123", "456", "7", " x", "12"]),
        ("汉字かな漢字ABC", ["汉字かな漢字", "ABC"]),
        ("def f(x):\n\n    return -x", ["def", " f", "(x", "):\n\n", "   ", " return", " -", "x"]),
        ("é́ l'été…\r\n", ["é́", " l", "'", "été", "…\r\n"]),
    ],
)
def test_no_token_crosses_a_split(text: str, pieces: list[str]) -> None:
    """With room for every merge, a token grows until a split stops it: tokens are DeepSeek-V3's pieces."""
    marks = "".join(map(chr, range(0x21, 0x21 + 15)))  # other text, so that the vocabulary can be reached
    tokenizer = _train_to_the_limit([text] * 4 + [marks])
    assert [tokenizer.decode([token_id]) for token_id in tokenizer.encode(text)] == pieces


def _train_to_the_limit(texts: list[str]) -> Tokenizer:
    with pytest.raises(ValueError, match="no more than") as caught:
        train_tokenizer(texts, 5000)
    reached = int(re.findall(r"at most (\d+)", str(caught.value))[0])
    return train_tokenizer(texts, reached)


def test_a_vocabulary_the_text_cannot_fill_is_refused_with_the_size_it_can() -> None:
    with pytest.raises(ValueError, match=r"vocab_size is 4096.* no more than 284 .* at most 284"):
        train_tokenizer(["hello world"], 4096)
    assert train_tokenizer(["hello world"], 284).vocab_size == 284


def test_a_vocabulary_without_room_for_every_byte_is_refused() -> None:
    with pytest.raises(ValueError, match=f"vocab_size is {SMALLEST - 1}.* at least {SMALLEST}"):
        train_tokenizer(["text"], SMALLEST - 1)
    assert train_tokenizer(["text"], SMALLEST).decode(train_tokenizer([], SMALLEST).encode("é")) == "é"
