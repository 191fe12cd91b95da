"""Which documents are worth reading: document -> verdict, by rules on its words, lines and repetitions.

The rules are those of Gopher (arXiv 2112.11446, appendix A.1.1) with its limits, where a language has what
they count, and two of our own: the language, and boilerplate. The law: a verdict depends on the document
alone, so it is the same whoever computes it and in whatever order. A unit (units.py) stands for a word.
Repetition is counted in units and not in characters, and as a Chinese word has some two characters, runs are
twice as long there; code is spared the rules of prose.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from shoal.data.read import Document
from shoal.data.units import Hashes, Units


@dataclass(frozen=True)
class Verdict:
    """`reason` is empty for a document to keep, else the rule it broke."""

    language: str  # en, zh, code or other
    reason: str = ""
    value: float = 0.0  # what the rule measured

    @property
    def keep(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class CleanRules:
    """The limits. Shares are of the document's units (repetition), lines, or words."""

    languages: tuple[str, ...] = ("en", "zh", "code")
    min_units: int = 50
    max_units: int = 100_000
    mean_word_length: tuple[float, float] = (3.0, 10.0)  # English
    max_symbols_per_unit: float = 0.1  # of # and ...
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    min_stop_words: int = 2  # English
    max_duplicate_lines: float = 0.3
    max_top_runs: tuple[float, float, float] = (0.20, 0.18, 0.16)  # the most frequent run of 2, 3, 4 units
    max_repeated_runs: tuple[float, float] = (0.15, 0.10)  # runs of 5 and 10 units that were there before
    max_code_repetition: float = 0.5  # of code, in runs of 10
    max_boilerplate_lines: float = 0.3

    def __post_init__(self) -> None:
        unknown = set(self.languages) - {"en", "zh", "code", "other"}
        if unknown or not self.languages:
            raise ValueError(f"languages are {self.languages}; choose some of en, zh, code, other")
        if not 0 < self.min_units <= self.max_units:
            raise ValueError(f"min_units is {self.min_units} and max_units {self.max_units}; 0 < min <= max")


STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
WORDS = re.compile(r"[^\W\d_]+")
SYMBOLS = re.compile(r"#|\.\.\.|…")
BULLETS = ("•", "‣", "- ", "* ", "+ ", "·", "●")
ELLIPSES = ("...", "…", "……")
BOILERPLATE = re.compile(
    r"lorem ipsum|all rights reserved|terms of (use|service)|privacy policy|cookie policy|accept cookies"
    r"|enable javascript|subscribe to our|sign up for|click here|share (this|on)|skip to (main )?content"
    r"|版权所有|隐私政策|服务条款|点击(这里|查看|下载)|扫码关注|责任编辑|转载请注明|相关阅读",
    re.IGNORECASE,
)
# A line of code: it starts as a statement does, or ends as one.
CODE_LINE = re.compile(
    r"\s*(def |class |import |from \S+ import |return\b|if .*:$|for .*:$|while .*:$|else:$|elif |try:$"
    r"|except\b|with .*:$|raise |@\w|#include|#define|public |private |static |const |let |var |func |fn "
    r"|package |using |//|/\*|\*/|self\.|\w+ = \S)|.*[;{}]\s*$|.*\)\s*:?\s*$|\s*[\])}]+[,;]?\s*$"
)
CODE_SHARE = 0.45  # of a text's lines, above which it is code
FEW_LINES = 3  # below which shares of lines say nothing


def judge(documents: Sequence[Document], rules: CleanRules) -> list[Verdict]:
    """One verdict a document, in order."""
    units = Units.of([document.text for document in documents])
    chinese_X = units.mostly_ideographs_X
    parts = np.split(units.hashes_U, units.offsets_X1[1:-1])
    return [
        _judge(document.text, hashes_U, chinese, rules)
        for document, hashes_U, chinese in zip(documents, parts, chinese_X.tolist(), strict=True)
    ]


def _judge(text: str, hashes_U: Hashes, chinese: bool, rules: CleanRules) -> Verdict:
    lines = [line for line in text.splitlines() if line.strip()]
    words = [] if chinese else WORDS.findall(text)
    language = "zh" if chinese else find_language(lines, words)
    count, word = hashes_U.size, 2 if chinese else 1  # units, and units of a word

    # 1. What it is, and how long.
    if language not in rules.languages:
        return Verdict(language, f"language {language}")
    if count < rules.min_units:
        return Verdict(language, "short", count)
    if count > rules.max_units:
        return Verdict(language, "long", count)

    # 2. Prose is made of words and sentences.
    if language == "en":
        mean = sum(map(len, words)) / max(len(words), 1)
        if not rules.mean_word_length[0] <= mean <= rules.mean_word_length[1]:
            return Verdict(language, "mean word length", mean)
        stops = len(STOP_WORDS.intersection(map(str.lower, words)))
        if stops < rules.min_stop_words:
            return Verdict(language, "stop words", stops)
    if language != "code":
        shares = (
            ("symbols", len(SYMBOLS.findall(text)) / count, rules.max_symbols_per_unit),
            ("bullets", _share(lines, _is_bullet), rules.max_bullet_lines),
            ("ellipses", _share(lines, _is_cut_short), rules.max_ellipsis_lines),
            ("boilerplate", _share(lines, _is_boilerplate), rules.max_boilerplate_lines),
        )
        for reason, share, most in shares:
            if share > most:
                return Verdict(language, reason, share)

    # 3. Repetition. Code repeats itself by nature: its lines may, its long runs may not.
    if language != "code":
        repeated = 1 - len({line.strip() for line in lines}) / max(len(lines), 1)
        if repeated > rules.max_duplicate_lines:
            return Verdict(language, "duplicate lines", repeated)
        for length, most in zip((2 * word, 3 * word, 4 * word), rules.max_top_runs, strict=True):
            share = _top_run(_runs(hashes_U, length), length / count)
            if share > most:
                return Verdict(language, f"top {length}-gram", share)
    prose = zip((5 * word, 10 * word), rules.max_repeated_runs, strict=True)
    lengths = ((10, rules.max_code_repetition),) if language == "code" else prose
    for length, most in lengths:
        share = _repeated_runs(_runs(hashes_U, length), length)
        if share > most:
            return Verdict(language, f"repeated {length}-grams", share)
    return Verdict(language)


def find_language(lines: Sequence[str], words: Sequence[str]) -> str:
    """Of a text that is not Chinese: code by the shape of its lines, English by its commonest words."""
    if _share(lines, _is_code) > CODE_SHARE:
        return "code"
    stops = sum(word.lower() in STOP_WORDS for word in words)
    return "en" if stops > 0.02 * len(words) else "other"


def _share(lines: Sequence[str], holds: Callable[[str], bool]) -> float:
    return sum(map(holds, lines)) / len(lines) if len(lines) >= FEW_LINES else 0.0


def _is_code(line: str) -> bool:
    return CODE_LINE.match(line) is not None


def _is_bullet(line: str) -> bool:
    return line.lstrip().startswith(BULLETS)


def _is_cut_short(line: str) -> bool:
    return line.rstrip().endswith(ELLIPSES)


def _is_boilerplate(line: str) -> bool:
    return BOILERPLATE.search(line) is not None


def _runs(hashes_U: Hashes, length: int) -> Hashes:
    return Units(hashes_U, np.empty(0, np.bool_), np.array([0, hashes_U.size])).runs(length)[0]


def _top_run(runs: Hashes, weight: float) -> float:
    """The share of units in the most frequent run, 0 where none comes twice."""
    most = int(np.unique(runs, return_counts=True)[1].max(initial=0))
    return min(most * weight, 1.0) if most > 1 else 0.0


def _repeated_runs(runs: Hashes, length: int) -> float:
    """The share of units that lie in a run which the text had before."""
    first = np.unique(runs, return_index=True)[1]
    again = np.ones(runs.size, np.int64)
    again[first] = 0
    covered = np.convolve(again, np.ones(length, np.int64)) > 0
    return float(covered.mean()) if runs.size else 0.0
