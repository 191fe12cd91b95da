"""Fill-in-the-middle: some documents told as prefix, suffix, middle, so that a model learns to fill a hole.

DeepSeek-V3's way (arXiv 2412.19437, section 4.1): by document, in the order PSM, at a rate of 0.1,
    BOS <fim begin> prefix <fim hole> suffix <fim end> middle EOS.
The law: whether and where a document is cut depends on (seed, its text) alone, so packing the same text
again, elsewhere or in another order, gives the same tokens. The three pieces, in order, are the text.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

BEGIN, HOLE, END = "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"


@dataclass(frozen=True)
class FIM:
    """`rate` is the share of documents; 0 leaves all as they are."""

    rate: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ValueError(f"the fill-in-the-middle rate is {self.rate}; it lies between 0 and 1")

    def cut(self, text: str) -> tuple[str, str, str] | None:
        """(prefix, middle, suffix), or None for a document that stays whole; cuts are uniform."""
        if self.rate == 0:
            return None
        digest = hashlib.blake2b(
            text.encode(), digest_size=24, salt=self.seed.to_bytes(16, "little")
        ).digest()
        draws = [int.from_bytes(digest[n : n + 8], "little") for n in (0, 8, 16)]
        if draws[0] >= self.rate * 2**64:
            return None
        first, last = sorted(draw % (len(text) + 1) for draw in draws[1:])
        return text[:first], text[first:last], text[last:]
