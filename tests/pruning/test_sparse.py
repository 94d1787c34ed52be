"""Sparse pruning: exactly as sparse as asked, SparseGPT as its paper has it, and folders that hold only what stays."""

import json
import shutil
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, HYBRIDS, elsewhere, relative
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import loram
from loram.base.hashes import file_sha256
from loram.disk.checkpoint import Checkpoint
from loram.model.dense import LLAMA
from loram.model.modeling_loram import SparseLinear, dense, pack, unpack
from loram.model.plan import MASKS_NAME
from loram.model.sparsity import kept_values
from loram.pruning.criteria import CRITERIA, NEEDS_TEXT, SPARSE
from loram.pruning.options import SPARSE_CRITERIA, STRUCTURED_CRITERIA, PruneOptions
from loram.pruning.sparse import sparse_layers
from loram.pruning.sparsify import best, sparsegpt

TOKENS = torch.arange(3, 15)[None]
PATTERNS = [("4:8", None), ("2:4", None), ("1:8", None), ("unstructured", 0.5), ("unstructured", 0.37)]


@pytest.fixture(scope="module")
def sparse_models(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> folder of its tiny model at 4:8 by SparseGPT."""
    root = tmp_path_factory.mktemp("sparse")
    for family in (*FAMILIES, *HYBRIDS):
        loram.prune(tiny_models[family], root / family, pattern="4:8")
    return {family: root / family for family in (*FAMILIES, *HYBRIDS)}


def masks_of(folder: Path) -> dict[str, Tensor]:
    return {name: unpack(mask) for name, mask in load_file(folder / MASKS_NAME).items()}


def dense_model(folder: Path, base: Path) -> Any:
    """The base's plain class with the weights that a sparse folder stands for."""
    model, checkpoint = AutoModelForCausalLM.from_pretrained(base), Checkpoint(folder)
    model.load_state_dict({name: checkpoint.tensor(name) for name in checkpoint.names()}, strict=False)
    return model.eval()


@pytest.mark.parametrize("criterion", SPARSE_CRITERIA)
@pytest.mark.parametrize(("pattern", "ratio"), PATTERNS)
def test_exactly_as_sparse_as_asked(
    pattern: str, ratio: float | None, criterion: str, tiny_llama: Path, tmp_path: Path
) -> None:
    plan = loram.prune(tiny_llama, tmp_path / "out", pattern=pattern, ratio=ratio, criterion=criterion)
    masks, full = masks_of(tmp_path / "out"), load_file(tiny_llama / "model.safetensors")
    assert len(masks) == 5 * 7
    for name, kept in masks.items():
        rows, columns = kept.shape
        assert (rows, columns) == tuple(full[name.replace(".mask", ".weight")].shape)
        if ratio is None:
            n, m = map(int, pattern.split(":"))
            assert (kept.view(rows, -1, m).sum(-1) == n).all()
            continue
        assert kept.sum() == ceil(rows * columns * (1 - Fraction(str(ratio))))
        if criterion == "wanda":
            each = kept.sum(1)
            assert each.max() - each.min() <= 1
            assert (each.diff() <= 0).all()
    removed = sum((~kept).sum().item() for kept in masks.values())
    assert plan.parameters() == (plan.parameters()[0], plan.parameters()[0] - removed)
    model = loram.load_pruned(tmp_path / "out")
    assert sum(parameter.numel() for parameter in model.parameters()) == plan.parameters()[1]
    assert Checkpoint(tmp_path / "out").parameters == plan.parameters()[1]


@pytest.mark.parametrize("criterion", ["wanda", "magnitude", "random"])
def test_what_stays_is_untouched_but_for_sparsegpt(criterion: str, tiny_llama: Path, tmp_path: Path) -> None:
    loram.prune(tiny_llama, tmp_path / "out", pattern="2:4", criterion=criterion)
    found, full = Checkpoint(tmp_path / "out"), load_file(tiny_llama / "model.safetensors")
    masks = masks_of(tmp_path / "out")
    for name in found.names():
        kept = masks.get(name.replace(".weight", ".mask"), torch.tensor(1))
        assert torch.equal(found.tensor(name), full[name] * kept)


def test_magnitude_by_hand(tiny_llama: Path, tmp_path: Path) -> None:
    loram.prune(tiny_llama, tmp_path / "out", pattern="unstructured", ratio=0.25, criterion="magnitude", keep_last=4)
    masks, full = masks_of(tmp_path / "out"), load_file(tiny_llama / "model.safetensors")
    assert {name.split(".")[2] for name in masks} == {"0"}
    for name, kept in masks.items():
        weight = full[name.replace(".mask", ".weight")].abs()
        assert weight[kept].min() >= weight[~kept].max()


def test_of_equals_the_first_stays() -> None:
    assert best(torch.tensor([1.0, 2, 2, 2, 0]), 2).tolist() == [False, True, True, False, False]
    assert best(torch.zeros(4), 3).tolist() == [True, True, True, False]


def reference(weight: Tensor, hessian: Tensor, keep: int, group: int) -> Tensor:
    """Optimal brain surgery, a column at a time, each time inverting what is left of the Hessian."""
    weight, columns = weight.clone(), weight.shape[1]
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns, dtype=hessian.dtype)
    for column in range(columns):
        if column % group == 0:
            kept = torch.ones(len(weight), group, dtype=torch.bool)
            scores = torch.stack(
                [weight[:, c] ** 2 / torch.linalg.inv(damped[c:, c:])[0, 0] for c in range(column, column + group)], 1
            )
            kept.scatter_(1, scores.argsort(1)[:, : group - keep], False)
        inverse = torch.linalg.inv(damped[column:, column:])
        error = weight[:, column] * ~kept[:, column - column // group * group]
        weight[:, column:] -= error[:, None] / inverse[0, 0] * inverse[0]
    return weight


@pytest.mark.parametrize(("pattern", "columns"), [("4:8", 264), ("2:4", 136), ("1:8", 16)])
def test_sparsegpt_is_optimal_brain_surgery_by_columns(pattern: str, columns: int) -> None:
    """264 columns: two blocks and a part of one."""
    torch.manual_seed(0)
    weight, inputs = torch.randn(12, columns).double(), torch.randn(2 * columns, columns).double()
    inputs = inputs @ (torch.eye(columns) + 0.3 * torch.randn(columns, columns)).double()  # some go together
    keep, group = map(int, pattern.split(":"))
    found, kept = sparsegpt(weight, inputs.T @ inputs, pattern=pattern, ratio=0.5)
    expected = reference(weight, inputs.T @ inputs, keep, group)
    assert relative(found, expected) < 1e-9
    assert torch.equal(found != 0, kept)


def test_sparsegpt_without_structure_compares_in_blocks_of_128() -> None:
    torch.manual_seed(0)
    weight, inputs = torch.randn(10, 200).double(), torch.randn(300, 200).double()
    hessian = inputs.T @ inputs
    found, kept = sparsegpt(weight, hessian, pattern="unstructured", ratio=0.3)
    assert [kept[:, :128].sum().item(), kept.sum().item()] == [ceil(0.7 * 1280), 1400]
    factor = torch.linalg.cholesky(
        torch.linalg.inv(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(200)), upper=True
    )
    scores = weight[:, :128] ** 2 / factor.diagonal()[:128] ** 2
    assert scores[kept[:, :128]].min() >= scores[~kept[:, :128]].max()
    plain = torch.where(kept, weight, 0)
    assert ((weight - found) @ inputs.T).norm() < ((weight - plain) @ inputs.T).norm()


def test_an_input_that_never_is_there_is_no_trouble() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(40, 16)
    inputs[:, 3] = 0
    found, kept = sparsegpt(torch.randn(4, 16), inputs.T @ inputs, pattern="4:8", ratio=0.5)
    assert torch.isfinite(found).all()
    assert not kept[:, 3].any()


def test_a_layer_sees_what_the_pruned_ones_below_give_out(tiny_llama: Path, tmp_path: Path) -> None:
    """Pruning the upper layers of a model whose lower ones are pruned already is the same as pruning all at once."""
    samples = [list(range(3, 40)), list(range(100, 130))]
    options: dict[str, Any] = {"pattern": "4:8", "criterion": "sparsegpt"}
    at_once = list(
        _weights(sparse_layers(Checkpoint(tiny_llama), PruneOptions.of(**options).resolved(), samples=samples))
    )
    lower = dense_weights(tiny_llama, at_once[:2], tmp_path / "lower")
    upper = PruneOptions.of(**options, keep_first=2).resolved()
    again = list(_weights(sparse_layers(Checkpoint(lower), upper, samples=samples)))
    for layer in range(2, 5):
        assert all(torch.equal(again[layer][name], tensor) for name, tensor in at_once[layer].items())


def _weights(layers: Any) -> Any:
    for layer in layers:
        yield {name: tensor.clone() for name, tensor in layer.tensors.items()}


def dense_weights(base: Path, layers: list[dict[str, Tensor]], out: Path) -> Path:
    """A copy of a model with some layers' weights replaced."""
    shutil.copytree(base, out)
    weights = load_file(out / "model.safetensors")
    for layer in layers:
        weights.update(layer)
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize("family", [*FAMILIES, *HYBRIDS])
def test_a_folder_equals_the_dense_model_it_stands_for(
    family: str, sparse_models: dict[str, Path], tiny_models: dict[str, Path], rows_file: Path
) -> None:
    folder = sparse_models[family]
    model = loram.load_pruned(folder).eval()
    full = dense_model(folder, tiny_models[family])
    with torch.no_grad():
        assert relative(model(TOKENS).logits, full(TOKENS).logits) < 1e-6
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(TOKENS, **options), full.generate(TOKENS, **options))
    found = [loram.evaluate(folder, data=rows_file, stream=stream) for stream in (False, True)]
    assert found[0].loss == pytest.approx(found[1].loss, rel=1e-6)
    assert found[0].parameters == found[1].parameters == loram.PruningPlan.load(folder).parameters()[1]


def test_the_folder_holds_only_what_stays(sparse_models: dict[str, Path], tiny_models: dict[str, Path]) -> None:
    folder = sparse_models["llama"]
    plan, checkpoint = loram.PruningPlan.load(folder), Checkpoint(folder)
    assert plan.pattern == "4:8"
    assert plan.sparse
    stored = checkpoint.stored
    for layer in range(5):
        for linear, count in plan.kept_values().items():
            rows, columns = checkpoint.shape(f"model.layers.{layer}.{linear}.weight")
            assert stored.shape(f"model.layers.{layer}.{linear}.weight") == (count,) == (rows * columns // 2,)
            assert stored.spec(f"model.layers.{layer}.{linear}.mask").nbytes == rows * columns // 8
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert {file for name, file in index.items() if name.endswith(".mask")} == {MASKS_NAME}
    assert checkpoint.names() == Checkpoint(tiny_models["llama"]).names()


def test_rows_of_a_sparse_tensor_are_read_alone(sparse_models: dict[str, Path]) -> None:
    checkpoint, name = Checkpoint(sparse_models["llama"]), "model.layers.2.mlp.down_proj.weight"
    whole = checkpoint.tensor(name)
    assert whole.shape == checkpoint.shape(name) == (32, 40)
    assert torch.equal(checkpoint.tensor(name, 5, 9), whole[5:9])
    assert torch.equal(torch.cat([block for _, block in checkpoint.blocks(name)]), whole)


def test_sparse_folders_in_16_bits_stay_so(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    loram.prune(tmp_path / "base", tmp_path / "out", pattern="4:8", shard_bytes=10_000)
    checkpoint = Checkpoint(tmp_path / "out")
    assert {checkpoint.spec(name).dtype for name in checkpoint.names()} == {torch.bfloat16}
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    assert loram.load_pruned(tmp_path / "out").dtype == torch.bfloat16


def test_the_same_bytes_again(tiny_llama: Path, sparse_models: dict[str, Path], tmp_path: Path) -> None:
    loram.prune(tiny_llama, tmp_path / "again", pattern="4:8", ratio=0.5, criterion="sparsegpt")
    for path in sparse_models["llama"].iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_masks_are_those_that_the_plan_names(sparse_models: dict[str, Path]) -> None:
    folder = sparse_models["llama"]
    assert loram.PruningPlan.load(folder).masks == file_sha256(folder / MASKS_NAME)


REMOTE = """
import json, sys, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
result = {}
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.inference_mode():
        result[folder] = model(torch.arange(3, 15)[None]).logits.double().sum().item()
adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
adapted(torch.arange(3, 15)[None], labels=torch.arange(3, 15)[None]).loss.backward()
assert all(p.grad is not None for n, p in adapted.named_parameters() if "lora_" in n)
assert not any(name.split(".")[0] == "loram" for name in sys.modules)
print(json.dumps(result))
"""


def test_plain_transformers_and_peft_take_the_folder(sparse_models: dict[str, Path], tmp_path: Path) -> None:
    folders = [sparse_models[family] for family in ("llama", "gemma2")]
    done = elsewhere(REMOTE, *map(str, folders), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for folder, found in json.loads(done.stdout).items():
        with torch.inference_mode():
            ours = loram.load_pruned(folder).eval()(TOKENS).logits.double().sum().item()
        assert found == pytest.approx(ours, rel=1e-5)


def test_packing_is_undone_by_unpacking() -> None:
    torch.manual_seed(0)
    kept = torch.rand(5, 24) < 0.4
    assert torch.equal(unpack(pack(kept)), kept)
    assert pack(kept).shape == (5, 3)
    assert pack(torch.tensor([[True] + 7 * [False]])).item() == 1
    weight = torch.randn(5, 24) * kept
    assert torch.equal(dense(weight[kept], pack(kept)), weight)


def sparse_linear(bias: bool = True) -> tuple[SparseLinear, torch.nn.Linear]:
    """A sparse linear and the dense one that it stands for."""
    torch.manual_seed(0)
    full, kept = torch.nn.Linear(16, 12, bias), torch.rand(12, 16) < 0.5
    full.weight.data *= kept
    sparse = SparseLinear(full, int(kept.sum()))
    sparse.weight.data, sparse.mask = full.weight.data[kept], pack(kept)
    return sparse, full


@pytest.mark.parametrize("bias", [True, False])
def test_a_sparse_linear_is_the_dense_one_forward_and_backward(bias: bool) -> None:
    sparse, full = sparse_linear(bias)
    inputs = [torch.randn(3, 5, 16, requires_grad=True)]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    outputs = [module(x) for module, x in zip((sparse, full), inputs, strict=True)]
    for output in outputs:
        output.square().sum().backward()
    assert torch.equal(*outputs)
    assert relative(inputs[0].grad, inputs[1].grad) < 1e-6
    assert relative(sparse.weight.grad, full.weight.grad[unpack(sparse.mask)]) < 1e-6
    torch.autograd.gradcheck(sparse.double(), torch.randn(2, 16, dtype=torch.float64, requires_grad=True))


def test_a_sparse_linear_under_autocast() -> None:
    """As on a GPU in training: weights and inputs in 32 bits, the product in 16."""
    sparse, full = sparse_linear()
    x = torch.randn(3, 5, 16)
    gradients = []
    for module in (sparse, full):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = module(leaf)
        output.sum().backward()
        gradients.append((output, leaf.grad, module.weight.grad))
    (output, by_x, by_values), (expected, expected_by_x, by_weight) = gradients
    assert relative(output.float(), expected.float()) < 1e-2
    assert relative(by_x, expected_by_x) < 1e-2
    assert relative(by_values, by_weight[unpack(sparse.mask)]) < 1e-2


def shapes_saved_by(linear: torch.nn.Module) -> list[tuple[int, ...]]:
    saved: list[tuple[int, ...]] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        linear(torch.randn(3, 16, requires_grad=True))
    return saved


def test_nothing_dense_is_kept_for_backward() -> None:
    sparse, _ = sparse_linear()
    assert shapes_saved_by(sparse) == [(3, 16)]  # where values are trained, the inputs
    assert shapes_saved_by(sparse.requires_grad_(False)) == []


def test_stages_that_cannot_take_a_sparse_folder_say_so(
    sparse_models: dict[str, Path], tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(loram.UserError, match="knows no sparse weights"):
        loram.quantize(sparse_models["llama"], tmp_path / "out")
    with pytest.raises(loram.UserError, match="already pruned"):
        loram.prune(sparse_models["llama"], tmp_path / "out", pattern="4:8")


def test_settings_that_do_not_go_together_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    wrong: dict[str, dict[str, Any]] = {
        "pattern '5:4'": {"pattern": "5:4"},
        "pattern 'half'": {"pattern": "half"},
        r"pattern 4:8 keeps 4 of every 8 weights, which is a ratio of 0\.5": {"pattern": "4:8", "ratio": 0.6},
        "ratio None": {"pattern": "unstructured"},
        "ratio 1.0: must lie": {"pattern": "unstructured", "ratio": 1.0},
        "ratio: missing": {},
        "'taylor' is not for pattern 4:8; known are sparsegpt": {"pattern": "4:8", "criterion": "taylor"},
        "'sparsegpt' is not for pattern structured; known are taylor": {"ratio": 0.5, "criterion": "sparsegpt"},
        "'best' is not known": {"pattern": "4:8", "criterion": "best"},
        "removes no inputs": {"pattern": "4:8", "bias_compensation": True},
        "32 inputs, which is no multiple of 7": {"pattern": "3:7"},
        "leave no layer": {"pattern": "4:8", "keep_first": 5},
    }
    for message, options in wrong.items():
        with pytest.raises(loram.UserError, match=message):
            loram.prune(tiny_llama, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_tables_of_criteria_are_those_that_there_are() -> None:
    assert set(STRUCTURED_CRITERIA) == CRITERIA.keys()
    reading = {name for name, row in SPARSE.items() if row.reads != "nothing"}
    assert set(SPARSE_CRITERIA) == SPARSE.keys()
    for names, reads in ((STRUCTURED_CRITERIA, NEEDS_TEXT), (SPARSE_CRITERIA, reading)):
        sparse = names is SPARSE_CRITERIA
        for name in names:
            chosen = PruneOptions.of(pattern="4:8" if sparse else "structured", ratio=0.5, criterion=name).resolved()
            assert chosen.reads_text(LLAMA) == (name in reads)


def test_kept_values_are_counted_with_the_decimal_ratio() -> None:
    assert kept_values(10, 8, "unstructured", 0.7) == 24  # 80 * (1 - 0.7) is above 24 in binary
    assert kept_values(3, 24, "1:3", 2 / 3) == 24


def test_plans_that_contradict_themselves_are_refused(sparse_models: dict[str, Path]) -> None:
    plan = loram.PruningPlan.load(sparse_models["llama"])
    for changes in ({"masks": None}, {"pattern": "structured"}, {"layers": {1: {"channels": (0,)}}}):
        with pytest.raises(ValueError, match="sparse plans have masks"):
            loram.PruningPlan(**{**plan.model_dump(), **changes})


def test_structured_plans_are_written_as_before_there_were_patterns(pruned_models: dict[str, Path]) -> None:
    text = (pruned_models["llama"] / "loram_plan.json").read_text()
    assert not {"pattern", "masks"} & json.loads(text).keys()
    assert loram.PruningPlan.load(pruned_models["llama"]).to_json() == text
