"""The engine room's face: what the server, the stages and the command line use."""

from shoal.engine.engine import Completion, Engine, EngineSettings, Event
from shoal.engine.sequence import FinishReason, SamplingParams

__all__ = ["Completion", "Engine", "EngineSettings", "Event", "FinishReason", "SamplingParams"]
