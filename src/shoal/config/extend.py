"""How an extension is told: a trained checkpoint continued at a longer context, its angles stretched by YaRN.

DeepSeek's way (V2, arXiv 2405.04434, section 3.1.4; V3, arXiv 2412.19437, section 4.3): one scaling, factor
40 with beta 32 and 1, for both phases, 1,000 steps of 32K sequences and, in V3, 1,000 of 128K. A phase is a
run; the next one starts from its folder and says no `yarn`.

The law: at factor 1 nothing changes. What is continued is run as stages/pretrain runs anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from shoal.config.model import MLAConfig, ModelConfig, YarnScaling
from shoal.config.require import require
from shoal.config.run import DataConfig, TrainConfig, build, load_table


@dataclass(frozen=True)
class NeedleConfig:
    """The needle test: `trials` facts at each of `depths` depths in contexts of each of `lengths` tokens.

    `fact`, `question` and `answer` are templates: {key} is one of `keys`, {value} one of `values`, drawn anew
    for each needle; without them, so many random letters and digits. Facts are hidden in held-out text that
    does not ask the question itself.
    """

    lengths: tuple[int, ...]
    depths: int = 5
    trials: int = 4
    fact: str = "\nThe code of {key} is {value}.\n"
    question: str = "\nThe code of {key} is"
    answer: str = " {value}"
    letters: int = 6
    digits: int = 4
    keys: tuple[str, ...] = ()
    values: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(bool(self.lengths), "lengths names none; give the contexts to test, in tokens")
        require(
            list(self.lengths) == sorted(set(self.lengths)),
            f"lengths are {self.lengths}; name each once, the shortest first",
        )
        for name, least in (("depths", 2), ("trials", 1), ("letters", 1), ("digits", 1)):
            value = getattr(self, name)
            require(value >= least, f"{name} is {value}; it must be at least {least}")
        for name, words in (("fact", ("key", "value")), ("question", ("key",)), ("answer", ("value",))):
            for word in words:
                text = getattr(self, name)
                require(f"{{{word}}}" in text, f"{name} is {text!r}; it must have {{{word}}} in it")


@dataclass(frozen=True)
class ExtendConfig:
    """The checkpoint `model` (its folder, or that of a finished run) continued on sequences of
    `data.seq_len`.

    Without `yarn` it keeps the angles it has: the second phase of an extension, or a plain continuation. The
    tokenizer is the checkpoint's. `needle` is asked before and after.
    """

    model: str
    train: TrainConfig
    data: DataConfig
    yarn: YarnScaling | None = None
    needle: NeedleConfig | None = None
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        require(
            self.data.tokenizer is None,
            f"data.tokenizer is {self.data.tokenizer!r}, but a model goes on with its own; leave it out",
        )
        if self.needle is not None:
            longest = self.needle.lengths[-1]
            require(
                self.yarn is None or longest <= self.yarn.factor * self.yarn.original_max_position_embeddings,
                f"needle.lengths go to {longest}, beyond yarn.factor times the original length; lower them",
            )


def load_extend(path: str | Path, overrides: Iterable[str] = ()) -> ExtendConfig:
    return build(ExtendConfig, *load_table(path, overrides))


def stretch(model: ModelConfig, yarn: YarnScaling | None) -> ModelConfig:
    """The model with its angles stretched, and as many positions as that gives; itself without `yarn`."""
    if yarn is None:
        return model
    original, present = yarn.original_max_position_embeddings, model.rope.scaling
    require(
        present is None or isinstance(present, YarnScaling),
        f"the model has a {type(present).__name__}, and YaRN stretches plain angles; leave yarn out",
    )
    known = (
        present.original_max_position_embeddings
        if isinstance(present, YarnScaling)
        else model.max_position_embeddings
    )
    require(
        original == known if isinstance(present, YarnScaling) else original <= known,
        f"yarn.original_max_position_embeddings is {original}, but the model was made for {known} positions; "
        f"say {known}",
    )
    require(
        isinstance(model.attention, MLAConfig) or (yarn.mscale is None and yarn.mscale_all_dim is None),
        "yarn.mscale and mscale_all_dim scale the softmax of MLA, which this model does not have; leave them "
        "out",
    )
    return replace(
        model,
        rope=replace(model.rope, scaling=yarn),
        max_position_embeddings=int(yarn.factor * original),
    )
