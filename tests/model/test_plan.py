"""Plans refuse what makes no sense, survive JSON, and narrow and widen are inverses whatever is kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from loram.base.errors import UserError
from loram.model.families import ARCHITECTURES
from loram.model.geometry import Geometry
from loram.model.plan import PLAN_NAME, BaseReference, PruningPlan, find_plan
from loram.model.resize import narrow, widen

GEOMETRY = {
    "vocab_size": 50,
    "hidden_size": 12,
    "intermediate_size": 10,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "tie_word_embeddings": True,
}


def make(layers: Any, **changes: Any) -> PruningPlan:
    values = {
        "model_type": "llama",
        "base": BaseReference(name="owner/model", fingerprint="f" * 64),
        "geometry": Geometry(**GEOMETRY),
        "criterion": "random",
        "ratio": 0.5,
        "seed": 0,
        "keep_first": 1,
        "keep_last": 1,
        "versions": {"loram": "0"},
    }
    return PruningPlan(**{**values, "layers": layers, **changes})


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({6: {"channels": (0,)}}, "layer 6 is outside 0..5"),
        ({-1: {"channels": (0,)}}, "outside"),
        ({2: {"experts": (0,)}}, "unknown space 'experts'"),
        ({2: {"channels": ()}}, "at least one"),
        ({2: {"channels": (3, 1)}}, "sorted and distinct"),
        ({2: {"channels": (1, 1)}}, "sorted and distinct"),
        ({2: {"channels": (9, 10)}}, "must lie in 0..9"),
        ({2: {"kv_groups": (3,)}}, "must lie in 0..2"),
        ({2: {"kv_groups": (-1, 0)}}, "must lie in 0..2"),
    ],
    ids=str,
)
def test_impossible_plans_are_refused_at_birth(layers: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make(layers)


@pytest.mark.parametrize("changes", [{"ratio": 0.0}, {"ratio": 1.0}, {"model_type": "gpt2"}, {"foo": 1}], ids=str)
def test_bad_fields_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        make({}, **changes)


def test_plans_are_frozen() -> None:
    with pytest.raises(ValidationError):
        make({}).ratio = 0.3  # type: ignore[misc]


def test_a_plan_shows_itself_in_few_words() -> None:
    plan = make({4: {"kv_groups": (0, 2)}})
    assert "1 of " in repr(plan)
    assert "kv_groups" not in repr(plan)
    assert len(str(plan)) < 1000


def test_kept_elements_by_hand() -> None:
    plan = make({2: {"kv_groups": (0, 2), "channels": (1, 7)}})
    queries, keys, up = (
        plan.architecture.linear(path).rows for path in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
    )
    assert plan.kept_elements(2, keys).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert plan.kept_elements(2, queries).tolist() == [*range(8), *range(16, 24)]
    assert plan.kept_elements(2, up).tolist() == [1, 7]
    assert plan.kept_elements(3, up) is None


@st.composite
def plans(draw: Any) -> PruningPlan:
    heads, group = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    geometry = {
        **GEOMETRY,
        "num_key_value_heads": heads,
        "num_attention_heads": heads * group,
        "head_dim": draw(st.integers(1, 4)),
        "intermediate_size": draw(st.integers(1, 12)),
        "biases": draw(st.sampled_from([(), ("self_attn.q_proj", "mlp.up_proj", "self_attn.o_proj")])),
    }
    kept = {
        "kv_groups": st.sets(st.integers(0, heads - 1), min_size=1),
        "channels": st.sets(st.integers(0, geometry["intermediate_size"] - 1), min_size=1),
    }
    spaces = st.fixed_dictionaries({}, optional={n: s.map(lambda k: tuple(sorted(k))) for n, s in kept.items()})
    layers = draw(st.dictionaries(st.integers(0, 5), spaces, max_size=6))
    families = [family for family, row in ARCHITECTURES.items() if {space.name for space in row.spaces} == set(kept)]
    return make(layers, geometry=Geometry(**geometry), model_type=draw(st.sampled_from(families)))


@st.composite
def expert_plans(draw: Any) -> PruningPlan:
    """Plans of a mixture of experts: some experts stay, and each of them keeps as many channels of its own."""
    count, width = draw(st.integers(2, 5)), draw(st.integers(1, 6))
    geometry = {**GEOMETRY, "num_experts": count, "moe_intermediate_size": width, "num_experts_per_tok": 1}
    experts = sorted(draw(st.sets(st.integers(0, count - 1), min_size=1)))
    each = draw(st.integers(1, width))
    channels = [
        expert * width + channel
        for expert in experts
        for channel in sorted(draw(st.sets(st.integers(0, width - 1), min_size=each, max_size=each)))
    ]
    layer = {"experts": tuple(experts), "expert_channels": tuple(channels)}
    if draw(st.booleans()):
        del layer["expert_channels"]
    elif len(experts) == count:
        del layer["experts"]
    return make({2: layer}, geometry=Geometry(**geometry), model_type="mixtral")


@settings(max_examples=60, deadline=None)
@given(plan=expert_plans())
def test_narrow_undoes_widen_for_experts(plan: PruningPlan) -> None:
    for name, shape in plan.geometry.layer_shapes(plan.architecture, 2).items():
        full = torch.randn(shape)
        small = narrow(f"model.layers.2.{name}", full, plan)
        wide = widen(f"model.layers.2.{name}", small, plan)
        assert tuple(small.shape) == plan.geometry.layer_shapes(plan.architecture, 2, plan.units(2))[name]
        assert torch.equal(narrow(f"model.layers.2.{name}", wide, plan), small)
        assert torch.equal(wide[wide != 0], full[wide != 0])
        assert wide.count_nonzero() == small.count_nonzero()


def test_experts_keep_channels_of_their_own() -> None:
    """There are 3 experts with 4 channels each; expert 0 keeps its channels 1 and 3, expert 2 its channels 0 and 1."""
    geometry = Geometry(**GEOMETRY, num_experts=3, moe_intermediate_size=4, num_experts_per_tok=1)
    plan = make({2: {"experts": (0, 2), "expert_channels": (1, 3, 8, 9)}}, geometry=geometry, model_type="mixtral")
    gate_up, down = torch.arange(3 * 8 * 12).view(3, 8, 12), torch.arange(3 * 12 * 4).view(3, 12, 4)
    expected = torch.stack([gate_up[0, [1, 3, 5, 7]], gate_up[2, [0, 1, 4, 5]]])
    assert torch.equal(narrow("model.layers.2.mlp.experts.gate_up_proj", gate_up, plan), expected)
    expected = torch.stack([down[0][:, [1, 3]], down[2][:, [0, 1]]])
    assert torch.equal(narrow("model.layers.2.mlp.experts.down_proj", down, plan), expected)


@pytest.mark.parametrize(
    "layer",
    [
        {"experts": (0, 2), "expert_channels": (1, 3, 8)},
        {"experts": (0, 2), "expert_channels": (1, 3, 4, 5)},
        {"expert_channels": (1, 8)},
    ],
    ids=str,
)
def test_experts_must_keep_as_many_channels_as_the_others(layer: dict[str, tuple[int, ...]]) -> None:
    geometry = Geometry(**GEOMETRY, num_experts=3, moe_intermediate_size=4, num_experts_per_tok=1)
    with pytest.raises(ValidationError, match="every kept unit of experts must keep as many"):
        make({2: layer}, geometry=geometry, model_type="mixtral")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=plans())
def test_json_round_trip(plan: PruningPlan, tmp_path: Path) -> None:
    plan.save(tmp_path)
    again = PruningPlan.load(tmp_path)
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert again.fingerprint == plan.fingerprint
    assert list(json.loads(plan.to_json())["layers"]) == [str(layer) for layer in sorted(plan.layers)]


@settings(max_examples=60, deadline=None)
@given(plan=plans(), layer=st.integers(0, 5))
def test_narrow_undoes_widen_and_widen_is_zero_elsewhere(plan: PruningPlan, layer: int) -> None:
    for linear in plan.architecture.linears:
        rows, columns = plan.geometry.linear_shape(linear)
        prefix = f"base_model.model.model.layers.{layer}.{linear.path}"
        shapes = {"weight": (rows, columns), "bias": (rows,), "lora_A.weight": (2, columns), "lora_B.weight": (rows, 2)}
        for part, shape in shapes.items():
            name = f"{prefix}.{part}"
            full = torch.randn(shape)
            small = narrow(name, full, plan)
            wide = widen(name, small, plan)
            assert wide.shape == full.shape
            assert torch.equal(narrow(name, wide, plan), small)
            assert torch.equal(wide[wide != 0], full[wide != 0])
            assert wide.count_nonzero() == small.count_nonzero()
        small_weight = narrow(f"{prefix}.weight", torch.zeros(rows, columns), plan)
        assert tuple(small_weight.shape) == plan.geometry.linear_shape(linear, plan.units(layer))


def test_names_that_the_plan_does_not_touch_come_back_as_they_are() -> None:
    plan, tensor = make({2: {"channels": (1,)}}), torch.ones(12)
    for name in ("model.norm.weight", "model.layers.2.input_layernorm.weight", "model.layers.3.mlp.up_proj.weight"):
        assert narrow(name, tensor, plan) is tensor
        assert widen(name, tensor, plan) is tensor


def test_wrong_shapes_and_unknown_parts_are_refused() -> None:
    plan = make({2: {"channels": (1,)}})
    with pytest.raises(UserError, match=r"dimension 0 of shape \(9, 12\) should be 10"):
        narrow("model.layers.2.mlp.up_proj.weight", torch.ones(9, 12), plan)
    with pytest.raises(UserError, match="should be 1;"):
        widen("model.layers.2.mlp.up_proj.weight", torch.ones(10, 12), plan)
    with pytest.raises(UserError, match="lora_magnitude_vector"):
        widen("model.layers.2.mlp.up_proj.lora_magnitude_vector", torch.ones(10), plan)


def test_plans_keep_the_fingerprint_that_they_always_had() -> None:
    """What was made from a plan knows it by this; fields that the format got later must not change it."""
    plan = make({2: {"kv_groups": (0, 2), "channels": (1, 7)}})
    assert plan.fingerprint == "6520f6ed71cbb32327097d1eab0bfbd97fa4ed5f3365908c20127948b8d2150f"


MUTATIONS = st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutations=MUTATIONS)
def test_a_mutilated_plan_is_a_clear_error_or_a_plan(mutations: list[tuple[int, int]], tmp_path: Path) -> None:
    content = bytearray(make({2: {"channels": (1, 4)}, 3: {"kv_groups": (0,)}}).to_json().encode())
    for position, value in mutations:
        content[position % len(content)] = value
    (tmp_path / PLAN_NAME).write_bytes(bytes(content))
    try:
        plan = PruningPlan.load(tmp_path)
    except UserError as error:
        assert PLAN_NAME in str(error)  # noqa: PT017  either outcome is right
    else:
        assert plan.parameters()[0] >= plan.parameters()[1]


PATHS = [
    (),
    ("format_version",),
    ("model_type",),
    ("base",),
    ("base", "fingerprint"),
    ("geometry",),
    ("geometry", "head_dim"),
    ("geometry", "num_key_value_heads"),
    ("geometry", "biases"),
    ("ratio",),
    ("keep_first",),
    ("versions",),
    ("layers",),
    ("layers", "2"),
    ("layers", "2", "channels"),
    ("layers", "x"),
]
WRONG = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(PATHS), value=WRONG)
def test_a_plan_of_wrong_types_is_a_clear_error_or_a_plan(path: tuple[str, ...], value: Any, tmp_path: Path) -> None:
    content: dict[str, Any] = {"": json.loads(make({2: {"channels": (1, 4)}}).to_json())}
    *parents, last = ("", *path)
    place = content
    for key in parents:
        place = place[key]
    place[last] = value
    (tmp_path / PLAN_NAME).write_text(json.dumps(content[""]))
    try:
        plan = PruningPlan.load(tmp_path)
    except UserError as error:
        assert PLAN_NAME in str(error)  # noqa: PT017  either outcome is right
    else:
        assert plan.parameters()[0] >= plan.parameters()[1]


@pytest.mark.parametrize("key", [key for key, field in PruningPlan.model_fields.items() if field.is_required()])
def test_a_missing_key_is_named(key: str, tmp_path: Path) -> None:
    content = json.loads(make({2: {"channels": (1, 4)}}).to_json())
    del content[key]
    (tmp_path / PLAN_NAME).write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"loram_plan\.json: .*{key}: Field required"):
        PruningPlan.load(tmp_path)


def test_a_folder_without_a_plan(tmp_path: Path) -> None:
    assert find_plan(tmp_path) is None
    with pytest.raises(UserError, match=r"no loram_plan\.json here"):
        PruningPlan.load(tmp_path)
