"""Laws of the experiments: a run is a function of its variant and seed, variants are what their claim says,
and masking leaves out what it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import look, picture, text
from experiments.claims import Claim, claims
from experiments.pool import Study, run
from experiments.study import Extra, Plan, Question, Result, Variant, nothing_more, run_one, summarise
from experiments.text import Text
from shoal.batch import Batch
from shoal.config import cost
from shoal.config.families import tiny
from shoal.config.model import ModelConfig
from shoal.config.run import BalanceConfig
from shoal.model.transformer import Transformer

CLAIMS = claims(64)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("text")
    source = folder / "en.txt"
    source.write_text(
        "\n".join(f"The {n}th line says that {n} is {n % 7} more than it was." for n in range(400))
    )
    text.make(folder, {"en": [str(source)]}, 16_000, 400)
    return Plan(str(folder), steps=3, tokens_per_batch=256, seq_len=64)


def small(model: ModelConfig) -> ModelConfig:
    """A claim's model, as it routes but narrow."""
    moe = model.moe and replace(model.moe, moe_intermediate_size=8)
    return replace(model, hidden_size=32, intermediate_size=16, num_hidden_layers=2, moe=moe)


def one(variant: Variant, seed: int, plan: Plan, extra: Extra = nothing_more) -> Result:
    return run_one([Question("", variant, extra)], seed, plan)[0]


def test_a_run_is_a_function_of_its_variant_and_seed(plan: Plan) -> None:
    variant = Variant("tiny", tiny("deepseek-moe-16b"), BalanceConfig())
    first, same, other = (one(variant, seed, plan) for seed in (0, 0, 1))
    assert replace(same, seconds=first.seconds) == first
    assert other.bits_per_byte != first.bits_per_byte
    (row,) = summarise([first, other])
    assert row.seeds == 2
    assert row.bits_per_byte == pytest.approx((first.bits_per_byte + other.bits_per_byte) / 2)


@pytest.mark.parametrize("name", CLAIMS)
def test_a_claims_variants_are_alike_but_for_what_it_compares(name: str) -> None:
    """As many active parameters, to the routers' own (2.5%), but where a row says otherwise."""
    sizes = [
        cost.params(each.model, mtp=False).active
        for each in claims()[name].variants
        if "all parameters" not in each.name
    ]
    # Full attention of both kinds is not of one size; each is held to its sparse form.
    pairs, most = ([sizes[:2], sizes[2:]], 1.2) if name == "sparse" else ([sizes], 1.025)
    assert all(max(pair) / min(pair) < most for pair in pairs)


@pytest.mark.parametrize("name", CLAIMS)
def test_every_variant_trains_and_is_looked_at(name: str, plan: Plan) -> None:
    claim = CLAIMS[name]
    alike = ("segments", "balance", "fp8", "masking", "overhead", "domains")
    variants = claim.variants[-1:] if name in alike else claim.variants
    if name == "sparse":
        variants = claim.variants[1::2]
    steps = 3 if name == "sparse" else 1
    for variant in variants:
        made = replace(variant, model=small(variant.model))
        result = one(made, 0, replace(plan, steps=steps), claim.extra)
        assert 0 < result.bits_per_byte < 16
        moe = variant.model.moe
        assert (result.max_violation > 0) == (moe is not None and moe.topk_method != "expert_choice")
        if name in ("routers", "masking") and variant.name in ("GShard", "DeepSeekMoE"):
            assert len(result.extra["masked"]) == len(look.MASKED)
        if "acceptance" in result.extra:
            assert result.extra["same_answers"] == 1.0


def test_a_model_that_was_kept_is_the_one_that_was_trained(plan: Plan, tmp_path: Path) -> None:
    variant = Variant("tiny", tiny("deepseek-v3"), BalanceConfig(), precision="fp8")
    keeping = replace(plan, models=str(tmp_path))
    plain, first, again = (one(variant, 0, each) for each in (plan, keeping, keeping))
    assert first == again  # to the seconds: nothing was trained
    assert replace(plain, seconds=first.seconds) == first
    other = one(replace(variant, precision="dtype"), 0, keeping)
    assert other.bits_per_byte != first.bits_per_byte


def fails(model: Transformer, text: Text, plan: Plan) -> dict[str, Any]:
    raise ValueError("no answer")


def counts(model: Transformer, text: Text, plan: Plan) -> dict[str, Any]:
    return {"kept": len(list(Path(plan.models).iterdir()))}


def test_studies_share_their_runs_and_what_is_timed_comes_last(plan: Plan, tmp_path: Path) -> None:
    variant = Variant("tiny", tiny("deepseek-moe-16b"), BalanceConfig())
    keeping = replace(plan, models=str(tmp_path))
    studies = [
        Study("late", Claim("", "", (variant,), counts, timed=True), keeping),
        Study("early", Claim("", "", (replace(variant, name="same"),)), keeping),
        Study("wrong", Claim("", "", (variant,), fails), replace(keeping, steps=2)),
    ]
    taken: list[tuple[str, Result]] = []
    failures = run(studies, 1, 2, lambda name, result: taken.append((name, result)))
    assert [each.split(" ", 1)[1] for each in failures] == ["wrong, tiny, seed 0: ValueError: no answer"]
    (_, first), (_, same), (_, last) = taken
    assert [name for name, _ in taken] == ["late", "early", "late"]
    assert same == replace(first, variant="same")  # to the seconds: trained once
    assert last == replace(first, extra={"kept": 2})


def test_what_was_looked_at_is_told_with_its_spread(plan: Plan) -> None:
    variant = Variant("tiny", tiny("deepseek-moe-16b"), BalanceConfig())
    results = [one(variant, seed, plan, look.at_domains) for seed in (0, 1)]
    told = picture.looked_table(results)
    mean = sum(each.extra["divergence"] for each in results) / 2
    assert f"| divergence | {mean:.4g} ± " in told
    assert "| specialists, en |" in told
    picture.dots(results)


@torch.inference_mode()
def test_masking_leaves_out_the_best_and_nothing_else() -> None:
    model = Transformer(tiny("deepseek-moe-16b"))
    model.init_weights(torch.Generator().manual_seed(0))
    model.eval()
    assert model.config.moe is not None
    experts = model.config.moe.n_routed_experts
    ids_T = torch.arange(40)
    ends = torch.tensor([0, 40], dtype=torch.int32)
    batch = Batch(ids_T=ids_T, positions_T=ids_T, cu_seqlens_S1=ends, max_seqlen=40)
    plain = model(batch)
    with look.without_best(model, 0.0):
        same = model(batch)
    with look.without_best(model, 2 / experts):
        masked = model(batch)
    assert torch.equal(model(batch).hidden_TD, plain.hidden_TD)  # the gates are back
    for ours, theirs in zip(same.routing, plain.routing, strict=True):
        assert torch.equal(ours.experts_TK.sort(-1).values, theirs.experts_TK.sort(-1).values)
    first = plain.routing[0].experts_TK[:, :2]  # its input is the same, so its best are
    assert not (masked.routing[0].experts_TK.unsqueeze(-1) == first.unsqueeze(-2)).any()
