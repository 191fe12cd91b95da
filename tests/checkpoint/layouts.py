"""Tiny checkpoints to test on, and their bytes.

Where transformers has the family it makes them itself. DeepSeekMoE-16B, and V3 with its prediction module and
its float8, are written out here name by name, so that the name map is held against the published layout and
not against itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from shoal.checkpoint.fp8 import scale_shape

Tensors = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]
Fields = dict[str, Any]
Edit = Callable[[Tensors, Fields], object]
Made = Callable[..., Path]

VOCAB, HIDDEN, WIDTH, EXPERT_WIDTH, LAYERS, HEADS, EXPERTS = 64, 32, 48, 16, 3, 4, 4
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MLA = {"q_lora_rank": 12, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
DEEPSEEK = {
    "moe_intermediate_size": EXPERT_WIDTH,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
ORACLES: dict[str, Fields] = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": EXPERTS},
    "olmoe": {"num_experts": EXPERTS, "num_experts_per_tok": 2, "pad_token_id": 0},
    "qwen3_moe": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": EXPERT_WIDTH,
    },
    "deepseek_v2": DEEPSEEK
    | MLA
    | {"n_shared_experts": 2, "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
    "deepseek_v3": DEEPSEEK | MLA | {"n_shared_experts": 1, "n_group": 2, "topk_group": 2},
}
MOE_ORACLES = [family for family in ORACLES if family not in ("llama", "qwen2")]
DTYPES = [torch.float32, torch.bfloat16]


@torch.no_grad()
def make_oracle(family: str, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """A random model of transformers, no tensor of which is constant."""
    config = transformers.AutoConfig.for_model(family, **BASE | ORACLES[family])
    oracle = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in oracle.state_dict().items():
        tensor.normal_(1.0 if "norm" in name else 0.0, 0.1, generator=generator)
    for name, buffer in oracle.named_buffers():
        if name.endswith("e_score_correction_bias"):  # as published, and as from_pretrained keeps it
            buffer.data = buffer.float()
    return oracle.eval()


def v3_shapes() -> Shapes:
    """DeepSeek-V3 with its prediction module, layer 2 here, in sizes that leave ragged blocks of float8."""
    hidden, width, expert_width, vocab = 200, 296, 136, VOCAB
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(3):
        at = f"model.layers.{layer}."
        shapes |= {
            f"{at}input_layernorm.weight": (hidden,),
            f"{at}post_attention_layernorm.weight": (hidden,),
            f"{at}self_attn.q_a_proj.weight": (144, hidden),
            f"{at}self_attn.q_a_layernorm.weight": (144,),
            f"{at}self_attn.q_b_proj.weight": (4 * 40, 144),
            f"{at}self_attn.kv_a_proj_with_mqa.weight": (136, hidden),
            f"{at}self_attn.kv_a_layernorm.weight": (128,),
            f"{at}self_attn.kv_b_proj.weight": (4 * 56, 128),
            f"{at}self_attn.o_proj.weight": (hidden, 4 * 24),
        }
        if layer == 0:
            shapes |= mlp_shapes(f"{at}mlp", hidden, width)
            continue
        shapes |= {
            f"{at}mlp.gate.weight": (EXPERTS, hidden),
            f"{at}mlp.gate.e_score_correction_bias": (EXPERTS,),
        }
        for expert in range(EXPERTS):
            shapes |= mlp_shapes(f"{at}mlp.experts.{expert}", hidden, expert_width)
        shapes |= mlp_shapes(f"{at}mlp.shared_experts", hidden, expert_width)
    shapes |= {
        "model.layers.2.enorm.weight": (hidden,),
        "model.layers.2.hnorm.weight": (hidden,),
        "model.layers.2.eh_proj.weight": (hidden, 2 * hidden),
        "model.layers.2.shared_head.norm.weight": (hidden,),
        "model.layers.2.embed_tokens.weight": (vocab, hidden),
        "model.layers.2.shared_head.head.weight": (vocab, hidden),
    }
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


PUBLISHED = {
    "vocab_size": VOCAB,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": None,
    "max_position_embeddings": 64,
    "initializer_range": 0.02,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}
V3_CONFIG = PUBLISHED | {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 200,
    "intermediate_size": 296,
    "moe_intermediate_size": 136,
    "num_nextn_predict_layers": 1,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 144,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
DEEPSEEK_MOE_CONFIG = PUBLISHED | {
    "model_type": "deepseek",
    "architectures": ["DeepseekForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "moe_intermediate_size": EXPERT_WIDTH,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
}


def deepseek_moe_shapes() -> Shapes:
    shapes: Shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(2):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
        shapes |= {f"{at}self_attn.{x}_proj.weight": (HIDDEN, HIDDEN) for x in "qkvo"}
        if layer == 0:
            shapes |= mlp_shapes(f"{at}mlp", HIDDEN, WIDTH)
            continue
        shapes[f"{at}mlp.gate.weight"] = (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            shapes |= mlp_shapes(f"{at}mlp.experts.{expert}", HIDDEN, EXPERT_WIDTH)
        shapes |= mlp_shapes(f"{at}mlp.shared_experts", HIDDEN, 2 * EXPERT_WIDTH)
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def mlp_shapes(at: str, hidden: int, width: int) -> Shapes:
    return {
        f"{at}.gate_proj.weight": (width, hidden),
        f"{at}.up_proj.weight": (width, hidden),
        f"{at}.down_proj.weight": (hidden, width),
    }


def fill(shapes: Shapes) -> Tensors:
    """Random bfloat16, correction biases float32; a prediction module repeats the embedding and the head."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors = {name: x if name.endswith("correction_bias") else x.bfloat16() for name, x in tensors.items()}
    if "model.layers.2.embed_tokens.weight" in tensors:
        tensors["model.layers.2.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.2.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    return tensors


def quantise(tensors: Tensors) -> Tensors:
    """Projections of attention and feed-forward as float8 with scales, as DeepSeek publishes them."""
    quantised: Tensors = {}
    for name, weight in tensors.items():
        if not re.search(r"\.(self_attn|mlp)\..*proj(_with_mqa)?\.weight$", name):
            quantised[name] = weight
            continue
        scale = torch.empty(scale_shape(weight.shape, (128, 128)))
        codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        for row in range(scale.shape[0]):
            for column in range(scale.shape[1]):
                block = slice(row * 128, row * 128 + 128), slice(column * 128, column * 128 + 128)
                scale[row, column] = weight[block].float().abs().amax() / 448.0
                codes[block] = (weight[block].float() / scale[row, column]).to(torch.float8_e4m3fn)
        quantised |= {name: codes, f"{name}_scale_inv": scale}
    return quantised


def write(folder: Path, config: Fields, *files: Tensors) -> Path:
    """One file, or several without an index."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for number, tensors in enumerate(files):
        name = "model.safetensors" if len(files) == 1 else f"part-{number}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
    return folder


def read(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    return tensors


def assert_same(left: Tensors, right: Tensors) -> None:
    """Names, shapes, dtypes and bytes."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert (tensor.shape, tensor.dtype) == (right[name].shape, right[name].dtype), name
        assert torch.equal(tensor.view(torch.uint8), right[name].view(torch.uint8)), name


def change(folder: Path, target: Path, edit: Edit) -> Path:
    """A copy of a checkpoint after `edit` of its tensors and its config."""
    tensors, config = read(folder), json.loads((folder / "config.json").read_text())
    edit(tensors, config)
    return write(target, config, tensors)
