"""Before anything imports Triton: on a machine without a GPU its kernels run in its interpreter.

Examples that are drawn are the same each time and have no time limit, as on CI: other work may hold the
machine.
"""

from __future__ import annotations

import os

import hypothesis
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

hypothesis.settings.load_profile("ci")
