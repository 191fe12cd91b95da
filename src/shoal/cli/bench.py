"""`shoal bench`: what this machine reaches, and plans measured for it. A verb is a function here.

`kernels` times the routed experts of a model, bucket by bucket of choices (tokens times experts a token), by
the plans that serve this GPU. With `--tune` it measures new ones first, within a budget of seconds, and keeps
what is faster in the user's cache, where every later run on this machine finds it. Results go to standard
output, progress to standard error.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

bench_app = typer.Typer(
    help="Measure this machine: kernels, the engine, a running server.", no_args_is_help=True
)


@bench_app.command("kernels")
def kernels(
    model: Annotated[
        str, typer.Option(help="A family, a checkpoint folder or a config.json: its experts' shape.")
    ] = "deepseek-v2-lite",
    tune: Annotated[bool, typer.Option("--tune", help="Measure new plans first, and keep them.")] = False,
    budget: Annotated[float, typer.Option(help="Seconds that tuning may take.")] = 30.0,
    experts: Annotated[int | None, typer.Option(help="Experts that one GPU holds. Default: all.")] = None,
    device: Annotated[str, typer.Option(help="cuda or cuda:N.")] = "cuda",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time the routed experts on this GPU; with --tune find and keep faster plans (30 s)."""
    import torch

    from shoal.cli.plan import find_config
    from shoal.cli.view import say
    from shoal.ops import dispatch

    config = find_config(model)
    if config.moe is None:
        raise ValueError(f"{model} has no routed experts; only those are tuned: name a model that has")
    if budget <= 0:
        raise ValueError(f"--budget is {budget}; it must be more than 0 seconds")
    if experts is not None and not config.moe.num_experts_per_tok <= experts <= config.moe.n_routed_experts:
        raise ValueError(
            f"--experts is {experts}; {model} has {config.moe.n_routed_experts} "
            f"and each token needs {config.moe.num_experts_per_tok}"
        )
    if not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here; kernels are measured on the GPU that will run them")
    where = torch.device(device) if ":" in device else torch.device(device, torch.cuda.current_device())
    tuning = dispatch.expert_tuning()
    shape = tuning.Shape(
        experts or config.moe.n_routed_experts,
        config.moe.num_experts_per_tok,
        config.hidden_size,
        config.moe.moe_intermediate_size,
    )
    with torch.inference_mode():
        if tune:
            with _progress(budget) as observe:
                found = tuning.tune(shape, where, budget, observe)
            path = tuning.keep(found, shape, where)
            faster = sum(each.us < each.heuristic_us for each in found)
            say(f"{faster} of {len(found)} buckets have a faster plan now, kept in {path}")
        else:
            found = tuning.measure(shape, where)
    if as_json:
        print(json.dumps({"shape": shape.name, "buckets": [asdict(each) for each in found]}))
    else:
        _show(shape.name, found, shape.top_k)


def _show(name: str, found: list[Any], top_k: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=name, title_justify="left")
    for head in ("choices", "tokens", "plan", "us", "heuristic us"):
        table.add_column(head, justify="left" if head == "plan" else "right")
    for each in found:
        plan = f"{each.plan.kind}, {each.plan.rows} rows"
        tokens = f"{max(1, each.bucket // top_k):,}"
        table.add_row(f"{each.bucket:,}", tokens, plan, f"{each.us:.1f}", f"{each.heuristic_us:.1f}")
    Console().print(table)


def _progress(budget: float) -> Any:
    """A bar over the candidates that shows the seconds left; without a terminal, a line now and then."""
    from collections.abc import Callable, Iterator
    from contextlib import contextmanager

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from shoal.cli.view import console, say

    @contextmanager
    def watch() -> Iterator[Callable[[int, int, float], None]]:
        if not console.is_terminal:
            printed = budget

            def report(done: int, total: int, left: float) -> None:
                nonlocal printed
                if done in (0, total) or printed - left >= 10.0:
                    printed = left
                    say(f"  candidate {done}/{total}, {left:.0f} s left")

            yield report
            return
        columns = (TextColumn("tuning"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=None, left="")
            yield lambda done, total, left: progress.update(
                task, completed=done, total=total, left=f"{left:.0f} s left"
            )

    return watch()
