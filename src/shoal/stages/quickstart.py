"""Quickstart: a DeepSeek-V3 in small, from raw text to a model that writes, in minutes on two CPU cores.

Every part is the real one and the same as at scale: latent attention, shared and fine-grained experts,
loss-free balancing, multi-token prediction. `recipe` is what is trained, by `pretrain`; `summarise` is what
there is to show.

The law: what is claimed is measured on text that was held out, and the baselines are computed on those very
bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from shoal.analysis import plots
from shoal.analysis.routing import expert_load, without_correction_bias
from shoal.checkpoint import hf
from shoal.config.model import MLAConfig, ModelConfig, MoEConfig, RopeConfig
from shoal.config.run import BalanceConfig, DataConfig, OptimConfig, RunConfig, TrainConfig
from shoal.data.baselines import Baselines, baselines
from shoal.data.pack import evaluation_batches
from shoal.data.shard import Shard
from shoal.data.text import Tokenizer
from shoal.engine.engine import Engine, EngineSettings
from shoal.engine.sequence import SamplingParams
from shoal.model.transformer import Transformer
from shoal.stages import pretrain

SAMPLE_TOKENS = 96
ROUTING_BATCHES = 8  # of held-out text, for the picture of the experts' load

MODEL = ModelConfig(
    model_type="deepseek_v3",
    vocab_size=2048,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=4,
    attention=MLAConfig(
        num_attention_heads=4,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
    ),
    rope=RopeConfig(theta=10000.0, interleaved=True),
    moe=MoEConfig(
        n_routed_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=64,
        n_shared_experts=1,
        first_k_dense_replace=1,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    ),
    num_nextn_predict_layers=1,
    max_position_embeddings=1024,
    bos_token_id=0,
    eos_token_id=1,
    initializer_range=0.02,
    dtype="float32",
)


def recipe(patterns: Sequence[str] = (), steps: int | None = None) -> RunConfig:
    """The run: `patterns` are the user's files, none is Python's standard library."""
    return RunConfig(
        model=MODEL,
        data=DataConfig(train=tuple(patterns), holdout_fraction=0.02, tokens_per_batch=4096, seq_len=512),
        train=TrainConfig(
            steps=steps or 300,
            evaluate_every=60,
            checkpoint_every=50,
            optim=OptimConfig(optimizer="muon", lr=1e-2, warmup_steps=10, schedule="linear"),
            balance=BalanceConfig(bias_update_speed=0.01),  # V3's 0.001 is for runs of a million steps
        ),
    )


@dataclass(frozen=True, eq=False)
class Summary:
    """What a finished run shows."""

    parameters: int
    minutes: float  # of training and evaluation, over all starts
    bits_per_byte: float
    baselines: Baselines
    samples: tuple[tuple[str, str], ...]  # (prompt, what the model wrote after it)
    export: Path
    pictures: tuple[Path, ...]


def summarise(config: RunConfig, folder: Path) -> Summary:
    """Hold the finished run of `folder` against compressors, draw it, and let it write."""
    # 1. The model as others load it, and the text it has not seen.
    model, tokenizer = hf.load(folder / "export").eval(), Tokenizer.load(folder / "export")
    held_out = Shard.open(folder / pretrain.SHARDS[1])
    text = tokenizer.decode(held_out.tokens.tolist(), skip_special=True)
    others = baselines(text.encode())

    # 2. Its record.
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    seconds = sum(line["timing"]["seconds"] for line in lines)

    # 3. Pictures: the loss, and where the tokens go with the routers' bias and without it.
    pictures = (folder / "loss.png", folder / "experts.png")
    tokens_at = {line["step"]: line["tokens"] for line in steps}
    curve = plots.loss_curve(
        [(line["tokens"], line["loss"]) for line in steps],
        [(tokens_at[line["step"]], line["bits_per_byte"]) for line in evaluations],
        {"unigram bytes": others.unigram, "gzip -9": others.gzip, "xz -9": others.xz},
    )
    plots.save(curve, pictures[0])
    plots.save(_draw_experts(model, held_out, config), pictures[1])

    return Summary(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        minutes=seconds / 60,
        bits_per_byte=evaluations[-1]["bits_per_byte"],
        baselines=others,
        samples=_write(model, tokenizer, text),
        export=folder / "export",
        pictures=pictures,
    )


def _draw_experts(model: Transformer, held_out: Shard, config: RunConfig) -> Figure:
    def load() -> Tensor:
        batches = evaluation_batches(held_out, config.data.tokens_per_batch, config.data.seq_len)
        return expert_load(model, islice(batches, ROUTING_BATCHES))

    with without_correction_bias(model):
        before = load()
    layers = [f"layer {n}" for n in range(model.config.num_hidden_layers) if model.config.is_moe_layer(n)]
    return plots.expert_load_map({"without balancing bias": before, "with it": load()}, layers)


def _write(model: Transformer, tokenizer: Tokenizer, held_out: str) -> tuple[tuple[str, str], ...]:
    """The model's own continuation of the first lines of two places in the held-out text."""
    engine = Engine(model, EngineSettings(max_sequences=2, cache_bytes=1 << 26))
    middle = held_out.find("\n", len(held_out) // 2) + 1  # the start, where there is no line after the middle
    prompts = [_first_lines(held_out), _first_lines(held_out[middle:])]
    ids = [tokenizer.encode(prompt, bos=True) for prompt in prompts]
    params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=SAMPLE_TOKENS, seed=0)
    completions = engine.generate(ids, params)
    return tuple(
        (prompt, tokenizer.decode(completion.ids, skip_special=True))
        for prompt, completion in zip(prompts, completions, strict=True)
    )


def _first_lines(text: str) -> str:
    """Some 120 characters, to the end of a line where one is near."""
    head = text[:120]
    return head[: head.rfind("\n") + 1] or head
