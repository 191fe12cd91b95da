"""The model that a command loads, the device it runs on, how weights and cache are held there: options that
most commands share, and what `auto` comes to.

torch is loaded only to answer `auto`, inside the command, so that `--help` needs none.
"""

from __future__ import annotations

from typing import Annotated, Literal

import typer

Checkpoint = Annotated[str, typer.Argument(help="A checkpoint folder, or a hub id with --download.")]
Download = Annotated[bool, typer.Option(help="Fetch a hub id, or take it from the hub's cache.")]
Dtype = Annotated[str | None, typer.Option(help="float32 or bfloat16. Default: the checkpoint's.")]
Quant = Annotated[
    str | None,
    typer.Option(
        "--quant", help="fp8 or int4: hold experts and linears so. FP8 as published is taken as it is."
    ),
]
Offload = Annotated[
    float | None,
    typer.Option(
        "--offload",
        help="GiB of routed experts to keep off the device, in host memory; it holds the hot ones.",
    ),
]
CacheDtype = Literal["auto", "fp8"]
KvCacheDtype = Annotated[
    CacheDtype,
    typer.Option(
        "--kv-cache-dtype",
        help="auto: the cache in the model's dtype; fp8: in e4m3, in little over half of that.",
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N. By default the GPU where there is one.")]


def find_device(device: str) -> str:
    import torch

    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"
