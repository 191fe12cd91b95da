"""Rewards that do what rewards should not, for test_judge.py."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from typing import Any


def misbehave(text: str, problem: Mapping[str, Any]) -> float:
    """What the answer says to do."""
    match text:
        case "raise":
            raise RuntimeError("no such luck")
        case "hang":
            time.sleep(600)
        case "hang in a thread":
            thread = threading.Thread(target=time.sleep, args=(600,))
            thread.start()
            thread.join()
        case "fork":
            if os.fork() == 0:
                time.sleep(600)
        case "return twice":
            os.fork()
        case "nan":
            return float("nan")
        case "exit":
            os._exit(1)
        case "print":
            print("hello", flush=True)  # noqa: T201
    return 1.0


def half(text: str, problem: Mapping[str, Any]) -> float:
    return 0.5


def letters(text: str, problem: Mapping[str, Any]) -> float:
    """How many of six characters are letters a to m, up to the first that may begin a control token."""
    return sum(c in "abcdefghijklm" for c in text.partition("<")[0]) / 6


def letters_if_even(text: str, problem: Mapping[str, Any]) -> float:
    return letters(text, problem) if problem["n"] % 2 == 0 else 1.0
