"""Shoal. Its face is loaded when it is asked for: configs and `--help` need no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.engine.sequence import SamplingParams
    from shoal.stages.llm import LLM

__all__ = ["LLM", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from shoal.stages.llm import LLM

        return LLM
    if name == "SamplingParams":
        from shoal.engine.sequence import SamplingParams

        return SamplingParams
    raise AttributeError(f"shoal has no {name!r}")
