"""Laws of the dispatcher: every op has its reference, one side can be forced, and nothing is guessed.

What each side computes is the other files' business.
"""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch

from shoal.ops import api, dispatch, quantised

OPS = {
    name
    for door in (api, quantised)
    for name, function in inspect.getmembers(door, inspect.isfunction)
    if function.__module__ == door.__name__ and not name.startswith(("_", "check_"))
}
EXPERTS = (
    torch.randn(2, 16),
    torch.zeros(2, 1, dtype=torch.int64),
    torch.ones(2, 1),
    torch.randn(1, 16, 16),
    torch.randn(1, 16, 8),
)


def test_every_op_has_a_reference_and_every_reference_an_op() -> None:
    """But half a block in one kernel, whose reference is the modules (tests/model/test_few_rows.py)."""
    assert set(dispatch.REFERENCE).isdisjoint(dispatch.steps())
    assert set(dispatch.REFERENCE) | set(dispatch.steps()) == OPS


def test_every_kernel_serves_an_op() -> None:
    assert set(dispatch.kernels()) <= OPS


def test_a_cpu_tensor_gets_the_reference_and_explain_says_so() -> None:
    with dispatch.using("auto"):
        assert (
            dispatch.explain("grouped_mlp", *EXPERTS)
            == "grouped_mlp: reference, since the tensors are on cpu"
        )
        auto = api.grouped_mlp(*EXPERTS)
    with dispatch.using("reference"):
        assert dispatch.explain("grouped_mlp", *EXPERTS) == "grouped_mlp: reference, as asked for"
        assert torch.equal(api.grouped_mlp(*EXPERTS), auto)


def test_the_other_side_can_be_asked_for_and_agrees() -> None:
    with dispatch.using("triton"):
        assert dispatch.explain("grouped_mlp", *EXPERTS) == "grouped_mlp: triton"
        kernel = api.grouped_mlp(*EXPERTS)
    # Sums of 16 float32 products, in two orders.
    torch.testing.assert_close(kernel, api.grouped_mlp(*EXPERTS), atol=1e-4, rtol=1e-5)


def test_a_call_the_kernel_does_not_take_is_refused_with_its_reason() -> None:
    wide = tuple(x.double() if x.is_floating_point() else x for x in EXPERTS)
    with dispatch.using("triton"):
        assert "float64" in dispatch.explain("grouped_mlp", *wide)
        with pytest.raises(ValueError, match=r"grouped_mlp: x is torch.float64; the kernels take"):
            api.grouped_mlp(*wide)


@pytest.mark.parametrize("op", sorted(OPS - set(dispatch.kernels())))
def test_triton_where_there_is_no_kernel_is_refused(op: str) -> None:
    with dispatch.using("triton"), pytest.raises(ValueError, match=f"{op}: it has no Triton kernel"):
        dispatch.call(op, torch.empty(0))


def test_using_lasts_for_its_block_even_when_it_raises() -> None:
    def fail() -> None:
        with dispatch.using("reference"):
            assert "as asked for" in dispatch.explain("grouped_mlp", *EXPERTS)
            raise KeyError

    with dispatch.using("auto"):
        with pytest.raises(KeyError):
            fail()
        assert "as asked for" not in dispatch.explain("grouped_mlp", *EXPERTS)


def test_an_unknown_side_is_refused() -> None:
    with pytest.raises(ValueError, match="side is 'gpu'; set it to auto, reference or triton"):
        dispatch.using("gpu").__enter__()  # pyright: ignore[reportArgumentType]
    code = "import os; os.environ['SHOAL_OPS'] = 'cuda'; import shoal.ops.api"
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "SHOAL_OPS is 'cuda'; set it to auto, reference or triton" in failed.stderr
