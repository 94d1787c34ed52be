"""Families whose layers all have attention and one MLP: one row each."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loram.model.architecture import Architecture, Scale, Softcap, Windows
from loram.model.parts import (
    FOUR_NORMS,
    FUSED_LINEARS,
    HEAD_NORMS,
    KEYS,
    LINEARS,
    MLP,
    NORMS,
    QKV,
    QKVO,
    QUERIES,
)
from loram.model.segments import ONE_HEAD, Norm

_POST_NORMS = (Norm(path="post_attention_layernorm"), Norm(path="post_feedforward_layernorm"))
_THREE_OF_FOUR = Windows(slides=lambda layer, config: (layer + 1) % config.get("sliding_window_pattern", 4) != 0)
# Some layers of Qwen's models slide: those from `max_window_layers` on.
QWEN_WINDOWS = Windows(
    switch="use_sliding_window", slides=lambda layer, config: layer >= config.get("max_window_layers", 28)
)


def _rotates(layer: int, config: Mapping[str, Any]) -> bool:
    """Return whether a layer of SmolLM3 has rotary embeddings."""
    listed = config.get("no_rope_layers")  # 1 where a layer has them, in spite of the name
    return bool(listed[layer]) if listed else (layer + 1) % config.get("no_rope_layer_interval", 4) != 0


LLAMA = Architecture(
    model_type="llama",
    model_class="LlamaForCausalLM",
    decoder="model",
    embedding="embed_tokens",
    layers="layers",
    final_norm="norm",
    head="lm_head",
    linears=LINEARS,
    norms=NORMS,
    blocks=("self_attn", "mlp"),
    biases={"attention_bias": QKVO, "mlp_bias": MLP},
)
_OLMO2 = replace(
    LLAMA,
    model_type="olmo2",
    model_class="Olmo2ForCausalLM",
    norms=(
        *_POST_NORMS,
        Norm(path="self_attn.q_norm", width=QUERIES),
        Norm(path="self_attn.k_norm", width=KEYS),
    ),
    normed_inputs=False,
    biases={"attention_bias": QKVO},
    rotary_in_float32=True,
)
# The other rows say in what they differ from Llama's.
DENSE = (
    LLAMA,
    replace(
        LLAMA,
        model_type="mistral",
        model_class="MistralForCausalLM",
        biases={},
        kv_heads=8,
        windows=Windows(slides=lambda layer, config: True),
    ),
    replace(
        LLAMA,
        model_type="qwen2",
        model_class="Qwen2ForCausalLM",
        biases={"always": QKV},
        kv_heads=32,
        windows=QWEN_WINDOWS,
    ),
    replace(
        LLAMA,
        model_type="qwen3",
        model_class="Qwen3ForCausalLM",
        norms=(*NORMS, *HEAD_NORMS),
        biases={"attention_bias": QKVO},
        kv_heads=32,
        head_dim=128,
        windows=QWEN_WINDOWS,
    ),
    replace(
        LLAMA,
        model_type="gemma2",
        model_class="Gemma2ForCausalLM",
        norms=FOUR_NORMS,
        biases={"attention_bias": QKVO},
        kv_heads=4,
        head_dim=256,
        tied=True,
        windows=Windows(slides=lambda layer, config: (layer + 1) % 2 != 0),
        attention_softcap=Softcap(key="attn_logit_softcapping", default=50.0),
        logit_softcap=Softcap(key="final_logit_softcapping", default=30.0),
        norms_add_one=True,
    ),
    replace(
        LLAMA,
        model_type="gemma3_text",
        model_class="Gemma3ForCausalLM",
        norms=(*FOUR_NORMS, *HEAD_NORMS),
        biases={"attention_bias": QKVO},
        kv_heads=4,
        head_dim=256,
        tied=True,
        windows=Windows(slides=lambda layer, config: (layer + 1) % config.get("sliding_window_pattern", 6) != 0),
        logit_softcap=Softcap(key="final_logit_softcapping", default=None),
        norms_add_one=True,
        rotary_by_window=True,
    ),
    replace(
        LLAMA,
        model_type="phi3",
        model_class="Phi3ForCausalLM",
        linears=FUSED_LINEARS,
        biases={},
        windows=Windows(slides=lambda layer, config: True, default=None),
        partial_rotary=1.0,
    ),
    replace(
        LLAMA,
        model_type="seed_oss",
        model_class="SeedOssForCausalLM",
        biases={"attention_bias": QKV, "attention_out_bias": ("self_attn.o_proj",), "mlp_bias": MLP},
        on_by_default=("attention_bias",),
        kv_heads=8,
        head_dim=128,
        dropouts={"attention_dropout": 0.1, "residual_dropout": 0.1},
    ),
    replace(
        LLAMA,
        model_type="smollm3",
        model_class="SmolLM3ForCausalLM",
        kv_heads=4,
        tied=True,
        windows=Windows(
            switch="use_sliding_window", slides=lambda layer, config: not _rotates(layer, config), default=None
        ),
    ),
    replace(
        LLAMA,
        model_type="granite",
        model_class="GraniteForCausalLM",
        logit_scale=Scale(key="logits_scaling", default=1.0, divides=True),
    ),
    replace(
        LLAMA,
        model_type="ministral3",
        model_class="Ministral3ForCausalLM",
        biases={},
        kv_heads=8,
        head_dim=128,
        windows=Windows(slides=lambda layer, config: True, default=None),
        queries_scaled=True,
    ),
    replace(
        LLAMA,
        model_type="ernie4_5",
        model_class="Ernie4_5ForCausalLM",
        biases={"use_bias": (*QKVO, *MLP)},
        kv_heads=2,
        head_dim=128,
        tied=True,
        rotary_by_layer=True,
        rotary_in_float32=True,
        dropouts={},
    ),
    replace(
        LLAMA,
        model_type="hunyuan_v1_dense",
        model_class="HunYuanDenseV1ForCausalLM",
        norms=(
            *NORMS,
            Norm(path="self_attn.query_layernorm", width=ONE_HEAD),
            Norm(path="self_attn.key_layernorm", width=ONE_HEAD),
        ),
        biases={"attention_bias": QKVO},
    ),
    replace(
        LLAMA,
        model_type="exaone4",
        model_class="Exaone4ForCausalLM",
        norms=(*_POST_NORMS, *HEAD_NORMS),
        normed_inputs=False,
        biases={},
        kv_heads=32,
        windows=_THREE_OF_FOUR,
    ),
    _OLMO2,
    replace(
        _OLMO2,
        model_type="olmo3",
        model_class="Olmo3ForCausalLM",
        windows=Windows(slides=lambda layer, config: (layer + 1) % 4 != 0),
        rotary_by_window=True,
    ),
    replace(
        LLAMA,
        model_type="glm4",
        model_class="Glm4ForCausalLM",
        linears=(*LINEARS[:3], *FUSED_LINEARS[1:]),
        norms=(*NORMS, Norm(path="post_self_attn_layernorm"), Norm(path="post_mlp_layernorm")),
        biases={"attention_bias": QKV},
        on_by_default=("attention_bias",),
        kv_heads=2,
        head_dim=128,
        partial_rotary=0.5,
        rotary_by_layer=True,
    ),
    replace(
        LLAMA,
        model_type="cohere2",
        model_class="Cohere2ForCausalLM",
        # attention and MLP stand side by side, and read the same normed hidden states
        linears=tuple(replace(linear, reads="layer") if linear.reads == "mlp" else linear for linear in LINEARS),
        norms=NORMS[:1],
        norms_center=True,
        biases={"attention_bias": QKVO},
        tied=True,
        windows=_THREE_OF_FOUR,
        logit_scale=Scale(key="logit_scale", default=0.0625),
    ),
)
