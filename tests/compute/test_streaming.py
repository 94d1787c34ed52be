"""A streamed model has the whole model's log-probabilities, likeliest tokens and gradients, also with an adapter."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    EVERY_FAMILY,
    FAMILIES,
    LINEARS,
    VOCABULARY,
    make_model,
    own_names,
    random_adapter,
    relative,
    targets_of,
)
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

import loram
from loram.base.errors import UserError
from loram.compute import head
from loram.compute.head import Head, TopK
from loram.compute.streaming import ResidentLayer, Stream, prefetched
from loram.data.batches import IGNORED, make_batches
from loram.disk.adapter import Adapter
from loram.disk.checkpoint import Checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
# One row is longer than the sliding windows of 8, some have the same length, and one is too short to predict anything.
LENGTHS = (30, 12, 5, 1, 21, 12)
torch.manual_seed(0)
INPUT_IDS = [torch.randint(1, 320, (length,)).tolist() for length in LENGTHS]
# A prompt outside the loss, a gap in the loss, and a row with nothing in the loss.
LABELS = [
    [IGNORED if row == 2 or position < row or position == 9 else token for position, token in enumerate(ids)]
    for row, ids in enumerate(INPUT_IDS)
]
# (bytes for hidden states, tokens per batch): all in memory and in one batch; all in files; one row per batch
WAYS = [(1 << 28, 2048), (0, 60), (3000, 1)]


def stream_of(
    folder: Path, adapter: Path | None = None, hidden_bytes: int = 1 << 28, max_tokens: int = 60, **options: Any
) -> Stream:
    return Stream(
        Checkpoint(folder),
        make_batches(INPUT_IDS, LABELS, max_tokens=max_tokens),
        device=torch.device("cpu"),
        dtype=torch.float32,
        adapter=None if adapter is None else Adapter.load(adapter),
        hidden_bytes=hidden_bytes,
        **options,
    )


def forwarded(*args: Any, **options: Any) -> Stream:
    stream = stream_of(*args, **options)
    for _ in stream.forward():
        pass
    return stream


def by_row(stream: Stream, found: list[Tensor]) -> list[Tensor]:
    """Regroup one tensor per batch into one tensor per row, in the order of the rows."""
    rows: dict[int, Tensor] = {}
    for batch, values in zip(stream.batches, found, strict=True):
        rows.update(zip(batch.rows, values.split(batch.wanted.sum(1).tolist()), strict=True))
    return [rows[row] for row in range(len(rows))]


def wanted(row: int) -> tuple[list[int], list[int]]:
    """Return the positions of a row whose next token is in the loss, and those tokens."""
    places = [position for position, label in enumerate(LABELS[row][1:]) if label != IGNORED]
    return places, [LABELS[row][place + 1] for place in places]


def whole_log_softmax(model: Any) -> list[Tensor]:
    """Compute (wanted, vocabulary) of each row by the model in memory, each row alone and without padding."""
    rows = [model(torch.tensor([ids])).logits[0].float().log_softmax(-1) for ids in INPUT_IDS]
    return [log_probs[wanted(row)[0]] for row, log_probs in enumerate(rows)]


def whole_log_probs(model: Any) -> list[Tensor]:
    with torch.inference_mode():
        found = whole_log_softmax(model.eval())
    return [values.gather(1, torch.tensor(wanted(row)[1]).view(-1, 1))[:, 0] for row, values in enumerate(found)]


def assert_same_log_probs(stream: Stream, expected: list[Tensor]) -> None:
    found = by_row(stream, stream.log_probs())
    assert [len(row) for row in found] == [len(row) for row in expected]
    assert torch.cat(found).sum().item() == pytest.approx(torch.cat(expected).sum().item(), rel=1e-5)
    assert relative(torch.cat(found), torch.cat(expected)) <= 1e-5
    assert stream.predicted == sum(map(len, expected))


@pytest.mark.parametrize(("hidden_bytes", "max_tokens"), WAYS)
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_log_probs_are_those_of_the_whole_model(
    family: str, hidden_bytes: int, max_tokens: int, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    folder = tiny_models[family]
    stream = forwarded(folder, hidden_bytes=hidden_bytes, max_tokens=max_tokens, scratch=tmp_path)
    assert_same_log_probs(stream, whole_log_probs(AutoModelForCausalLM.from_pretrained(folder)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text"])
def test_the_text_is_long_enough_for_a_window_to_matter(family: str, tiny_models: dict[str, Path]) -> None:
    """Otherwise the test above would not notice a stream without windows."""
    windowed = AutoModelForCausalLM.from_pretrained(tiny_models[family])
    unbounded = AutoModelForCausalLM.from_pretrained(tiny_models[family], sliding_window=1000)
    assert relative(torch.cat(whole_log_probs(unbounded)), torch.cat(whole_log_probs(windowed))) > 1e-2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": [*LINEARS, "lm_head"], "use_rslora": True, "alpha_pattern": {"up_proj": 1}},
        {"target_modules": ["v_proj", "down_proj"], "layers_to_transform": [0, 3]},
    ],
    ids=["linears", "lm_head-rslora", "some"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_does_what_it_does_in_peft(
    family: str, options: dict[str, Any], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    folder, options = tiny_models[family], own_names(family, options)
    adapter = random_adapter(AutoModelForCausalLM.from_pretrained(folder), tmp_path, **options)
    expected = whole_log_probs(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter))
    assert_same_log_probs(forwarded(folder, adapter), expected)
    plain = whole_log_probs(AutoModelForCausalLM.from_pretrained(folder))
    assert relative(torch.cat(plain), torch.cat(expected)) > 1e-2


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_a_pruned_model_and_its_adapter_stream_likewise(
    family: str, pruned_models: dict[str, Path], tmp_path: Path
) -> None:
    folder = pruned_models[family]
    assert_same_log_probs(forwarded(folder), whole_log_probs(loram.load_pruned(folder)))
    adapter = random_adapter(loram.load_pruned(folder), tmp_path, target_modules=targets_of(family, "lm_head"))
    expected = whole_log_probs(PeftModel.from_pretrained(loram.load_pruned(folder), adapter))
    assert_same_log_probs(forwarded(folder, adapter), expected)


def whole_gradients(model: Any) -> dict[str, Tensor]:
    """Compute the gradients of the mean loss over all wanted tokens by autograd through the whole model."""
    losses = [
        -values.gather(1, torch.tensor(wanted(row)[1]).view(-1, 1))
        for row, values in enumerate(whole_log_softmax(model))
    ]
    torch.cat(losses).mean().backward()
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if ".layers." in name and parameter.ndim == 2 and parameter.grad is not None  # linears
    }


def streamed_gradients(stream: Stream, down_to: int) -> dict[str, Tensor]:
    gradients: dict[str, Tensor] = {}

    def on_gradient(name: str, weight: Tensor, gradient: Tensor) -> None:
        assert name not in gradients
        assert weight.shape == gradient.shape
        gradients[name] = gradient.clone()

    for _ in stream.forward(keep_from=down_to):
        assert not gradients
    for layer in stream.backward(down_to, on_gradient):
        linears = stream.checkpoint.rows_by_layer[layer.index].linears
        assert {f"model.layers.{layer.index}.{linear.path}.weight" for linear in linears} <= gradients.keys()
    return gradients


@pytest.mark.parametrize(("hidden_bytes", "max_tokens"), WAYS)
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_gradients_are_those_of_the_whole_model(
    family: str, hidden_bytes: int, max_tokens: int, tiny_models: dict[str, Path]
) -> None:
    stream = stream_of(tiny_models[family], hidden_bytes=hidden_bytes, max_tokens=max_tokens)
    streamed = streamed_gradients(stream, 0)
    expected = whole_gradients(AutoModelForCausalLM.from_pretrained(tiny_models[family]))
    assert streamed.keys() == expected.keys()
    assert len(streamed) == sum(len(row.linears) for row in stream.checkpoint.rows_by_layer)
    for name, gradient in streamed.items():
        # both are up to 5e-5 from what float64 gives in Gemma 4; a wrong gradient is off by far more
        assert relative(gradient, expected[name]) <= 3e-4, name


def test_keys_get_the_gradients_of_all_layers_that_read_them(tokenizer: Any, tmp_path: Path) -> None:
    kinds = [f"{kind}_attention" for kind in ("sliding", "full", "full", "full", "full")]
    folder = make_model(tmp_path, "gemma4_text", tokenizer, layer_types=kinds, num_kv_shared_layers=2)
    stream = stream_of(folder, hidden_bytes=1 << 20)
    streamed, expected = streamed_gradients(stream, 0), whole_gradients(AutoModelForCausalLM.from_pretrained(folder))
    for name, gradient in streamed.items():
        assert relative(gradient, expected[name]) <= 1e-4, name  # counting one reader twice would make it 0.5
    assert stream._scratch.free_bytes == 1 << 20


@pytest.mark.parametrize("down_to", [1, 4])
def test_only_layers_from_down_to_are_visited(down_to: int, tiny_llama: Path) -> None:
    stream = stream_of(tiny_llama)
    visited: list[int] = []
    names: set[str] = set()
    assert [layer.index for layer in stream.forward(keep_from=down_to)] == [0, 1, 2, 3, 4]
    for layer in stream.backward(down_to, lambda name, weight, gradient: names.add(name)):
        visited.append(layer.index)
    assert visited == list(range(4, down_to - 1, -1))
    assert {int(name.split(".")[2]) for name in names} == set(visited)
    expected = whole_gradients(AutoModelForCausalLM.from_pretrained(tiny_llama))
    found = streamed_gradients(stream_of(tiny_llama), down_to)
    assert all(relative(gradient, expected[name]) <= 1e-5 for name, gradient in found.items())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_gradients_through_an_adapter_are_those_of_the_merged_model(
    family: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    base = tiny_models[family]
    options = {"target_modules": targets_of(family, "lm_head")}
    adapter = random_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", **options)
    loram.merge(base, adapter, tmp_path / "merged")
    expected = whole_gradients(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    found = streamed_gradients(stream_of(base, adapter), 0)
    assert all(relative(gradient, expected[name]) <= 1e-4 for name, gradient in found.items())


def test_activations_go_back_to_the_budget(tiny_llama: Path) -> None:
    stream = stream_of(tiny_llama, hidden_bytes=1 << 20)
    streamed_gradients(stream, 1)
    # only the outputs of the final norm are left; they are closed before the gradients
    assert stream._scratch.free_bytes == 1 << 20


def assert_same_top_k(stream: Stream, found: list[TopK], whole: list[Tensor], k: int) -> None:
    ids, log_probs, log_rest = (
        torch.cat(by_row(stream, [getattr(part, name) for part in found])) for name in ("ids", "log_probs", "log_rest")
    )
    expected = torch.cat(whole)
    values, order = expected.topk(k)
    assert torch.equal(ids[:, :7], order[:, :7])
    assert ids.shape == order.shape
    assert all(len(set(row)) == k for row in ids.tolist())
    assert relative(expected.gather(1, ids), values) <= 1e-5  # tokens of almost equal likelihood may swap
    assert relative(log_probs, values) <= 1e-5
    rest = 1 - values.double().exp().sum(1)
    assert torch.allclose(log_rest.double().exp(), rest, atol=1e-6, rtol=1e-4)
    assert (log_probs.dtype, log_rest.dtype, ids.dtype) == (torch.float32, torch.float32, torch.int64)


@pytest.mark.parametrize("k", [1, 7, 319])
@pytest.mark.parametrize("family", FAMILIES)
def test_top_k_is_that_of_the_whole_model(family: str, k: int, tiny_models: dict[str, Path]) -> None:
    stream = forwarded(tiny_models[family])
    with torch.inference_mode():
        whole = whole_log_softmax(AutoModelForCausalLM.from_pretrained(tiny_models[family]).eval())
    assert_same_top_k(stream, stream.top_k(k), whole, k)


def test_top_k_of_the_whole_vocabulary_leaves_a_small_finite_rest(tiny_llama: Path) -> None:
    for found in forwarded(tiny_llama).top_k(1000):
        assert torch.equal(found.ids.sort(1).values, torch.arange(320).expand(len(found.ids), 320))
        assert ((found.log_rest > -17) & (found.log_rest < -12)).all()


@pytest.mark.parametrize("slice_bytes", [1, 4 * 60 * 50])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_slices_of_the_vocabulary_change_nothing(
    family: str, slice_bytes: int, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_models[family]
    options = {"target_modules": ["q_proj", "lm_head"]}
    adapter = random_adapter(AutoModelForCausalLM.from_pretrained(folder), tmp_path, **options)
    whole = forwarded(folder, adapter)
    expected = whole.log_probs(), whole.top_k(5), streamed_gradients(stream_of(folder, adapter), 3)
    slices = []
    visit = Head._visit_logits
    monkeypatch.setattr(head, "_SLICE_BYTES", slice_bytes)
    monkeypatch.setattr(
        Head,
        "_visit_logits",
        lambda self, inner: visit(
            self, lambda number, start, *rest: (slices.append(start), inner(number, start, *rest))
        ),
    )
    sliced = forwarded(folder, adapter)
    found = sliced.log_probs(), sliced.top_k(5), streamed_gradients(stream_of(folder, adapter), 3)
    assert len(set(slices)) >= 4
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(found[0], expected[0], strict=True))
    for mine, theirs in zip(found[1], expected[1], strict=True):
        assert torch.equal(mine.ids, theirs.ids)
        assert torch.allclose(mine.log_probs, theirs.log_probs, rtol=1e-5)
        assert torch.allclose(mine.log_rest, theirs.log_rest, rtol=1e-5)
    assert all(relative(found[2][name], gradient) <= 1e-5 for name, gradient in expected[2].items())


def test_capped_logits_are_capped_forward_and_backward(tokenizer: Any, tmp_path: Path) -> None:
    """This low cap changes every logit; the families' own caps hardly change those of tiny models."""
    capped = make_model(tmp_path / "capped", "gemma2", tokenizer, final_logit_softcapping=0.7)
    free = make_model(tmp_path / "free", "gemma2", tokenizer, final_logit_softcapping=None)
    model = AutoModelForCausalLM.from_pretrained(capped)
    log_probs, top, gradients = whole_log_probs(model), whole_log_softmax(model), whole_gradients(model)
    stream = forwarded(capped)
    assert_same_log_probs(stream, log_probs)
    assert_same_top_k(stream, stream.top_k(4), top, 4)
    for name, gradient in streamed_gradients(stream_of(capped), 0).items():
        assert relative(gradient, gradients[name]) <= 1e-5, name
    uncapped = AutoModelForCausalLM.from_pretrained(free)
    assert relative(torch.cat(whole_log_probs(uncapped)), torch.cat(log_probs)) > 0.1
    assert_same_log_probs(forwarded(free), whole_log_probs(uncapped))


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted_without_loading(
    family: str, tiny_models: dict[str, Path], pruned_models: dict[str, Path]
) -> None:
    for folder in (tiny_models[family], pruned_models[family]):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert Checkpoint(folder).parameters == sum(parameter.numel() for parameter in model.parameters())


def real_layers(stream: Stream) -> list[int]:
    """Return the decoder layers that have a parameter in memory."""
    layers = stream.model.model.layers
    return [index for index, layer in enumerate(layers) if any(not p.is_meta for p in layer.parameters())]


def test_one_decoder_layer_is_in_memory_at_a_time_and_nothing_outside_them(tiny_llama: Path) -> None:
    stream = stream_of(tiny_llama)
    seen: list[list[int]] = []
    for layer in stream.forward(lambda *_: seen.append(real_layers(stream)), keep_from=1):
        assert real_layers(stream) == [layer.index]
        assert stream.model.model.embed_tokens.weight.is_meta
    assert sorted({tuple(layers) for layers in seen}) == [(0,), (1,), (2,), (3,), (4,)]
    assert real_layers(stream) == []
    for layer in stream.backward(1, lambda *_: seen.append(real_layers(stream))):
        assert real_layers(stream) == [layer.index]
        assert all(parameter.grad is None for parameter in stream.model.parameters())
    assert all(len(layers) == 1 for layers in seen)
    assert real_layers(stream) == []
    assert all(parameter.is_meta for parameter in stream.model.lm_head.parameters())


def test_resident_tensors_are_the_weights_of_the_file_by_name(tiny_models: dict[str, Path]) -> None:
    checkpoint = Checkpoint(tiny_models["qwen3"])
    names: set[str] = set()
    for layer in stream_of(tiny_models["qwen3"]).forward():
        assert all(torch.equal(tensor, checkpoint.tensor(name)) for name, tensor in layer.tensors.items())
        names |= layer.tensors.keys()
    assert names == {name for name in checkpoint.names() if ".layers." in name}


def test_observers_see_each_linear_s_inputs_and_outputs(tiny_llama: Path, tmp_path: Path) -> None:
    """Outputs without the adapter's update would be misleading."""
    adapter = random_adapter(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path)
    stream = stream_of(tiny_llama, adapter, max_tokens=60)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), adapter).eval()
    expected: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            name = name.removeprefix("base_model.model.") + ".weight"
            module.register_forward_hook(lambda _, args, output, name=name: expected.update({name: (args[0], output)}))
    found: dict[str, list[tuple[Tensor, ...]]] = {}
    for _ in stream.forward(lambda name, *rest: found.setdefault(name, []).append(rest)):
        pass
    for number, batch in enumerate(stream.batches):
        with torch.inference_mode():
            model(batch.ids, attention_mask=batch.real)
        assert len(expected) == 35
        for name, (inputs, outputs) in expected.items():
            mine = found[name][number]
            assert torch.equal(mine[2], batch.real)
            assert relative(mine[0][batch.real], inputs[batch.real]) <= 1e-5
            assert relative(mine[1][batch.real], outputs[batch.real]) <= 1e-5


def test_a_layer_whose_weights_do_not_fit_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    for path in tiny_llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 40', '"intermediate_size": 41'))
    with pytest.raises(
        UserError, match=r"mlp\.gate_proj\.weight has shape \(40, 32\), but config\.json says \(41, 32\)"
    ):
        forwarded(tmp_path)


def test_prefetched_keeps_the_order() -> None:
    assert list(prefetched(range(5), lambda item: item * item)) == [0, 1, 4, 9, 16]
    assert list(prefetched([], lambda item: item)) == []


def test_prefetched_loads_the_next_one_meanwhile_and_no_more() -> None:
    taken: list[int] = []
    loaded = [threading.Event() for _ in range(5)]

    def items() -> Iterator[int]:
        for item in range(5):
            taken.append(item)
            yield item

    def load(item: int) -> int:
        loaded[item].set()
        return item

    for item in prefetched(items(), load):
        assert taken == list(range(min(item + 2, 5)))
        assert loaded[taken[-1]].wait(timeout=60)  # although we have not requested it


def test_prefetched_hands_on_what_went_wrong_when_it_is_reached() -> None:
    def load(item: int) -> int:
        if item == 2:
            raise UserError("the second shard is gone")
        return item

    found: list[int] = []

    def collect() -> None:
        for item in prefetched(range(5), load):
            found.append(item)

    with pytest.raises(UserError, match="the second shard is gone"):
        collect()
    assert found == [0, 1]


def test_leaving_a_pass_early_waits_for_no_further_layer(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, read = stream_of(tiny_llama), []
    whole_read = Stream._read_ahead
    monkeypatch.setattr(Stream, "_read_ahead", lambda self, index: (read.append(index), whole_read(self, index))[1])
    layers = stream.forward()
    assert isinstance(next(layers), ResidentLayer)
    layers.close()  # type: ignore[attr-defined]
    assert set(read) <= {0, 1}


def test_a_token_beyond_the_embedding_is_refused(tiny_llama: Path) -> None:
    batches = make_batches([[3, 4, VOCABULARY]], max_tokens=10)
    stream = Stream(Checkpoint(tiny_llama), batches, device=torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(UserError, match=f"token id {VOCABULARY}, but its embedding has only {VOCABULARY} rows"):
        next(stream.forward())
