"""`require`: how a config refuses what it cannot mean.

Every part of a config checks itself when it is made, so one that exists is consistent. The message is the
reader's: the value, the limit, and the way out.
"""

from __future__ import annotations


def require(condition: bool, message: str) -> None:
    """ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)
