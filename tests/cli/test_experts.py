"""`shoal experts`, `inspect` and `plan` as commands: what they write, and that a mistake is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shoal.checkpoint import hf
from tests.cli.conftest import Shoal, refusal
from tests.tiny_checkpoint import TEXT


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.py"
    file.write_text(TEXT)
    return file


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_score_extract_graft_is_the_checkpoint_again(
    shoal: Shoal, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    scores, cut, whole = (tmp_path / name for name in ("scores.json", "pack", "whole"))
    told = json.loads(shoal("experts", "score", checkpoint, "--text", text, "--out", scores, "--json").out)
    assert json.loads(scores.read_text()) == told
    for kind in ("gate_scores", "token_scores"):
        assert all(sum(row.values()) == pytest.approx(1.0) for row in told[kind].values())
    made = shoal("experts", "extract", checkpoint, cut, "--scores", scores, "--share", "0.5", "--json")
    count = json.loads(made.out)["experts"]
    assert 0 < count < sum(map(len, told["token_scores"].values()))
    put = shoal("experts", "graft", checkpoint, cut, whole, "--text", text, "--json")
    result = json.loads(put.out)
    assert result["before"] == result["after"]
    assert equal(whole, checkpoint)
    assert (whole / "tokenizer.json").exists()


def test_prune_and_merge_report_what_they_cost(
    shoal: Shoal, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    moe = hf.load(checkpoint).config.moe
    assert moe is not None
    keep = moe.n_routed_experts // 2
    pruned = shoal(
        "experts", "prune", checkpoint, tmp_path / "half", "--keep", keep, "--text", text, "--json"
    )
    told = json.loads(pruned.out)
    assert told["after"]["text"] != told["before"]["text"]
    model = hf.load(tmp_path / "half")
    assert model.config.moe is not None
    assert model.config.moe.n_routed_experts == keep
    assert model.config.num_nextn_predict_layers == 0

    for by in ("average", "score"):
        out = tmp_path / by
        merged = shoal("experts", "merge", checkpoint, checkpoint, out, "--by", by, "--text", text, "--json")
        told = json.loads(merged.out)
        assert told["before"] == told["after"]
        assert equal(out, checkpoint)


def test_place_reads_scores_and_tells_its_balance(
    shoal: Shoal, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    scores = tmp_path / "scores.json"
    shoal("experts", "score", checkpoint, "--text", text, "--out", scores)
    told = json.loads(shoal("experts", "place", scores, "--gpus", "4", "--slots", "32", "--json").out)
    for layer in told["layers"].values():
        assert len(layer["gpus"]) == 4
        assert 0 < layer["balance"] <= 1 + 1e-9
        assert layer["over_bound"] >= 1 - 1e-9
    assert told["policy"] == "global"
    assert "balance" not in shoal("experts", "place", scores, "--gpus", "4").err


def test_inspect_writes_a_page_and_the_same_as_json(
    shoal: Shoal, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    other, page = tmp_path / "other.txt", tmp_path / "page.html"
    other.write_text("The sea, the sea. " * 50)
    arguments = ("--text", f"code={text}", "--text", f"en={other}", "--out", page, "--sample", "20")
    told = json.loads(shoal("inspect", checkpoint, *arguments, "--json").out)
    assert told == json.loads(page.with_suffix(".json").read_text())
    assert set(told["domains"]) == {"code", "en"}
    moe = hf.load(checkpoint).config.moe
    assert moe is not None
    for one in told["domains"].values():
        assert all(sum(row) == one["tokens"] * moe.num_experts_per_tok for row in one["load"])
    assert page.read_text().count('<button class="token"') == 40
    placed = json.loads(shoal("experts", "place", page.with_suffix(".json"), "--gpus", "2", "--json").out)
    assert list(placed["layers"]) == [str(block) for block in told["blocks"]]


def test_plan_for_gpus_keeps_the_old_keys_and_adds_its_own(shoal: Shoal, tmp_path: Path) -> None:
    plain = json.loads(shoal("plan", "deepseek-v2-lite", "--json").out)
    picture = tmp_path / "plan.png"
    arguments = ("--gpu", "h200", "--batch", "32", "--tokens", "1e12", "--plot", picture, "--json")
    told = json.loads(shoal("plan", "deepseek-v2-lite", *arguments).out)
    assert plain.items() <= told.items()
    assert "serving" not in plain
    assert told["hardware"]["count"] == 1
    assert 1e3 * told["serving"]["point"]["floor_s"] == pytest.approx(6.77, rel=1e-3)
    assert told["training"]["tokens"] == 1e12
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "a decoding step" in shoal("plan", "deepseek-v3", "--gpu", "h200", "--weights", "fp8").out
    small = shoal("plan", "deepseek-v3", "--gpu", "h200", "--count", "1").out
    assert "no: more GPUs" in small


def test_plan_compares_and_recomputes(shoal: Shoal) -> None:
    models = ("deepseek-v3", "deepseek-v2", "llama-3-70b", "mixtral-8x7b")
    told = json.loads(shoal("plan", "compare", *models, "--json").out)
    assert [row["model"] for row in told["models"]] == list(models)
    assert told["models"][0]["kv_bytes_at_128k"] == 70_272 * 131_072
    assert all(row["dollars_per_million"] > 0 for row in told["models"])
    published = json.loads(shoal("plan", "published", "--json").out)
    assert {row["reproduced"] for row in published} == {True, False}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("plan", "deepseek-v3", "--gpu", "h2000"), "h200"),
        (("plan", "deepseek-v3", "deepseek-v2"), "compare"),
        (("plan", "compare"), "compare needs models"),
        (("plan", "deepseek-v3", "--gpu", "h200", "--price", "0"), "--price"),
        (("experts", "extract", "{model}", "{out}"), "say which experts"),
        (("experts", "extract", "{model}", "{out}", "--experts", "1-2"), "1:12,40"),
        (("experts", "extract", "{model}", "{out}", "--experts", "1:999"), "no expert 999"),
        (("experts", "prune", "{model}", "{out}", "--keep", "4"), "--text"),
        (("experts", "graft", "{model}", "{model}", "{out}"), "manifest.json"),
        (("experts", "place", "{model}/config.json"), "token_scores"),
        (("inspect", "{model}", "--text", "=x"), "NAME=FILES"),
        (("inspect", "{model}", "--text", "{text}", "--sample", "0"), "--sample"),
    ],
)
def test_a_mistake_is_one_line(
    shoal: Shoal, checkpoint: Path, text: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    places = {"model": checkpoint, "out": tmp_path / "out", "text": text}
    result = shoal(*(each.format(**places) for each in arguments))
    assert words in refusal(result)
    assert not (tmp_path / "out").exists()
