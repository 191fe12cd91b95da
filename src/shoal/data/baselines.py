"""What a text costs without a model, in bits per byte: the bar a trained model is held against.

The law: all figures are of the same bytes, those the model is evaluated on. The compressors see nothing else:
they start empty and learn on the way, while the model has read the training text. Say so where the figures
are compared.
"""

from __future__ import annotations

import gzip
import lzma
import math
from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Baselines:
    """Bits per byte."""

    unigram: float  # the entropy of the text's own byte frequencies
    gzip: float  # gzip -9
    xz: float  # xz -9


def baselines(text: bytes) -> Baselines:
    if not text:
        raise ValueError("an empty text has no bits per byte; hold out more text")
    shares = [count / len(text) for count in Counter(text).values()]
    return Baselines(
        unigram=-sum(share * math.log2(share) for share in shares),
        gzip=8 * len(gzip.compress(text, 9)) / len(text),
        xz=8 * len(lzma.compress(text, preset=9)) / len(text),
    )
