"""What the rows of families are put together from: spaces, segments, and the linears and norms that many share."""

from loram.model.segments import ONE_HEAD, Linear, Norm, Segment, Space

KV_GROUPS = Space(
    name="kv_groups",
    size="num_key_value_heads",
    config_keys=("num_attention_heads", "num_key_value_heads"),
    rounding="up",
)
CHANNELS = Space(name="channels", size="intermediate_size", config_keys=("intermediate_size",), rounding="down")

QUERIES = Segment(name="queries", unit="group", space=KV_GROUPS)
KEYS = Segment(name="keys", unit="head", space=KV_GROUPS)
VALUES = Segment(name="values", unit="head", space=KV_GROUPS)
# These three are for layers that keep all their groups.
WHOLE_QUERIES = Segment(name="queries of all heads", unit="queries")
WHOLE_KEYS = Segment(name="keys of all heads", unit="keys")
WHOLE_VALUES = Segment(name="values of all heads", unit="keys")
GATE = Segment(name="gate", unit="channel", space=CHANNELS)
UP = Segment(name="up", unit="channel", space=CHANNELS)

OUT = Linear(path="self_attn.o_proj", reads="attention", columns=(QUERIES,))
DOWN = Linear(path="mlp.down_proj", reads="channels", columns=(UP,))
ATTENTION = (
    Linear(path="self_attn.q_proj", reads="layer", rows=(QUERIES,)),
    Linear(path="self_attn.k_proj", reads="layer", rows=(KEYS,)),
    Linear(path="self_attn.v_proj", reads="layer", rows=(VALUES,)),
    OUT,
)
MLP_LINEARS = (
    Linear(path="mlp.gate_proj", reads="mlp", rows=(GATE,)),
    Linear(path="mlp.up_proj", reads="mlp", rows=(UP,)),
    DOWN,
)
LINEARS = (*ATTENTION, *MLP_LINEARS)
FUSED_LINEARS = (
    Linear(path="self_attn.qkv_proj", reads="layer", rows=(QUERIES, KEYS, VALUES)),
    OUT,
    Linear(path="mlp.gate_up_proj", reads="mlp", rows=(GATE, UP)),
    DOWN,
)
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
QKVO = (*QKV, "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NORMS = (Norm(path="input_layernorm"), Norm(path="post_attention_layernorm"))
FOUR_NORMS = (*NORMS, Norm(path="pre_feedforward_layernorm"), Norm(path="post_feedforward_layernorm"))
HEAD_NORMS = (Norm(path="self_attn.q_norm", width=ONE_HEAD), Norm(path="self_attn.k_norm", width=ONE_HEAD))
