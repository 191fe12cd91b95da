"""The engine room's face: what the server, the stages and the command line use."""

from shoal.engine.engine import Engine
from shoal.engine.events import Completion, Event
from shoal.engine.grammar import Grammar, Vocabulary
from shoal.engine.sequence import FinishReason, SamplingParams
from shoal.engine.settings import EngineSettings
from shoal.engine.stats import Stats

__all__ = [
    "Completion",
    "Engine",
    "EngineSettings",
    "Event",
    "FinishReason",
    "Grammar",
    "SamplingParams",
    "Stats",
    "Vocabulary",
]
