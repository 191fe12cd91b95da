"""Measured plans: what was found fastest on this very GPU, kept so that nobody waits for it twice.

A table is one JSON file for one GPU (name and multiprocessors) and one pair of torch and Triton versions: for
each op and shape, by fixed bucket of size, the plan's fields. Two places are asked, the user's first:

    $SHOAL_CACHE, or $XDG_CACHE_HOME/shoal, or ~/.cache/shoal      written by `shoal bench kernels --tune`
    ops/triton/tuned                                               shipped, measured by us

A table is read once a process, the first time its GPU is asked about, and never written by a run that serves
or trains: what it does not hold is left to the op's heuristic, so no call ever waits for a measurement. A
file that is not what it should be is left alone, with a warning. A table appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton

Plans = dict[str, dict[str, dict[str, Any]]]  # "op shape" -> bucket -> fields
SHIPPED = Path(__file__).parent / "tuned"


@dataclass(frozen=True)
class Machine:
    """What a measurement holds for."""

    gpu: str
    multiprocessors: int
    torch: str
    triton: str

    @property
    def file_name(self) -> str:
        words = (self.gpu, f"{self.multiprocessors} sm", f"torch {self.torch}", f"triton {self.triton}")
        return re.sub(r"[^a-z0-9.]+", "-", " ".join(words).lower()) + ".json"


def this_machine(index: int | None) -> Machine:
    """Of a CUDA device."""
    properties = torch.cuda.get_device_properties(index)
    version = torch.__version__.partition("+")[0]
    return Machine(properties.name, properties.multi_processor_count, version, triton.__version__)


def user_folder() -> Path:
    if own := os.environ.get("SHOAL_CACHE"):
        return Path(own) / "plans"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shoal" / "plans"


def read(folder: Path, machine: Machine) -> Plans:
    """The table of a machine in a folder; empty where there is none, or none that can be read."""
    path = folder / machine.file_name
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return {}
    except OSError as error:
        return _ignored(path, str(error))
    try:
        table = json.loads(text)
        if table["machine"] != asdict(machine):
            return _ignored(path, f"it is of another machine: {table['machine']}")
        plans: Plans = {
            str(shape): {str(int(bucket)): dict(fields) for bucket, fields in buckets.items()}
            for shape, buckets in table["plans"].items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return _ignored(path, f"{type(error).__name__}: {error}")
    return plans


def _ignored(path: Path, why: str) -> Plans:
    warnings.warn(
        f"the table of measured plans {path} is left alone, since {why}; "
        "the heuristic serves. Delete the file, or run: shoal bench kernels --tune",
        stacklevel=3,
    )
    return {}


def write(folder: Path, machine: Machine, plans: Plans) -> Path:
    """Add plans to the table of a machine: a shape's buckets replace those of the same size."""
    known = read(folder, machine)
    for shape, buckets in plans.items():
        known[shape] = known.get(shape, {}) | buckets
    path = folder / machine.file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump({"machine": asdict(machine), "plans": known}, file, indent=1, sort_keys=True)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


@lru_cache
def tables(index: int | None) -> tuple[Plans, Plans]:
    """The user's and the shipped one of a CUDA device, read once."""
    machine = this_machine(index)
    return read(user_folder(), machine), read(SHIPPED, machine)


def find(tables: tuple[Plans, ...], shape: str, size: int) -> dict[str, Any] | None:
    """The fields measured for the smallest bucket that holds `size`, from the first table that has one."""
    for plans in tables:
        fitting = [int(bucket) for bucket in plans.get(shape, {}) if int(bucket) >= size]
        if fitting:
            return plans[shape][str(min(fitting))]
    return None
