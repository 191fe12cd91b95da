"""Laws of measured plans: kept whole, found by machine, shape and bucket, and never in the way of a call."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shoal.ops.triton import expert_plan, expert_tuning, plans

GPU = torch.cuda.is_available()
MACHINE = plans.Machine("NVIDIA H200", 132, "2.11.0", "3.6.0")
V2_LITE = expert_tuning.Shape(64, 6, 2048, 1408)
TABLE: plans.Plans = {"op E1": {"64": {"a": 1}, "256": {"a": 2}}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    yield tmp_path / "plans"
    plans.tables.cache_clear()
    expert_plan.find_plan.cache_clear()


def test_what_is_written_is_read_and_added_to(own_cache: Path) -> None:
    assert plans.user_folder() == own_cache
    assert plans.read(own_cache, MACHINE) == {}
    path = plans.write(own_cache, MACHINE, TABLE)
    assert plans.read(own_cache, MACHINE) == TABLE
    plans.write(own_cache, MACHINE, {"op E1": {"64": {"a": 3}}, "op E2": {"64": {"a": 4}}})
    assert plans.read(own_cache, MACHINE) == {
        "op E1": {"64": {"a": 3}, "256": {"a": 2}},
        "op E2": {"64": {"a": 4}},
    }
    assert list(own_cache.iterdir()) == [path]  # no temporary file is left


def test_a_failed_write_leaves_the_old_table(own_cache: Path) -> None:
    plans.write(own_cache, MACHINE, TABLE)
    with pytest.raises(TypeError):
        plans.write(own_cache, MACHINE, {"op E1": {"64": {"a": object()}}})
    assert plans.read(own_cache, MACHINE) == TABLE
    assert len(list(own_cache.iterdir())) == 1


@pytest.mark.parametrize(
    "other", [{"gpu": "NVIDIA H100"}, {"multiprocessors": 114}, {"torch": "2.12.0"}, {"triton": "3.7.0"}]
)
def test_another_machine_has_another_table(own_cache: Path, other: dict[str, str | int]) -> None:
    plans.write(own_cache, MACHINE, TABLE)
    assert plans.read(own_cache, replace(MACHINE, **other)) == {}  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"machine": {}}',
        '{"machine": MACHINE}',
        '{"machine": MACHINE, "plans": 3}',
        '{"machine": MACHINE, "plans": {"op E1": {"many": {}}}}',
        '{"machine": MACHINE, "plans": {"op E1": {"64": 7}}}',
    ],
)
def test_a_broken_table_is_left_alone_with_a_warning(own_cache: Path, text: str) -> None:
    path = plans.write(own_cache, MACHINE, TABLE)
    broken = text.replace("MACHINE", json.dumps(MACHINE.__dict__))
    path.write_text(broken)
    with pytest.warns(UserWarning, match="is left alone, since"):
        assert plans.read(own_cache, MACHINE) == {}
    assert path.read_text() == broken


def test_the_smallest_bucket_that_holds_a_size_serves_it() -> None:
    user: plans.Plans = {"op E1": {"128": {"a": 9}}}
    assert plans.find((TABLE,), "op E1", 1) == {"a": 1}
    assert plans.find((TABLE,), "op E1", 64) == {"a": 1}
    assert plans.find((TABLE,), "op E1", 65) == {"a": 2}
    assert plans.find((TABLE,), "op E1", 257) is None
    assert plans.find((TABLE,), "op E3", 1) is None
    assert plans.find((user, TABLE), "op E1", 100) == {"a": 9}
    assert plans.find((user, TABLE), "op E1", 200) == {"a": 2}  # the user's table has no bucket so large


def test_the_fields_of_a_plan_come_back() -> None:
    for bucket in expert_plan.BUCKETS:
        heuristic, *others = expert_tuning.candidates(bucket, V2_LITE)
        for plan in (heuristic, *others):
            fields = json.loads(json.dumps(expert_plan.plan_fields(plan)))
            assert expert_plan.with_fields(heuristic, fields) == plan


@pytest.mark.parametrize("change", [{"kind": "fast"}, {"rows": 48}, {"gate_up": {}}, {"kind": "scan"}])
def test_fields_that_fit_no_kernel_are_refused(change: dict[str, object]) -> None:
    plan = expert_plan.choose_plan(1024, 64, 2048, torch.bfloat16, tma=True, training=False)
    with pytest.raises(ValueError, match="plan"):
        expert_plan.with_fields(plan, expert_plan.plan_fields(plan) | change)


def test_candidates_keep_the_laws_of_the_kernels() -> None:
    """The heuristic is first; few choices are scanned, and only they; slots of a tile are the tiles' rows."""
    for bucket in expert_plan.BUCKETS:
        ways = list(expert_tuning.candidates(bucket, V2_LITE))
        sizes = (bucket, 64, 2048, torch.bfloat16)
        assert ways[0] == expert_plan.choose_plan(*sizes, tma=True, training=False)
        assert len(set(ways)) == len(ways) > 1
        for plan in ways:
            assert (plan.kind == "scan") == (bucket <= expert_plan.MAX_SCAN)
            assert plan.rows == plan.gate_up.bm == plan.down.bm


def test_every_shipped_table_holds_plans() -> None:
    for path in plans.SHIPPED.glob("*.json"):
        machine = plans.Machine(**json.loads(path.read_text())["machine"])
        assert path.name == machine.file_name
        for shape, buckets in plans.read(plans.SHIPPED, machine).items():
            assert shape.startswith("grouped_mlp bfloat16")
            for bucket, fields in buckets.items():
                assert int(bucket) in expert_plan.BUCKETS
                plan = expert_plan.choose_plan(
                    int(bucket), 64, 2048, torch.bfloat16, tma=True, training=False
                )
                expert_plan.with_fields(plan, fields)


# --------------------------------------------------------------------------------------------------
# On a GPU

on_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


@on_gpu
@pytest.mark.gpu
def test_tuning_keeps_its_budget_and_what_it_found_serves(own_cache: Path) -> None:
    shape, device = expert_tuning.Shape(8, 2, 512, 256), torch.device("cuda", 0)
    seen: list[float] = []
    found = expert_tuning.tune(shape, device, 3.0, lambda done, total, left: seen.append(left))
    assert {each.bucket for each in found} <= set(expert_plan.BUCKETS)
    assert found
    assert all(each.us <= each.heuristic_us for each in found)
    assert seen == sorted(seen, reverse=True)
    expert_tuning.keep(found, shape, device)
    for each in found:
        assert expert_plan.find_plan(0, each.bucket, 8, 512, 256, torch.bfloat16) == each.plan
    # A table that no kernel can follow is left alone.
    path = own_cache / plans.this_machine(0).file_name
    path.write_text(path.read_text().replace('"rows"', '"lines"'))
    plans.tables.cache_clear()
    expert_plan.find_plan.cache_clear()
    with pytest.warns(UserWarning, match="the heuristic serves"):
        expert_plan.find_plan(0, found[0].bucket, 8, 512, 256, torch.bfloat16)


@on_gpu
@pytest.mark.gpu
def test_nothing_compiles_after_the_buckets_are_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes between the buckets, odd ones and multiples of 16, find every kernel compiled."""
    from triton import knobs

    from shoal.ops import api as ops

    compiled: list[str] = []

    def note(**event: object) -> None:
        compiled.append(str(event["repr"]))

    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", note)
    D, E, K, F, V, H, C, R = 512, 16, 2, 256, 5000, 8, 64, 32
    weight = {"device": "cuda", "dtype": torch.bfloat16}
    norm_D, norm_C = torch.randn(D, **weight), torch.randn(C, **weight)
    gate_ED, head_VD = torch.randn(E, D, **weight), torch.randn(V, D, **weight)
    gate_up, down = torch.randn(E, 2 * F, D, **weight), torch.randn(E, D, F, **weight)
    latents, heads = torch.zeros(64, 64, C + R, **weight), torch.zeros(64, 64, 2, 2, R, **weight)

    @torch.inference_mode()
    def step(T: int) -> None:
        x_TD = torch.randn(T, D, **weight)
        cos_TR2, sin_TR2 = torch.randn(2, T, R // 2, device="cuda").unbind(0)
        slots_T = torch.arange(T, device="cuda")
        _, normal_TD = ops.add_rms_norm(x_TD, ops.rms_norm(x_TD, norm_D, 1e-6), norm_D, 1e-6)
        ops.swiglu(x_TD, normal_TD)
        routing = ops.route(ops.gate_logits(x_TD, gate_ED), K, scoring_func="softmax")
        ops.grouped_mlp(x_TD, routing.experts_TK, routing.weights_TK, gate_up, down)
        q_THR = torch.randn(T, H, 2 * R, **weight)[..., R:]
        kv_TL = torch.randn(T, C + R, **weight)
        angles, turn = (cos_TR2, sin_TR2), {"interleaved": True}
        ops.write_latent_cache(q_THR, kv_TL, norm_C, 1e-6, *angles, latents, slots_T, **turn)
        k_TGR, v_TGR = torch.randn(2, T, 2, R, **weight).unbind(0)
        ops.write_kv_cache(q_THR, k_TGR, v_TGR, *angles, heads, slots_T, **turn)
        logits_TV = torch.nn.functional.linear(x_TD, head_VD)
        ids_TN = torch.randint(0, V, (T, T), device="cuda")
        half, wide = torch.full((T,), 0.5, device="cuda"), torch.full((T,), 0.5, device="cuda").double()
        scores_TV = ops.penalise(logits_TV, ids_TN, slots_T, slots_T // 2, half, half, half)
        ops.sample(logits_TV, half, slots_T.int(), wide, half, wide, scores_SV=scores_TV)
        targets_T = ids_TN[:, 0].contiguous()
        ops.linear_cross_entropy(x_TD, head_VD, targets_T, half)

    for bucket in expert_plan.BUCKETS[:12]:
        step(bucket // K)
        step(bucket // K - 1)
    step(1)
    assert compiled  # the hook is heard
    compiled.clear()
    for T in (2, 3, 16, 17, 33, 63, 64, 65, 100, 128, 200, 257, 500, 1000):
        step(T)
    assert not compiled
