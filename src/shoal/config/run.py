"""How one run is told: a TOML recipe plus `--set a.b=c`, resolved into one frozen RunConfig.

The law: nothing a user writes is ignored. An unknown key fails with the nearest valid name, a wrong type with
the type wanted, and both say where it was written. A model is named by family (`family = "deepseek-v3"`,
`tiny = true` for its small twin) and changed field by field. What is resolved is whole: it names no family
and, written as TOML, reads back equal, so the copy saved beside the results tells the run again.

Left to others: what the fields of a model may be (model.py), which families exist (families.py).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import tomllib
import types
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from shoal.config import families
from shoal.config.model import MLAConfig, ModelConfig, NSAConfig
from shoal.config.require import require

Table = dict[str, Any]
DEGREES = ("data", "expert", "context", "pipeline")
Recompute = Literal["none", "selective", "full"]
Keep = Literal["auto", "step", "pass", "use"]  # of weights in FP8
T = TypeVar("T")


@dataclass(frozen=True)
class SourceConfig:
    """One of several sources of text: its files or globs, and its share of the tokens beside the others'."""

    files: tuple[str, ...] = ()
    weight: float = 1.0

    def __post_init__(self) -> None:
        require(0 < self.weight < math.inf, f"weight is {self.weight}; it must be positive and finite")


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it is cut.

    `train` and `validation` are files or globs; without `train`, the running Python's standard library is
    read, which every machine has. Without `validation`, `holdout_fraction` of `train` is held out. Without
    `tokenizer`, a folder, one is trained on `train` with the model's `vocab_size`. A micro-batch has
    `tokens_per_batch` tokens, and no sequence in it is longer than `seq_len`.

    In place of `train`, `sources` names several, each with a weight: every batch has their tokens in that
    proportion, and what is held out of each is judged by its name. `domains` are files or globs to be judged
    by names of their own, in place of `validation`. `fim_rate` is the share of documents to train on that
    are told as prefix, suffix and middle (DeepSeek-V3: 0.1).
    """

    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    holdout_fraction: float = 0.05
    tokenizer: str | None = None
    tokens_per_batch: int = 8192
    seq_len: int = 512
    sources: dict[str, SourceConfig] = dataclasses.field(default_factory=dict[str, SourceConfig])
    domains: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict[str, tuple[str, ...]])
    fim_rate: float = 0.0

    def __post_init__(self) -> None:
        require(
            not (self.train and self.sources),
            "train and sources are both given; name the files of train as one of the sources",
        )
        require(
            not (self.validation and self.domains),
            "validation and domains are both given; name the files of validation as one of the domains",
        )
        for kind, names in (("source", self.sources), ("domain", self.domains)):
            for name in names:
                require(
                    re.fullmatch(r"[A-Za-z0-9_-]+", name) is not None,
                    f"a {kind} is called {name!r}; use letters, digits, - and _",
                )
        require(0 <= self.fim_rate <= 1, f"fim_rate is {self.fim_rate}; it must lie between 0 and 1")
        require(
            0 < self.holdout_fraction < 1,
            f"holdout_fraction is {self.holdout_fraction}; it must lie between 0 and 1",
        )
        require(self.seq_len >= 2, f"seq_len is {self.seq_len}; a sequence needs 2 tokens to predict one")
        require(
            self.tokens_per_batch >= self.seq_len,
            f"tokens_per_batch is {self.tokens_per_batch}, less than one sequence of seq_len {self.seq_len}",
        )


@dataclass(frozen=True)
class OptimConfig:
    """The update rule and its learning rate (defaults: DeepSeekMoE-16B, arXiv 2401.06066, section 5.1).

    After `warmup_steps` of linear growth the rate stays `constant`, falls by `cosine` to `floor` times `lr`,
    by DeepSeek's `multi_step` (times 0.316 at 80% and again at 90% of all steps), or `linear`ly to zero. With
    `muon`, AdamW keeps embedding, head and vectors; the same `lr` serves both. `clip` bounds the gradient's
    global norm.

    `master` and `moments` say what the optimizer keeps of bfloat16 weights: a float32 copy, or none (steps
    are then rounded at random, right on average); moments in float32, bfloat16 or 8 bits. `in_backward` takes
    each parameter's step as soon as its gradient is whole and frees it; clipping is then by the last step's
    norm (train/optim.py).
    """

    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 4.2e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine", "multi_step", "linear"] = "multi_step"
    floor: float = 0.1
    master: Literal["float32", "bfloat16"] = "float32"
    moments: Literal["float32", "bfloat16", "int8"] = "float32"
    in_backward: bool = False

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "clip"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"{name} is {value}; it must be positive and finite")
        require(all(0 <= beta < 1 for beta in self.betas), f"betas are {self.betas}; each lies in [0, 1)")
        require(self.weight_decay >= 0, f"weight_decay is {self.weight_decay}; it cannot be negative")
        require(self.warmup_steps >= 0, f"warmup_steps is {self.warmup_steps}; it cannot be negative")
        require(0 <= self.floor <= 1, f"floor is {self.floor}; it is a fraction of lr, between 0 and 1")


@dataclass(frozen=True)
class BalanceConfig:
    """What keeps experts evenly loaded (DeepSeek-V3, arXiv 2412.19437, sections 2.1.2 and 4.2).

    The correction bias of routers that have one (`topk_method = "noaux_tc"`) moves by `bias_rule`: `sign`, by
    `bias_update_speed` a step against the load, or `quantile`, solved anew each step so that loads come out
    even (Kimi K3; it has no step size). It moves for the first `bias_share` of the run, then rests; V3's
    share was 0.966.

    The others are weights of auxiliary losses (train/auxiliary.py; 0: not computed): V3's within a sequence
    (V2's expert-level one, 0.003), V2's over `devices` groups of experts (0: the model's n_group; 0.05 and
    0.02), Switch's and GShard's over a micro-batch (0.01), the router's z-loss (0.001). `noise` is the spread
    of normal noise on the router's logits while training.
    """

    bias_update_speed: float = 0.001
    bias_rule: Literal["sign", "quantile"] = "sign"
    bias_share: float = 1.0
    sequence_loss: float = 1e-4
    device_loss: float = 0.0
    communication_loss: float = 0.0
    devices: int = 0
    switch_loss: float = 0.0
    gshard_loss: float = 0.0
    z_loss: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str):
                require(value >= 0, f"{field.name} is {value}; it cannot be negative, and 0 turns it off")
        require(self.bias_share <= 1, f"bias_share is {self.bias_share}; it is a share of the run, at most 1")


@dataclass(frozen=True)
class TrainConfig:
    """The loop: `steps` optimizer steps of `accumulation` micro-batches each.

    A checkpoint and an evaluation are made every so many steps (0: none in between) and after the last;
    `keep` checkpoints stay; with `background_saves` they are written from a copy in host memory while steps
    go on. `mtp_loss_weight` is lambda of the multi-token-prediction loss. `recompute` is what backward makes
    again instead of keeping it: nothing, the attention of each block, or all of it.
    A loss more than `spike_deviations` standard deviations above the last 64 (0: never asked) is a spike;
    `spike_action` leaves its step out, or rolls back to the last checkpoint and on with the batches after it.
    """

    steps: int
    accumulation: int = 1
    evaluate_every: int = 100
    checkpoint_every: int = 100
    keep: int = 2
    background_saves: bool = False
    mtp_loss_weight: float = 0.3
    recompute: Recompute = "none"
    spike_deviations: float = 0.0
    spike_action: Literal["skip", "rollback"] = "skip"
    optim: OptimConfig = OptimConfig()
    balance: BalanceConfig = BalanceConfig()

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("accumulation", 1), ("keep", 1)):
            value = getattr(self, name)
            require(value >= least, f"{name} is {value}; it must be at least {least}")
        for name in ("evaluate_every", "checkpoint_every", "mtp_loss_weight", "spike_deviations"):
            value = getattr(self, name)
            require(value >= 0, f"{name} is {value}; it cannot be negative, and 0 turns it off")
        require(
            self.accumulation == 1 or not self.optim.in_backward,
            f"accumulation is {self.accumulation}, but optim.in_backward frees a gradient before the next "
            f"micro-batch could add to it; set one of them to 1 or false",
        )
        require(
            self.optim.warmup_steps <= self.steps,
            f"optim.warmup_steps is {self.optim.warmup_steps}, more than the run's {self.steps} steps",
        )


@dataclass(frozen=True)
class ParallelConfig:
    """Over how many processes a run is spread: the product of its degrees, started by torchrun.

    Each of `data` and `expert` reads micro-batches of its own and keeps a part of all weights (FSDP2). With
    `expert` above 1 experts are spread over that many, and tokens are sent to them. With `pipeline` above 1
    blocks are: each process has one stage of them (`1f1b`), or the two of a V, one on its way down and one on
    its way up (`dualpipev`, DeepSeek's). With `context` above 1 that many read the same micro-batches, each a
    share of the positions of every sequence: for long ones. The run stays the same run, whatever the degrees.
    """

    data: int = 1
    expert: int = 1
    pipeline: int = 1
    schedule: Literal["1f1b", "dualpipev"] = "1f1b"
    context: int = 1

    @property
    def ranks(self) -> int:
        return self.readers * self.context * self.pipeline

    @property
    def readers(self) -> int:
        """Shares into which the micro-batches of a step are cut."""
        return self.data * self.expert

    @property
    def stages(self) -> int:
        return self.pipeline * (2 if self.schedule == "dualpipev" else 1)

    @property
    def told(self) -> str:
        return " x ".join(f"{name} {getattr(self, name)}" for name in DEGREES)

    def __post_init__(self) -> None:
        for name in DEGREES:
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}; it must be at least 1")
        require(
            self.pipeline > 1 or self.schedule == "1f1b",
            f"schedule is {self.schedule!r}, but pipeline is 1; raise pipeline, or leave schedule out",
        )
        require(
            self.context == 1 or self.pipeline == 1,
            f"context is {self.context} and pipeline {self.pipeline}, which do not work together yet; set "
            "one of them to 1",
        )


@dataclass(frozen=True)
class RunConfig:
    """One run, whole. `seed` decides the weights at birth and the order of the data.

    `dtype` is that of the weights the model computes with; of bfloat16 ones the optimizer keeps float32
    copies. `precision` is that of the products: `fp8` multiplies linears and experts as DeepSeek-V3 does,
    forward and for the gradient of their inputs; all else stays in `dtype`. `fp8_keep` says for how long
    a weight in FP8 is kept, which costs memory and changes no number: `step`, from one change of it to the
    next, two bytes an element; `pass`, from the forward to the backward pass, one; `use`, not at all. `auto`
    is `step` for what there is room for, after two micro-batches, where a step has several; `pass` where it
    has one; and `use` with recompute, which is for want of memory, and on several processes, where nothing
    else works. The micro-batches of a step are shared among the processes of `parallel`.
    """

    model: ModelConfig
    train: TrainConfig
    data: DataConfig = DataConfig()
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    precision: Literal["dtype", "fp8"] = "dtype"
    fp8_keep: Keep = "auto"
    parallel: ParallelConfig = ParallelConfig()

    def __post_init__(self) -> None:
        self._check_parallel()
        require(
            self.data.seq_len <= self.model.max_position_embeddings,
            f"data.seq_len is {self.data.seq_len}, beyond the {self.model.max_position_embeddings} positions "
            f"of the model; lower it or raise model.max_position_embeddings",
        )
        require(
            self.dtype == "bfloat16" or self.train.optim.master == "float32",
            f"train.optim.master is {self.train.optim.master}, but weights of dtype float32 are their own "
            f"masters; leave it at float32, or set dtype to bfloat16",
        )
        require(self.seed >= 0, f"seed is {self.seed}; it cannot be negative")
        require(
            self.precision == "fp8" or self.fp8_keep == "auto",
            f"fp8_keep is {self.fp8_keep!r}, but no weight is in FP8; set precision to fp8, or leave it out",
        )

    @property
    def keeps(self) -> Keep:
        """`fp8_keep`, decided as far as it can be before a pass was seen."""
        if self.fp8_keep != "auto":
            return self.fp8_keep
        if self.parallel.ranks > 1 or self.train.recompute != "none":
            return "use"
        return "auto" if self.train.accumulation > 1 else "pass"

    def _check_parallel(self) -> None:
        """What several processes cannot do is refused."""
        ranks, optim, moe = self.parallel.ranks, self.train.optim, self.model.moe
        if ranks == 1:
            return
        told = f"on the {ranks} processes of parallel.{self.parallel.told}"
        # Why, for the reader of the error: what of one process's rule there is no equal of on several.
        for key, value, works, why in (
            (
                "train.optim.in_backward",
                optim.in_backward,
                (False,),
                "the step of a parameter is clipped by the norm of its whole gradient, of which each process "
                "has a part",
            ),
            (
                "train.optim.moments",
                optim.moments,
                ("float32", "bfloat16"),
                "blocks of 256 that share a scale would straddle the cuts between processes",
            ),
            (
                "fp8_keep",
                self.fp8_keep,
                ("auto", "use"),
                "weights are gathered for each pass, and what is made of one would lie whole on each process",
            ),
        ):
            require(
                value in works,
                f"{key} is {value!r}, which does not work {told}: {why}; use {' or '.join(map(repr, works))} "
                f"or one process",
            )
        readers, stages, blocks = self.parallel.readers, self.parallel.stages, self.model.num_hidden_layers
        require(
            self.train.accumulation % readers == 0,
            f"train.accumulation is {self.train.accumulation} micro-batches a step, which cannot be shared "
            f"evenly {told}; make it a multiple of {readers}",
        )
        require(
            self.parallel.pipeline == 1 or self.train.accumulation >= readers * stages,
            f"train.accumulation is {self.train.accumulation} micro-batches a step, too few to fill the "
            f"{stages} stages of each pipeline {told}; make it at least {readers * stages}",
        )
        require(
            blocks >= stages,
            f"the model has {blocks} layers, fewer than the {stages} stages of parallel.schedule "
            f"{self.parallel.schedule!r} {told}; lower parallel.pipeline",
        )
        experts = 0 if moe is None else moe.n_routed_experts
        require(
            self.parallel.expert == 1 or (experts > 0 and experts % self.parallel.expert == 0),
            f"parallel.expert is {self.parallel.expert}, but the model has {experts} experts; it must divide "
            f"their number",
        )
        if self.parallel.context > 1:
            self._check_context()

    def _check_context(self) -> None:
        """What cannot be said of tokens without the rest of their micro-batch is refused."""
        context, moe = self.parallel.context, self.model.moe
        told = f"parallel.context is {context}"
        require(
            self.data.seq_len >= 2 * context,
            f"{told}, which cuts a sequence into {2 * context} pieces, but data.seq_len is "
            f"{self.data.seq_len}; raise it to {2 * context} at least",
        )
        attention = self.model.attention
        chooses = isinstance(attention, MLAConfig) and attention.indexer is not None
        require(
            not chooses and not isinstance(attention, NSAConfig),
            f"{told}, but the model's attention {'has an indexer' if chooses else 'is native sparse'}: what "
            f"a token reads is chosen among all tokens of its pack, and each process has some of them; set "
            f"parallel.context to 1",
        )
        if moe is None:
            return
        require(
            moe.topk_method != "expert_choice",
            f"{told}, but model.moe.topk_method is 'expert_choice': all tokens of a micro-batch compete, and "
            f"each process has some; use another router, or set parallel.context to 1",
        )
        require(
            moe.capacity_factor is None and moe.eval_capacity_factor is None,
            f"{told}, but the model's experts have a capacity: the tokens of a micro-batch fill it in their "
            f"order, and each process has some; set model.moe.capacity_factor and eval_capacity_factor to "
            f"none, or parallel.context to 1",
        )


# Reading: text -> table -> dataclasses


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a TOML recipe, change it by `a.b=c` overrides in order, and check every word of it."""
    return from_table(*load_table(path, overrides))


def load_table(path: str | Path, overrides: Iterable[str] = ()) -> tuple[Table, str]:
    """A TOML recipe with its overrides, not yet checked, and what to call it in errors."""
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no recipe at {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    changes = list(overrides)
    for override in changes:
        table = _merge(table, _parse_override(override))
    return table, f"{path} with --set" if changes else str(path)


def from_table(table: Mapping[str, Any], source: str) -> RunConfig:
    """A RunConfig from nested dicts as TOML or JSON give them; `source` names them in errors."""
    table = dict(table)
    if _is_table(model := table.get("model")):
        table["model"] = _resolve_model(dict(model), source)
    return _build(RunConfig, table, "", source)


def build(kind: type[T], table: Mapping[str, Any], source: str) -> T:
    """Another config than RunConfig, as strictly: every key known, every value of its type."""
    return _build(kind, dict(table), "", source)


def _parse_override(override: str) -> Table:
    """`a.b=c` as {a: {b: c}}. c is read as TOML where it is TOML, else taken as a string."""
    key, equals, text = override.partition("=")
    require(bool(equals) and bool(key.strip()), f"--set {override}: write it as a.b=value")
    value: Any = text
    with suppress(tomllib.TOMLDecodeError):
        value = tomllib.loads(f"value = {text}")["value"]
    for part in reversed(key.strip().split(".")):
        value = {part: value}
    return value


def _merge(base: Table, change: Table) -> Table:
    """`base` with every leaf of `change` in its place."""
    merged = dict(base)
    for key, value in change.items():
        merged[key] = value
        if _is_table(old := base.get(key)) and _is_table(value):
            merged[key] = _merge(old, value)
    return merged


def _is_table(value: Any) -> TypeGuard[Table]:
    return isinstance(value, dict)


def _is_list(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def _resolve_model(table: Table, source: str) -> Table:
    """Put the fields of the named family under those that are written."""
    family, tiny = table.pop("family", None), table.pop("tiny", False)
    if family is None:
        require(tiny is False, f"{source}: model.tiny needs model.family, the model to make small")
        return table
    require(isinstance(family, str), f"{source}: model.family is {family!r}; it must be a string")
    require(isinstance(tiny, bool), f"{source}: model.tiny is {tiny!r}; it must be true or false")
    try:
        config = families.tiny(family) if tiny else families.family(family).config
    except ValueError as error:
        raise ValueError(f"{source}: model.family: {error}") from None
    return _change(config, table)


def _change(config: Any, table: Table) -> Table:
    """The fields of `config`, those that are written changed. A part that is written in full as another kind
    than the config has (GQA where it has MLA) takes its place."""
    changed, hints = to_table(config), get_type_hints(config.__class__)
    for name, value in table.items():
        part, changed[name] = getattr(config, name, None), value
        if _is_table(value) and dataclasses.is_dataclass(part):
            kinds = get_args(hints[name])
            stranger = _fit(type(part), value)[0] < 0
            if not (stranger and any(_fit(kind, value) == (0, 0) for kind in kinds)):
                changed[name] = _change(part, value)
    return changed


def _build(kind: type, table: Any, where: str, source: str) -> Any:
    """An instance of the dataclass `kind` from a table, every key known and every value of its type."""
    place = f"{source}: {where or 'the recipe'}"
    require(_is_table(table), f"{place} is {table!r}; it must be a table")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in table:
        if key not in fields:
            names = [*fields, "family", "tiny"] if kind is ModelConfig else list(fields)
            raise ValueError(f"{place} has no key {key!r}; the nearest is {_nearest(key, names, 0.0)!r}")
    hints, values = get_type_hints(kind), {}
    for name, field in fields.items():
        inner = f"{where}.{name}" if where else name
        if name in table:
            values[name] = _convert(hints[name], table[name], inner, source)
        elif _is_required(field):
            raise ValueError(f"{source}: {inner} is missing; it has no default")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _convert(hint: Any, value: Any, where: str, source: str) -> Any:
    """`value` as the type `hint` wants it, or an error that names both."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _build(hint, value, where, source)
    origin, choices = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(choices, value, where, source)
    if origin is Literal and value in choices:
        return value
    if origin is dict and _is_table(value):
        return {name: _convert(choices[1], part, f"{where}.{name}", source) for name, part in value.items()}
    if origin is tuple and _is_list(value):
        kinds = [choices[0]] * len(value) if choices[-1] is Ellipsis else choices
        if len(kinds) == len(value):
            return tuple(_convert(kind, item, where, source) for kind, item in zip(kinds, value, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    near = _nearest(value, choices) if origin is Literal and isinstance(value, str) else None
    meant = f" (did you mean {near!r}?)" if near else ""
    raise ValueError(f"{source}: {where} is {value!r}; it must be {_describe(hint)}{meant}")


def _convert_union(choices: tuple[Any, ...], value: Any, where: str, source: str) -> Any:
    """The member that fits: None is written "none"; a table is the dataclass whose fields it names best."""
    if type(None) in choices and value in (None, "none"):
        return None
    members = [choice for choice in choices if choice is not type(None)]
    if _is_table(value):
        fitting = max(members, key=lambda member: _fit(member, value))
        return _convert(fitting, value, where, source)
    for member in members[:-1]:
        try:
            return _convert(member, value, where, source)
        except ValueError:  # not this one; the last member's error is the one that is told
            continue
    return _convert(members[-1], value, where, source)


def _fit(kind: Any, table: Table) -> tuple[int, int]:
    """How well a table's keys match a dataclass: few strangers first, then few required fields missing."""
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    names = {field.name for field in fields}
    required = {field.name for field in fields if _is_required(field)}
    return -len(table.keys() - names), -len(required - table.keys())


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


_WORDS = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


def _describe(hint: Any) -> str:
    origin, choices = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in choices)
    if origin is tuple:
        count = "" if choices[-1] is Ellipsis else f"{len(choices)} of "
        return f"a list, {count}{_describe(choices[0])}"
    return "a table" if dataclasses.is_dataclass(hint) or origin is dict else _WORDS[hint]


def _nearest(word: str, words: Sequence[str], cutoff: float = 0.6) -> str | None:
    return next(iter(difflib.get_close_matches(word, words, n=1, cutoff=cutoff)), None)


# Writing: dataclasses -> table -> text


def to_table(config: Any) -> Table:
    """A config dataclass as nested dicts of TOML's types. A field that is None is left out, as TOML has no
    null: None is the default wherever it is allowed."""
    table: Table = {}
    for field in dataclasses.fields(config):
        value: Any = getattr(config, field.name)
        if isinstance(value, dict):
            parts = cast(dict[str, Any], value)
            table |= {field.name: {name: _plain(part) for name, part in parts.items()}} if parts else {}
        elif value is not None:
            table[field.name] = _plain(value)
    return table


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_table(value)
    return list(cast(tuple[Any, ...], value)) if isinstance(value, tuple) else value


def to_toml(config: Any) -> str:
    """The resolved recipe as text that `load_recipe` reads back equal."""
    return "\n".join(_toml_lines(to_table(config), "")).lstrip("\n") + "\n"


def _toml_lines(table: Table, name: str) -> list[str]:
    leaves = [f"{key} = {_toml_value(value)}" for key, value in table.items() if not _is_table(value)]
    lines = ["", f"[{name}]", *leaves] if name else leaves
    for key, value in table.items():
        if _is_table(value):
            lines += _toml_lines(value, f"{name}.{key}" if name else key)
    return lines


def _toml_value(value: Any) -> str:
    if _is_list(value):
        return f"[{', '.join(map(_toml_value, value))}]"
    # JSON's strings, booleans and numbers are TOML's; only DEL needs an escape that JSON leaves out.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
