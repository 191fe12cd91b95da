"""Laws of the baselines: what Shannon and the command-line tools say of the same bytes.

Each figure is held against its source: known entropies, and gzip and xz themselves where the machine has
them.
"""

from __future__ import annotations

import shutil
import subprocess

import pytest

from shoal.data.baselines import baselines
from shoal.data.read import Document


def test_entropy_of_known_texts() -> None:
    assert baselines(b"aaaa").unigram == 0
    assert baselines(b"abab").unigram == 1
    assert baselines(bytes(range(256))).unigram == 8


@pytest.mark.parametrize("tool", ["gzip", "xz"])
def test_a_compressor_is_the_tool_of_its_name(tool: str, modules: list[Document]) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"no {tool} on this machine")
    text = "".join(module.text for module in modules[:20]).encode()
    packed = subprocess.run([tool, "-9", "-c"], input=text, stdout=subprocess.PIPE, check=True).stdout
    # The tool may be of another version than the library, and writes its own header: within 1%.
    assert getattr(baselines(text), tool) == pytest.approx(8 * len(packed) / len(text), rel=0.01)


def test_the_better_the_compressor_the_fewer_the_bits(modules: list[Document]) -> None:
    found = baselines("".join(module.text for module in modules).encode())
    assert 8 > found.unigram > found.gzip > found.xz > 0


def test_no_text_has_no_baseline() -> None:
    with pytest.raises(ValueError, match="empty text"):
        baselines(b"")
