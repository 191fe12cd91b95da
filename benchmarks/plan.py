"""What `shoal plan` predicts against what `shoal bench latency` measures, in one table.

    python -m benchmarks.plan [--model deepseek-v2-lite] [--batches 1 32 256] [--gpu h200]

Each row is a run of that command in a process of its own, of random weights in the model's shape: a batch
that begins together, the median time of a step in which all of it decodes, and to the first token. The
prediction is analysis/planner's for the same load, and promises 20% of the step.

On a device that config/hardware.py does not know, a CPU say, a GPU is named with --gpu; the table then shows
its form and nothing else, and says so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from benchmarks import report
from shoal.analysis.planner import Load, decode_point, plan_serving
from shoal.cli.plan import find_config
from shoal.config.cost import WeightDtype
from shoal.config.hardware import GPUS, Gpu, gpu

SHOAL = [sys.executable, "-c", "from shoal.cli import main; main()"]
TOLERANCE = 0.2


@dataclass(frozen=True)
class Row:
    """In milliseconds, and the prediction over the measurement."""

    batch: int
    step_predicted: float
    step_measured: float
    first_predicted: float
    first_measured: float

    @property
    def step_ratio(self) -> float:
        return self.step_predicted / self.step_measured

    @property
    def first_ratio(self) -> float:
        return self.first_predicted / self.first_measured


def measure(model: str, batch: int, *, prompt: int, tokens: int, rounds: int, device: str) -> dict[str, Any]:
    """What `shoal bench latency --json` tells."""
    sizes = {"batch": batch, "prompt": prompt, "tokens": tokens, "rounds": rounds}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    command = [*SHOAL, "bench", "latency", model, "--random", "--device", device, "--json", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def compare(told: dict[str, Any], row: Gpu) -> Row:
    """A measurement beside what the planner says of the same load on that GPU."""
    settings, config = told["settings"], find_config(told["settings"]["model"])
    batch, prompt = settings["batch"], settings["prompt"]
    load = Load(batch, prompt, settings["tokens"], cast(WeightDtype, settings["dtype"]))
    if "p50_step_ms" not in told:
        raise SystemExit(
            f"in no step did all {batch} requests decode: the first ended, after --tokens "
            f"{settings['tokens']}, before the last had begun; raise it"
        )
    rate = plan_serving(config, row, 1, load).prefill
    return Row(
        batch=batch,
        step_predicted=1e3 * decode_point(config, row, 1, load, batch).predicted_s,
        step_measured=told["p50_step_ms"],
        first_predicted=1e3 * batch * prompt / rate,
        first_measured=told["p50_ttft_ms"],
    )


def known(device: str) -> Gpu | None:
    """The row of a device by the name it has itself."""
    name = device.lower().replace(" ", "-")
    return next((each for each in GPUS.values() if each.name in name), None)


def table(rows: list[Row]) -> str:
    heads = ("batch", "step, predicted ms", "measured", "ratio", f"within {TOLERANCE:.0%}")
    heads += ("first token, predicted ms", "measured", "ratio")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        holds = "yes" if abs(row.step_ratio - 1) <= TOLERANCE else "no"
        step = f"{row.step_predicted:.2f} | {row.step_measured:.2f} | {row.step_ratio:.2f} | {holds}"
        first = f"{row.first_predicted:.1f} | {row.first_measured:.1f} | {row.first_ratio:.2f}"
        lines.append(f"| {row.batch} | {step} | {first} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=__doc__)
    parser.add_argument("--model", default="deepseek-v2-lite", help="a family or a folder with a config.json")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--gpu", help="the row of the table of hardware; default: the device's own")
    parser.add_argument("--out", type=Path, help="Markdown file to append to, with a .jsonl beside it")
    arguments = parser.parse_args()
    wanted = {name: getattr(arguments, name) for name in ("prompt", "tokens", "rounds", "device")}
    rows, device, title = [], "", ""
    for batch in arguments.batches:
        told = measure(arguments.model, batch, **wanted)
        device = told["settings"]["device"]
        own = known(device)
        row = gpu(arguments.gpu) if arguments.gpu else own
        if row is None:
            raise SystemExit(f"{device} is not in the table of hardware; name a GPU with --gpu")
        rows.append(compare(told, row))
        print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
        title = f"{arguments.model}, {row.name} predicted, {device} measured"
        if own is not row:
            title += ": not the same device, so the ratios say nothing"
    print(f"{title}\n\n{table(rows)}")
    if arguments.out:
        report.append(arguments.out, "plan", device, title, table(rows), map(asdict, rows))


if __name__ == "__main__":
    main()
