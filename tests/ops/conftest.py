"""What the laws of several ops need: memory that nobody wrote is NaN.

An op that forgets a row of its output passes by luck where fresh memory happens to be zero. Under
`poison`, torch fills every `empty` with NaN, so it cannot.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def poison() -> Iterator[None]:
    """Fresh floating-point memory is NaN."""
    torch.set_deterministic_debug_mode("warn")
    yield
    torch.set_deterministic_debug_mode("default")
