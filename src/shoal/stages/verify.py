"""Verify: does serving give what the model says, with each feature on, and with each two of them?

The engine answers some prompts, greedy and sampled, once plainly and once for every feature and every pair of
features. For each token it drew, its log-probability is compared with that of the naive forward pass over the
same text (naive.py), and where the draw was greedy no other token may be better there.

The law is a measured one. The naive pass in the model's dtype differs from the same pass in a wider one by
rounding alone; serving computes the same sums in other orders, so it may differ from the wide pass by `SLACK`
times the most that the naive one does, and choose other experts as much oftener. With a cache in FP8 the
naive pass rounds to e4m3 what a cache would hold, and by that is the law measured. With an indexer's keys in
FP8 both passes round them: who reads other positions is another model, and no tolerance would say anything.
A feature is a row of `FEATURES`: what it changes, why a model may lack it, and how to see that it was really
at work.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from shoal.config.cost import fp8_cache_shape
from shoal.config.model import MLAConfig
from shoal.engine import Completion, Engine, EngineSettings, SamplingParams, Stats
from shoal.engine.buckets import default_sizes
from shoal.engine.pieces import default_lengths, why_not
from shoal.engine.speculation import Governor
from shoal.model.transformer import Transformer
from shoal.ops import dispatch
from shoal.ops.quantised import check_index
from shoal.stages import naive

SLACK = 4.0  # times the naive pass's own rounding: paths differ in length and order, not in kind
NEAR_TIES = 0.01  # of the choices of experts, beside SLACK times what the naive pass turns
PAGE, CHUNK, DRAFTS = 16, 8, 2
Rounds = tuple[bool, bool]  # to FP8: what is cached, and the keys of an indexer
BEST = 8  # tokens of a position whose rounding is looked at, beside the one that was drawn


@dataclass(frozen=True)
class Setup:
    """How one case is served."""

    settings: EngineSettings
    longest_prompt: int
    together: bool = False  # all prompts at once; else one after the other
    twice: bool = False  # asked again, and the second answer counts
    invariant: bool = False  # batch-invariant mode


@dataclass(frozen=True)
class Feature:
    """`apply` turns it on; `lacks` says why a model has none, or None; `shows` whether it was at work."""

    name: str
    apply: Callable[[Setup], Setup]
    lacks: Callable[[Transformer], str | None] = lambda model: None
    shows: Callable[[Stats], bool] = lambda stats: True
    excludes: tuple[str, ...] = ()
    fp8_rows: bool = False  # what is cached is rounded to e4m3
    fp8_keys: bool = False  # so are the keys of an indexer


@dataclass(frozen=True)
class Case:
    """What came of one combination. Differences are of log-probabilities, in nats."""

    features: tuple[str, ...]  # none: plainly
    holds: bool
    skipped: str | None = None  # why it was not run
    difference: float = 0.0  # the largest, from the wide naive pass
    tolerance: float = 0.0
    regret: float = 0.0  # by how much the naive pass prefers another token to a greedy one, at most
    tokens: int = 0
    choices: int = 0  # of experts
    other_choices: int = 0  # of these, not what the naive router chose
    other_choices_limit: int = 0
    same_as_plain: bool = True  # bit for bit: tokens and log-probabilities
    fault: str | None = None


@dataclass(frozen=True)
class Report:
    dtype: str
    wide: str
    device: str
    rounding: float  # the naive pass's own, in nats
    fp8_rounding: float  # the same with cached rows in e4m3; 0 where no case asks for it
    fp8_keys_rounding: float  # the same with an indexer's keys in FP8, its rows as well where a case asks
    cases: tuple[Case, ...]

    @property
    def holds(self) -> bool:
        return all(case.holds for case in self.cases)


def _settings(**changes: object) -> Callable[[Setup], Setup]:
    return lambda setup: replace(setup, settings=replace(setup.settings, **changes))  # type: ignore[arg-type]


def _pad(setup: Setup) -> Setup:
    return replace(
        setup, settings=replace(setup.settings, buckets=default_sizes(setup.settings.max_sequences))
    )


def _pad_prompts(setup: Setup) -> Setup:
    settings = setup.settings
    return replace(setup, settings=replace(settings, lengths=default_lengths(settings.max_batch_tokens)))


def _starve(setup: Setup) -> Setup:
    """Pages for the two longest prompts, or for one with its answer: the second has to give its up."""
    settings = setup.settings
    assert settings.num_pages is not None
    alone = settings.num_pages // settings.max_sequences
    few = max(2 * -(-setup.longest_prompt // settings.page_size), alone)
    return replace(setup, together=True, settings=replace(settings, num_pages=few))


def _remember(setup: Setup) -> Setup:
    return replace(setup, twice=True, settings=replace(setup.settings, prefix_cache=True))


def _no_fp8_cache(model: Transformer) -> str | None:
    try:
        fp8_cache_shape(model.config)
    except ValueError as error:
        return str(error)
    return None


def _no_index_keys(model: Transformer) -> str | None:
    attention = model.config.attention
    if not isinstance(attention, MLAConfig) or attention.indexer is None:
        return "the model has no indexer"
    try:
        check_index(attention.indexer.index_head_dim)
        fp8_cache_shape(model.config, "fp8")
    except ValueError as error:
        return str(error)
    return None


def _no_module(model: Transformer) -> str | None:
    return None if model.config.num_nextn_predict_layers else "the model has no prediction module"


FEATURES = (
    Feature("prefix cache", _remember, shows=lambda stats: stats.prompt_positions_cached > 0),
    Feature("chunks", _settings(max_batch_tokens=CHUNK)),
    Feature("batch", lambda setup: replace(setup, together=True)),
    Feature("preemption", _starve, shows=lambda stats: stats.preemptions > 0),
    Feature("graphs", _pad),  # on a CPU the padded steps that graphs would replay
    Feature("pieces", _pad_prompts, why_not),
    Feature("overlap", _settings(overlap=True), excludes=("speculation",)),
    Feature(
        "speculation",
        _settings(speculate=DRAFTS),
        _no_module,
        lambda stats: sum(stats.drafted) > 0,
        excludes=("overlap",),
    ),
    Feature("batch invariance", lambda setup: replace(setup, invariant=True)),
    Feature("fp8 cache", _settings(cache_dtype="fp8"), _no_fp8_cache, fp8_rows=True),
    Feature(
        "fp8 index keys",
        _settings(index_keys="fp8"),
        _no_index_keys,
        excludes=("fp8 cache and index keys",),
        fp8_keys=True,
    ),
    Feature(
        "fp8 cache and index keys",
        _settings(cache_dtype="fp8", index_keys="fp8"),
        _no_index_keys,
        excludes=("fp8 index keys",),
        fp8_rows=True,
        fp8_keys=True,
    ),
)


def verify(
    model: Transformer,
    *,
    prompts: Sequence[list[int]],
    tokens: int = 16,
    features: Sequence[Feature] = FEATURES,
    pairs: bool = True,
    observe: Callable[[int, int, tuple[str, ...]], None] = lambda done, total, names: None,
) -> Report:
    """The plain case, each feature's, with `pairs` each pair's. `observe` is told of each before it runs."""
    if tokens < PAGE:
        raise ValueError(
            f"tokens is {tokens}; answers of {PAGE} or more outgrow a page, which some features need"
        )
    longest = max(map(len, prompts)) + tokens
    if longest > model.config.max_position_embeddings:
        raise ValueError(
            f"prompt and answer take {longest} tokens, but the model's context is "
            f"{model.config.max_position_embeddings}; give shorter prompts"
        )
    judge = _Judge(model)
    sets = [(), *((feature,) for feature in features)]
    sets += combinations(features, 2) if pairs else ()
    plainly: list[Completion] | None = None
    cases: list[Case] = []
    for chosen in sets:
        names = tuple(feature.name for feature in chosen)
        observe(len(cases), len(sets), names)
        if (why := _skip(model, chosen)) is not None:
            cases.append(Case(names, holds=True, skipped=why))
            continue
        got, stats = _serve(model, chosen, prompts, tokens)
        plainly = plainly or got
        unseen = [feature.name for feature in chosen if not feature.shows(stats)]
        rounds = any(feature.fp8_rows for feature in chosen), any(feature.fp8_keys for feature in chosen)
        case = judge.judge(names, prompts, got, plainly, rounds)
        if unseen:
            case = replace(case, holds=False, fault=f"{' and '.join(unseen)} did nothing in this run")
        cases.append(case)
    dtype = model.head_weight().dtype
    return Report(
        str(dtype).removeprefix("torch."),
        str(naive.wider(dtype)).removeprefix("torch."),
        model.head_weight().device.type,
        judge.rounding[False, False],
        judge.rounding[True, False],
        max(judge.rounding[False, True], judge.rounding[True, True]),
        tuple(cases),
    )


def draw_prompts(model: Transformer, count: int, length: int, seed: int) -> list[list[int]]:
    """So many prompts of random ids that begin alike and end apart.

    The two longest end in the middle of a page, so that both find room where their answers do not.
    """
    if count < 2 or length < 3 * PAGE // 2:
        raise ValueError(
            f"{count} prompts of up to {length} tokens are too few; 2 of {3 * PAGE // 2} show something"
        )
    most = (length - PAGE // 2) // PAGE * PAGE + PAGE // 2
    lengths = [most, *(max(1, most - most * place // (count - 1)) for place in range(count - 1))]
    generator = torch.Generator().manual_seed(seed)

    def text(size: int) -> list[int]:
        return torch.randint(model.config.vocab_size, (size,), generator=generator).tolist()

    shared = text(most)
    alike = [max(0, size - PAGE // 2) for size in lengths]
    return [shared[:same] + text(size - same) for size, same in zip(lengths, alike, strict=True)]


def _skip(model: Transformer, chosen: Sequence[Feature]) -> str | None:
    for feature in chosen:
        if (why := feature.lacks(model)) is not None:
            return why
        if others := [each.name for each in chosen if each.name in feature.excludes]:
            return f"{feature.name} and {others[0]} exclude each other"
    return None


def _serve(
    model: Transformer, chosen: Sequence[Feature], prompts: Sequence[list[int]], tokens: int
) -> tuple[list[Completion], Stats]:
    longest = max(map(len, prompts)) + tokens
    plain = EngineSettings(
        page_size=PAGE,
        num_pages=len(prompts) * (-(-longest // PAGE)),
        max_batch_tokens=max(len(prompts) * longest, CHUNK),
        max_sequences=len(prompts),
        prefix_cache=False,
        buckets=(),
        lengths=(),
        overlap=False,
    )
    setup = Setup(plain, max(map(len, prompts)))
    for feature in chosen:
        setup = feature.apply(setup)
    routes = model.config.moe is not None
    params = [
        SamplingParams(temperature=place % 2, seed=place, max_tokens=tokens, ignore_eos=True, routing=routes)
        for place in range(len(prompts))
    ]
    with dispatch.batch_invariant() if setup.invariant else nullcontext():
        engine = Engine(model, setup.settings, governor=Governor(trial=1 << 30))  # it always guesses

        def ask() -> list[Completion]:
            if setup.together:
                return engine.generate(list(prompts), params)
            return [engine.generate([ids], wish)[0] for ids, wish in zip(prompts, params, strict=True)]

        got = ask()
        got = ask() if setup.twice else got
    return got, engine.stats()


class _Judge:
    """Holds completions against naive passes; a text it has seen with the same experts is not read again."""

    def __init__(self, model: Transformer) -> None:
        self._model, self._dtype = model, model.head_weight().dtype
        self._wide = naive.wider(self._dtype)
        self._read: dict[tuple[tuple[int, ...], bytes, Rounds], tuple[Tensor, int]] = {}
        # By what is rounded to FP8, in nats, as far as it was measured; and choices that the naive pass turns
        # by it.
        self.rounding: dict[Rounds, float] = defaultdict(float)
        self._turned: dict[Rounds, int] = defaultdict(int)
        self._counted: dict[Rounds, int] = defaultdict(int)

    def judge(
        self,
        names: tuple[str, ...],
        prompts: Sequence[list[int]],
        got: list[Completion],
        plainly: list[Completion],
        rounds: Rounds,
    ) -> Case:
        difference = regret = 0.0
        others = choices = 0
        for place, (ids, done) in enumerate(zip(prompts, got, strict=True)):
            logprobs_NV, other = self._logprobs([*ids, *done.ids], len(ids), done.routing, rounds)
            others += other
            choices += 0 if done.routing is None else done.routing.numel()
            chosen_N1 = torch.tensor(done.ids, device=logprobs_NV.device).unsqueeze(1)
            theirs_N = logprobs_NV.gather(1, chosen_N1).squeeze(1)
            ours_N = torch.tensor(done.logprobs, dtype=theirs_N.dtype, device=theirs_N.device)
            difference = max(difference, (ours_N - theirs_N).abs().max().item())
            if place % 2 == 0:  # drawn greedily
                regret = max(regret, (logprobs_NV.amax(1) - theirs_N).max().item())
        tolerance, counted = SLACK * self.rounding[rounds], self._counted[rounds]
        share = self._turned[rounds] / counted if counted else 0.0
        limit = int((SLACK * share + NEAR_TIES) * choices)
        fault = None
        if not difference <= tolerance:
            fault = "log-probabilities differ from the naive pass by more than rounding does"
        elif not regret <= 2 * tolerance:
            fault = "a greedy token is not the naive pass's best"
        elif others > limit:
            fault = "experts are not the naive router's"
        return Case(
            names,
            holds=fault is None,
            difference=difference,
            tolerance=tolerance,
            regret=regret,
            tokens=sum(len(done.ids) for done in got),
            choices=choices,
            other_choices=others,
            other_choices_limit=limit,
            same_as_plain=all(
                (one.ids, one.logprobs) == (other.ids, other.logprobs)
                for one, other in zip(got, plainly, strict=True)
            ),
            fault=fault,
        )

    def _logprobs(
        self, ids: list[int], num_prompt: int, routing: Tensor | None, rounds: Rounds
    ) -> tuple[Tensor, int]:
        """Of every token in the place of each that was drawn, by the wide pass; and its other choices."""
        key = tuple(ids), b"" if routing is None else routing.numpy().tobytes(), rounds
        if key not in self._read:
            rows, keys = rounds
            wide = naive.forward(self._model, ids[:-1], self._wide, routing, fp8_keys=keys)
            own = naive.forward(self._model, ids[:-1], self._dtype, routing, fp8_rows=rows, fp8_keys=keys)
            drawn = slice(num_prompt - 1, None)
            ids_N1 = torch.tensor(ids[num_prompt:], device=wide.logits_TV.device).unsqueeze(1)
            wide_NV = wide.logits_TV[drawn].log_softmax(-1)
            off_NV = (own.logits_TV[drawn].to(self._wide).log_softmax(-1) - wide_NV).abs()
            told_NX = torch.cat((wide_NV.topk(BEST).indices, ids_N1), 1)  # those that may be drawn
            off = off_NV.gather(1, told_NX).max().item()
            ulp = torch.finfo(self._dtype).eps * wide.logits_TV.abs().max().item()
            self.rounding[rounds] = max(self.rounding[rounds], off, ulp)
            if wide.experts_TLK is not None and own.experts_TLK is not None:
                self._turned[rounds] += naive.count_others(own.experts_TLK, wide.experts_TLK)
                self._counted[rounds] += own.experts_TLK.numel()
            self._read[key] = wide_NV, naive.count_others(routing, wide.experts_TLK)
        return self._read[key]
