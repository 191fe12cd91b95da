"""How a vocabulary spells bytes: the table from token id to what the token adds to a text.

Two spellings cover every family here. Byte-level BPE (DeepSeek, Qwen, Llama 3, OLMoE) writes each byte as one
printing character. SentencePiece BPE (Llama 2, Mixtral) writes text, with U+2581 for a space, `<0x0A>` for a
byte it has no piece for, and one space before the whole text. The law: bytes, not characters, since a token
may end inside one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spelling:
    bytes_of: Mapping[int, bytes]
    drops_first_space: bool  # of the whole text

    @classmethod
    def of(cls, definition: dict[str, Any]) -> Spelling:
        """`definition` is a tokenizer.json, parsed."""
        decoder: dict[str, Any] = definition["decoder"] or {"type": "nothing"}
        types = {part["type"] for part in decoder.get("decoders", [decoder])}
        if not types & {"ByteLevel", "ByteFallback", "Metaspace"}:
            raise ValueError(
                f"the tokenizer decodes by {decoder['type']}; only byte-level and SentencePiece BPE are known"
            )
        spell = _spell_characters if "ByteLevel" in types else _spell_piece
        table = {token_id: spell(token) for token, token_id in definition["model"]["vocab"].items()}
        table |= {token["id"]: token["content"].encode() for token in definition["added_tokens"]}
        return cls(table, bool(types & {"Strip", "Metaspace"}))


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character stands for: itself if it prints, others from 256 on (as GPT-2)."""
    printing = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printing)
    return {chr(byte): byte for byte in printing} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()


def _spell_characters(token: str) -> bytes:
    # DeepSeek-V3 keeps BOS, EOS and PAD in the same table, written as they are; their bar stands for no byte.
    return bytes(map(BYTE_OF.__getitem__, token)) if BYTE_OF.keys() >= set(token) else token.encode()


def _spell_piece(token: str) -> bytes:
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return bytes.fromhex(token[3:5])
    return token.replace("\u2581", " ").encode()
