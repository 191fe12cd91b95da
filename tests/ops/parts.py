"""What the laws of Triton kernels share: where they run, and what of the interpreter is to be expected.

On a GPU the sizes are real; elsewhere Triton's interpreter (TRITON_INTERPRET=1) runs the same on small ones.
"""

from __future__ import annotations

import os

import pytest
import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HALF = torch.bfloat16 if GPU else torch.float16  # the interpreter truncates, and cannot multiply
on_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
runs_triton = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU, or TRITON_INTERPRET=1"
)
# Triton 3.6's interpreter keeps scalars in arrays of one element.
scalars_in_arrays = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0")
