"""GGUF, out: llama.cpp itself reads what was written, and says what our engine says.

Models of every architecture are trained here for some seconds, for the answers of random weights are ties.
llama.cpp comes as xllamacpp, which is llama.cpp built into a wheel.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import gguf
import httpx
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shoal.batch import Batch
from shoal.checkpoint import hf
from shoal.checkpoint.gguf import OF_A_LAYER, WHOLE, export
from shoal.checkpoint.gguf_tokenizer import read_tokenizer
from shoal.config.families import tiny
from shoal.config.model import GQAConfig, MLAConfig, ModelConfig, RopeConfig, YarnScaling
from shoal.data.text import Tokenizer
from shoal.data.tokenizer import train_tokenizer
from shoal.engine.engine import Engine, EngineSettings
from shoal.engine.sequence import SamplingParams
from shoal.model.transformer import Transformer

llama_cpp: Any = import_module("xllamacpp")  # compiled, without types
SOURCE = Path(argparse.__file__).read_text("utf-8")[2000:2800]
LETTERS = "".join(map(chr, range(32, 127)))
FAMILIES = [  # of each the architecture that llama.cpp has for it
    ("deepseek-v3", "deepseek2"),
    pytest.param("deepseek-v2-lite", "deepseek2", marks=pytest.mark.slow),  # 27 layers to train
    ("deepseek-moe-16b", "deepseek"),
    ("r1-distill-llama-8b", "llama"),
    ("r1-distill-qwen-1.5b", "qwen2"),
]
PROMPTS = (SOURCE[100:160], SOURCE[:300], "    def __init__(self", "# 2024 年 ")
LENGTH = 24  # tokens of each answer; the second prompt reaches beyond the 64 positions that YaRN stretches

Folders = Callable[[str], Path]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Checkpoints of tiny models that know a module of the standard library a little."""
    root = tmp_path_factory.mktemp("trained")

    @cache
    def make(family: str) -> Path:
        tokenizer = train_tokenizer([SOURCE, LETTERS], 320)
        tokenizer.save(root / f"{family}-tokenizer")
        config = replace(
            tiny(family), vocab_size=320, bos_token_id=0, eos_token_id=1, num_nextn_predict_layers=0
        )
        if (
            family == "deepseek-v2-lite"
        ):  # llama.cpp knows it by its 27 layers; most are dense here, to be quick
            assert config.moe is not None
            moe = replace(config.moe, first_k_dense_replace=25)
            config = replace(config, num_hidden_layers=27, moe=moe)
        model = train(config, tokenizer.encode(SOURCE))
        files = [root / f"{family}-tokenizer" / name for name in ("tokenizer.json", "tokenizer_config.json")]
        hf.save(model, root / family, tokenizer_files=files)
        return root / family

    return make


def train(config: ModelConfig, ids: list[int], steps: int = 100, length: int = 64) -> Transformer:
    """A real, small training: rows of the text, Adam, a step rule that leaves the routers' biases uneven."""
    model = Transformer(config)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    ids_T = torch.tensor(ids)
    for step in range(steps):
        starts = torch.randint(len(ids) - length - 1, (4,), generator=generator).tolist()
        rows = [ids_T[start : start + length + 1] for start in starts]
        batch = Batch(
            ids_T=torch.cat([row[:-1] for row in rows]),
            positions_T=torch.arange(length).repeat(len(rows)),
            cu_seqlens_S1=torch.arange(len(rows) + 1, dtype=torch.int32) * length,
            max_seqlen=length,
        )
        out = model(batch)
        loss = F.cross_entropy(model.logits(out.hidden_TD, batch), torch.cat([row[1:] for row in rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        for gate, routing in zip(model.gates(), out.routing, strict=True):
            if gate.e_score_correction_bias is not None:
                load_E = torch.bincount(routing.experts_TK.flatten(), minlength=gate.weight.shape[0]).float()
                gate.e_score_correction_bias += 0.01 * (load_E.mean() - load_E).sign()
    return model.eval()


def ours(model: Transformer, prompt: list[int]) -> tuple[list[int], list[float]]:
    params = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
    [answer] = Engine(model.eval(), EngineSettings(num_pages=32)).generate([prompt], params)
    return list(answer.ids), list(answer.logprobs)


class LlamaCpp:
    def __init__(self, file: Path) -> None:
        params = llama_cpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.warmup, params.n_gpu_layers = 256, 1, False, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.verbosity = 0
        self.server = llama_cpp.Server(params)

    def answer(self, prompt: list[int] | str) -> tuple[list[int], list[float]]:
        """The ids of a greedy answer and the log-probability of each."""
        fixed = {
            "temperature": 0,
            "n_predict": LENGTH,
            "ignore_eos": True,
            "logprobs": 1,
            "cache_prompt": False,
        }
        told: Any = self.server.handle_completions({"prompt": prompt, **fixed})
        tokens = told["choices"][0]["logprobs"]["content"]
        return [token["id"] for token in tokens], [token["logprob"] for token in tokens]


@pytest.mark.parametrize(("family", "architecture"), FAMILIES)
def test_llama_cpp_says_what_we_say(family: str, architecture: str, trained: Folders, tmp_path: Path) -> None:
    exported = export(trained(family), tmp_path / "out", "f16")
    assert exported.architecture == architecture
    llama, model, tokenizer = (
        LlamaCpp(exported.file),
        hf.load(trained(family)),
        Tokenizer.load(trained(family)),
    )
    for text in PROMPTS:
        ids = tokenizer.encode(text, bos=True)
        (tokens, logprobs), (expected, ours_logprobs) = llama.answer(ids), ours(model, ids)
        assert tokens == expected
        # Weights, keys and values of float16 are off by 2^-11 of themselves, so are logits of size 10 by some
        # 5e-3; with any part of the mathematics another one, these models differ by 0.1 and more.
        assert logprobs == pytest.approx(ours_logprobs, abs=2e-2)


@pytest.mark.parametrize("family", ["deepseek-v3", "deepseek-moe-16b"])
@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_quantised_it_says_what_the_rounded_weights_say(
    family: str, kind: Any, trained: Folders, tmp_path: Path
) -> None:
    exported = export(trained(family), tmp_path / "out", kind)
    assert exported.num_bytes < {"q8_0": 0.36, "q4_0": 0.32}[kind] * weight_bytes(trained(family))
    llama, tokenizer = LlamaCpp(exported.file), Tokenizer.load(trained(family))
    model = rounded(hf.load(trained(family)), exported.file)
    for text in PROMPTS:
        ids = tokenizer.encode(text, bos=True)
        (tokens, logprobs), (expected, best) = llama.answer(ids), ours(model, ids)
        scored = Engine(model, EngineSettings(num_pages=32)).score(ids + tokens)[-LENGTH:]
        # llama.cpp rounds what it multiplies by such weights to 8 bits, 1 part in 250, so logits are off by
        # some 1e-3; and now and then a router picks another expert for its last place, which moves by 0.2.
        away = np.abs(np.array(logprobs) - np.array(scored))
        assert np.median(away) < 0.01
        assert away.max() < 0.5
        parting = next(
            (at for at, pair in enumerate(zip(tokens, expected, strict=True)) if len({*pair}) > 1), None
        )
        if parting is not None:  # only ever between two tokens that are nearly as likely
            assert scored[parting] > best[parting] - 0.4


def weight_bytes(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


def rounded(model: Transformer, file: Path) -> Transformer:
    """Our model with the values that the file's weights stand for."""
    stored = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(file).tensors}
    state, attention = model.state_dict(), model.config.attention

    def put(parameter: str, value: np.ndarray[Any, Any]) -> None:
        state[parameter].copy_(torch.from_numpy(value.copy()).reshape(state[parameter].shape))

    for name in ("token_embd", "output", "output_norm"):
        put({v: k for k, v in WHOLE.items()}[f"{name}.weight"], stored[f"{name}.weight"])
    for layer in range(model.config.num_hidden_layers):
        ours_at, theirs_at = f"model.layers.{layer}", f"blk.{layer}"
        for ours_name, theirs_name in OF_A_LAYER.items():
            value = stored.get(f"{theirs_at}.{theirs_name}.weight")
            if value is None:
                continue
            if isinstance(attention, GQAConfig) and ours_name in ("self_attn.q_proj", "self_attn.k_proj"):
                half = attention.head_dim // 2  # pairs back to halves
                value = value.reshape(-1, half, 2, value.shape[-1]).swapaxes(1, 2)
            put(f"{ours_at}.{ours_name}.weight", value)
        if isinstance(attention, MLAConfig):
            keys, values = (stored[f"{theirs_at}.attn_{half}_b.weight"] for half in "kv")
            put(
                f"{ours_at}.self_attn.kv_b_proj.weight", np.concatenate((keys.swapaxes(1, 2), values), axis=1)
            )
        if f"{theirs_at}.ffn_gate_exps.weight" in stored:
            gate, up, down = (
                stored[f"{theirs_at}.ffn_{part}_exps.weight"] for part in ("gate", "up", "down")
            )
            put(f"{ours_at}.mlp.experts.gate_up_proj", np.concatenate((gate, up), axis=1))
            put(f"{ours_at}.mlp.experts.down_proj", down)
    return model


def test_llama_cpp_encodes_as_we_do(trained: Folders, tmp_path: Path) -> None:
    text = SOURCE + "你好 世界 12345 été 🙂 \t\r\n\n  x  =  'a'  \u3000—… naïve \uff12\uff14年 \uff0c\n   "
    llama = LlamaCpp(export(trained("deepseek-v3"), tmp_path / "out").file)
    asked = {"content": text, "parse_special": False}
    told = httpx.post(f"{llama.server.listening_address}/tokenize", json=asked, timeout=30).json()
    assert told["tokens"] == Tokenizer.load(trained("deepseek-v3")).encode(text)


def test_what_lies_in_the_folder(trained: Folders, tmp_path: Path) -> None:
    told: list[tuple[int, int, int]] = []
    exported = export(trained("deepseek-v3"), tmp_path / "mine", progress=lambda *args: told.append(args))
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["Modelfile", "mine-f16.gguf"]
    lines = (tmp_path / "mine" / "Modelfile").read_text("utf-8").splitlines()
    assert lines[:3] == [
        "FROM ./mine-f16.gguf",
        "PARAMETER num_ctx 2560",
        'PARAMETER stop "<｜end▁of▁sentence｜>"',
    ]
    assert lines[3].startswith('TEMPLATE """{{ .System }}')
    fields = gguf.GGUFReader(exported.file).fields
    assert fields["tokenizer.ggml.pre"].contents() == "deepseek-v3"
    assert fields["deepseek2.expert_group_used_count"].contents() == 2
    assert told[-1] == (len(told), len(told), exported.num_bytes)
    with pytest.raises(ValueError, match="is not empty"):
        export(trained("deepseek-v3"), tmp_path / "mine")
    export(trained("deepseek-v3"), tmp_path / "mine", "q8_0", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["Modelfile", "mine-q8_0.gguf"]


V3, MOE, LLAMA = tiny("deepseek-v3"), tiny("deepseek-moe-16b"), tiny("llama-3-8b")
YARN = YarnScaling(4.0, 64)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (tiny("deepseek-v2"), "ranks groups by their two best"),
        (tiny("deepseek-v2-lite"), "takes a model for one without query latents by its layers"),
        (tiny("deepseek-v3.2"), "a deepseek_v32 model is not written"),
        (tiny("mixtral-8x7b"), "a mixtral model is not written"),
        (tiny("deepseek-moe-2b-expert-choice"), "no routing by topk_method 'expert_choice'"),
        (tiny("deepseek-moe-2b-gshard"), "shared experts, but n_shared_experts is 0"),
        (replace(MOE, rope=RopeConfig(scaling=YARN)), "does not scale rotary angles"),
        (
            replace(V3, rope=RopeConfig(interleaved=True, scaling=YARN)),
            "mscale and mscale_all_dim to be equal",
        ),
        (replace(V3, rope=RopeConfig()), "rope_interleave is false"),
        (replace(LLAMA, attention=GQAConfig(4, 2, 16, qkv_bias=True, o_bias=True)), "no bias of q, k, v"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    config: ModelConfig, reason: str, tmp_path: Path
) -> None:
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    hf.save(model, tmp_path / "model")
    with pytest.raises(ValueError, match=reason):
        export(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_weight_beyond_float16_is_named(trained: Folders, tmp_path: Path) -> None:
    model = hf.load(trained("r1-distill-qwen-1.5b"))
    with torch.no_grad():
        model.head_weight()[3, 3] = 1e6
    files = [trained("r1-distill-qwen-1.5b") / name for name in ("tokenizer.json", "tokenizer_config.json")]
    hf.save(model, tmp_path / "model", tokenizer_files=files)
    with pytest.raises(ValueError, match=r"output\.weight has values beyond 65504"):
        export(tmp_path / "model", tmp_path / "out")


def test_rules_without_a_name_are_refused(trained: Folders, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((trained("deepseek-v3") / name).read_bytes())
    assert read_tokenizer(tmp_path, 320).pre == "deepseek-v3"
    with pytest.raises(ValueError, match="has 320 tokens, but the model has 300 rows"):
        read_tokenizer(tmp_path, 300)
    spec = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    spec["pre_tokenizer"]["pretokenizers"].pop(1)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    with pytest.raises(ValueError, match=r"rules that llama\.cpp has no name for"):
        read_tokenizer(tmp_path, 320)


TOKENIZERS = Path(__file__).parents[3] / "shared" / "data" / "deepseek" / "tokenizers"


@pytest.mark.skipif(not TOKENIZERS.exists(), reason="needs ../shared/data")
def test_published_tokenizers_are_known_by_their_rules(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_bytes((TOKENIZERS / "deepseek-llm.tokenizer.json").read_bytes())
    tokenizer = read_tokenizer(tmp_path, 102400)
    assert tokenizer.pre == "deepseek-coder"  # by its rules: V2's have a line of letters more
    assert (len(tokenizer.merges), tokenizer.tokens[100_000]) == (99_757, "<｜begin▁of▁sentence｜>")
    assert tokenizer.types[100_000:100_002] == [3, 3]  # BOS and EOS are control tokens
    assert tokenizer.types[-1] == 5  # rows of the embedding that no token has
