"""The planner's bytes are those of the real tensors: bitsandbytes', PEFT's, torch's, autograd's."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from bitsandbytes.nn import Params4bit
from bitsandbytes.optim import AdamW8bit, GlobalOptimManager
from conftest import EXPERTS, FAMILIES, HYBRID_EXPERTS, ODDITIES, SIZES, own_names
from helpers import Live
from peft import LoraConfig, get_peft_model
from pydantic import BaseModel
from test_estimate import COUNTED, LLAMA_70B
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import loram
from loram import cli
from loram.base.size import parse_size, show_size
from loram.compute.loss import chunked_cross_entropy, use_chunked_loss_, use_log_probs_
from loram.compute.nf4 import load_4bit, nbytes
from loram.disk.opening import open_model
from loram.model.families import family_of
from loram.planner.activations import saved_around_layers, saved_by_layer, saved_by_layers
from loram.planner.fit import GRID, Fit, fit
from loram.planner.memory import training_memory
from loram.planner.settings import LINEARS, Settings, make_settings
from loram.planner.shapes import Model
from loram.planner.ways import advice
from loram.planner.weights import factors, frozen_bytes, optimizer_bytes
from loram.planner.weights import trained as trained_parameters
from loram.pruning.options import PruneOptions
from loram.trainer.arguments import defaults_of
from loram.training.configs import build_configs
from loram.training.methods.lora_sp import LoraSpOptions
from loram.training.methods.preference import Preference, PreferenceOptions
from loram.training.methods.table import METHODS
from loram.training.options import SftFlags, TrainOptions, lora_defaults, resolve

LLAMA_31_70B = {**LLAMA_70B, "vocab_size": 128256}
GIB = 1 << 30


class RecipeOfATest(BaseModel):
    prune: PruneOptions
    train: TrainOptions


def tiny(family: str, **changes: Any) -> Any:
    config = AutoConfig.for_model(family, **{**SIZES, **ODDITIES[family], **changes})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def adapted(
    model: Any,
    r: int = 4,
    targets: tuple[str, ...] | None = None,
    *,
    method: str = "lora",
    dropout: float = 0.05,
) -> Any:
    targets = targets or family_of(model.config.to_dict()).default_targets
    config = LoraConfig(r=r, lora_dropout=dropout, target_modules=list(targets), task_type="CAUSAL_LM")
    adapted_model = get_peft_model(model, config).train()
    METHODS[method].specialise_(adapted_model, LoraSpOptions(share=0.5), pruned=True)
    return adapted_model


def sizes_of(model: Any) -> Model:
    return Model.of(model.config.to_dict(), "config")


def pruned_sizes(config: Any, **options: Any) -> Model:
    return Model.of(config, "config", PruneOptions(**options).resolved())


def quantised_bytes(weight: Tensor) -> int:
    packed = Params4bit(weight.detach().clone(), requires_grad=False, quant_type="nf4").to("cpu")
    state = packed.quant_state
    constants = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    return int(packed.nbytes + sum(tensor.nbytes for tensor in constants))


@pytest.mark.parametrize("family", COUNTED)
@pytest.mark.parametrize("tied", [True, False])
def test_bytes_in_4_bits_are_bitsandbytes_own(family: str, tied: bool) -> None:
    model = tiny(family, tie_word_embeddings=tied, intermediate_size=43)  # odd counts of values and of blocks
    sizes = sizes_of(model)
    expected = sum(in_4_bits(name, parameter, sizes) for name, parameter in model.named_parameters())  # a tied one once
    settings = make_settings(device="cpu", load_in_4bit=True)
    assert frozen_bytes(sizes, settings).total == expected


def in_4_bits(name: str, parameter: Tensor, sizes: Model) -> int:
    """The bytes of a parameter of a model in 4 bits, where each expert's matrix is quantised by itself."""
    layer, path = sizes.architecture.split(name) or (0, "")
    row = sizes.geometry.layer(sizes.architecture, layer)
    if path in [part.name for part in row.expert_tensors] and parameter.dim() == 3:
        return sum(map(quantised_bytes, parameter))
    whole = parameter.dim() != 2 or path in [part.name for part in row.parameters]
    return parameter.nbytes if whole else quantised_bytes(parameter)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_moe", "gpt_oss"])
def test_a_pruned_model_in_4_bits_is_as_large_as_it_is_loaded(
    family: str, offload: bool, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    loram.prune(tiny_models[family], tmp_path / "out", ratio=0.7, criterion="random", keep_first=1, keep_last=2)
    cpu = torch.device("cpu")
    model: Any = load_4bit(open_model(tmp_path / "out"), device=cpu, dtype=torch.float32, offload_embedding=offload)
    config = json.loads((tiny_models[family] / "config.json").read_text())
    settings = make_settings(device="cpu", load_in_4bit=True, offload_embedding=offload)
    found = frozen_bytes(pruned_sizes(config, ratio=0.7, keep_first=1, keep_last=2), settings)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    in_float32 = found.host  # the tiny files are; large ones are in 16 bits
    assert found.total + in_float32 == nbytes(model) - buffers


def test_an_offloaded_embedding_is_in_host_memory() -> None:
    on_device, offloaded = (
        frozen_bytes(Model.of(LLAMA_70B, ""), make_settings(load_in_4bit=True, offload_embedding=offload))
        for offload in (False, True)
    )
    assert offloaded.host == 32000 * 8192 * 2
    assert on_device.weights - offloaded.weights == 32000 * 8192 // 2


@pytest.mark.parametrize("method", ["lora", "lora-fa", "lora-sp"])
@pytest.mark.parametrize("targets", [(*LINEARS, "lm_head"), ("q_proj", "down_proj")], ids=str)
@pytest.mark.parametrize("family", ["qwen3", "phi3"])
def test_adapter_and_adamw_are_as_large_as_the_real_ones(family: str, targets: tuple[str, ...], method: str) -> None:
    model, targets = tiny(family), tuple(own_names(family, {"target_modules": list(targets)})["target_modules"])
    wrapped = adapted(model, r=16, targets=targets, method=method)
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    sizes = sizes_of(model)
    settings = make_settings(device="cpu", lora_r=16, lora_target_modules=targets, method=method)
    expected = sorted(parameters for parameters in trained_parameters(sizes, settings) if parameters)
    assert expected == sorted(parameter.numel() for parameter in trained)
    held = sum(p.numel() for name, p in wrapped.named_parameters() if "lora_" in name)
    assert sum(factors(sizes, settings)) == held
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(trained, fused=True)
    optimizer.step()
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert optimizer_bytes(sizes, settings) == sum(moment.nbytes for moment in moments)


def test_8_bit_adamw_is_as_large_as_bitsandbytes_own() -> None:
    model = tiny("llama", hidden_size=64)
    wrapped = adapted(model, r=72)  # factors on both sides of the size from which states are in 8 bits
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    GlobalOptimManager.get_instance().initialize()  # it remembers other trainings' exceptions, by place
    optimizer = AdamW8bit(trained)
    optimizer.step()
    tensors = {
        tensor.data_ptr(): tensor.nbytes
        for state in optimizer.state.values()
        for tensor in state.values()
        if isinstance(tensor, Tensor)
    }
    settings = make_settings(device="cpu", lora_r=72, optim="adamw_8bit")
    assert optimizer_bytes(sizes_of(model), settings) == sum(tensors.values())


class Saved:
    """Bytes that autograd saves, each storage once, those of weights and buffers not counted."""

    def __init__(self, model: nn.Module) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        self.seen = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self.alive: list[Tensor] = []  # or a storage could be freed and its address be seen again
        self.bytes = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.alive.append(tensor)
            self.bytes += storage.nbytes()
        return tensor


def saved_bytes(wrapped: Any, batch: int, length: int) -> tuple[list[int], int]:
    """(what each decoder layer saves, what is saved in all up to the loss)."""
    base = wrapped.get_base_model()
    inner, row = base.model, family_of(base.config.to_dict())
    saved, before = Saved(wrapped), []
    handles = [layer.register_forward_pre_hook(lambda *_: before.append(saved.bytes)) for layer in inner.layers]
    handles.append(inner.get_submodule(row.final_norm).register_forward_pre_hook(lambda *_: before.append(saved.bytes)))
    ids = torch.randint(0, SIZES["vocab_size"], (batch, length))
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
        inner(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return [after - start for start, after in itertools.pairwise(before)], saved.bytes


def about(family: str, expected: Any) -> Any:
    """What to compare with: the planner knows the routers of Qwen 3 MoE and Mixtral, and others nearly."""
    near = family in (*EXPERTS, *HYBRID_EXPERTS) and family not in ("qwen3_moe", "mixtral")
    return pytest.approx(expected, rel=0.1) if near else expected


def with_known_tables(model: Model) -> list[int]:
    """Return the layers that have no rotary tables, or whose tables a layer below has saved already."""
    by_window, known, seen = model.architecture.rotary_by_window, [], set[bool]()
    for index, layer in enumerate(model.layers):
        kind = by_window and layer.window is None
        if index and (kind in seen or not layer.heads):
            known.append(index)
        if layer.heads:
            seen.add(kind)
    return known


@pytest.mark.parametrize("family", COUNTED)
@pytest.mark.parametrize("length", [6, 16], ids=["inside the window", "beyond the window"])
def test_saved_activations_are_autograds_own(family: str, length: int) -> None:
    model = tiny(family)
    layers, total = saved_bytes(adapted(model), 2, length)
    sizes = sizes_of(model)
    options = {"lora_r": 4, "per_device_train_batch_size": 2, "max_length": length}
    settings = make_settings(device="cpu", **options).for_family(sizes.architecture)
    expected = saved_by_layers(sizes, settings)
    known = with_known_tables(sizes)
    assert [layers[index] for index in known] == about(family, [expected[index] for index in known])
    read_by_the_loss = 2 * (length - 1) * SIZES["hidden_size"] * 4  # not yet saved here
    if sizes.layers[0].heads:  # else nothing trains in the first mixer, and it keeps less than it could
        assert total == about(family, sum(expected) + saved_around_layers(sizes, settings) - read_by_the_loss)


@pytest.mark.parametrize("length", [64, 128, 130])
def test_saved_activations_of_chunks(length: int) -> None:
    """A DeltaNet computes in chunks of 64 tokens."""
    model = tiny("qwen3_5_text")
    layers, _ = saved_bytes(adapted(model), 2, length)
    sizes = sizes_of(model)
    settings = make_settings(device="cpu", lora_r=4, per_device_train_batch_size=2, max_length=length)
    settings = settings.for_family(sizes.architecture)
    assert not sizes.layers[2].heads
    assert layers[2] == saved_by_layer(sizes, sizes.layers[2], settings)


@pytest.mark.parametrize(("method", "dropout"), [("lora", 0.0), ("lora-fa", 0.0), ("lora-fa", 0.1), ("lora-sp", 0.05)])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_activations_of_a_method_are_autograds_own(family: str, method: str, dropout: float) -> None:
    model = tiny(family)
    layers, total = saved_bytes(adapted(model, method=method, dropout=dropout), 2, 12)
    sizes = sizes_of(model)
    options = {"lora_r": 4, "per_device_train_batch_size": 2, "max_length": 12, "lora_dropout": dropout}
    settings = make_settings(device="cpu", method=method, **options).for_family(sizes.architecture)
    expected = saved_by_layers(sizes, settings)
    assert layers[1:] == expected[1:]
    read_by_the_loss = 2 * 11 * SIZES["hidden_size"] * 4  # not yet saved here
    assert total == sum(expected) + saved_around_layers(sizes, settings) - read_by_the_loss


@pytest.mark.parametrize("targets", [("q_proj",), ("up_proj", "down_proj"), ("k_proj", "o_proj", "gate_proj")], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_saved_activations_depend_on_the_targets(targets: tuple[str, ...], dropout: float) -> None:
    model = tiny("llama")
    layers, _ = saved_bytes(adapted(model, r=3, targets=targets, dropout=dropout), 3, 10)
    options = {"lora_r": 3, "lora_dropout": dropout, "per_device_train_batch_size": 3, "max_length": 10}
    settings = make_settings(device="cpu", lora_target_modules=targets, **options)
    # the first with anything to train below it, and with the rotary tables saved already
    assert layers[2:] == [saved_by_layer(sizes_of(model), layer, settings) for layer in sizes_of(model).layers[2:]]


@pytest.mark.parametrize("family", COUNTED)
def test_saved_activations_of_a_pruned_model(family: str, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    loram.prune(tiny_models[family], tmp_path / "out", ratio=0.5, criterion="random", keep_first=1, keep_last=1)
    layers, _ = saved_bytes(adapted(loram.load_pruned(tmp_path / "out")), 2, 12)
    config = json.loads((tiny_models[family] / "config.json").read_text())
    sizes = pruned_sizes(config, ratio=0.5, keep_first=1, keep_last=1)
    options = {"lora_r": 4, "per_device_train_batch_size": 2, "max_length": 12}
    settings = make_settings(device="cpu", **options).for_family(sizes.architecture)
    expected = saved_by_layers(sizes, settings)
    known = with_known_tables(sizes)
    assert [layers[index] for index in known] == about(family, [expected[index] for index in known])
    whole = Model.of(config, "config")
    assert sum(expected) < sum(saved_by_layers(whole, settings))


def test_a_bypass_saves_no_activations(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Its factors are frozen, so their inputs are of no use to the backward pass. It is counted in all else."""
    options = {"ratio": 0.5, "criterion": "random", "keep_first": 1, "keep_last": 1, "refit": True}
    counts = []
    for rank in (0, 4):
        loram.prune(tiny_models["llama"], tmp_path / str(rank), **options, refit_samples=1, bypass_rank=rank)
        counts.append(saved_bytes(adapted(loram.load_pruned(tmp_path / str(rank))), 2, 12))
    assert counts[0] == counts[1]
    without, with_bypass = (loram.estimate(LLAMA_70B, ratio=0.85, refit=True, bypass_rank=rank) for rank in (0, 32))
    plain, layers = loram.estimate(LLAMA_70B, ratio=0.85, refit=False), without.pruned_layers
    assert with_bypass.pruned_parameters - without.pruned_parameters == layers * 4 * 32 * 8192
    operations = [each.arithmetic.flops_per_token for each in (without, with_bypass)]
    assert operations[1] - operations[0] == 6 * layers * 4 * 32 * 8192
    needed = [[s.memory for s in each.stages if s.name == "prune (taylor)"] for each in (plain, without, with_bypass)]
    assert needed[0] < needed[1] < needed[2]
    assert "bypass_rank: 32" in fit(LLAMA_70B, 30 << 30, refit=True, bypass_rank=32).recipe


def test_the_loss_saves_what_it_reads_only() -> None:
    head, hidden = nn.Linear(8, 50, bias=False).requires_grad_(False), torch.randn(2, 700, 8, requires_grad=True)
    labels = torch.randint(0, 50, (2, 700))
    saved = Saved(head)
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
        chunked_cross_entropy(hidden, labels, head)
    places = 2 * 699
    indices_and_targets = 3 * places * 8
    assert saved.bytes <= places * 8 * 4 + indices_and_targets + 64


def live_peak(model: Any, settings: Settings, steps: int = 2) -> int:
    """Bytes of all tensors at the peak of a training's steps."""
    method = METHODS[settings.method]
    (use_log_probs_ if isinstance(method, Preference) else use_chunked_loss_)(model)
    chosen = {"method": settings.method, "dropout": settings.lora_dropout}
    wrapped = adapted(model, settings.lora_r, settings.lora_target_modules, **chosen)
    if settings.gradient_checkpointing:
        wrapped.gradient_checkpointing_enable({"use_reentrant": False})
    live = Live()
    for tensor in [*wrapped.parameters(), *wrapped.buffers()]:
        live.add(tensor)
        if state := getattr(tensor, "quant_state", None):
            for constant in (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code):
                live.add(constant)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], fused=True)
    with live:
        for _ in range(steps):
            for _ in range(settings.gradient_accumulation_steps):
                ids = torch.randint(0, SIZES["vocab_size"], (settings.rows, settings.max_length))
                if isinstance(method, Preference):
                    preference_loss(wrapped, method, ids).backward()  # type: ignore[no-untyped-call]
                else:
                    wrapped(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return live.peak


def preference_loss(wrapped: Any, method: Preference, ids: Tensor) -> Tensor:
    """The loss of pairs, or of labelled answers, without prompts."""

    def policy(ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        found: Tensor = wrapped(input_ids=ids, attention_mask=mask, labels=labels).log_probs
        return found

    def reference(*rows: Tensor) -> Tensor:
        with torch.no_grad(), wrapped.disable_adapter():
            return policy(*rows)

    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    labels = {"desirable": torch.arange(len(ids)) % 2 == 0}
    batch = {**rows, **{f"kl_{name}": tensor.flip(0) for name, tensor in rows.items()}, **labels}
    return method.loss(batch, policy, reference, PreferenceOptions())[0]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True},
        {"load_in_4bit": True},
        {"load_in_4bit": True, "gradient_checkpointing": True},
        {"lora_r": 32, "max_length": 64, "gradient_accumulation_steps": 2},
        {"lora_dropout": 0.0},
        {"method": "lora-fa", "lora_r": 32},
        {"method": "lora-fa", "load_in_4bit": True},
        {"method": "lora-sp", "lora_r": 32},
        {"method": "dpo"},
        {"method": "dpo", "load_in_4bit": True, "gradient_checkpointing": True},
        {"method": "orpo", "gradient_checkpointing": True},
        {"method": "kto"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")
def test_the_peak_is_that_of_all_tensors_alive(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Of a real training's steps, allocator aside; what happens inside one operation is not seen."""
    assert_peak(family, options, tmp_path)


@pytest.mark.parametrize("family", ["seed_oss", "granite", "cohere2"])
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")
def test_the_peak_with_dropouts_factors_and_norms_of_other_kinds(family: str, tmp_path: Path) -> None:
    assert_peak(family, {"load_in_4bit": True, "gradient_checkpointing": True}, tmp_path)


@pytest.mark.parametrize("sizes", [{"num_experts_per_tok": 6}, {"moe_intermediate_size": 160}], ids=str)
@pytest.mark.parametrize("in_4bit", [False, True])
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")
def test_the_peak_inside_experts(sizes: dict[str, int], in_4bit: bool, tmp_path: Path) -> None:
    """That of the gradients of what experts give, and that of the gradients of their channels."""
    options = {"gradient_checkpointing": True, "load_in_4bit": in_4bit}
    assert_peak("qwen3_moe", options, tmp_path, vocab_size=320, num_experts=8, **sizes)


def assert_peak(family: str, options: dict[str, Any], tmp_path: Path, **changes: Any) -> None:
    sizes = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 170, "num_hidden_layers": 3, **changes}
    model = tiny(family, **sizes)
    config = model.config.to_dict()
    settings = make_settings(**{"device": "cpu", "per_device_train_batch_size": 2, "max_length": 120, **options})
    settings = settings.for_family(sizes_of(model).architecture)
    if settings.load_in_4bit:
        model.save_pretrained(tmp_path)
        model = load_4bit(open_model(tmp_path), device=torch.device("cpu"), dtype=torch.float32)
    predicted = training_memory(Model.of(config, "config"), settings).total
    assert live_peak(model, settings) == pytest.approx(predicted, rel=0.03)


@pytest.mark.parametrize(
    ("config", "in_4bit", "counted", "real"),
    [
        (LLAMA_70B, True, 16.95, (16.0, 16.95)),
        (LLAMA_31_70B, True, 15.81, (15.0, 15.81)),
        (LLAMA_70B, False, 4.24, None),
    ],
    ids=["llama-2 in 4 bits", "llama-3.1 in 4 bits", "llama-2 in 16 bits"],
)
def test_the_papers_reductions_and_what_they_really_are(
    config: dict[str, Any], in_4bit: bool, counted: float, real: tuple[float, float] | None
) -> None:
    found = loram.estimate(config, ratio=0.85, load_in_4bit=in_4bit)
    assert round(found.counted_reduction, 2) == counted
    if real is None:
        assert found.real_reduction == found.counted_reduction == found.parameter_reduction
    else:
        assert real[0] < found.real_reduction < real[1]


def test_the_full_model_is_estimated_without_a_ratio() -> None:
    found = loram.estimate(LLAMA_70B)
    assert (found.pruned_parameters, found.pruned_layers) == (found.parameters, 0)
    assert found.units == {"kv_groups": 8, "channels": 28672}
    assert (found.real_reduction, found.arithmetic.times_fewer) == (1, 1)
    assert {stage.name for stage in found.stages} == {"train", "merge", "eval", "eval --stream"}


def test_items_add_up_to_the_total() -> None:
    memory = loram.estimate(LLAMA_70B, ratio=0.5, load_in_4bit=True).training
    beside = {"moment", "pageable", "host", "total"}
    assert memory.total == sum(value for name, value in memory.model_dump().items() if name not in beside)


def test_small_tensors_of_the_optimiser_are_not_paged() -> None:
    options: dict[str, Any] = {"ratio": 0.85, "load_in_4bit": True, "device": "cuda"}
    small, large = (loram.estimate(LLAMA_70B, lora_r=rank, **options).training for rank in (8, 64))
    # at r 8 the tensors of 100,000 values and more are gate_proj's and up_proj's lora_B and down_proj's lora_A, of the
    # six layers that are whole: 8 * 28,672 values each, with two moments of one byte per value
    assert small.pageable == 6 * 3 * 2 * 8 * 28_672
    assert small.optimizer - small.pageable > 0
    assert large.pageable > 8 * small.pageable
    assert loram.estimate(LLAMA_70B, optim="adamw_8bit", **options).training.pageable == 0


def test_gradients_are_counted_where_they_are() -> None:
    options: dict[str, Any] = {"gradient_checkpointing": False}  # the peak is then near the top
    once = loram.estimate(LLAMA_70B, gradient_accumulation_steps=1, **options).training
    twice = loram.estimate(LLAMA_70B, gradient_accumulation_steps=2, **options).training
    assert once.gradients < twice.gradients == twice.adapter


@pytest.mark.parametrize(
    ("changes", "larger"),
    [
        ({"gradient_checkpointing": False}, True),
        ({"max_length": 1024}, True),
        ({"lora_r": 16}, True),
        ({"lora_target_modules": (*LINEARS, "lm_head")}, True),
        ({"lora_dtype": "bfloat16"}, False),
        ({"load_in_4bit": True}, False),
        ({"activation_offloading": True}, False),
        ({"optim": "adamw_8bit"}, False),
        ({"ratio": 0.5}, False),
    ],
    ids=str,
)
def test_what_makes_training_larger(changes: dict[str, Any], larger: bool) -> None:
    before, after = loram.estimate(LLAMA_70B).training.total, loram.estimate(LLAMA_70B, **changes).training.total
    assert (after > before) == larger
    assert after != before


def test_fewer_operations() -> None:
    """Without adapters in the count: 2 forward, 2 backward, 2 again; lm_head always again."""
    config = {**LLAMA_70B, "vocab_size": 1}
    weights = loram.estimate(config).parameters - 2 * 8192 - 8192 - 80 * 2 * 8192
    adapter = loram.estimate(config).adapter_parameters
    with_again, without = (
        loram.estimate(config, gradient_checkpointing=again).arithmetic.flops_per_token for again in (True, False)
    )
    assert with_again == 6 * weights + 8 * adapter + 6 * 8192
    assert without == 4 * weights + 6 * adapter + 6 * 8192
    assert loram.estimate(LLAMA_70B, ratio=0.85).arithmetic.times_fewer > 4


def test_operations_of_the_reference() -> None:
    """Forward passes without gradients, of the adapted model as of the reference; both answers of a pair are tokens."""
    forward = 2 * sum(layer.weights for layer in Model.of(LLAMA_70B, "").layers) + 2 * 32000 * 8192
    plain = loram.estimate(LLAMA_70B).arithmetic.flops_per_token
    for method, passes in (("orpo", 0), ("dpo", 1), ("kto", 3)):
        assert loram.estimate(LLAMA_70B, method=method).arithmetic.flops_per_token == plain + passes * forward


def test_a_pair_is_two_rows_in_memory() -> None:
    pairs = loram.estimate(LLAMA_70B, method="dpo", per_device_train_batch_size=2)
    rows = loram.estimate(LLAMA_70B, lora_dropout=0.0, per_device_train_batch_size=4)
    assert pairs.training == rows.training
    assert "2 pairs x 512 tokens" in pairs.settings.describe(pairs.adapter_parameters)


def test_operations_that_measure_the_full_model() -> None:
    """The full model forward, again and backward, and what was pruned of it forward and backward."""
    whole, pruned = (loram.estimate(LLAMA_70B, ratio=ratio) for ratio in (None, 0.85))
    head, ends = 32000 * 8192, 2 * 32000 * 8192
    weights = whole.parameters - ends - 8192 - 80 * 2 * 8192 + whole.adapter_parameters
    left_whole = 6 * (whole.parameters - ends - 8192 - 80 * 2 * 8192) // 80
    narrowed = pruned.pruned_parameters - ends - 8192 - 80 * 2 * 8192 - left_whole
    anchored = loram.estimate(LLAMA_70B, ratio=0.85, anchor_steps=8).arithmetic
    forward = loram.estimate(LLAMA_70B, ratio=0.85, anchor_steps=8, anchor_gradients=False).arithmetic
    assert pruned.arithmetic.measuring_flops_per_token == 0
    assert anchored.measuring_flops_per_token == 6 * (weights + head) + 4 * narrowed
    assert forward.measuring_flops_per_token == 2 * weights + 2 * narrowed
    for found in (anchored, forward):
        assert found.flops_per_token == pruned.arithmetic.flops_per_token + found.measuring_flops_per_token
        assert found.times_fewer == found.full_flops_per_token / found.flops_per_token
    assert anchored.times_fewer < 1


def test_a_streamed_model_is_a_layer_in_memory_and_is_read_in_every_step() -> None:
    options = {"engine": "streamed", "per_device_train_batch_size": 16}
    streamed = loram.estimate(LLAMA_31_70B, **options)
    table = LLAMA_31_70B["vocab_size"] * LLAMA_31_70B["hidden_size"]
    in_layers = streamed.parameters - 2 * table - LLAMA_31_70B["hidden_size"]
    assert streamed.read_per_step == 2 * 2 * in_layers + 2 * table
    assert streamed.training.total < loram.estimate(LLAMA_31_70B, load_in_4bit=True).training.total / 3
    kept = loram.estimate(LLAMA_31_70B, ram_budget="200GB", device="cpu", **options)
    assert kept.read_per_step == 0
    assert kept.training.weights >= 2 * (in_layers + table)
    packed = loram.estimate(LLAMA_31_70B, load_in_4bit=True, **options)
    assert 0.25 < packed.read_per_step / streamed.read_per_step < 0.27
    assert loram.estimate(LLAMA_31_70B).read_per_step == 0


@pytest.mark.parametrize("memory", ["12GiB", "24GiB", "40GiB", "300GiB"])
def test_the_least_ratio_that_fits(memory: str) -> None:
    limit = parse_size(memory)
    found = fit(LLAMA_31_70B, limit, per_device_train_batch_size=1)
    assert found.estimate.training.total <= limit
    ratio, in_4bit = found.estimate.ratio, found.estimate.settings.load_in_4bit
    if in_4bit:
        assert loram.estimate(LLAMA_31_70B, per_device_train_batch_size=1).training.total > limit
    if ratio is not None:
        less = loram.estimate(
            LLAMA_31_70B,
            ratio=GRID[GRID.index(ratio) - 1],
            load_in_4bit=True,
            per_device_train_batch_size=1,
        )
        assert less.training.total > limit
    assert {"12GiB": 0.85, "300GiB": None}.get(memory, ratio) == ratio


def test_4_bits_come_before_pruning_unless_refused() -> None:
    limit = 80 * GIB
    assert fit(LLAMA_70B, limit).estimate.ratio is None
    assert fit(LLAMA_70B, limit).estimate.settings.load_in_4bit
    in_16_bits = fit(LLAMA_70B, limit, load_in_4bit=False).estimate
    assert not in_16_bits.settings.load_in_4bit
    assert in_16_bits.ratio is not None
    assert not fit(LLAMA_70B, 400 * GIB).estimate.settings.load_in_4bit


def test_an_offloaded_embedding_asks_for_4_bits() -> None:
    found = fit(LLAMA_70B, 400 * GIB, offload_embedding=True)
    assert found.estimate.settings.load_in_4bit
    assert yaml.safe_load(found.recipe)["train"]["offload_embedding"]


def test_the_recipes_lines() -> None:
    found = fit(LLAMA_31_70B, 12 * GIB, per_device_train_batch_size=1, lora_r=16, keep_first=2)
    assert yaml.safe_load(found.recipe) == {
        "prune": {"ratio": found.estimate.ratio, "keep_first": 2, "keep_last": 2},
        "train": {
            "load_in_4bit": True,
            "lora": {"r": 16},
            "trainer": {"max_length": 512, "per_device_train_batch_size": 1},
        },
    }
    assert RecipeOfATest.model_validate(yaml.safe_load(found.recipe)).train.load_in_4bit
    assert "prune" not in yaml.safe_load(fit(LLAMA_31_70B, 400 * GIB).recipe)


def test_the_defaults_are_those_of_training() -> None:
    settings = make_settings(device="cpu")
    assert settings.lora_target_modules == tuple(lora_defaults()["target_modules"])
    assert settings.lora_r == lora_defaults()["r"]
    for name in ("max_length", "per_device_train_batch_size"):
        assert getattr(settings, name) == defaults_of(SftFlags)[name]
    _, arguments = build_configs(resolve(TrainOptions()), torch.device("cpu"))
    for name in ("optim", "gradient_accumulation_steps", "activation_offloading"):
        assert getattr(settings, name) == getattr(arguments, name)


def test_nothing_fits() -> None:
    with pytest.raises(loram.UserError, match=r"nothing fits into 2.00 GiB; the smallest, ratio 0.95 in 4 bits, takes"):
        fit(LLAMA_31_70B, 2 * GIB)
    with pytest.raises(loram.UserError, match="try --load-in-4bit"):
        fit(LLAMA_31_70B, 2 * GIB, load_in_4bit=False)


@pytest.mark.parametrize("text", ["", "12", "GiB", "12 parsecs", "-1GiB", "0GB", "1e9B", "12GiB!"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(loram.UserError, match=r"--memory .*should be a number with a unit"):
        parse_size(text)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_all_linear_takes_what_the_default_takes(family: str, tiny_models: dict[str, Path]) -> None:
    named = loram.estimate(tiny_models[family], lora_target_modules="all-linear")
    assert named == loram.estimate(tiny_models[family])


def test_sizes() -> None:
    found = [parse_size(text) for text in ("12GiB", "12 gb", "1.5 MiB", "800MB")]
    assert found == [12 * GIB, 12 * 10**9, 3 << 19, 800 * 10**6]
    assert [show_size(count) for count in (0, 3 << 19, 3 << 29)] == ["0", "1.5 MiB", "1.50 GiB"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device"),
        ({"lora_r": 0}, "lora_r"),
        ({"lora_target_modules": ["fc1"]}, "lora_target_modules: .*q_proj"),
        ({"lora_target_modules": []}, "lora_target_modules"),
        ({"lora_dtype": "float8"}, "lora_dtype"),
        ({"max_length": 0}, "max_length"),
        ({"optim": "sgd"}, "optim: .*adamw_8bit"),
        ({"device": "cpu", "activation_offloading": True}, "activation_offloading"),
        ({"device": "cpu", "optim": "paged_adamw_8bit"}, "adamw_8bit"),
        ({"offload_embedding": True}, "add load_in_4bit"),
        ({"engine": "streamed", "anchor_steps": 2}, "engine streamed takes no anchor_steps"),
        ({"engine": "streamed", "lora_dropout": 0.1}, "engine streamed takes no"),
        ({"ram_budget": "1GB"}, "ram_budget is for what is streamed"),
        ({"ram_budget": "many"}, "a number with a unit"),
        ({"method": "lora-f"}, "known are lora, rslora"),
        ({"method": "lisa"}, "'lisa' cannot be estimated; that of lora, rslora, lora-fa, lora-sp, dpo, orpo, kto can"),
        ({"method": "lora-sp", "lora_r": 5}, "the nearest is 0.6"),
        ({"lora_sp_share": 0.5}, "an option of method lora-sp, and the method is lora"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
    ],
    ids=str,
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(loram.UserError, match=message):
        loram.estimate(LLAMA_70B, ratio=0.5, **options)


def test_stages_hold_what_was_measured() -> None:
    measured = json.loads((Path(__file__).parents[2] / "benchmarks" / "streaming.json").read_text())
    config = {
        **{"model_type": "llama", "vocab_size": 32000, "hidden_size": 5120, "intermediate_size": 13824},
        **{"num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40},
    }
    stages = {stage.name: stage for stage in loram.estimate(config, ratio=0.65, refit=False).stages}
    pairs = {"prune, magnitude": "prune (magnitude, random)", "prune, taylor": "prune (taylor)", "merge": "merge"}
    for row, stage in pairs.items():
        peak = measured["rows"][row]["peak_rss"]
        assert peak <= stages[stage].memory <= 1.5 * peak, row
    recover = {stage.name: stage for stage in loram.estimate(LLAMA_70B, ratio=0.65).stages}["recover"]
    assert measured["rows"]["recover, 70B shape"]["peak_rss"] <= 1.5 * recover.memory


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_31_70B))
    return path


def test_the_ways_to_train_are_compared() -> None:
    whole, pruned, streamed = loram.estimate(LLAMA_70B, ratio=0.85, load_in_4bit=True).ways
    assert whole.memory > pruned.memory > streamed.memory
    assert whole.flops_per_token == streamed.flops_per_token > 4 * pruned.flops_per_token
    assert [way.exact for way in (whole, pruned, streamed)] == [True, False, True]
    alone = loram.estimate(LLAMA_70B, load_in_4bit=True)
    assert alone.ways == (whole, streamed)
    assert (alone.training.total, alone.arithmetic.flops_per_token) == (whole.memory, whole.flops_per_token)
    out_of_core = loram.estimate(LLAMA_70B, load_in_4bit=True, engine="streamed")
    assert out_of_core.ways[-1] == streamed
    assert (out_of_core.training.total, out_of_core.read_per_step) == (streamed.memory, streamed.read_per_step)
    anchored = loram.estimate(LLAMA_70B, ratio=0.85, load_in_4bit=True, anchor_steps=8)
    assert anchored.ways[1].flops_per_token == anchored.arithmetic.flops_per_token > pruned.flops_per_token


def test_the_advice_follows_the_memory() -> None:
    ways = loram.estimate(LLAMA_70B, ratio=0.85, load_in_4bit=True).ways
    assert "as it is" in advice(ways, 80 * GIB)
    for memory in (12 * GIB, None):
        sentence = advice(ways, memory)
        assert "pruned model where time counts: 4." in sentence
        assert "--engine streamed" in sentence
    assert "pruned" not in advice((ways[0], ways[2]), 12 * GIB)


def test_the_command_says_what_fits(config_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["estimate", str(config_file), "--memory", "12GiB", "--per-device-train-batch-size", "1"]
    assert cli._main(arguments) == 0
    printed = capfd.readouterr().out
    assert "ratio: 0.85\n" in printed
    assert "15.81x" in printed
    assert cli._main([*arguments, "--json"]) == 0
    printed = capfd.readouterr().out
    assert Fit.model_validate_json(printed).estimate.ratio == 0.85
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "12"], "12GiB"),
        (["--memory", "12GiB", "--ratio", "0.5"], "give one of the two"),
        (["--memory", "1GiB"], "nothing fits"),
        (["--ratio", "1.5"], "between 0 and 1"),
    ],
    ids=str,
)
def test_the_commands_mistakes(
    arguments: list[str], message: str, config_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli._main(["estimate", str(config_file), *arguments]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_the_command_needs_no_torch(config_file: Path) -> None:
    code = (
        "import sys; sys.argv[0] = 'loram'\nfrom loram.cli import _main\n"
        f"assert _main(['estimate', {str(config_file)!r}, '--memory', '24GiB']) == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "The least pruning that fits" in done.stdout
