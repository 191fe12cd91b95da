"""The laws of compiling ahead: a rehearsal runs nothing, what it met is compiled at its end, and a part that
fails harms no other. On a GPU alone: Triton's interpreter compiles nothing.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from shoal.ops import api as ops

pytestmark = pytest.mark.gpu


@triton.jit
def _fill_kernel(ptr, VALUE: tl.constexpr):  # noqa: ANN001, ANN202
    tl.store(ptr + tl.arange(0, 16), VALUE)


def _fill(memory: Tensor, value: Any) -> None:
    _fill_kernel[(1,)](memory, VALUE=value)


def test_a_rehearsal_runs_nothing_and_compiles_what_it_met(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = torch.zeros(16, dtype=torch.int32, device="cuda")
    with ops.rehearsing() as rehearsal, rehearsal.attempt():
        _fill(memory, 3)
        memory += 1
    assert not memory.any()
    compiled: list[Any] = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **told: compiled.append(told) or False)
    _fill(memory, 3)
    assert compiled == []
    assert memory.tolist() == [3] * 16
    _fill(memory, 4)
    assert len(compiled) == 1


def test_a_part_that_fails_harms_no_other() -> None:
    memory = torch.zeros(16, dtype=torch.int32, device="cuda")
    with ops.rehearsing() as rehearsal:
        with rehearsal.attempt():
            memory.tolist()  # waits, which no recording can
        with rehearsal.attempt():
            _fill(memory, 5)
    assert not memory.any()
    _fill(memory, 5)
    assert memory.tolist() == [5] * 16
