"""`config.json`, in and out: what transformers' model files say, as a ModelConfig, and back.

What differs between model types is a row of dialects.py; here is what they share: the keys, rotary embedding,
dtype and quantisation. Files of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and 5
(`rope_parameters`, `dtype`) are read; the layout of 5 is written, but for `deepseek`, which is older.

The law: no key is passed over. Each is read, or carries no architecture (IGNORED), or holds the value that we
compute with, or is refused by name. And what `to_hf` writes reads back equal, or it refuses to write.

What is left to others: files and weights (checkpoint/hf.py), whether sizes fit each other (model.py).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, cast

from shoal.config.dialects import CAPACITY, CHANCE, DIALECTS, Dialect, Fields, Values
from shoal.config.model import (
    Fp8Blocks,
    LinearScaling,
    Llama3Scaling,
    MLAConfig,
    ModelConfig,
    RopeConfig,
    YarnScaling,
)

# Called the same in every dialect and in ModelConfig.
SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "rms_norm_eps",
    "max_position_embeddings",
    "tie_word_embeddings",
    "initializer_range",
    "bos_token_id",
)
# Read here, in every dialect.
TABLES = ("rope_scaling", "rope_parameters", "quantization_config")
COMMON = (*TABLES, "model_type", "rope_theta", "dtype", "torch_dtype")

# Keys without architecture: how a file was saved, how its model is trained, run or labelled.
SAVED = ("architectures", "auto_map", "transformers_version", "_name_or_path", "_attn_implementation_autoset")
TRAINED = ("aux_loss_alpha", "seq_aux", "router_aux_loss_coef", "pretraining_tp", "ep_size")
RUN = ("use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict")
LABELS = ("pad_token_id", "id2label", "label2id", "num_labels", "problem_type")
IGNORED = (*SAVED, *TRAINED, *RUN, *LABELS, "chunk_size_feed_forward", "max_window_layers")

# Other values than these would make it another computation, one that we do not do.
NEUTRAL: Values = {
    "hidden_act": ("silu",),
    "attention_dropout": (0, None),
    "mlp_bias": (False,),
    "is_encoder_decoder": (False,),
    "use_sliding_window": (False,),
    "sliding_window": (None,),
    "use_mrope": (False,),
    "partial_rotary_factor": (1, None),
    "clip_qkv": (None,),
    "decoder_sparse_step": (1,),
    "router_jitter_noise": (0,),
    "num_nextn_predict_layers": (0, None),
}
ALIASES = {  # names that some releases of transformers write
    "num_mtp_layers": ("num_nextn_predict_layers",),
    "num_experts": ("num_local_experts", "n_routed_experts"),
    "num_local_experts": ("num_experts", "n_routed_experts"),
}
UNSUPPORTED = {
    "deepseek_v4": "its attention shares compressed keys and values (compress_ratios, o_groups), its "
    "residual is hyper-connected (hc_mult), its gates are sqrtsoftplus or hashed (num_hash_layers), its "
    "SwiGLU is clamped (swiglu_limit) and its experts are FP4 (expert_dtype)",
}

# What a key holds, where it is not an integer; and what may be null although its default is not.
LISTED = ("layer_types", "mlp_layer_types")  # a word for each layer
NUMBER, FLAG, TEXT = ((int, float), "a number"), ((bool,), "true or false"), ((str,), "text")
KINDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(("rms_norm_eps", "initializer_range", "routed_scaling_factor", *CAPACITY), NUMBER),
    **dict.fromkeys(
        ("tie_word_embeddings", "attention_bias", "norm_topk_prob", "rope_interleave", *CHANCE), FLAG
    ),
    **dict.fromkeys(("topk_method", *LISTED), TEXT),
    **dict.fromkeys(TABLES, ((dict,), "a table")),
}
LISTS = ("mlp_only_layers", *LISTED)
OPTIONAL = ("bos_token_id", "eos_token_id", "num_key_value_heads", "q_lora_rank", "sliding_window")
NULLABLE = (*OPTIONAL, "n_routed_experts", "n_shared_experts", "n_group", "topk_group")


def from_hf(raw: Fields) -> ModelConfig:
    """The model a `config.json` tells of. ValueError names the key that cannot be honoured, and the fix."""
    dialect = _dialect(raw.get("model_type"))
    fields = _collect(raw, dialect)
    attention, moe = dialect.read(fields)
    latent, eos = isinstance(attention, MLAConfig), fields["eos_token_id"]
    return ModelConfig(
        model_type=raw["model_type"],
        **{key: fields[key] for key in SHARED},
        attention=attention,
        rope=_read_rope(raw, fields, dialect.rope_theta, latent),
        moe=moe,
        num_nextn_predict_layers=fields.get("num_nextn_predict_layers", 0),
        eos_token_id=tuple(cast(list[int], eos)) if isinstance(eos, list) else eos,
        dtype=_read_dtype(raw),
        quantization=_read_quantization(raw.get("quantization_config") or {}),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model, as transformers 5 reads it. ValueError where it cannot say it all."""
    dialect, eos = _dialect(config.model_type), config.eos_token_id
    raw = {
        "architectures": [dialect.architecture],
        "model_type": config.model_type,
        **{key: getattr(config, key) for key in SHARED},
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "hidden_act": "silu",
        **dialect.write(config),
        **_write_rope(config),
        "dtype": config.dtype,
        **_write_quantization(config.quantization),
    }
    try:
        reread = from_hf(raw)
    except ValueError as error:
        raise ValueError(f"no {config.model_type} config.json says this model: {error}") from None
    for field in dataclasses.fields(config):
        ours, theirs = getattr(config, field.name), getattr(reread, field.name)
        if ours != theirs:
            raise ValueError(
                f"a {config.model_type} config.json cannot say {field.name} = {ours}; "
                f"it would read back as {theirs}. Change it, or model_type"
            )
    return raw


def _dialect(model_type: Any) -> Dialect:
    if model_type in DIALECTS:
        return DIALECTS[model_type]
    reason = f": {UNSUPPORTED[model_type]}" if model_type in UNSUPPORTED else ""
    raise ValueError(f"model_type {model_type!r} is not supported{reason}. Known are {', '.join(DIALECTS)}")


# --------------------------------------------------------------------------------------------------
# Keys


def _collect(raw: Fields, dialect: Dialect) -> dict[str, Any]:
    """The dialect's keys, with defaults where the file has none; every other key is accounted for."""
    fields, given = dict(dialect.defaults), dict[str, str]()
    fixed = {**NEUTRAL, **dialect.fixed}
    for key, value in raw.items():
        name = (
            key if key in fields else next((known for known in ALIASES.get(key, ()) if known in fields), key)
        )
        if name in fields:
            _check_kind(key, value, nullable=name in NULLABLE or dialect.defaults[name] is None)
            if name in given and fields[name] != value:
                raise ValueError(f"{given[name]} is {fields[name]} but {key}, the same, is {value}; keep one")
            fields[name], given[name] = value, key
        elif key in fixed:
            _check_fixed(key, value, fixed[key])
        elif key in TABLES:
            _check_kind(key, value, nullable=True)
        elif key not in COMMON and key not in IGNORED:
            near = difflib.get_close_matches(key, (*fields, *fixed, *COMMON, *IGNORED), n=1, cutoff=0.0)[0]
            raise ValueError(
                f"unknown key {key!r} = {value!r} in config.json; nearest known is {near!r}. "
                f"If it shapes no computation, remove it"
            )
    return fields


def _check_kind(key: str, value: Any, *, nullable: bool) -> None:
    kinds, wanted = KINDS.get(key, ((int,), "an integer"))
    items = cast(list[Any], value) if isinstance(value, list) else [value]
    shaped = key == "eos_token_id" or isinstance(value, list) == (key in LISTS)
    if not (shaped and all(type(item) in kinds for item in items)) and not (nullable and value is None):
        also = f"{' in a list' * (key in LISTS)}{' or null' * nullable}"
        raise ValueError(f"{key} is {value!r} in config.json; it must be {wanted}{also}")


def _check_fixed(key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{key} is {value!r} in config.json; only {allowed[0]!r} is computed here")


def _agree(name: str, first: Any, second: Any, default: Any) -> Any:
    """The value that two keys for the same thing give, or the default where neither does."""
    if first is not None and second is not None and first != second:
        raise ValueError(f"config.json gives {name} twice, as {first!r} and {second!r}; keep one")
    given = second if first is None else first
    return default if given is None else given


def _read_dtype(raw: Fields) -> Any:
    dtype = str(_agree("dtype", raw.get("dtype"), raw.get("torch_dtype"), "float32")).removeprefix("torch.")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype is {dtype!r} in config.json; known are float32, bfloat16 and float16")
    return dtype


# --------------------------------------------------------------------------------------------------
# Rotary embedding

SCALINGS: Mapping[str, type[YarnScaling | Llama3Scaling | LinearScaling]] = {
    "yarn": YarnScaling,
    "llama3": Llama3Scaling,
    "linear": LinearScaling,
}


def _read_rope(raw: Fields, fields: Fields, theta: float, latent: bool) -> RopeConfig:
    layouts: list[Fields] = [raw[key] for key in ("rope_scaling", "rope_parameters") if raw.get(key)]
    if len(layouts) > 1:
        raise ValueError("config.json has both rope_scaling and rope_parameters; keep rope_parameters")
    given = {key: value for layout in layouts for key, value in layout.items() if value is not None}
    kind = _agree("rope_type", given.pop("rope_type", None), given.pop("type", None), "default")
    theta = _agree("rope_theta", raw.get("rope_theta"), given.pop("rope_theta", None), theta)
    for key, value in {"rope_theta": theta, **given}.items():
        if key != "truncate" and type(value) not in (int, float):
            raise ValueError(f"{key} of rope_type {kind!r} is {value!r} in config.json; it must be a number")
    for key, neutral in (("truncate", True), ("partial_rotary_factor", 1)):
        _check_fixed(key, given.pop(key, neutral), (neutral,))
    return RopeConfig(
        theta=float(theta),
        interleaved=latent and fields.get("rope_interleave", True),
        scaling=_read_scaling(kind, given, fields["max_position_embeddings"], latent),
    )


def _read_scaling(
    kind: str, given: dict[str, Any], context: int, latent: bool
) -> YarnScaling | Llama3Scaling | LinearScaling | None:
    if kind != "default" and kind not in SCALINGS:
        raise ValueError(f"rope_type {kind!r} is not supported; known are default, {', '.join(SCALINGS)}")
    known = [] if kind == "default" else [field.name for field in dataclasses.fields(SCALINGS[kind])]
    if strangers := sorted(given.keys() - known):
        raise ValueError(f"rope_type {kind!r} has no {strangers[0]}; known are {', '.join(known) or 'none'}")
    if kind == "default":
        return None
    if "factor" not in given:
        raise ValueError(f"rope_type {kind!r} needs a factor: how many times the context is stretched")
    if latent and bool(given.get("mscale")) != bool(given.get("mscale_all_dim")):
        raise ValueError(
            "YaRN has one of mscale and mscale_all_dim; DeepSeek's code and transformers then scale cos and "
            "sin differently. Give both or neither"
        )
    settings: dict[str, Any] = {key: float(value) for key, value in given.items()}
    if "original_max_position_embeddings" in known:
        settings["original_max_position_embeddings"] = given.get("original_max_position_embeddings", context)
    return SCALINGS[kind](**settings)


def _write_rope(config: ModelConfig) -> dict[str, Any]:
    theta, scaling = config.rope.theta, config.rope.scaling
    kind = next((name for name, made in SCALINGS.items() if isinstance(scaling, made)), "default")
    settings = {} if scaling is None else dataclasses.asdict(scaling)
    settings = {key: value for key, value in settings.items() if value is not None}
    if config.model_type == "deepseek":
        return {"rope_theta": theta, "rope_scaling": {"type": kind, **settings} if settings else None}
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **settings}}


# --------------------------------------------------------------------------------------------------
# Quantisation

FP8: Values = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3",),
    "activation_scheme": ("dynamic",),
    "scale_fmt": ("float", "ue8m0", None),
    "expert_dtype": ("fp8",),
    "dequantize": (False,),
    "modules_to_convert": (None,),
}


def _read_quantization(given: Fields) -> Fp8Blocks | None:
    """FP8 blocks or nothing. Which weights are in FP8 is seen from the weights, not told here."""
    if not given:
        return None
    for key, value in {"quant_method": None, **given}.items():
        allowed = FP8.get(key, ())
        if key not in ("weight_block_size", "modules_to_not_convert") and value not in allowed:
            raise ValueError(
                f"quantization_config.{key} is {value!r}; only DeepSeek's FP8 blocks are read "
                f"({key}: {allowed[0] if allowed else 'absent'}). Use a checkpoint that is not quantised, or "
                f"dequantise this one with the tool that made it"
            )
    block = given.get("weight_block_size", [128, 128])
    sizes = cast(list[Any], block) if isinstance(block, list) else []
    if len(sizes) != 2 or any(type(size) is not int for size in sizes):
        raise ValueError(
            f"quantization_config.weight_block_size is {block!r}; give rows and columns of a block"
        )
    return Fp8Blocks((sizes[0], sizes[1]), "ue8m0" if given.get("scale_fmt") == "ue8m0" else None)


def _write_quantization(fp8: Fp8Blocks | None) -> dict[str, Any]:
    if fp8 is None:
        return {}
    written = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    scales = {} if fp8.scale_fmt is None else {"scale_fmt": fp8.scale_fmt}
    return {"quantization_config": {**written, "weight_block_size": list(fp8.weight_block_size), **scales}}
