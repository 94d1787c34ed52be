"""narrow and widen by hand, against a slow reference, and as what LoRAM needs of them: recovery of a product."""

from typing import Any

import pytest
import torch
from torch import Tensor

from loram.base.errors import UserError
from loram.model.families import ARCHITECTURES
from loram.model.geometry import Geometry
from loram.model.plan import BaseReference, PruningPlan
from loram.model.resize import narrow, widen

KEPT = {"kv_groups": (0, 2), "channels": (1, 3, 4)}
LINEARS = [(family, linear.path) for family in ("llama", "phi3") for linear in ARCHITECTURES[family].linears]
LAYER = "model.layers.1"
# (query heads, key-value heads, head size): grouped, one group, every head its own, heads of one
GEOMETRIES = [(6, 3, 2), (3, 3, 4), (12, 3, 1)]


def make(
    heads: int = 6,
    groups: int = 3,
    head_dim: int = 2,
    kept: dict[str, tuple[int, ...]] = KEPT,
    family: str = "llama",
) -> PruningPlan:
    geometry = Geometry(
        vocab_size=20,
        hidden_size=5,
        intermediate_size=6,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        tie_word_embeddings=True,
    )
    return PruningPlan(
        model_type=family,
        base=BaseReference(name="m", fingerprint="f"),
        geometry=geometry,
        criterion="random",
        ratio=0.5,
        seed=0,
        keep_first=1,
        keep_last=1,
        versions={},
        layers={1: kept},
    )


def kept_positions(path: str, plan: PruningPlan) -> tuple[int, list[int]]:
    """(axis, which rows or columns of a linear stay), asked one at a time: does the unit that owns it stay?"""
    geometry = plan.geometry
    head, groups, channels = geometry.head_dim, geometry.num_key_value_heads, geometry.intermediate_size
    group = geometry.num_attention_heads // groups * head
    queries = [(unit, "kv_groups") for unit in range(groups) for _ in range(group)]
    keys = [(unit, "kv_groups") for unit in range(groups) for _ in range(head)]
    up = [(unit, "channels") for unit in range(channels)]
    axis, owners = {
        "q_proj": (0, queries),
        "k_proj": (0, keys),
        "v_proj": (0, keys),
        "qkv_proj": (0, [*queries, *keys, *keys]),
        "o_proj": (1, queries),
        "gate_proj": (0, up),
        "up_proj": (0, up),
        "gate_up_proj": (0, [*up, *up]),
        "down_proj": (1, up),
    }[path.split(".")[1]]
    return axis, [position for position, (unit, space) in enumerate(owners) if unit in plan.layers[1][space]]


def test_by_hand() -> None:
    plan = make()
    keys = torch.arange(6.0)  # three heads of two
    assert narrow(f"{LAYER}.self_attn.k_proj.bias", keys, plan).tolist() == [0, 1, 4, 5]
    assert widen(f"{LAYER}.self_attn.k_proj.bias", torch.tensor([7.0, 8, 9, 10]), plan).tolist() == [7, 8, 0, 0, 9, 10]
    queries = torch.arange(12.0)  # two query heads a key-value head
    assert narrow(f"{LAYER}.self_attn.q_proj.bias", queries, plan).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    down = torch.arange(12.0).view(2, 6)
    assert narrow(f"{LAYER}.mlp.down_proj.lora_A.weight", down, plan).tolist() == [[1, 3, 4], [7, 9, 10]]
    up = torch.tensor([[1.0], [2.0], [3.0]])
    assert widen(f"{LAYER}.mlp.up_proj.lora_B.weight", up, plan).flatten().tolist() == [0, 1, 0, 2, 3, 0]


def test_norms_over_all_heads_are_cut_with_the_heads() -> None:
    plan, layer = make(family="olmo2"), f"{LAYER}.self_attn"
    assert narrow(f"{layer}.k_norm.weight", torch.arange(6.0), plan).tolist() == [0, 1, 4, 5]
    assert widen(f"{layer}.k_norm.weight", torch.tensor([7.0, 8, 9, 10]), plan).tolist() == [7, 8, 0, 0, 9, 10]
    assert narrow(f"{layer}.q_norm.weight", torch.arange(12.0), plan).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert plan.narrow_norms() == {"1": {"self_attn.q_norm": (8, 12), "self_attn.k_norm": (4, 6)}}
    assert "narrow_norms" not in make().config_keys()  # other families' files stay as they were


@pytest.mark.parametrize("sizes", GEOMETRIES, ids=str)
@pytest.mark.parametrize(("family", "path"), LINEARS)
def test_every_linear_against_a_slow_reference(family: str, path: str, sizes: tuple[int, int, int]) -> None:
    plan = make(*sizes, family=family)
    (axis, kept), linear = kept_positions(path, plan), plan.architecture.linear(path)
    full = torch.randn(plan.geometry.linear_shape(linear))
    small = narrow(f"{LAYER}.{path}.weight", full, plan)
    assert small.shape == plan.geometry.linear_shape(linear, plan.units(1))
    wide = widen(f"{LAYER}.{path}.weight", small, plan)
    for position in range(full.shape[axis]):
        row, found = full.select(axis, position), wide.select(axis, position)
        if position in kept:
            assert torch.equal(small.select(axis, kept.index(position)), row)
            assert torch.equal(found, row)
        else:
            assert not found.any()


@pytest.mark.parametrize("sizes", GEOMETRIES, ids=str)
@pytest.mark.parametrize(("family", "path"), LINEARS)
def test_the_product_of_widened_factors_is_the_widened_product(
    family: str, path: str, sizes: tuple[int, int, int]
) -> None:
    """What recovery rests on: B^R A^R is B A in the kept places and zero elsewhere."""
    plan = make(*sizes, family=family)
    rows, columns = plan.geometry.linear_shape(plan.architecture.linear(path), plan.units(1))
    b, a = torch.randn(rows, 2, dtype=torch.float64), torch.randn(2, columns, dtype=torch.float64)
    name = f"base_model.model.{LAYER}.{path}"
    wide = widen(f"{name}.lora_B.weight", b, plan) @ widen(f"{name}.lora_A.weight", a, plan)
    torch.testing.assert_close(wide, widen(f"{name}.weight", b @ a, plan), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool])
def test_dtype_and_bits_survive(dtype: torch.dtype) -> None:
    name, plan = f"{LAYER}.mlp.up_proj.bias", make()
    small = torch.ones(3, dtype=dtype)
    wide = widen(name, small, plan)
    assert (wide.dtype, wide.tolist()) == (dtype, torch.tensor([0, 1, 0, 1, 1, 0], dtype=dtype).tolist())
    assert narrow(name, wide, plan).dtype == dtype


def test_odd_values_survive_and_the_input_is_left_alone() -> None:
    name, plan = f"{LAYER}.mlp.up_proj.bias", make()
    small = torch.tensor([float("nan"), float("inf"), -0.0])
    wide = widen(name, small, plan)
    assert [str(x) for x in wide.tolist()] == ["0.0", "nan", "0.0", "inf", "-0.0", "0.0"]
    narrow(name, wide, plan).fill_(5)
    assert wide[3] == float("inf")  # a copy, not a view
    assert torch.equal(small.nan_to_num(1), torch.tensor([1, torch.finfo(torch.float32).max, 0]))


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.self_attn.q_norm.weight",
        "model.layers.0.mlp.up_proj.weight",  # this layer keeps everything
        "model.layers.11.mlp.up_proj.weight",
        "model.mylayers.1.mlp.up_proj.weight",
        "model.layers.1.mlp.up_proj.lora_A.weight",  # lora_A of an output cut, lora_B of an input cut
        "model.layers.1.mlp.down_proj.lora_B.weight",
        "model.layers.1.self_attn.o_proj.bias",
    ],
)
def test_other_tensors_come_back_as_they_are(name: str) -> None:
    tensor = torch.ones(4, 4)
    assert narrow(name, tensor, make()) is tensor
    assert widen(name, tensor, make()) is tensor


def test_only_the_spaces_that_a_layer_names_are_cut() -> None:
    plan, tensor = make(kept={"channels": (0,)}), torch.ones(6, 5)
    assert narrow(f"{LAYER}.self_attn.k_proj.weight", tensor, plan) is tensor
    assert narrow(f"{LAYER}.mlp.up_proj.weight", tensor, plan).shape == (1, 5)


@pytest.mark.parametrize("prefix", ["", "model.", "base_model.model.model.", "language_model.model."])
def test_any_prefix(prefix: str) -> None:
    assert narrow(f"{prefix}layers.1.mlp.up_proj.weight", torch.ones(6, 5), make()).shape == (3, 5)


@pytest.mark.parametrize(
    ("function", "part", "tensor"),
    [
        (narrow, "up_proj.weight", torch.ones(3, 5)),  # small already
        (widen, "up_proj.weight", torch.ones(6, 5)),  # wide already
        (narrow, "down_proj.weight", torch.ones(6)),  # a vector has no columns
        (widen, "down_proj.lora_A.weight", torch.ones(2, 4)),
        (narrow, "up_proj.bias", torch.ones(())),
        (narrow, "up_proj.lora_embedding_A", torch.ones(6)),
        (narrow, "up_proj.lora_A.default.weight", torch.ones(2, 5)),
    ],
)
def test_what_does_not_fit_is_refused_by_name(function: Any, part: str, tensor: Tensor) -> None:
    with pytest.raises(UserError, match=f"{LAYER}.mlp.{part}"):
        function(f"{LAYER}.mlp.{part}", tensor, make())
