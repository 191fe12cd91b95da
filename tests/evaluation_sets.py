"""Evaluation sets in their published layouts, with a few questions of ours, for tests of `shoal eval`."""

from __future__ import annotations

import gzip
import json
from pathlib import Path


def write_sets(out: Path) -> Path:
    """gsm8k, mmlu_stem and humaneval."""
    for name in ("gsm8k", "mmlu", "humaneval"):
        (out / name).mkdir()
    asked = [
        {"question": f"A hen lays {n}, then {m}. How many?", "answer": f"<<{n}+{m}>>{n + m}\n#### {n + m}"}
        for n, m in ((1, 2), (3, 5), (4, 4), (7, 1), (2, 6), (9, 9), (5, 8))
    ]  # fmt: skip
    lines = [json.dumps(each) for each in asked]
    (out / "gsm8k/test.jsonl").write_text("\n".join(lines))
    (out / "gsm8k/train.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[:5]).encode()))
    options = ["one egg", "two", "three of them", "none"]
    chosen = [
        {"question": f"How many {n}?", "options": options, "answer": "ABCD"[n % 4], "topic": "hen_house"}
        for n in range(9)
    ]
    (out / "mmlu/mmlu_stem_test.jsonl").write_text("\n".join(map(json.dumps, chosen)))
    code = [
        {
            "task_id": f"HumanEval/{n}",
            "prompt": f'def add{n}(a, b):\n    """a + b + {n}"""\n',
            "entry_point": f"add{n}",
            "canonical_solution": f"    return a + b + {n}\n",
            "test": f"def check(candidate):\n    assert candidate(2, 3) == 5 + {n}\n",
        }
        for n in range(3)
    ]
    (out / "humaneval/HumanEval.jsonl.gz").write_bytes(
        gzip.compress("\n".join(map(json.dumps, code)).encode())
    )
    return out
