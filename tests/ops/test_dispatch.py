"""Laws of the dispatcher: every op has its reference, one side can be forced, and nothing is guessed.

What each side computes is the other files' business.
"""

from __future__ import annotations

import inspect

import pytest
import torch

from shoal.ops import api, dispatch

OPS = {
    name
    for name, function in inspect.getmembers(api, inspect.isfunction)
    if function.__module__ == api.__name__ and not name.startswith("_")
}


def test_every_op_has_a_reference_and_every_reference_an_op() -> None:
    assert set(dispatch.REFERENCE) == OPS


def test_every_kernel_serves_an_op() -> None:
    assert set(dispatch.TRITON) <= OPS


def test_explain_lists_every_op() -> None:
    with dispatch.using("auto"):
        side, *rows = dispatch.explain().splitlines()
    assert side == "side: auto"
    assert {row.split()[0] for row in rows} == OPS


def test_a_cpu_tensor_gets_the_reference() -> None:
    with dispatch.using("auto"):
        for op, reference in dispatch.REFERENCE.items():
            assert dispatch.choose(op, torch.empty(0)) is reference


def test_using_lasts_for_its_block_even_when_it_raises() -> None:
    def fail() -> None:
        with dispatch.using("reference"):
            assert dispatch.explain().startswith("side: reference")
            raise KeyError

    with dispatch.using("triton"):
        with pytest.raises(KeyError):
            fail()
        assert dispatch.explain().startswith("side: triton")


@pytest.mark.parametrize("op", sorted(OPS - set(dispatch.TRITON)))
def test_triton_where_there_is_no_kernel_is_refused(op: str) -> None:
    with dispatch.using("triton"), pytest.raises(ValueError, match=f"{op} has no Triton kernel"):
        dispatch.choose(op, torch.empty(0))


@pytest.mark.parametrize("side", ["", "cuda", "Triton"])
def test_an_unknown_side_in_the_environment_is_refused(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_OPS", side)
    with pytest.raises(ValueError, match=f"SHOAL_OPS is '{side}'; set it to auto, reference or triton"):
        dispatch._side_from_environment()
