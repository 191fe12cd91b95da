"""How a dense model is told to become a sparse one: DeepSeek sparse attention, put on a trained checkpoint.

DeepSeek-V3.2's way (arXiv 2512.02556, section 2.1.1), a stage a run. `warm-up`: an indexer is added to each
layer, attention still reads everything, and the indexers alone learn to spread as it does (V3.2: 1,000 steps,
lr 1e-3, 2.1B tokens). `sparse`: attention reads what they choose and all learn, the model from its loss, the
indexers from the divergence over the chosen (V3.2: 15,000 steps, lr 7.3e-6, 944B tokens).

The law: a run changes nothing but what its stage trains.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from shoal.config.model import IndexerConfig, MLAConfig, ModelConfig
from shoal.config.require import require
from shoal.config.run import DataConfig, ParallelConfig, TrainConfig, build, load_table

Stage = Literal["warm-up", "sparse"]


@dataclass(frozen=True)
class SparsifyConfig:
    """The checkpoint `model` (its folder, or that of a finished run) and one of the two stages.

    `indexer` is what warm-up adds to a model that has none. The tokenizer is the checkpoint's. The stage
    `sparse` may run on the processes of `parallel`.
    """

    model: str
    stage: Stage
    train: TrainConfig
    data: DataConfig
    indexer: IndexerConfig | None = None
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        told = f"on the {self.parallel.ranks} processes of parallel.{self.parallel.told}"
        require(
            self.stage == "sparse" or self.parallel.ranks == 1,
            f"stage is 'warm-up', which does not work {told}: processes that share weights bring those of a "
            f"block together again, and sum its gradients, when a gradient comes back through the block, and "
            f"here none does, as indexers alone learn; set every degree of parallel to 1",
        )
        require(
            self.parallel.pipeline == 1,
            f"stage is 'sparse', which does not work {told}: the divergence of the indexers is a mean over "
            f"the layers of one model, of which a stage of a pipeline has some; set parallel.pipeline to 1",
        )
        require(
            self.stage in get_args(Stage),
            f"stage is {self.stage!r}; it must be 'warm-up', and then, from its run, 'sparse'",
        )
        require(
            self.data.tokenizer is None,
            f"data.tokenizer is {self.data.tokenizer!r}, but a model goes on with its own; leave it out",
        )
        require(
            self.stage == "warm-up" or self.indexer is None,
            "indexer is given, but the sparse stage goes on with the one that warm-up taught; leave it out",
        )


def load_sparsify(path: str | Path, overrides: Iterable[str] = ()) -> SparsifyConfig:
    return build(SparsifyConfig, *load_table(path, overrides))


def with_indexer(model: ModelConfig, config: SparsifyConfig) -> ModelConfig:
    """The model of the stage. ValueError where it cannot have an indexer, or has another already."""
    attention, asked = model.attention, config.indexer
    require(
        isinstance(attention, MLAConfig),
        f"{config.model} has no latent attention, whose latents an indexer chooses among; take a V2 or V3",
    )
    assert isinstance(attention, MLAConfig)
    present = attention.indexer
    require(
        present is not None or asked is not None,
        f"{config.model} has no indexer; "
        + ("give [indexer]" if config.stage == "warm-up" else "run the stage warm-up on it first"),
    )
    require(
        present is None or asked is None or present == asked,
        f"{config.model} has an indexer of {present}, not {asked}; leave indexer out to go on with it",
    )
    if present is not None:
        return model
    kind = "deepseek_v32" if model.model_type == "deepseek_v3" else model.model_type
    return replace(model, model_type=kind, attention=replace(attention, indexer=asked))
