"""The verbs. Each reads its arguments, calls the rooms that do the work, and prints.

The law: a mistake of the user's is one clear line and exit code 2, never a traceback; results go to standard
output, everything else to standard error. Rooms are imported inside the commands, so that `--help` needs no
torch.
"""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.batch import batch
from shoal.cli.bench import bench_app
from shoal.cli.bench_engine import latency, throughput
from shoal.cli.bench_serve import serve as bench_serve
from shoal.cli.data import app as data_app
from shoal.cli.device import Checkpoint, Device, Download, find_device
from shoal.cli.evaluate import evaluate
from shoal.cli.experts import experts_app
from shoal.cli.generate import ComputeDtype, chat, generate, score, torch_dtype
from shoal.cli.inspect import inspect
from shoal.cli.plan import plan
from shoal.cli.serve import serve
from shoal.cli.verify import verify

app = typer.Typer(
    name="shoal",
    help="The DeepSeek mixture-of-experts system: train, load, study and talk to models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")
app.add_typer(experts_app, name="experts")
app.command()(serve)
app.command()(batch)
bench_app.command("serve")(bench_serve)
bench_app.command()(latency)
bench_app.command()(throughput)
app.command()(plan)
app.command()(inspect)
app.command()(verify)
app.command("eval")(evaluate)


class Gguf(StrEnum):
    f16 = "f16"
    q8_0 = "q8_0"
    q4_0 = "q4_0"


class Track(StrEnum):
    tensorboard = "tensorboard"
    trackio = "trackio"
    wandb = "wandb"


Recipe = Annotated[Path, typer.Argument(help="A TOML recipe; recipes/ has some.")]
RunFolder = Annotated[Path, typer.Option("--out", help="The run's folder; one that is there goes on.")]
Changes = Annotated[list[str] | None, typer.Option("--set", help="Change the recipe: a.b=c. Repeatable.")]


@app.command()
def quickstart(
    more: Annotated[list[str] | None, typer.Argument(metavar="[FILES]...", hidden=True)] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILES...", help="Files or globs: .txt .md .py .jsonl. Default: Python's own library."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The run's folder.")] = Path("runs/quickstart"),
    steps: Annotated[int | None, typer.Option(help="Fewer or more steps than the recipe's.")] = None,
    fresh: Annotated[bool, typer.Option(help="Start over, if the folder holds a run.")] = False,
    sums: Annotated[bool, typer.Option(help="Then teach it sums, by SFT and GRPO.")] = True,
) -> None:
    """Train a tiny DeepSeek-V3 on your text, here and now: tokenizer, model, pictures, samples; then teach it
    to think and add (minutes on 2 cores).
    """
    from shoal.cli.quickstart import show

    if more and not text:
        raise ValueError(f"{more[0]!r} is out of place; give files as --text {' '.join(more)}")
    show(patterns=[*(text or []), *(more or [])], folder=out, steps=steps, fresh=fresh, teaches=sums)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A TOML recipe; recipes/ has some.")],
    out: Annotated[
        Path, typer.Option(help="The run's folder. A run that is there goes on where it stopped.")
    ],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change the recipe: a.b=c. Repeatable.")
    ] = None,
    device: Device = "auto",
    track: Annotated[
        list[Track] | None,
        typer.Option(help="Hand the run to a tracker too (shoal[track], or shoal[wandb]). Repeatable."),
    ] = None,
) -> None:
    """Train a model by a recipe, or go on with a run that was interrupted. Several processes: by torchrun.

    Ctrl-C and SIGTERM save and stop; the exit code is then 130 and 0.
    """
    import os
    from contextlib import ExitStack

    from shoal.cli.view import COMMAND, TrainingView, say
    from shoal.config.run import load_recipe
    from shoal.stages import pretrain
    from shoal.train.track import together, tracking

    config = load_recipe(recipe, set_ or ())
    first = os.environ.get("RANK", "0") == "0"  # of the processes of torchrun: it alone shows
    with ExitStack() as watchers:
        observers = []
        if first:
            observers += [watchers.enter_context(tracking(tracker.value, out)) for tracker in track or ()]
            observers.append(watchers.enter_context(TrainingView()))
        outcome = pretrain.run(config, out, device=find_device(device), observe=together(observers))
    if outcome.interrupted:
        if first:
            say(f"stopped after step {outcome.step}; the same command goes on from {outcome.checkpoint}")
    elif first:
        say(f"done: the model is {out}/export; talk to it with: {COMMAND} chat {out}/export --raw")
    code = 130 if outcome.interrupted and not outcome.preempted else 0
    if config.parallel.ranks > 1:
        from shoal.parallel.mesh import leave

        leave(code)
    if code:
        raise typer.Exit(code)


@app.command()
def extend(recipe: Recipe, out: RunFolder, set_: Changes = None, device: Device = "auto") -> None:
    """Continue a checkpoint at a longer context (YaRN), with a needle test before and after."""
    from shoal.cli.extend import show
    from shoal.config.extend import load_extend

    show(load_extend(recipe, set_ or ()), out, find_device(device))


@app.command()
def sparsify(recipe: Recipe, out: RunFolder, set_: Changes = None, device: Device = "auto") -> None:
    """Teach a checkpoint DeepSeek sparse attention (V3.2): indexers alone first, then all together."""
    from shoal.cli.tune import show
    from shoal.config.sparsify import load_sparsify
    from shoal.stages import sparsify

    show(sparsify.run, load_sparsify(recipe, set_ or ()), out, find_device(device))


@app.command()
def sft(recipe: Recipe, out: RunFolder, set_: Changes = None, device: Device = "auto") -> None:
    """Tune a checkpoint on conversations by a recipe."""
    from shoal.cli.tune import show
    from shoal.config.tune import load_sft
    from shoal.stages import sft

    show(sft.run, load_sft(recipe, set_ or ()), out, find_device(device))


@app.command()
def grpo(recipe: Recipe, out: RunFolder, set_: Changes = None, device: Device = "auto") -> None:
    """Reasoning RL by a recipe: answers from the model in training, rewards, a policy loss."""
    from shoal.cli.tune import show
    from shoal.config.tune import load_grpo
    from shoal.stages import grpo

    show(grpo.run, load_grpo(recipe, set_ or ()), out, find_device(device))


@app.command()
def preference(recipe: Recipe, out: RunFolder, set_: Changes = None, device: Device = "auto") -> None:
    """Train a reward model on pairs of answers, for shoal grpo to reward by."""
    from shoal.cli.tune import show
    from shoal.config.tune import load_preference
    from shoal.stages import preference

    show(preference.run, load_preference(recipe, set_ or ()), out, find_device(device))


@app.command()
def reject(recipe: Recipe, out: RunFolder, set_: Changes = None, device: Device = "auto") -> None:
    """Rejection sampling: answer problems, keep what is right as conversations to tune on."""
    from shoal.cli.tune import show_kept
    from shoal.config.tune import load_reject

    show_kept(load_reject(recipe, set_ or ()), out, find_device(device))


@app.command()
def r1(
    out: RunFolder = Path("runs/r1"),
    task: Annotated[str, typer.Option(help="addition or countdown.")] = "addition",
    scale: Annotated[
        str, typer.Option(help="laptop: half an hour on 2 cores at most; one-gpu: the same on one GPU.")
    ] = "laptop",
    rl_only: Annotated[bool, typer.Option(help="Stop after RL and its control.")] = False,
    size: Annotated[int | None, typer.Option(help="Digits of an addition, numbers of a countdown.")] = None,
    slips: Annotated[float | None, typer.Option(help="How often the demonstrator gets a step wrong.")] = None,
    start_steps: Annotated[int | None, typer.Option(help="Steps on demonstrations before RL.")] = None,
    rl_steps: Annotated[int | None, typer.Option(help="Steps of RL.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, problems and answers.")] = 0,
    device: Device = "auto",
) -> None:
    """R1's pipeline in small: demonstrations, RL and its control, then RL for all, and a student."""
    from shoal.cli.r1 import show
    from shoal.stages.r1_recipes import scale_of

    given = {"size": size, "slips": slips, "start_steps": start_steps, "rl_steps": rl_steps}
    changes = {name: value for name, value in given.items() if value is not None}
    show(scale_of(scale, task, changes), out, seed, find_device(device), whole=not rl_only)


app.command()(chat)
app.command()(generate)
app.command()(score)


@app.command()
def convert(
    source: Checkpoint,
    target: Annotated[Path, typer.Argument(help="The folder to write, in Hugging Face's layout.")],
    dtype: ComputeDtype = None,
    mtp: Annotated[bool, typer.Option(help="Keep multi-token-prediction modules.")] = True,
    overwrite: Annotated[bool, typer.Option(help="Replace a checkpoint that is there.")] = False,
    gguf: Annotated[
        Gguf | None, typer.Option(help="For llama.cpp and Ollama: OUT/NAME-KIND.gguf and a Modelfile.")
    ] = None,
    download: Download = False,
) -> None:
    """Rewrite a checkpoint: FP8 to bfloat16, another dtype, without its MTP modules; or as GGUF."""
    from shoal.checkpoint import hf
    from shoal.cli.view import loading, say

    if gguf is not None:
        from shoal.cli.gguf import show

        if dtype is not None:
            raise ValueError(
                f"--dtype is {dtype.value}, but --gguf {gguf.value} says what the weights become"
            )
        show(source, target, gguf.value, download=download, overwrite=overwrite)
        return
    with loading("writing") as progress:
        hf.convert(
            source,
            target,
            dtype=torch_dtype(dtype),
            download=download,
            mtp=mtp,
            overwrite=overwrite,
            progress=progress,
        )
    say(f"written to {target}")


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or their metrics.jsonl.")],
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("runs.png"),
) -> None:
    """Compare runs: loss, held-out text, balance of experts, speed."""
    from shoal.cli.plot import show

    show(runs, out)


def main() -> None:
    """The `shoal` command."""
    try:
        app()
    except ValueError as error:
        _fail(str(error), 2)
    except FloatingPointError as error:
        _fail(str(error), 1)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        _fail(f"{error.strerror or error}{where}", 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _fail(message: str, code: int) -> None:
    print(f"shoal: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)
