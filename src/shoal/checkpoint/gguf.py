"""GGUF, out: a checkpoint as llama.cpp, Ollama and LM Studio read it.

A model is one of llama.cpp's architectures or none: `deepseek2` (latent attention), `deepseek` (DeepSeekMoE's
shape), `llama` and `qwen2`. Tensors are renamed, experts stacked, `kv_b_proj` cut into the two halves of
absorbed attention, and rotary halves woven into pairs where llama.cpp turns pairs. The law: what llama.cpp
would compute otherwise is refused, with the reason; a file that is written answers as the checkpoint does, up
to the rounding of its weights.

The header is written first, then one piece after the other (an expert at a time), so no model is too large.
Norms, biases and routers stay float32; rows that are no whole blocks of 32 are float16; in `q4_0` the
embedding and the head are `q8_0`. The tokenizer is gguf_tokenizer.py's. Prediction modules are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from shoal.checkpoint.folder import replacing
from shoal.checkpoint.gguf_tokenizer import GgufTokenizer, modelfile, read_tokenizer
from shoal.checkpoint.hf import find_folder
from shoal.checkpoint.names import DOWN, EMBEDDING, GATE_UP, HEAD, Piece, published
from shoal.checkpoint.shards import Progress
from shoal.checkpoint.source import open_source
from shoal.config.model import GQAConfig, LinearScaling, Llama3Scaling, MLAConfig, ModelConfig, YarnScaling
from shoal.model.rope import inverse_frequencies

Kind = Literal["f16", "q8_0", "q4_0"]
ARCHITECTURES = {"deepseek": "deepseek", "llama": "llama", "qwen2": "qwen2"} | dict.fromkeys(
    ("deepseek_v2", "deepseek_v3"), "deepseek2"
)
LITE_LAYERS = (26, 27)  # by which llama.cpp knows V2-Lite and its kin, which have no query latent
BLOCK = 32  # elements of a row that one scale covers, in q8_0 and q4_0
MODELFILE = "Modelfile"
ROPE_FACTORS = "rope_freqs.weight"

WHOLE = {EMBEDDING: "token_embd.weight", HEAD: "output.weight", "model.norm.weight": "output_norm.weight"}
OF_A_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}


@dataclass(frozen=True)
class Exported:
    """What was written, and what a reader of the file should know."""

    file: Path
    architecture: str
    num_bytes: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file: `pieces` of the checkpoint, each changed, one after the other."""

    name: str
    shape: tuple[int, ...]  # rows last
    kind: str  # F32, F16, Q8_0, Q4_0
    pieces: tuple[Piece, ...]
    change: Callable[[Tensor], Tensor]


def export(
    path_or_id: str | Path,
    folder: str | Path,
    kind: Kind = "f16",
    *,
    download: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write `folder`/NAME-KIND.gguf and a Modelfile beside it, whole or not at all.

    ValueError names what llama.cpp cannot compute as we do: an architecture, a rule of routing or of rotary
    scaling, a tokenizer; or a weight that float16 cannot hold.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"--gguf is {kind!r}; known are {', '.join(get_args(Kind))}")
    library = _library()
    origin = find_folder(path_or_id, download=download)
    source = open_source(origin, mtp=False)
    config, state = source.model.config, source.model.state_dict()
    architecture = _architecture(config)
    tokenizer = read_tokenizer(origin, config.vocab_size)
    tensors = list(_tensors(config, state, kind))
    name = f"{Path(folder).name}-{kind}.gguf"
    with replacing(Path(folder), overwrite=overwrite, marker=MODELFILE) as new:
        with closing(library.GGUFWriter(new / name, architecture)) as writer:
            _describe(writer, library, config, kind, Path(folder).name)
            _add_tokenizer(writer, tokenizer)
            num_bytes = _write(writer, library, config, tensors, source.parts(), progress)
        text = modelfile(name, tokenizer, config.max_position_embeddings)
        (new / MODELFILE).write_text(text, encoding="utf-8")
    return Exported(Path(folder) / name, architecture, num_bytes, tuple(_notes(config, tensors, kind)))


def _write(
    writer: Any,
    library: Any,
    config: ModelConfig,
    tensors: list[_Tensor],
    read: Callable[[Piece], Tensor],
    progress: Progress | None,
) -> int:
    """The header, then the weights piece by piece; gives the bytes of the weights."""
    for tensor in tensors:
        _announce(writer, library, tensor)
    factors = _llama3_factors(config) if isinstance(config.rope.scaling, Llama3Scaling) else None
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    [file] = writer.fout
    writer.write_padding(file, file.tell())
    done = 0
    for number, tensor in enumerate(tensors, start=1):
        size = 0
        for piece in tensor.pieces:
            size += file.write(_encode(library, tensor, tensor.change(read(piece).float())).tobytes())
        writer.write_padding(file, size)
        done += size
        if progress is not None:
            progress(number, len(tensors), done)
    if factors is not None:
        writer.write_padding(file, file.write(factors.tobytes()))
    return done


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ValueError("writing GGUF needs the gguf library: pip install 'shoal[gguf]'") from error
    return gguf


# --------------------------------------------------------------------------------------------------
# What llama.cpp can compute


def _architecture(config: ModelConfig) -> str:
    known = ", ".join(ARCHITECTURES)
    if config.model_type not in ARCHITECTURES:
        raise ValueError(f"a {config.model_type} model is not written to GGUF; those that are: {known}")
    for reason in _obstacles(config):
        raise ValueError(f"llama.cpp computes another model than this one: {reason}")
    return ARCHITECTURES[config.model_type]


def _obstacles(config: ModelConfig) -> Iterator[str]:
    moe, attention, scaling = config.moe, config.attention, config.rope.scaling
    if config.model_type.startswith("deepseek") and moe is None:
        yield "its DeepSeek architectures have routed experts, and this model has none"
    if moe is not None:
        if moe.moe_layer_freq != 1:
            yield f"it routes every layer after the dense ones, but moe_layer_freq is {moe.moe_layer_freq}"
        if moe.topk_method == "group_limited_greedy" and moe.n_group > 1:
            yield "it ranks groups by their two best experts, but group_limited_greedy by the best one"
        elif moe.topk_method not in ("greedy", "group_limited_greedy", "noaux_tc"):
            yield f"it has no routing by topk_method {moe.topk_method!r}"
        if moe.n_shared_experts == 0:
            yield "its DeepSeek architectures have shared experts, but n_shared_experts is 0"
        if moe.noisy_gate:
            yield "it has no weights of a router's noise, which noisy_gate keeps"
        if moe.eval_capacity_factor is not None:
            yield f"it drops no token, but eval_capacity_factor is {moe.eval_capacity_factor}"
        if config.model_type == "deepseek" and (moe.norm_topk_prob or moe.n_group > 1):
            yield "its architecture 'deepseek' has neither norm_topk_prob nor groups"
        if config.model_type == "deepseek" and moe.topk_method != "greedy":
            yield f"its architecture 'deepseek' routes greedily, but topk_method is {moe.topk_method!r}"
    if isinstance(attention, MLAConfig):
        if attention.attention_bias:
            yield "its latent attention has no bias, but attention_bias is true"
        if (attention.q_lora_rank is None) != (config.num_hidden_layers in LITE_LAYERS):
            yield (
                f"it takes a model for one without query latents by its layers, {LITE_LAYERS[0]} or "
                f"{LITE_LAYERS[1]}; this one has {config.num_hidden_layers}, and q_lora_rank is "
                f"{attention.q_lora_rank}"
            )
        if not config.rope.interleaved:
            yield "it turns pairs of neighbours, but rope_interleave is false"
        if isinstance(scaling, LinearScaling | Llama3Scaling):
            yield "its latent attention scales by YaRN alone"
        if isinstance(scaling, YarnScaling) and (
            not scaling.mscale_all_dim or scaling.mscale != scaling.mscale_all_dim
        ):
            yield (
                f"it takes mscale and mscale_all_dim to be equal, but they are {scaling.mscale} and "
                f"{scaling.mscale_all_dim}"
            )
    elif isinstance(attention, GQAConfig):
        wanted = ARCHITECTURES[config.model_type] == "qwen2"
        if attention.qkv_bias != wanted or attention.o_bias or attention.qk_norm is not None:
            yield f"its {config.model_type} has {'a' if wanted else 'no'} bias of q, k, v, and nothing else"
        if config.model_type == "deepseek" and scaling is not None:
            yield "its architecture 'deepseek' does not scale rotary angles"
        if isinstance(scaling, YarnScaling) and (scaling.attention_factor or scaling.mscale_all_dim):
            yield "its YaRN takes the attention factor from the factor alone"


def _notes(config: ModelConfig, tensors: list[_Tensor], kind: str) -> Iterator[str]:
    if isinstance(config.attention, MLAConfig) and config.rms_norm_eps != 1e-6:
        yield f"llama.cpp norms latents with rms_norm_eps {config.rms_norm_eps}, this model with 1e-06"
    uneven = [tensor.name for tensor in tensors if tensor.kind == "F16" and kind != "f16"]
    if uneven:
        yield f"{len(uneven)} tensors are f16: their rows are no whole blocks of {BLOCK} ({uneven[0]} ...)"


def _describe(writer: Any, library: Any, config: ModelConfig, kind: str, name: str) -> None:
    """The keys that llama.cpp builds the graph from."""
    attention, moe, rope = config.attention, config.moe, config.rope
    types = library.LlamaFileType
    file_types = {"f16": types.MOSTLY_F16, "q8_0": types.MOSTLY_Q8_0, "q4_0": types.MOSTLY_Q4_0}
    writer.add_name(name)
    writer.add_file_type(file_types[kind])
    writer.add_quantization_version(library.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_head_count(attention.num_attention_heads)
    writer.add_rope_freq_base(rope.theta)
    writer.add_rope_dimension_count(attention.rope_dim)
    if isinstance(attention, MLAConfig):  # one head of keys: the latent and the rotated key
        writer.add_head_count_kv(1)
        if attention.q_lora_rank is not None:
            writer.add_q_lora_rank(attention.q_lora_rank)
        writer.add_kv_lora_rank(attention.kv_lora_rank)
        writer.add_key_length(attention.latent_dim)
        writer.add_value_length(attention.kv_lora_rank)
        writer.add_key_length_mla(attention.qk_head_dim)
        writer.add_value_length_mla(attention.v_head_dim)
    elif isinstance(attention, GQAConfig):
        writer.add_head_count_kv(attention.num_key_value_heads)
        writer.add_key_length(attention.head_dim)
        writer.add_value_length(attention.head_dim)
    if moe is not None:
        gates = library.ExpertGatingFuncType
        writer.add_leading_dense_block_count(moe.first_k_dense_replace)
        writer.add_expert_count(moe.n_routed_experts)
        writer.add_expert_used_count(moe.num_experts_per_tok)
        writer.add_expert_shared_count(moe.n_shared_experts)
        writer.add_expert_feed_forward_length(moe.moe_intermediate_size)
        writer.add_expert_weights_scale(moe.routed_scaling_factor)
        writer.add_expert_weights_norm(moe.norm_topk_prob)
        writer.add_expert_gating_func(gates.SIGMOID if moe.scoring_func == "sigmoid" else gates.SOFTMAX)
        if moe.n_group > 1:
            writer.add_expert_group_count(moe.n_group)
            writer.add_expert_group_used_count(moe.topk_group)
    match rope.scaling:
        case YarnScaling() as yarn:
            writer.add_rope_scaling_type(library.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(yarn.factor)
            writer.add_rope_scaling_orig_ctx_len(yarn.original_max_position_embeddings)
            writer.add_rope_scaling_yarn_beta_fast(yarn.beta_fast)
            writer.add_rope_scaling_yarn_beta_slow(yarn.beta_slow)
            if yarn.mscale_all_dim:  # a tenth of it, which llama.cpp undoes for these models
                writer.add_rope_scaling_yarn_log_mul(0.1 * yarn.mscale_all_dim)
        case LinearScaling(factor):
            writer.add_rope_scaling_type(library.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(factor)
        case _:
            writer.add_rope_scaling_type(library.RopeScalingType.NONE)


def _llama3_factors(config: ModelConfig) -> np.ndarray[Any, np.dtype[np.float32]]:
    """By how much Llama 3.1's rule divides each frequency."""
    rope, dim = config.rope, config.attention.rope_dim
    plain = [rope.theta ** (-2 * pair / dim) for pair in range(dim // 2)]
    return np.array(plain, np.float32) / np.array(inverse_frequencies(rope, dim), np.float32)


def _add_tokenizer(writer: Any, tokenizer: GgufTokenizer) -> None:
    writer.add_tokenizer_model("gpt2")  # GGUF's word for byte-level BPE
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.types)
    writer.add_token_merges(tokenizer.merges)
    writer.add_add_bos_token(tokenizer.adds_bos)
    writer.add_add_eos_token(False)
    for token, add in (
        (tokenizer.bos_id, writer.add_bos_token_id),
        (tokenizer.eos_id, writer.add_eos_token_id),
        (tokenizer.pad_id, writer.add_pad_token_id),
    ):
        if token is not None:
            add(token)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


# --------------------------------------------------------------------------------------------------
# Tensors


def _tensors(config: ModelConfig, state: dict[str, Tensor], kind: Kind) -> Iterator[_Tensor]:
    """In the order of the parameters, so that shards are read once through."""
    pieces: dict[str, list[Piece]] = {}
    for piece in published(config, state):
        if piece.role == "own":
            pieces.setdefault(piece.parameter, []).append(piece)
    for parameter, parts in pieces.items():
        shape = tuple(state[parameter].shape)
        for name, size, which, change in _renamed(config, parameter, shape, parts):
            yield _Tensor(name, size, _kind(parameter, size, kind), tuple(which), change)


def _renamed(
    config: ModelConfig, parameter: str, shape: tuple[int, ...], parts: list[Piece]
) -> Iterator[tuple[str, tuple[int, ...], list[Piece], Callable[[Tensor], Tensor]]]:
    """What becomes of a parameter: names, shapes, pieces, and what is done to each."""
    if parameter in WHOLE:
        yield WHOLE[parameter], shape, parts, _same
        return
    _, _, layer, rest = parameter.split(".", 3)
    block, attention = f"blk.{layer}", config.attention
    if parameter.endswith(GATE_UP):
        half = (shape[0], shape[1] // 2, shape[2])
        for number, name in enumerate(("ffn_gate_exps", "ffn_up_exps")):
            yield f"{block}.{name}.weight", half, [part for part in parts if part.half == number], _same
    elif parameter.endswith(DOWN):
        yield f"{block}.ffn_down_exps.weight", shape, parts, _same
    elif rest == "mlp.gate.e_score_correction_bias":
        yield f"{block}.exp_probs_b.bias", shape, parts, _same
    elif rest == "self_attn.kv_b_proj.weight":
        assert isinstance(attention, MLAConfig)
        heads, nope, value = attention.num_attention_heads, attention.qk_nope_head_dim, attention.v_head_dim
        rank = attention.kv_lora_rank

        def keys(weight: Tensor) -> Tensor:
            return weight.view(heads, nope + value, rank)[:, :nope].transpose(1, 2)

        def values(weight: Tensor) -> Tensor:
            return weight.view(heads, nope + value, rank)[:, nope:]

        yield f"{block}.attn_k_b.weight", (heads, rank, nope), parts, keys
        yield f"{block}.attn_v_b.weight", (heads, value, rank), parts, values
    else:
        module, _, what = rest.rpartition(".")
        change = _same
        if (
            module in ("self_attn.q_proj", "self_attn.k_proj")
            and isinstance(attention, GQAConfig)
            and ARCHITECTURES[config.model_type] != "qwen2"
        ):
            change = _pair_halves(attention.head_dim)
        yield f"{block}.{OF_A_LAYER[module]}.{what}", shape, parts, change


def _same(weight: Tensor) -> Tensor:
    return weight


def _pair_halves(head_dim: int) -> Callable[[Tensor], Tensor]:
    """Rows of each head from two halves to pairs, as llama.cpp turns them in these architectures."""
    return lambda weight: weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def _kind(parameter: str, shape: tuple[int, ...], kind: Kind) -> str:
    if len(shape) == 1 or parameter.endswith(".mlp.gate.weight"):
        return "F32"
    if kind != "f16" and shape[-1] % BLOCK:
        return "F16"
    return "Q8_0" if kind == "q4_0" and parameter in (EMBEDDING, HEAD) else kind.upper()


def _announce(writer: Any, library: Any, tensor: _Tensor) -> None:
    if tensor.kind in ("F32", "F16"):
        dtype = np.dtype(np.float32 if tensor.kind == "F32" else np.float16)
        size = int(np.prod(tensor.shape)) * dtype.itemsize
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, size)
    else:
        kind = library.GGMLQuantizationType[tensor.kind]
        in_bytes = library.quant_shape_to_byte_shape(tensor.shape, kind)
        size = int(np.prod(in_bytes))
        writer.add_tensor_info(tensor.name, in_bytes, np.dtype(np.uint8), size, raw_dtype=kind)


def _encode(library: Any, tensor: _Tensor, weight: Tensor) -> np.ndarray[Any, Any]:
    array = weight.contiguous().numpy()
    if tensor.kind == "F32":
        return array
    if tensor.kind == "F16":
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        if not np.isfinite(half).all():
            most = float(torch.finfo(torch.float16).max)
            raise ValueError(f"{tensor.name} has values beyond {most:.0f}, more than float16 holds; use q8_0")
        return half
    return library.quants.quantize(array, library.GGMLQuantizationType[tensor.kind])
