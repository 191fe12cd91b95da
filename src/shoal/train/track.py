"""Other people's dashboards as Observers: TensorBoard, trackio and wandb, extras, imported when asked for.

The law: they only watch. Each gets a run's numbers under the same names as metrics.jsonl has, by step; what a
tracker cannot do (no network, no package) never stops a run that did not ask for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from shoal.train.metrics import EvaluationReport, Event, Observer, StepReport

Tracker = Literal["tensorboard", "trackio", "wandb"]
Log = Callable[[dict[str, float], int], None]


def numbers(event: Event) -> dict[str, float]:
    """What of an event a curve can be drawn of."""
    match event:
        case StepReport():
            told = {**event.terms, "lr": event.lr, "grad_norm": event.grad_norm}
            told |= {"tokens": event.tokens, "tokens_per_second": event.tokens_per_second}
            if event.max_violation:
                told["max_violation"] = sum(event.max_violation) / len(event.max_violation)
            return told if event.mfu is None else {**told, "mfu": event.mfu}
        case EvaluationReport():
            domains = {f"bits_per_byte/{name}": value for name, value in event.domains.items()}
            return {"held_out_loss": event.loss, "bits_per_byte": event.bits_per_byte, **domains}
        case _:
            return {}


def together(observers: Sequence[Observer]) -> Observer:
    """One that tells them all, in order."""

    def observe(event: Event) -> None:
        for observer in observers:
            observer(event)

    return observe


@contextmanager
def tracking(tracker: Tracker, folder: Path) -> Iterator[Observer]:
    """An Observer that hands a run of this folder to a tracker. ValueError where it is not installed."""
    try:
        log, close = {"tensorboard": _tensorboard, "trackio": _trackio, "wandb": _wandb}[tracker](folder)
    except ImportError as error:
        extra = "wandb" if tracker == "wandb" else "track"
        raise ValueError(
            f"{tracker} is asked for but cannot be imported ({error}); install shoal[{extra}]"
        ) from None

    def observe(event: Event) -> None:
        told = numbers(event)
        if told and isinstance(event, StepReport | EvaluationReport):
            log(told, event.step)

    try:
        yield observe
    finally:
        close()


def _tensorboard(folder: Path) -> tuple[Log, Callable[[], None]]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def log(told: dict[str, float], step: int) -> None:
        for name, value in told.items():
            writer.add_scalar(name, value, step)

    return log, writer.close


def _trackio(folder: Path) -> tuple[Log, Callable[[], None]]:
    import trackio

    trackio.init(project=folder.parent.name or "shoal", name=folder.name)
    return (lambda told, step: trackio.log(told, step=step)), trackio.finish


def _wandb(folder: Path) -> tuple[Log, Callable[[], None]]:
    import wandb  # pyright: ignore[reportMissingImports]  # an extra that tests do without

    try:
        run = wandb.init(project=folder.parent.name or "shoal", name=folder.name, dir=str(folder))
    except wandb.Error as error:
        raise ValueError(f"wandb does not begin ({error}); log in, or set WANDB_MODE=offline") from None
    return (lambda told, step: run.log(told, step=step)), run.finish
