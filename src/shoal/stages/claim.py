"""Whose a folder is: a run is told by the recipe that lies in it, and any other recipe is refused there.

Every stage asks here before it writes. The law: recipes are compared key by key, as what they mean and not as
they are written, so that one key more, or a table more at the end, is another run. What may change when a run
goes on is how far it goes, how often it looks up, and over how many processes it is spread.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shoal.config.run import build, load_table, to_table, to_toml
from shoal.data.atomic import write_atomically

CONFIG = "config.toml"
MAY_CHANGE = {
    "train.steps",
    "train.evaluate_every",
    "train.checkpoint_every",
    "train.keep",
    "train.background_saves",
    "train.recompute",
    "parallel.data",
    "parallel.expert",
    "parallel.pipeline",
    "parallel.schedule",
    "parallel.context",
}


def is_begun(folder: Path, config: Any) -> bool:
    """Whether the folder holds this very run; ValueError if another."""
    if not (folder / CONFIG).exists():
        return False
    theirs = _flatten(to_table(build(type(config), *load_table(folder / CONFIG))))
    ours = _flatten(to_table(config))
    changed = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
    if refused := [key for key in changed if key not in MAY_CHANGE]:
        key, more = refused[0], f" ({len(refused) - 1} more differ)" if len(refused) > 1 else ""
        raise ValueError(
            f"{folder} holds another run: its {key} is {theirs.get(key)!r}, here {ours.get(key)!r}{more}; "
            f"choose another folder, or the recipe it has ({CONFIG})"
        )
    return True


def claim(folder: Path, config: Any) -> None:
    """Make the folder this run's; ValueError if it holds another."""
    is_begun(folder, config)
    with write_atomically(folder / CONFIG) as file:
        file.write(to_toml(config).encode())


def _flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{a: {b: c}} as {a.b: c}."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
