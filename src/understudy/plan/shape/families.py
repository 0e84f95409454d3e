"""How architectures of transformers differ: where their parts are called what, and which parts they have.

A new architecture is one entry of `FAMILIES`; a test builds each on the meta device and compares every parameter. What
a configuration leaves out has the default that transformers gives it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

__all__ = ["FAMILIES", "Family", "Flag"]

Norm = Literal["rms", "rms_wide", "rms_shifted", "layer", "layer_wide", "layer_plain"]
"""rms: x·r in fp32, cast, times the weight (Llama). rms_wide: times the weight before the cast. rms_shifted: times
1 + weight in fp32 (Gemma). layer: `nn.LayerNorm`. layer_wide: written out in fp32 (Cohere). layer_plain: in fp32 and
without weights (OLMo)."""
Mlp = Literal["gated", "fused", "plain", "experts"]
"""gated: down(act(gate) · up). fused: gate and up in one matrix. plain: down(act(up))."""
Windows = Literal["none", "all", "flagged", "alternate", "by_pattern"]
"""Which layers slide: none, all, those past `max_window_layers` where `use_sliding_window`, every other one, all but
every n-th. A configuration's own `layer_types` goes before it."""


@dataclass(frozen=True)
class Flag:
    """A yes or no of the configuration: its field, and what it is where that is missing."""

    name: str
    default: bool

    def of(self, config: dict[str, Any]) -> bool:
        value = config.get(self.name)
        return self.default if value is None else bool(value)


YES, NO = Flag("", True), Flag("", False)


@dataclass(frozen=True)
class Family:
    root: str = "model"
    """Path of the decoder; layers, embedding and last norm are below it."""
    layers: str = "layers"
    embedding: str = "embed_tokens"
    positions: str | None = None
    """Learned positions, where it has them, with `extra_positions` rows more than the configuration says."""
    extra_positions: int = 0
    last_norm: str = "norm"
    head: str = "lm_head"
    fields: dict[str, str] = field(default_factory=dict)
    """Its own names of the sizes, where they are others than Llama's."""
    inner_factor: int = 0
    """Width of the feed-forward part over that of the state, where the configuration may leave it out."""
    attention: str = "self_attn"
    queries: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """Three projections, or one that does all."""
    output: str = "o_proj"
    transposed: bool = False
    """Its linear layers are GPT-2's own class, whose weights are [in, out]."""
    query_bias: Flag = NO
    output_bias: Flag = NO
    kv_heads: int | None = None
    """Where the configuration does not say; as many as heads."""
    head_dim: int | None = None
    """The same; the width over the heads."""
    head_norm: Literal["head", "row"] | None = None
    """A norm of queries and keys: of each head, or of all together."""
    head_norm_flag: Flag = YES
    head_norm_names: tuple[str, str] = ("q_norm", "k_norm")
    head_norm_per_head: bool = False
    """Its weights have a dimension of the heads, too (Cohere)."""
    rotary: bool = True
    sinks: bool = False
    softcap: bool = False
    windows: Windows = "none"
    window: int | None = None
    """Where the configuration does not say."""
    window_pattern: int = 0
    norm: Norm = "rms"
    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    parallel: bool = False
    """Attention and feed-forward part read the same state, and are added together."""
    mlp: Mlp = "gated"
    mlp_path: str = "mlp"
    """Empty where its layers are the block's own."""
    mlp_names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    mlp_bias: Flag = NO
    activation: str = "silu"
    activation_field: str = "hidden_act"
    tied: bool = False
    residual_dropout: tuple[str, float] | None = None
    """Field and default of dropout on what is added to the residual stream."""
    attention_dropout: tuple[str, float] = ("attention_dropout", 0.0)
    router: str = "gate"
    router_bias: bool = False
    expert_width_field: str = "intermediate_size"
    experts_transposed: bool = False
    """Expert matrices are [in, out], with biases (gpt-oss)."""
    shared_expert: bool = False


_LLAMA = Family(
    query_bias=Flag("attention_bias", False),
    output_bias=Flag("attention_bias", False),
    mlp_bias=Flag("mlp_bias", False),
)
_QWEN2 = Family(query_bias=YES, kv_heads=32, windows="flagged", window=4096)
_GEMMA = replace(
    _LLAMA, mlp_bias=NO, norm="rms_shifted", tied=True, head_dim=256, kv_heads=16, activation="gelu_pytorch_tanh"
)
_GEMMA2 = replace(
    _GEMMA,
    kv_heads=4,
    softcap=True,
    windows="alternate",
    window=4096,
    activation_field="hidden_activation",
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)
_OLMO2 = replace(
    _LLAMA,
    mlp_bias=NO,
    norm="rms_wide",
    head_norm="row",
    before_attention=None,
    after_attention="post_attention_layernorm",
    before_mlp=None,
    after_mlp="post_feedforward_layernorm",
)
_COHERE = replace(
    _LLAMA,
    mlp_bias=NO,
    norm="layer_wide",
    parallel=True,
    before_mlp=None,
    tied=True,
    head_norm="head",
    head_norm_per_head=True,
    head_norm_flag=Flag("use_qk_norm", False),
)
_GLM = replace(
    _LLAMA,
    query_bias=Flag("attention_bias", True),
    output_bias=NO,
    kv_heads=2,
    head_dim=128,
    mlp="fused",
    mlp_names=("gate_up_proj", "down_proj"),
    mlp_bias=NO,
)
_QWEN3 = replace(_LLAMA, mlp_bias=NO, head_norm="head", head_dim=128, kv_heads=32, windows="flagged", window=4096)
_GPT2_FIELDS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
}

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": Family(kv_heads=8, windows="all", window=4096),
    "ministral": Family(kv_heads=8, windows="all", window=4096),
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "phi3": Family(
        queries=("qkv_proj",),
        mlp="fused",
        mlp_names=("gate_up_proj", "down_proj"),
        windows="all",
        residual_dropout=("resid_pdrop", 0.0),
    ),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": replace(_GEMMA2, softcap=False, head_norm="head", windows="by_pattern", window_pattern=6),
    "gpt2": Family(
        root="transformer",
        layers="h",
        embedding="wte",
        positions="wpe",
        last_norm="ln_f",
        fields=_GPT2_FIELDS,
        inner_factor=4,
        attention="attn",
        queries=("c_attn",),
        output="c_proj",
        transposed=True,
        query_bias=YES,
        output_bias=YES,
        rotary=False,
        norm="layer",
        before_attention="ln_1",
        before_mlp="ln_2",
        mlp="plain",
        mlp_names=("c_fc", "c_proj"),
        mlp_bias=YES,
        activation="gelu_new",
        activation_field="activation_function",
        tied=True,
        residual_dropout=("resid_pdrop", 0.1),
        attention_dropout=("attn_pdrop", 0.1),
    ),
    "olmo": replace(_LLAMA, mlp_bias=NO, norm="layer_plain"),
    "olmo2": _OLMO2,
    "olmo3": replace(_OLMO2, windows="by_pattern", window=4096, window_pattern=4),
    "smollm3": replace(_LLAMA, kv_heads=4, tied=True),
    "gpt_neox": Family(
        root="gpt_neox",
        embedding="embed_in",
        last_norm="final_layer_norm",
        attention="attention",
        queries=("query_key_value",),
        output="dense",
        query_bias=Flag("attention_bias", True),
        output_bias=Flag("attention_bias", True),
        norm="layer",
        parallel=True,
        mlp="plain",
        mlp_names=("dense_h_to_4h", "dense_4h_to_h"),
        mlp_bias=YES,
        activation="gelu",
        residual_dropout=("hidden_dropout", 0.0),
    ),
    "cohere": _COHERE,
    "cohere2": replace(_COHERE, head_norm=None, windows="by_pattern", window=4096, window_pattern=4),
    "granite": _LLAMA,
    "starcoder2": Family(
        query_bias=Flag("use_bias", True),
        output_bias=Flag("use_bias", True),
        kv_heads=2,
        windows="all",
        norm="layer",
        mlp="plain",
        mlp_names=("c_fc", "c_proj"),
        mlp_bias=Flag("use_bias", True),
        activation="gelu_pytorch_tanh",
        tied=True,
        residual_dropout=("residual_dropout", 0.0),
    ),
    "gpt_oss": Family(
        query_bias=Flag("attention_bias", True),
        output_bias=Flag("attention_bias", True),
        kv_heads=8,
        head_dim=64,
        sinks=True,
        windows="alternate",
        window=128,
        norm="rms_wide",
        mlp="experts",
        router="router",
        router_bias=True,
        experts_transposed=True,
    ),
    "apertus": replace(
        _LLAMA,
        mlp_bias=NO,
        head_norm="head",
        before_attention="attention_layernorm",
        before_mlp="feedforward_layernorm",
        mlp="plain",
        mlp_names=("up_proj", "down_proj"),
        activation="xielu",
    ),
    "opt": Family(
        root="model.decoder",
        positions="embed_positions",
        extra_positions=2,
        last_norm="final_layer_norm",
        fields={"intermediate_size": "ffn_dim"},
        output="out_proj",
        query_bias=Flag("enable_bias", True),
        output_bias=Flag("enable_bias", True),
        rotary=False,
        norm="layer",
        before_attention="self_attn_layer_norm",
        before_mlp="final_layer_norm",
        mlp="plain",
        mlp_path="",
        mlp_names=("fc1", "fc2"),
        mlp_bias=Flag("enable_bias", True),
        activation="relu",
        activation_field="activation_function",
        tied=True,
        residual_dropout=("dropout", 0.1),
    ),
    "glm": _GLM,
    "glm4": replace(_GLM, after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm"),
    "helium": replace(_LLAMA, output_bias=NO, kv_heads=20, head_dim=128, norm="rms_wide"),
    "ernie4_5": replace(
        _LLAMA,
        query_bias=Flag("use_bias", False),
        output_bias=Flag("use_bias", False),
        mlp_bias=Flag("use_bias", False),
        kv_heads=2,
        head_dim=128,
        tied=True,
    ),
    "seed_oss": replace(
        _LLAMA,
        query_bias=Flag("attention_bias", True),
        output_bias=Flag("attention_out_bias", False),
        kv_heads=8,
        head_dim=128,
        residual_dropout=("residual_dropout", 0.1),
        attention_dropout=("attention_dropout", 0.1),
    ),
    "exaone4": replace(
        _OLMO2,
        query_bias=NO,
        output_bias=NO,
        norm="rms",
        head_norm="head",
        windows="by_pattern",
        window=4096,
        window_pattern=4,
    ),
    "arcee": replace(_LLAMA, mlp="plain", mlp_names=("up_proj", "down_proj"), activation="relu2"),
    "hunyuan_v1_dense": replace(
        _LLAMA, mlp_bias=NO, head_norm="head", head_norm_names=("query_layernorm", "key_layernorm")
    ),
    "mixtral": Family(kv_heads=8, windows="all", mlp="experts"),
    "qwen2_moe": replace(
        _QWEN2,
        query_bias=Flag("qkv_bias", True),
        kv_heads=16,
        mlp="experts",
        expert_width_field="moe_intermediate_size",
        shared_expert=True,
    ),
    "qwen3_moe": replace(_QWEN3, kv_heads=4, head_dim=None, mlp="experts", expert_width_field="moe_intermediate_size"),
    "olmoe": replace(_LLAMA, mlp_bias=NO, head_norm="row", mlp="experts"),
    "granitemoe": replace(
        _LLAMA,
        mlp_bias=NO,
        mlp="experts",
        mlp_path="block_sparse_moe",
        router="router",
    ),
}
"""By `model_type`."""
